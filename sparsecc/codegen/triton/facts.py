"""What a GPU kernel may rely on: dtypes and divisibility, from the weight and the number of tokens."""

from __future__ import annotations

import torch

from sparsecc.codegen.kernel import FEW, ActivationType, KernelSpec, Regime
from sparsecc.codegen.triton.linear import BSR, family
from sparsecc.codegen.triton.nm import STEP
from sparsecc.errors import TargetError
from sparsecc.formats import Format


def regime_of(tokens: int) -> Regime:
    """Which of the kernels of one stored weight serves so many tokens."""
    return "one" if tokens == 1 else "few" if tokens <= FEW else "many"


def dtype_of(dtype: torch.dtype) -> ActivationType:
    """The spec's name; float32 is multiplied in TF32 where torch may (`torch.set_float32_matmul_precision`). Raises TargetError."""
    if dtype == torch.float32:
        return "f32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    names: dict[torch.dtype, ActivationType] = {torch.float16: "f16", torch.bfloat16: "bf16"}
    if dtype not in names:
        raise TargetError(f"GPU kernels take float32, float16 and bfloat16, not {dtype}: cast the model")
    return names[dtype]


def spec_of(
    formats: tuple[Format, ...], epilogue: str, residual: bool, shape: tuple[int, int], dtype: torch.dtype, tokens: int
) -> KernelSpec:
    """What a kernel for this weight and so many tokens may rely on."""
    N, K = shape
    rows, columns = zip(*(fmt.block if family(fmt) is BSR else (128, STEP) for fmt in formats), strict=True)
    return KernelSpec(
        formats,
        epilogue,
        residual,
        regime=regime_of(tokens),
        ragged=any(N % side for side in rows),
        wide=any(fmt.grid(N, K)[1] > 1 << 16 for fmt in formats),
        tail=any(K % side for side in columns),
        dtype=dtype_of(dtype),
    )
