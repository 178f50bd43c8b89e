"""Rows that share their columns: what instructions on pairs and tiles of values read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.errors import FormatError

from .level import Arrays, Compressed, Level, Size, ceil_div


@dataclass(frozen=True)
class Shared(Level):
    """`shared(rows, step)`: every `rows` parents store the coordinates that any of them has, padded to whole steps of `step`.

    A step is a matrix [rows, step], stored row by row: an operand of a product of 16-bit values, `step` of them along K at once.
    ptr int32[P / rows + 1]: the first step of each group; idx as in csr, [steps, step], ascending in a group. Padding repeats the
    group's last coordinate, so that a kernel may read there, and its values are zero, as are those that a row lacks.
    """

    rows: int
    step: int
    components = ("ptr", "idx")

    def __post_init__(self) -> None:
        if not all(isinstance(n, int) and 1 <= n <= 64 for n in (self.rows, self.step)):
            raise FormatError(f"shared(rows, step) needs integers from 1 to 64, got ({self.rows}, {self.step})")

    def __str__(self) -> str:
        return f"shared({self.rows}, {self.step})"

    @property
    def window(self) -> int:
        return self.rows

    def pack(self, occ: Tensor) -> tuple[Arrays, Tensor]:
        P, C = occ.shape
        found = occ.view(P // self.rows, self.rows, C).any(1).nonzero()
        counts = torch.bincount(found[:, 0], minlength=P // self.rows)
        steps = ceil_div(counts, self.step)
        ptr = F.pad(steps, (1, 0)).cumsum(0)
        group = torch.repeat_interleave(torch.arange(len(steps)), steps * self.step)
        at = torch.arange(len(group)) - ptr[group] * self.step
        first = F.pad(counts, (1, 0)).cumsum(0)
        coord = found[first[group] + torch.minimum(at, counts[group] - 1), 1]
        idx = coord.to(Compressed().dtypes(C)["idx"])
        arrays: Arrays = {"ptr": ptr.to(torch.int32), "idx": idx}
        return arrays, self._slots(group, coord.masked_fill(at >= counts[group], -1))

    def unpack(self, arrays: Mapping[str, Tensor], P: int, C: int) -> Tensor:
        steps, coord = arrays["ptr"].long().diff(), arrays["idx"].long()
        group = torch.repeat_interleave(torch.arange(len(steps)), steps * self.step)
        repeated = (coord == F.pad(coord, (1, 0), value=-1)[:-1]) & (group == F.pad(group, (1, 0), value=-1)[:-1])
        return self._slots(group, coord.masked_fill(repeated, -1))

    def _slots(self, group: Tensor, coord: Tensor) -> Tensor:
        """long[S, 2] of the coordinates [steps * step] of each group."""
        row = torch.arange(self.rows).view(1, -1, 1)
        parent = group.view(-1, 1, self.step) * self.rows + row
        return torch.stack([parent, coord.view(-1, 1, self.step).expand_as(parent)], -1).reshape(-1, 2)

    def dtypes(self, C: Size) -> dict[str, torch.dtype]:
        return Compressed().dtypes(C)

    def nbytes(self, P: Size, C: Size, S: Size) -> Size:
        return 4 * (P // self.rows + 1) + self.dtypes(C)["idx"].itemsize * (S // self.rows)
