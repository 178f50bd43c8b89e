"""Which zeros a weight has: counts for every candidate pattern, and the one that explains them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .pattern import ANY, NM, Block, Cols, Pattern, Rows, Unstructured

CANDIDATE_BLOCKS = ((1, 1), (4, 1), (8, 1), (16, 1), (1, 16), (4, 4), (16, 16), (32, 32))
CANDIDATE_NM = ((1, 4), (1, 2), (2, 4), (4, 8))
MAX_PADDING = 0.10
_SIDE = 32  # every candidate divides it

_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class BlockMeasure:
    """kept: fraction of blocks with a nonzero; fill: nonzeros / entries of the kept blocks, padding included (1.0 if none is kept)."""

    kept: float
    fill: float


@dataclass(frozen=True)
class Measurement:
    """What `measure` finds in a weight [N, K]."""

    shape: tuple[int, int]
    nnz: int
    blocks: Mapping[tuple[int, int], BlockMeasure]
    nm: tuple[int, int] | None
    zero_rows: Tensor
    zero_cols: Tensor
    constant_row_nnz: bool

    @property
    def density(self) -> float:
        entries = self.shape[0] * self.shape[1]
        return self.nnz / entries if entries else 0.0

    def explain(self) -> Pattern:
        """The most structured pattern that explains the zeros: one whose storage is at most MAX_PADDING zeros."""
        (N, K), dead_rows, dead_cols = self.shape, len(self.zero_rows), len(self.zero_cols)
        nnz = self.nnz / (1 - MAX_PADDING)
        if nnz >= N * K:
            return ANY
        if nnz >= (N - dead_rows) * K:
            return Rows()
        if nnz >= N * (K - dead_cols):
            return Cols()
        if nnz >= (N - dead_rows) * (K - dead_cols):  # both, named after what takes more away
            return Rows() if dead_rows * K >= dead_cols * N else Cols()
        for rows, cols in sorted(CANDIDATE_BLOCKS[1:], key=lambda b: -b[0] * b[1]):
            if self.blocks[rows, cols].fill >= 1 - MAX_PADDING:
                return Block(rows, cols)
        if self.nm and nnz >= N * K * self.nm[0] / self.nm[1]:
            return NM(*self.nm)
        return Unstructured()


def measure(w: Tensor) -> Measurement:
    """Counts the zeros of a weight [N, K]; NaN and infinities are nonzero."""
    N, K = w.shape
    occ = F.pad(w.detach().cpu() != 0, (0, _fill(K), 0, _fill(N)))
    per_row = _group_counts(occ, 8).to(torch.int32).sum(1)[:N]
    nnz = int(per_row.sum())
    grids = _block_grids(occ)
    return Measurement(
        shape=(N, K),
        nnz=nnz,
        blocks={b: _block_measure(grids[b], b, (N, K), nnz) for b in CANDIDATE_BLOCKS},
        nm=_tightest_nm(occ),
        zero_rows=(per_row == 0).nonzero()[:, 0],
        zero_cols=(~grids[16, 1].any(0)[:K]).nonzero()[:, 0],
        constant_row_nnz=bool((per_row == per_row[:1]).all()),
    )


def detect(w: Tensor) -> Pattern:
    """The most structured pattern that explains the zeros of a weight [N, K]; ANY where storing it dense wastes least."""
    return measure(w).explain()


def _block_grids(occ: Tensor) -> dict[tuple[int, int], Tensor]:
    """For each candidate, bool[N / rows, K / cols]: which blocks hold a nonzero. Coarser grids come from finer ones."""
    by4 = _fold_rows(occ, 4)
    by8 = _fold_rows(by4, 2)
    by16 = _fold_rows(by8, 2)
    square16 = _fold_cols(by16, 16)
    return {
        (1, 1): occ,
        (4, 1): by4,
        (8, 1): by8,
        (16, 1): by16,
        (1, 16): _fold_cols(occ, 16),
        (4, 4): _fold_cols(by4, 4),
        (16, 16): square16,
        (32, 32): _fold_cols(_fold_rows(square16, 2), 2),
    }


def _block_measure(grid: Tensor, block: tuple[int, int], shape: tuple[int, int], nnz: int) -> BlockMeasure:
    (N, K), (rows, cols) = shape, block
    blocks = -(-N // rows) * -(-K // cols)
    kept = nnz if block == (1, 1) else int(grid.count_nonzero())
    return BlockMeasure(kept / blocks if blocks else 0.0, nnz / (kept * rows * cols) if kept else 1.0)


def _tightest_nm(occ: Tensor) -> tuple[int, int] | None:
    """The first candidate that holds; they stand from tightest to loosest."""
    for n, m in CANDIDATE_NM:
        # The first rows refute most candidates.
        if all(not (_group_counts(part, m) > n).any() for part in (occ[:_SIDE], occ)):
            return n, m
    return None


def _fill(side: int) -> int:
    """How much to pad so that the side is a multiple of _SIDE and not empty."""
    return -side % _SIDE if side else _SIDE


def _fold_rows(occ: Tensor, by: int) -> Tensor:
    """[N, K] -> [N / by, K], or over `by` rows."""
    rows = occ.view(occ.shape[0] // by, by, occ.shape[1])
    out = rows[:, 0]
    for i in range(1, by):
        out = out | rows[:, i]
    return out


def _fold_cols(occ: Tensor, by: int) -> Tensor:
    """[N, K] -> [N, K / by], or over `by` columns: bytes read as words, which are nonzero if any byte is."""
    while by > 1:
        step = min(by, 8)
        occ, by = occ.contiguous().view(_WORDS[step]) != 0, by // step
    return occ


def _group_counts(occ: Tensor, m: int) -> Tensor:
    """bool[N, K] -> [N, K / m], nonzeros in each m: the product with 0x0101... leaves the sum of all bytes in the top one."""
    bits = 8 * m
    return (occ.view(_WORDS[m]) * int("01" * m, 16)) >> (bits - 8)
