"""One stored matrix as the kernels for a few tokens see it: which instructions walk it, where x lies, where its sums are."""

from __future__ import annotations

from dataclasses import dataclass

from sparsecc.codegen.tvm.entries import value_bytes
from sparsecc.codegen.tvm.host import Isa
from sparsecc.codegen.tvm.writer import Writer, splat, vec
from sparsecc.formats import Bitmap, Compressed, Dense, Format, Panels
from sparsecc.formats.level import NM


@dataclass(frozen=True)
class Term:
    """One stored matrix, and how it is read: see `spmv_source`."""

    w: Writer
    fmt: Format
    t: int
    tokens: int
    streams: int
    gather: bool
    isa: Isa
    wide: bool

    @property
    def along_rows(self) -> int:
        """Lanes along a block's rows."""
        return _whole(self.fmt.block[0], self.isa.lanes)

    @property
    def along_cols(self) -> int:
        """Lanes along a row's columns, where a block has one row."""
        br, bc = self.fmt.block
        return _whole(bc, self.isa.lanes) if br == 1 else 1

    @property
    def parts(self) -> int:
        """Vectors that a block's rows take."""
        return self.fmt.block[0] // self.along_rows

    def x(self, token: int, col: str, lanes: int = 1) -> str:
        """A column of a token, or several, `col` counted in the panel."""
        panel = f"p{self.t} * C{self.t} * {self.fmt.block[1]} + " if isinstance(self.fmt.swizzle, Panels) else ""
        return vec("work", f"{term_x(self.fmt, self.isa)}_at + {f'{token} * reach + ' if token else ''}{panel}{col}", lanes)


def _whole(size: int, lanes: int) -> int:
    return max(v for v in (lanes, lanes // 2, lanes // 4, 4, 2, 1) if v and size % v == 0)


def expands(fmt: Format, isa: Isa) -> int:
    """Columns that one instruction expands a bitmap's values over; 0 where there is none."""
    cut = isinstance(fmt.swizzle, Panels) and fmt.swizzle.width % 32 > 0
    if not isinstance(fmt.level, Bitmap) or fmt.block != (1, 1) or cut:
        return 0
    if value_bytes(fmt) == 4:
        return 16 if isa.has("avx512f") else 0
    return 32 if isa.has("avx512vbmi2") else 0


def pairs(fmt: Format, isa: Isa) -> bool:
    """Whether 16-bit values are widened in place, the even ones and then the odd ones, and x has to lie so."""
    return expands(fmt, isa) == 32 and str(fmt.codec) == "bf16"


def term_x(fmt: Format, isa: Isa) -> str:
    """The name of x as this format's loops want it."""
    return "xp" if pairs(fmt, isa) else "xs"


def permutes(fmt: Format, isa: Isa) -> bool:
    """Whether a vector of N:M offsets picks from two vectors of x."""
    level = fmt.level
    return isinstance(level, NM) and fmt.block == (1, 1) and isa.has("avx512f") and 16 % level.n == 0 and 16 // level.n * level.m <= 32


def serves_few(fmt: Format, isa: Isa) -> bool:
    """Whether a few tokens cost these loops little more than one: what a weight costs before it is multiplied decides. Single
    nonzeros and short blocks are better off with vectors along the tokens."""
    wide = isinstance(fmt.level, Compressed | NM | Dense) and max(fmt.block) >= 8 and fmt.block[0] * fmt.block[1] <= 64
    return bool(expands(fmt, isa)) or permutes(fmt, isa) or wide


class Sums:
    """Registers of one step: a sum for every stream (or row of a slice), token and part of a block's rows."""

    def __init__(self, term: Term, rows: int, width: int, parts: int) -> None:
        term.w.made += 1
        self.name = f"sum{term.w.made}_"
        self.w, self.tokens, self.parts, self.width = term.w, term.tokens, parts, width
        self._at = term.w.registers(self.name, rows * term.tokens * parts, 1, width)
        for i in range(rows * term.tokens * parts):
            term.w(f"{self._at(i, 0)} = {splat('T.float32(0)', width)}")

    def __call__(self, row: int, token: int, part: int = 0) -> str:
        return self._at((row * self.tokens + token) * self.parts + part, 0)

    def add(self, row: int, token: int, part: int, weight: str, x: str) -> None:
        """sum += weight * x"""
        acc = self(row, token, part)
        self.w(f"{acc} = {acc} + {weight} * {x}")
