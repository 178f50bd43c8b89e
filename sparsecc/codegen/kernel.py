"""KernelSpec: what a kernel must compute; the only thing that passes from the compiler to code generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from sparsecc.formats import Format

Regime = Literal["many", "few", "one"]

FEW = 16
"""Up to so many tokens the regime is "few": the time of a linear is that of reading its weight, once for all of them."""

ActivationType = Literal["f32", "tf32", "f16", "bf16"]

DTYPES: dict[ActivationType, torch.dtype] = {"f32": torch.float32, "tf32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class KernelSpec:
    """y[M, N] = epilogue(sum_t W_t x + bias) + residual, W_t [N, K] stored in `formats[t]`, float32 accumulation.

    M, N and K are run-time arguments, so layers of other sizes share the code. `layout` is y's: "row" (features consecutive)
    or "token" (tokens consecutive). `regime` is "many" (vectors along the tokens: prefill, encoders), "few" (M = 2..16) or "one"
    (M = 1: decode). `dtype` is that of x, y, bias and residual: f32, or bf16 and f16 where kernels read those as they are; "tf32" is
    float32 multiplied in TF32. `ragged`: N isn't a multiple of every block's rows; `tail`: K isn't of their columns. `wide`: coordinates
    need 32-bit indices.
    """

    formats: tuple[Format, ...]
    epilogue: str = ""
    residual: bool = False
    layout: str = "row"
    regime: Regime = "many"
    ragged: bool = False
    wide: bool = False
    tail: bool = False
    dtype: ActivationType = "f32"

    def __str__(self) -> str:
        """`linear(bsr(4, 1) + csr) gelu +residual -> row, many`"""
        tail = f" {self.epilogue}" if self.epilogue else ""
        facts = "".join(f", {fact}" for fact in ("ragged", "wide", "tail") if getattr(self, fact))
        facts += f", {self.dtype}" if self.dtype != "f32" else ""
        plus = " +residual" if self.residual else ""
        return f"linear({' + '.join(map(str, self.formats))}){tail}{plus} -> {self.layout}, {self.regime}{facts}"
