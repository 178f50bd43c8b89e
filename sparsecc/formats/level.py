"""Levels: who owns the coordinates of the stored blocks.

A level sees a matrix of blocks as `occ: bool[P, C]`, P parents (rows of blocks) with C coordinates each, and turns it into index
arrays and a list of slots, one per stored block in storage order. It knows nothing of values, block sizes or the order of
parents; those belong to the codec and the swizzle. The split is TACO's (Kjolstad et al., "The Tensor Algebra Compiler", 2017).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.errors import FormatError

Arrays = dict[str, Tensor]
Size = Any  # int, or a sympy expression where only a byte count is asked for


def ceil_div(a: Size, b: int) -> Size:
    """ceil(a / b), for integers and for sympy expressions."""
    return -(-a // b)


@dataclass(frozen=True)
class Level:
    """The interface. `str(level)` is its syntax; `components` names its arrays in their fixed order."""

    components: ClassVar[tuple[str, ...]] = ()

    @property
    def window(self) -> int:
        """Parents come in groups of so many: P is a multiple of it."""
        return 1

    def pack(self, occ: Tensor) -> tuple[Arrays, Tensor]:
        """bool[P, C] -> (index arrays, slots long[S, 2]).

        A slot is (parent, coord); coord -1 marks a padding slot, whose value is zero. Raises FormatError when `refuses(occ)`.
        """
        raise NotImplementedError

    def unpack(self, arrays: Mapping[str, Tensor], P: int, C: int) -> Tensor:
        """The slots again, long[S, 2]. Padding slots may come back with the (free) coordinate that they occupy."""
        raise NotImplementedError

    def refuses(self, occ: Tensor) -> str | None:
        """Why `occ` cannot be stored, or None."""
        return None

    def slots(self, P: Size, C: Size, nnz: Size) -> Size:
        """How many slots hold `nnz` occupied blocks, or the fewest that may if that depends on where they are."""
        return nnz

    def dtypes(self, C: Size) -> dict[str, torch.dtype]:
        """The dtype of each component."""
        return {}

    def nbytes(self, P: Size, C: Size, S: Size) -> Size:
        """Bytes of the index arrays, given the number of slots."""
        return 0


@dataclass(frozen=True)
class Dense(Level):
    """`dense`: every coordinate is stored, no index."""

    def __str__(self) -> str:
        return "dense"

    def pack(self, occ: Tensor) -> tuple[Arrays, Tensor]:
        return {}, self.unpack({}, *occ.shape)

    def unpack(self, arrays: Mapping[str, Tensor], P: int, C: int) -> Tensor:
        return torch.cartesian_prod(torch.arange(P), torch.arange(C)).reshape(P * C, 2)

    def slots(self, P: Size, C: Size, nnz: Size) -> Size:
        return P * C


@dataclass(frozen=True)
class Compressed(Level):
    """`csr`: the coordinates of the occupied blocks, ascending, in `idx`; `ptr[p]..ptr[p+1]` are those of parent p.

    ptr int32[P+1]; idx uint16[S] when C <= 65536, else int32[S].
    """

    components: ClassVar[tuple[str, ...]] = ("ptr", "idx")

    def __str__(self) -> str:
        return "csr"

    def pack(self, occ: Tensor) -> tuple[Arrays, Tensor]:
        slots = occ.nonzero()
        idx = slots[:, 1].to(self.dtypes(occ.shape[1])["idx"])
        return {"ptr": _row_pointers(self, occ), "idx": idx.contiguous()}, slots

    def refuses(self, occ: Tensor) -> str | None:
        return _too_many(self, occ)

    def unpack(self, arrays: Mapping[str, Tensor], P: int, C: int) -> Tensor:
        parent = torch.repeat_interleave(torch.arange(P), arrays["ptr"].long().diff())
        return torch.stack([parent, arrays["idx"].long()], 1)

    def dtypes(self, C: Size) -> dict[str, torch.dtype]:
        wide = isinstance(C, int) and C > 1 << 16
        return {"ptr": torch.int32, "idx": torch.int32 if wide else torch.uint16}

    def nbytes(self, P: Size, C: Size, S: Size) -> Size:
        return 4 * (P + 1) + self.dtypes(C)["idx"].itemsize * S


@dataclass(frozen=True)
class Sell(Level):
    """`sell(c, sigma)`: windows of `sigma` parents are sorted by their number of blocks, and cut into slices of `c` parents that are
    as long as their longest (SELL-C-sigma: Kreutzer et al., "A unified sparse matrix data format", SISC 2014).

    A kernel walks the c parents of a slice at once, with independent accumulators, and since neighbouring slices are about as long it
    leaves its loops at predictable places. order uint16[P]: the parent at each position, counted within its window; ptr int32[P/c+1]:
    the first step of each slice; idx as in csr, ordered [slice, step, c]. A padding slot repeats its parent's last coordinate (0 if
    the parent is empty), so that a kernel may read there.
    """

    c: int
    sigma: int
    components: ClassVar[tuple[str, ...]] = ("order", "ptr", "idx")

    def __post_init__(self) -> None:
        whole = isinstance(self.c, int) and isinstance(self.sigma, int)
        if not (whole and 1 <= self.c <= self.sigma <= 1 << 16 and self.sigma % self.c == 0):
            raise FormatError(f"sell(c, sigma) needs 1 <= c <= sigma <= 65536 and sigma a multiple of c, got ({self.c}, {self.sigma})")

    def __str__(self) -> str:
        return f"sell({self.c}, {self.sigma})"

    @property
    def window(self) -> int:
        return self.sigma

    def pack(self, occ: Tensor) -> tuple[Arrays, Tensor]:
        counts = occ.sum(1)
        order = counts.view(-1, self.sigma).argsort(dim=1, descending=True, stable=True).view(-1)
        parents = self._parents(order)
        longest = counts[parents].view(-1, self.c).amax(1) if len(parents) else counts
        ptr = F.pad(longest, (1, 0)).cumsum(0)
        parent, step = self._slots(parents, ptr)
        first = F.pad(counts, (1, 0)).cumsum(0)[:-1]
        last = (counts[parent] - 1).clamp(min=0)
        coords = F.pad(occ.nonzero()[:, 1], (0, 1))  # the entry added is what an empty last parent points at
        coord = torch.where(counts[parent] > 0, coords[first[parent] + torch.minimum(step, last)], 0)
        idx = coord.to(self.dtypes(occ.shape[1])["idx"])
        arrays = {"order": order.to(torch.uint16), "ptr": _narrow(self, occ, ptr), "idx": idx}
        return arrays, torch.stack([parent, coord.masked_fill(step >= counts[parent], -1)], 1)

    def refuses(self, occ: Tensor) -> str | None:
        return _too_many(self, occ)

    def unpack(self, arrays: Mapping[str, Tensor], P: int, C: int) -> Tensor:
        parent, step = self._slots(self._parents(arrays["order"].long()), arrays["ptr"].long())
        coord = arrays["idx"].long()
        before = F.pad(coord, (self.c, 0))[: len(coord)]
        return torch.stack([parent, coord.masked_fill((step > 0) & (coord == before), -1)], 1)

    def dtypes(self, C: Size) -> dict[str, torch.dtype]:
        return {"order": torch.uint16, **Compressed().dtypes(C)}

    def nbytes(self, P: Size, C: Size, S: Size) -> Size:
        return 2 * P + 4 * (P // self.c + 1) + self.dtypes(C)["idx"].itemsize * S

    def _parents(self, order: Tensor) -> Tensor:
        """long[P]: the parent at each position."""
        return order + torch.arange(len(order)) // self.sigma * self.sigma

    def _slots(self, parents: Tensor, ptr: Tensor) -> tuple[Tensor, Tensor]:
        """Parent and step within its slice of every slot, long[S] each."""
        longest = ptr.diff()
        slices = torch.repeat_interleave(torch.arange(len(longest)), longest)
        step = torch.arange(len(slices)) - ptr[slices]
        return parents.view(-1, self.c)[slices].view(-1), step.repeat_interleave(self.c)


@dataclass(frozen=True)
class NM(Level):
    """`nm(n, m)`: exactly n slots for every m consecutive coordinates; `idx` uint8[S] is the offset within the group.

    Slots are ordered [parent, group, n] with strictly ascending offsets. A group with fewer than n blocks fills up with padding
    slots on its lowest free offsets; those lie past C only where the last group has fewer than n coordinates.
    """

    n: int
    m: int
    components: ClassVar[tuple[str, ...]] = ("idx",)

    def __post_init__(self) -> None:
        if not (isinstance(self.n, int) and isinstance(self.m, int) and 1 <= self.n <= self.m <= 256):
            raise FormatError(f"nm(n, m) needs integers with 1 <= n <= m <= 256, got ({self.n}, {self.m})")

    def __str__(self) -> str:
        return f"nm({self.n}, {self.m})"

    def pack(self, occ: Tensor) -> tuple[Arrays, Tensor]:
        if reason := self.refuses(occ):
            raise FormatError(reason)
        groups = self._groups(occ)
        free = ~groups
        room = self.n - groups.sum(-1, keepdim=True)
        chosen = groups | (free & (free.cumsum(-1, dtype=torch.int16) <= room))
        offset = chosen.view(-1).nonzero()[:, 0] % self.m
        arrays: Arrays = {"idx": offset.to(torch.uint8)}
        slots = NM.unpack(self, arrays, *occ.shape)
        slots[:, 1].masked_fill_(free[chosen], -1)
        return arrays, slots

    def unpack(self, arrays: Mapping[str, Tensor], P: int, C: int) -> Tensor:
        groups = ceil_div(C, self.m)
        first = self.m * torch.arange(groups).view(1, groups, 1)
        coord = (first + arrays["idx"].long().view(P, groups, self.n)).reshape(-1)
        parent = torch.arange(P).repeat_interleave(groups * self.n)
        return torch.stack([parent, coord.masked_fill(coord >= C, -1)], 1)

    def refuses(self, occ: Tensor) -> str | None:
        counts = self._groups(occ).sum(-1)
        bad = (counts > self.n).nonzero()
        if not len(bad):
            return None
        p, g = bad[0].tolist()
        first, last = g * self.m, min((g + 1) * self.m, occ.shape[1]) - 1
        return f"row {p}, columns {first}-{last} hold {int(counts[p, g])} nonzeros, {self} stores at most {self.n}"

    def slots(self, P: Size, C: Size, nnz: Size) -> Size:
        return P * ceil_div(C, self.m) * self.n

    def dtypes(self, C: Size) -> dict[str, torch.dtype]:
        return {"idx": torch.uint8}

    def nbytes(self, P: Size, C: Size, S: Size) -> Size:
        return S

    def _groups(self, occ: Tensor) -> Tensor:
        P, C = occ.shape
        return F.pad(occ, (0, -C % self.m)).view(P, ceil_div(C, self.m), self.m)


@dataclass(frozen=True)
class Bitmap(Level):
    """`bitmap`: one bit per coordinate, bit j of word w for coordinate 16 w + j; `ptr` as the offset of a parent's first block.

    `bitmap(every)` keeps one offset per `every` parents, from which a kernel counts bits: a GPU tile of 64 short rows needs one.
    ptr int32[P / every + 1]; bits uint16[P, ceil(C / 16)].
    """

    every: int = 1
    components: ClassVar[tuple[str, ...]] = ("ptr", "bits")

    def __post_init__(self) -> None:
        if not (isinstance(self.every, int) and self.every >= 1):
            raise FormatError(f"bitmap(every) needs a positive integer, got {self.every}")

    def __str__(self) -> str:
        return "bitmap" if self.every == 1 else f"bitmap({self.every})"

    @property
    def window(self) -> int:
        return self.every

    def pack(self, occ: Tensor) -> tuple[Arrays, Tensor]:
        P, C = occ.shape
        words = F.pad(occ, (0, -C % 16)).view(P, ceil_div(C, 16), 16)
        bits = (words * self._weights()).sum(-1, dtype=torch.int32).to(torch.uint16)
        return {"ptr": _row_pointers(self, occ)[:: self.every].contiguous(), "bits": bits}, occ.nonzero()

    def refuses(self, occ: Tensor) -> str | None:
        return _too_many(self, occ)

    def unpack(self, arrays: Mapping[str, Tensor], P: int, C: int) -> Tensor:
        words = arrays["bits"].to(torch.int32).unsqueeze(-1) & self._weights()
        return (words != 0).view(P, 16 * ceil_div(C, 16))[:, :C].nonzero()

    def dtypes(self, C: Size) -> dict[str, torch.dtype]:
        return {"ptr": torch.int32, "bits": torch.uint16}

    def nbytes(self, P: Size, C: Size, S: Size) -> Size:
        return 4 * (P // self.every + 1) + 2 * P * ceil_div(C, 16)

    def _weights(self) -> Tensor:
        return torch.ones(16, dtype=torch.int32) << torch.arange(16, dtype=torch.int32)


MOST = (1 << 31) - (1 << 16)
"""Blocks that a weight may keep: kernels count them in 32 bits, and look up to a step beyond the last one."""


def _too_many(level: Level, occ: Tensor) -> str | None:
    """Why positions do not fit, or None. Blocks are only counted where they might be too many."""
    if occ.numel() <= MOST or (kept := int(occ.sum())) <= MOST:
        return None
    return f"it keeps {kept} of {occ.numel()} blocks, and {level} counts them in 32 bits: use larger blocks"


def _row_pointers(level: Level, occ: Tensor) -> Tensor:
    """bool[P, C] -> int32[P+1], where each parent's blocks begin."""
    return _narrow(level, occ, F.pad(occ.sum(1), (1, 0)).cumsum(0))


def _narrow(level: Level, occ: Tensor, ptr: Tensor) -> Tensor:
    """ptr as int32. Raises FormatError."""
    if len(ptr) and int(ptr[-1]) > MOST:
        raise FormatError(_too_many(level, occ) or f"{level} counts its slots in 32 bits")
    return ptr.to(torch.int32)
