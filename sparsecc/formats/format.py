"""A format: levels x codec x swizzle. How a weight W [N, K] = [out_features, in_features] is stored.

W is a grid of br x bc blocks (edge blocks padded with zeros). The swizzle orders the grid, the level owns the coordinates of the
blocks that are kept, the codec their values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.errors import FormatError, ShapeError

from .codec import Codec, Raw
from .level import NM, Arrays, Bitmap, Compressed, Dense, Level, Sell, Size, ceil_div
from .packed import PackedNM
from .shared import Shared
from .swizzle import Identity, Panels, Swizzle
from .text import Reader

_F32, _IN_ORDER = Raw(), Identity()


@dataclass(frozen=True)
class Format:
    """dense                                       every entry
    csr                                         the nonzeros
    bsr(4, 1).bf16.panels(128)                  4x1 blocks, values in bf16, in strips of 128 block columns
    sell(4, 64).panels(128)                     the nonzeros, sorted by row length, in strips of 128 columns
    shared(16, 32).bf16                         the columns of any of 16 rows, 32 at a time
    nm(2, 4)                                    2 of every 4
    packed_nm(2, 4)                             the same, positions in as few bits as hold them
    bitmap.block(1, 16)                         one bit per 1x16 block
    bitmap(64).f16.panels(64)                   one bit per entry, tiles of 64 rows and 64 columns
    """

    level: Level
    block: tuple[int, int] = (1, 1)
    codec: Codec = _F32
    swizzle: Swizzle = _IN_ORDER

    def __post_init__(self) -> None:
        if not all(isinstance(side, int) and side >= 1 for side in self.block):
            raise FormatError(f"block(rows, cols) needs positive integers, got {self.block}")
        group = getattr(self.level, "m", 1)
        if isinstance(self.swizzle, Panels) and self.swizzle.width % group:
            raise FormatError(f"{self.swizzle} cuts the groups of {self.level}: the width must be a multiple of {group}")

    def __str__(self) -> str:
        text = str(self.level)
        if self.block != (1, 1):
            sides = "({}, {})".format(*self.block)
            text = f"bsr{sides}" if text == "csr" else f"{text}.block{sides}"
        extras = [str(self.codec) if self.codec != _F32 else "", str(self.swizzle)]
        return ".".join([text, *filter(None, extras)])

    def components(self) -> tuple[str, ...]:
        """Names of the arrays, in the order in which kernels take them."""
        return self.level.components + self.codec.components

    def grid(self, N: Size, K: Size) -> tuple[Size, Size]:
        """(P, C): parents and coordinates per parent that the level sees."""
        return self.swizzle.grid(self.block_rows(N), ceil_div(K, self.block[1]))

    def block_rows(self, N: Size) -> Size:
        """Rows of blocks, the level's windows filled up with empty ones."""
        window = self.level.window
        return ceil_div(N, self.block[0] * window) * window

    def dtypes(self, N: Size, K: Size) -> dict[str, torch.dtype]:
        """The dtype of each component for a weight [N, K]."""
        return {**self.level.dtypes(self.grid(N, K)[1]), **self.codec.dtypes()}

    def pack(self, w: Tensor) -> Arrays:
        """float[N, K] -> contiguous CPU arrays, keyed and ordered by `components()`.

        Raises FormatError when `refuses(w)`, ShapeError if w isn't 2-D.
        """
        w = _matrix(w)
        if reason := self.codec.refuses(w):
            raise FormatError(f"{self} cannot store this weight: {reason}")
        blocks = self._blocks(w)
        arrays, slots = self.level.pack(self.swizzle.apply(_occupied(blocks)))
        row, col, real = self._locate(slots, *blocks.shape[:2])
        values = blocks.new_zeros(len(slots), *self.block)
        values[real] = blocks[row, col]
        return {name: array.contiguous() for name, array in (arrays | self.codec.encode(values)).items()}

    def unpack(self, arrays: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """The inverse of `pack`: f32[N, K]."""
        N, K = shape
        Nb, Kb = self.block_rows(N), ceil_div(K, self.block[1])
        slots = self.level.unpack(arrays, *self.swizzle.grid(Nb, Kb))
        row, col, real = self._locate(slots, Nb, Kb)
        blocks = torch.zeros(Nb, Kb, *self.block)
        blocks[row, col] = self.codec.decode(arrays, self.block)[real]
        return blocks.transpose(1, 2).reshape(Nb * self.block[0], Kb * self.block[1])[:N, :K].contiguous()

    def nbytes(self, N: Size, K: Size, nnz_blocks: Size) -> Size:
        """Bytes of all arrays when `nnz_blocks` blocks are kept, without padding that depends on where those are; integers or sympy
        expressions."""
        P, C = self.grid(N, K)
        S = self.level.slots(P, C, nnz_blocks)
        return self.level.nbytes(P, C, S) + self.codec.nbytes(S * self.block[0] * self.block[1])

    def refuses(self, w: Tensor) -> str | None:
        """Why the weight cannot be stored so, or None. Raises ShapeError if w isn't 2-D."""
        w = _matrix(w)
        return self.codec.refuses(w) or self.level.refuses(_occupied(self._blocks(w)))

    def _blocks(self, w: Tensor) -> Tensor:
        """[N, K] -> [Nb, Kb, br, bc], padded with zeros."""
        (N, K), (br, bc) = w.shape, self.block
        Nb, Kb = self.block_rows(N), ceil_div(K, bc)
        return F.pad(w, (0, -K % bc, 0, Nb * br - N)).view(Nb, br, Kb, bc).transpose(1, 2)

    def _locate(self, slots: Tensor, Nb: int, Kb: int) -> tuple[Tensor, Tensor, Tensor]:
        """(block row, block column) of the real slots, and the bool[S] that says which those are."""
        row, col = self.swizzle.locate(slots, Nb)
        real = (slots[:, 1] >= 0) & (col < Kb)
        return row[real], col[real], real


def _matrix(w: Tensor) -> Tensor:
    if w.ndim != 2:
        raise ShapeError(f"a format stores a matrix [N, K], got a tensor of shape {tuple(w.shape)}")
    return w.detach().cpu()


def _occupied(blocks: Tensor) -> Tensor:
    """[Nb, Kb, br, bc] -> bool[Nb, Kb]. NaN and infinities are nonzero, -0.0 is zero."""
    occ = blocks != 0
    return occ[..., 0, 0] if occ.shape[2:] == (1, 1) else occ.any(-1).any(-1)


_HEADS: dict[str, tuple[Callable[..., Format], tuple[int, ...]]] = {
    "dense": (lambda: Format(Dense()), (0,)),
    "csr": (lambda: Format(Compressed()), (0,)),
    "bsr": (lambda r, c: Format(Compressed(), (r, c)), (2,)),
    "sell": (lambda c, sigma: Format(Sell(c, sigma)), (2,)),
    "shared": (lambda rows, step: Format(Shared(rows, step)), (2,)),
    "nm": (lambda n, m: Format(NM(n, m)), (2,)),
    "packed_nm": (lambda n, m: Format(PackedNM(n, m)), (2,)),
    "bitmap": (lambda every=1: Format(Bitmap(every)), (0, 1)),
}
_EXTRAS: dict[str, tuple[Callable[..., dict[str, Any]], tuple[int, ...]]] = {
    "block": (lambda r, c: {"block": (r, c)}, (2,)),
    **{dtype: (lambda dtype=dtype: {"codec": Raw(dtype)}, (0,)) for dtype in Raw.DTYPES},
    "panels": (lambda width: {"swizzle": Panels(width)}, (1,)),
}


def parse_format(text: str) -> Format:
    """The inverse of `str(format)`. Raises FormatError with a caret under the place."""
    reader = Reader(text, FormatError)
    head, *extras = reader.calls()
    if head.name not in _HEADS:
        raise reader.unknown("format", head, _HEADS)
    fmt, given = reader.build(head, *_HEADS[head.name]), {"block"} if head.name == "bsr" else set()
    for call in extras:
        if call.name not in _EXTRAS:
            raise reader.unknown("format suffix", call, _EXTRAS)
        make, arity = _EXTRAS[call.name]
        change = reader.build(call, make, arity)
        if given & change.keys():
            raise reader.fail(f"the {next(iter(change))} is given twice", call.column)
        given |= change.keys()
        fmt = reader.build(call, lambda *_, fmt=fmt, change=change: replace(fmt, **change), arity)
    return fmt
