"""N:M with its positions packed into bits: what a kernel that is bound by bytes reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.errors import FormatError

from .level import NM, Arrays, Size, ceil_div


@dataclass(frozen=True)
class PackedNM(NM):
    """`packed_nm(n, m)`: as nm, the n positions of a group in one code of `bits` bits, the first position lowest.

    m is a power of two. Codes of less than a byte share bytes, the first group in the lowest bits; each parent begins a byte.
    idx uint8[P, ceil(groups * bits / 8)] for up to 8 bits, else uint16[P, groups]. 2:4 takes 4 bits a group, 1:4 takes 2.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.m & (self.m - 1) or self._width > 16:
            raise FormatError(f"packed_nm(n, m) needs m a power of two and n * log2(m) <= 16, got ({self.n}, {self.m})")

    def __str__(self) -> str:
        return f"packed_nm({self.n}, {self.m})"

    @property
    def bits(self) -> int:
        """Of one group's code: a power of two."""
        return 1 << max(0, self._width - 1).bit_length()

    @property
    def per_word(self) -> int:
        """Groups in one element of `idx`."""
        return max(1, 8 // self.bits)

    def pack(self, occ: Tensor) -> tuple[Arrays, Tensor]:
        arrays, slots = super().pack(occ)
        groups = ceil_div(occ.shape[1], self.m)
        offsets = arrays["idx"].to(torch.int32).view(len(occ), groups, self.n)
        codes = (offsets << self._shifts(self.n, self._position)).sum(-1, dtype=torch.int32)
        codes = F.pad(codes, (0, -groups % self.per_word)).view(len(occ), ceil_div(groups, self.per_word), self.per_word)
        words = (codes << self._shifts(self.per_word, self.bits)).sum(-1, dtype=torch.int32)
        return {"idx": words.to(self.dtypes(0)["idx"])}, slots

    def unpack(self, arrays: Mapping[str, Tensor], P: int, C: int) -> Tensor:
        groups = ceil_div(C, self.m)
        words = arrays["idx"].to(torch.int32).view(P, ceil_div(groups, self.per_word), 1)
        codes = (words >> self._shifts(self.per_word, self.bits)) & ((1 << self.bits) - 1)
        codes = codes.view(P, ceil_div(groups, self.per_word) * self.per_word, 1)[:, :groups]
        offsets = (codes >> self._shifts(self.n, self._position)) & (self.m - 1)
        return super().unpack({"idx": offsets.to(torch.uint8)}, P, C)

    def dtypes(self, C: Size) -> dict[str, torch.dtype]:
        return {"idx": torch.uint8 if self.bits <= 8 else torch.uint16}

    def nbytes(self, P: Size, C: Size, S: Size) -> Size:
        return P * ceil_div(ceil_div(C, self.m), self.per_word) * self.dtypes(C)["idx"].itemsize

    @property
    def _position(self) -> int:
        """Bits of one position."""
        return self.m.bit_length() - 1

    @property
    def _width(self) -> int:
        """Bits of one group before rounding up."""
        return self.n * self._position

    @staticmethod
    def _shifts(count: int, step: int) -> Tensor:
        return step * torch.arange(count, dtype=torch.int32)
