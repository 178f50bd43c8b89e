"""Patterns: which entries of a matrix [N, K] are known to be zero, whatever its storage.

Zero means `== 0`: -0.0 is zero, NaN and infinities are not. A pattern is checked on a weight (`mask_violation`), compared and
combined with others (`implies`, `join`, `meet`), and made (`topk_mask`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.errors import SpecError

from .grid import block_sums, keep_largest, lengths, matrix, ranked, span
from .text import Call, Reader

# Pruners round per row or per layer: a floor counts as met when it is missed by no more than this fraction.
FLOOR_SLACK = 0.005
# Zeros "come in blocks" when no more than this fraction of what the kept blocks hold is zero.
STRAY_ZEROS = 0.25


@dataclass(frozen=True)
class Pattern:
    """The interface; `str(pattern)` is its syntax and `parse_pattern` the inverse."""

    @property
    def density(self) -> float | None:
        """Upper bound of the kept fraction, if the pattern alone fixes one."""
        return None

    def mask_violation(self, w: Tensor) -> str | None:
        """The first place where the weight [N, K] breaks the pattern, in words, or None."""
        raise NotImplementedError

    def implies(self, q: Pattern) -> bool:
        """Whether every weight that satisfies self satisfies q. Never wrongly True; a last group of nm counts as full."""
        return self == q or q.vacuous

    @property
    def vacuous(self) -> bool:
        """Whether every weight satisfies it."""
        return False

    def join(self, q: Pattern) -> Pattern:
        """The pattern of x + y for x in self, y in q: zero where both are. Nonzeros add up: nm(1, 4) with nm(1, 4) is nm(2, 4)."""
        if self == ANY or q == ANY:
            return ANY
        if (joined := self._join(q)) is not None:
            return joined
        if self.density is None or q.density is None:
            return ANY
        return _sparser_than(self.density + q.density)

    def meet(self, q: Pattern) -> Pattern:
        """A pattern of x * y for x in self, y in q: zero where either is. Where one pattern cannot say it all, the sparser stays."""
        if q == ANY or self == q:
            return self
        return self._meet(q) or min(self, q, key=lambda p: 1.0 if p.density is None else p.density)

    def topk_mask(self, score: Tensor, per_row: bool = False) -> Tensor:
        """bool[N, K]: the entries to keep so that the total score is highest. Ties keep the lower index, NaN ranks highest.

        `per_row` gives every row of blocks the same share, as Wanda does, unless a row is a single block.
        Raises SpecError if the pattern fixes no sparsity.
        """
        raise SpecError(f"{self} fixes no sparsity: give one, such as unstructured(0.9), block(4, 1, 0.9) or nm(2, 4)")

    def _join(self, q: Pattern) -> Pattern | None:
        return None

    def _meet(self, q: Pattern) -> Pattern | None:
        return self if self.implies(q) else q if q.implies(self) else None


@dataclass(frozen=True)
class Anything(Pattern):
    """any: nothing is known."""

    def __str__(self) -> str:
        return "any"

    @property
    def vacuous(self) -> bool:
        return True

    def mask_violation(self, w: Tensor) -> str | None:
        return None

    def meet(self, q: Pattern) -> Pattern:
        return q


ANY = Anything()


@dataclass(frozen=True)
class NM(Pattern):
    """nm(2, 4), also "2:4": at most n nonzeros in every m consecutive entries of a row (the last group may be shorter)."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not (isinstance(self.n, int) and isinstance(self.m, int) and 1 <= self.n <= self.m):
            raise SpecError(f"nm(n, m) needs integers with 1 <= n <= m (n are kept), got ({self.n}, {self.m})")

    def __str__(self) -> str:
        return f"nm({self.n}, {self.m})"

    @property
    def density(self) -> float:
        return self.n / self.m

    @property
    def vacuous(self) -> bool:
        return self.n == self.m

    def mask_violation(self, w: Tensor) -> str | None:
        counts = self._groups(matrix(w) != 0, False).sum(-1)
        bad = (counts > self.n).nonzero()
        if not len(bad):
            return None
        row, group = bad[0].tolist()
        where = span("column", group * self.m, min((group + 1) * self.m, w.shape[1]))
        return f"row {row}, {where} hold {int(counts[row, group])} nonzeros, at most {self.n} allowed"

    def implies(self, q: Pattern) -> bool:
        if isinstance(q, NM):
            return self._most_in_groups(q.m) <= q.n
        if isinstance(q, Blocks) and q.extents == (1, 1):
            return _floor(q.sparsity) <= 1 - Fraction(self.n, self.m)
        return super().implies(q)

    def topk_mask(self, score: Tensor, per_row: bool = False) -> Tensor:
        groups = self._groups(ranked(score), -math.inf)
        kept = keep_largest(groups.reshape(-1, self.m), self.n)
        return kept.view(score.shape[0], groups.shape[1] * self.m)[:, : score.shape[1]]

    def _join(self, q: Pattern) -> Pattern | None:
        if not isinstance(q, NM):
            return None
        m = math.lcm(self.m, q.m)
        n = self.n * (m // self.m) + q.n * (m // q.m)
        return NM(n, m) if n < m else ANY

    def _groups(self, x: Tensor, fill: float) -> Tensor:
        """[N, K] -> [N, ceil(K / m), m]"""
        N, K = x.shape
        return F.pad(x, (0, -K % self.m), value=fill).view(N, -(-K // self.m), self.m)

    def _most_in_groups(self, m: int) -> int:
        """The most nonzeros that any m entries, aligned to m, can hold."""
        most = 0
        for first in range(0, math.lcm(self.m, m), m):
            edges = [first, *range((first // self.m + 1) * self.m, first + m, self.m), first + m]
            most = max(most, sum(min(self.n, b - a) for a, b in pairwise(edges)))
        return most


class Blocks(Pattern):
    """Zeros come in whole blocks (edge blocks are partial), and `sparsity` is the least fraction of the weight that lies in them.

    A kept block may hold stray zeros, up to STRAY_ZEROS of all kept entries. The patterns below differ in `extents`, the
    block's (rows, cols) where 0 stands for the whole side; so gcd finds the grid that two patterns share.
    """

    name: ClassVar[str]
    sparsity: float | None

    @property
    def extents(self) -> tuple[int, int]:
        raise NotImplementedError

    @property
    def vacuous(self) -> bool:
        return self.extents == (1, 1) and not self.sparsity

    def __post_init__(self) -> None:
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise SpecError(f"{self.name} needs a sparsity from 0 up to, not including, 1 (0.9 is 90 % zero), got {self.sparsity}")

    def __str__(self) -> str:
        args = [str(a) for a in (*self._sides(), self.sparsity) if a is not None]
        return f"{self.name}({', '.join(args)})" if args else self.name

    @property
    def density(self) -> float | None:
        return None if self.sparsity is None else float(1 - _floor(self.sparsity))

    def mask_violation(self, w: Tensor) -> str | None:
        return self._stray(matrix(w)) or self._shortfall(w)

    def implies(self, q: Pattern) -> bool:
        if isinstance(q, Blocks):
            finer = all(math.gcd(a, b) == b for a, b in zip(self.extents, q.extents, strict=True))
            return finer and _floor(q.sparsity) <= _floor(self.sparsity)
        return super().implies(q)

    def topk_mask(self, score: Tensor, per_row: bool = False) -> Tensor:
        if self.sparsity is None:
            return super().topk_mask(score)
        scores, (rows, cols) = ranked(score), self._block(score.shape)
        blocks = block_sums(scores, rows, cols)
        per_row = per_row and blocks.shape[1] > 1
        entries = min(rows, score.shape[0]) * score.shape[1] if per_row else score.numel()
        # Full blocks decide how many fit under the floor, so partial ones can only leave it sparser.
        budget = int((1 - _floor(self.sparsity)) * entries) // (rows * cols)
        kept = keep_largest(blocks if per_row else blocks.reshape(1, -1), budget).view(blocks.shape)
        return kept.repeat_interleave(rows, 0).repeat_interleave(cols, 1)[: score.shape[0], : score.shape[1]]

    def _join(self, q: Pattern) -> Pattern | None:
        if not isinstance(q, Blocks):
            return None
        floor = _floor(self.sparsity) + _floor(q.sparsity) - 1
        return _on_grid(self, q, float(floor) if floor > 0 else None)

    def _meet(self, q: Pattern) -> Pattern | None:
        if not isinstance(q, Blocks):
            return super()._meet(q)
        floors = [p.sparsity for p in (self, q) if p.sparsity is not None]
        return _on_grid(self, q, max(floors, default=None))

    def _sides(self) -> tuple[int, ...]:
        return ()

    def _block(self, shape: torch.Size) -> tuple[int, int]:
        """The block's size in a weight of this shape: never larger than the weight, never empty."""
        rows, cols = (min(extent or side, side) for extent, side in zip(self.extents, shape, strict=True))
        return max(rows, 1), max(cols, 1)

    def _counts(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """(nonzeros, entries) of each block, [Nb, Kb]; edge blocks have fewer entries."""
        rows, cols = self._block(w.shape)
        heights, widths = (lengths(side, step, w.device) for side, step in zip(w.shape, (rows, cols), strict=True))
        return block_sums((w != 0).to(torch.uint8), rows, cols), heights[:, None] * widths

    def _stray(self, w: Tensor) -> str | None:
        if self.extents == (1, 1):
            return None
        counts, sizes = self._counts(w)
        kept, nnz = int((sizes * (counts > 0)).sum()), int(counts.sum())
        if kept - nnz <= STRAY_ZEROS * kept:
            return None
        at = ((counts > 0) & (counts < sizes)).nonzero()[0].tolist()
        places = zip(("row", "column"), at, self._block(w.shape), w.shape, strict=True)
        where = ", ".join(span(side, i * step, min((i + 1) * step, end)) for side, i, step, end in places)
        hold, of = int(counts[at[0], at[1]]), int(sizes[at[0], at[1]])
        return (
            f"{where} hold {hold} nonzeros of {of}: the zeros do not come in whole {self._kind()} "
            f"({100 * (1 - nnz / kept):.1f} % of the kept ones is zero, at most {100 * STRAY_ZEROS:g} % allowed)"
        )

    def _shortfall(self, w: Tensor) -> str | None:
        if not self.sparsity or not w.numel():
            return None
        if self.extents == (1, 1):
            kept, inside = int(w.count_nonzero()), ""
        else:
            counts, sizes = self._counts(w)
            kept, inside = int((sizes * (counts > 0)).sum()), f" in whole {self._kind()}"
        zero = 1 - kept / w.numel()
        if zero >= self.sparsity - FLOOR_SLACK:
            return None
        return f"is {100 * zero:.1f} % zero{inside}, the spec asks for {100 * self.sparsity:g} %"

    def _kind(self) -> str:
        return {"rows": "rows", "cols": "columns", "channels": "channels"}.get(self.name, "{}x{} blocks".format(*self.extents))


@dataclass(frozen=True)
class Unstructured(Blocks):
    """unstructured, unstructured(0.9): zeros anywhere."""

    sparsity: float | None = None
    name: ClassVar[str] = "unstructured"

    @property
    def extents(self) -> tuple[int, int]:
        return 1, 1


@dataclass(frozen=True)
class Rows(Blocks):
    """rows, rows(0.5): whole rows (output features) are zero."""

    sparsity: float | None = None
    name: ClassVar[str] = "rows"

    @property
    def extents(self) -> tuple[int, int]:
        return 1, 0


@dataclass(frozen=True)
class Cols(Blocks):
    """cols, cols(0.5): whole columns (input features) are zero."""

    sparsity: float | None = None
    name: ClassVar[str] = "cols"

    @property
    def extents(self) -> tuple[int, int]:
        return 0, 1


@dataclass(frozen=True)
class Channels(Blocks):
    """channels, channels(0.3): output channels are removed: rows of the named weight, and in `prune` whatever is coupled to them."""

    sparsity: float | None = None
    name: ClassVar[str] = "channels"

    @property
    def extents(self) -> tuple[int, int]:
        return 1, 0


@dataclass(frozen=True)
class Heads(Blocks):
    """heads(64), heads(0.25, 64): attention heads of 64 rows are removed, and in `prune` whatever is coupled to them."""

    sparsity: float | None
    dim: int
    name: ClassVar[str] = "heads"

    def __post_init__(self) -> None:
        if not (isinstance(self.dim, int) and self.dim >= 1):
            raise SpecError(f"heads(sparsity, dim) needs the rows of a head as a positive integer, got {self.dim}")
        super().__post_init__()

    @property
    def extents(self) -> tuple[int, int]:
        return self.dim, 0

    def __str__(self) -> str:
        return f"heads({self.dim})" if self.sparsity is None else f"heads({self.sparsity}, {self.dim})"

    def _kind(self) -> str:
        return f"heads of {self.dim} rows"


@dataclass(frozen=True)
class Block(Blocks):
    """block(4, 1), block(4, 1, 0.9): zeros come in blocks of 4 rows x 1 column."""

    rows: int
    cols: int
    sparsity: float | None = None
    name: ClassVar[str] = "block"

    def __post_init__(self) -> None:
        if not all(isinstance(side, int) and side >= 1 for side in (self.rows, self.cols)):
            raise SpecError(f"block(rows, cols) needs positive integers, got ({self.rows}, {self.cols})")
        super().__post_init__()

    @property
    def extents(self) -> tuple[int, int]:
        return self.rows, self.cols

    def _sides(self) -> tuple[int, ...]:
        return self.rows, self.cols


nm, block, unstructured, rows, cols, channels = NM, Block, Unstructured, Rows, Cols, Channels


def heads(*args: float) -> Heads:
    """heads(dim) or heads(sparsity, dim), as they are written."""
    sparsity, dim = args if len(args) == 2 else (None, *args)
    return Heads(sparsity, dim)  # type: ignore[arg-type]  # a dim that is no integer is refused there


_PATTERNS: dict[str, tuple[Callable[..., Pattern], tuple[int, ...]]] = {
    "any": (Anything, (0,)),
    "unstructured": (Unstructured, (0, 1)),
    "block": (Block, (2, 3)),
    "nm": (NM, (2,)),
    "rows": (Rows, (0, 1)),
    "cols": (Cols, (0, 1)),
    "channels": (Channels, (0, 1)),
    "heads": (heads, (1, 2)),
}


def parse_pattern(text: str) -> Pattern:
    """The inverse of `str(pattern)`; also reads "2:4". Raises SpecError with a caret under the place."""
    reader = Reader(text, SpecError)
    if ratio := re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text):
        n, m = int(ratio[1]), int(ratio[2])
        return reader.build(Call("n:m", (n, m), ratio.start(1)), NM, (2,))
    call, *more = reader.calls()
    if call.name not in _PATTERNS:
        raise reader.unknown("pattern", call, _PATTERNS)
    if more:
        raise reader.fail("a pattern is one name; storage such as bf16 goes into sparsecc.options(pattern, codec=...)", more[0].column)
    return reader.build(call, *_PATTERNS[call.name])


def _on_grid(p: Blocks, q: Blocks, sparsity: float | None) -> Pattern:
    """Zeros in blocks of the finest grid that refines both."""
    height, width = (math.gcd(a, b) for a, b in zip(p.extents, q.extents, strict=True))
    if (height, width) == (1, 1):
        return Unstructured(sparsity)
    if not (height and width):
        if width == 1 or height == 1:
            return Cols(sparsity) if width else Rows(sparsity)
        if height:
            return Heads(sparsity, height)
    return Block(height, width, sparsity)


def _sparser_than(density: float) -> Pattern:
    return Unstructured(round(1 - density, 9)) if density < 1 else ANY


def _floor(sparsity: float | None) -> Fraction:
    """The sparsity as the decimal that was written, so that 10 % of 10 entries is 1."""
    return Fraction(str(sparsity or 0))
