"""Codecs: how the values of the stored blocks are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsecc.errors import FormatError

from .level import Arrays, Size


@dataclass(frozen=True)
class Codec:
    """The interface. A block's values lie column-major: val[s, c, r], so a 4x1 block is its 4 rows, a 1x16 block its 16 columns."""

    components: ClassVar[tuple[str, ...]] = ()

    def encode(self, values: Tensor) -> Arrays:
        """float[S, br, bc] -> arrays."""
        raise NotImplementedError

    def decode(self, arrays: Mapping[str, Tensor], block: tuple[int, int]) -> Tensor:
        """arrays -> f32[S, br, bc]."""
        raise NotImplementedError

    def lossless_for(self, values: Tensor) -> bool:
        """Whether decode(encode(values)) == values, NaN counted equal to NaN."""
        raise NotImplementedError

    def refuses(self, values: Tensor) -> str | None:
        """Why `values` (any shape) cannot be written, or None. Rounding is no reason."""
        return None

    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of each component."""
        raise NotImplementedError

    def nbytes(self, count: Size) -> Size:
        """Bytes of `count` values."""
        raise NotImplementedError


@dataclass(frozen=True)
class Raw(Codec):
    """`f32`, `bf16` or `f16`: the values themselves, rounded to that dtype. val[S * bc * br]."""

    dtype: str = "f32"
    components: ClassVar[tuple[str, ...]] = ("val",)
    DTYPES: ClassVar[dict[str, torch.dtype]] = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

    def __post_init__(self) -> None:
        if self.dtype not in self.DTYPES:
            raise FormatError(f"unknown value dtype {self.dtype!r}: known are {', '.join(self.DTYPES)}")

    def __str__(self) -> str:
        return self.dtype

    @property
    def torch_dtype(self) -> torch.dtype:
        return self.DTYPES[self.dtype]

    def encode(self, values: Tensor) -> Arrays:
        return {"val": values.transpose(1, 2).reshape(-1).to(self.torch_dtype).contiguous()}

    def decode(self, arrays: Mapping[str, Tensor], block: tuple[int, int]) -> Tensor:
        rows, cols = block
        val = arrays["val"]
        return val.view(val.numel() // (rows * cols), cols, rows).transpose(1, 2).float()

    def lossless_for(self, values: Tensor) -> bool:
        back = values.to(self.torch_dtype).to(values.dtype)
        return bool(((back == values) | (back.isnan() & values.isnan())).all())

    def refuses(self, values: Tensor) -> str | None:
        if torch.finfo(values.dtype).max <= torch.finfo(self.torch_dtype).max:
            return None
        over = values.isfinite() & values.to(self.torch_dtype).isinf()
        if not over.any():
            return None
        return f"{float(values[over].abs().max()):.4g} is too large for {self} (largest {torch.finfo(self.torch_dtype).max:.4g})"

    def dtypes(self) -> dict[str, torch.dtype]:
        return {"val": self.torch_dtype}

    def nbytes(self, count: Size) -> Size:
        return self.torch_dtype.itemsize * count
