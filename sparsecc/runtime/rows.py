"""Calling the kernels that stand between linears of a few tokens: rows of features, and heads that are views of them."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_void_p
from functools import lru_cache

from torch import Tensor

from sparsecc.codegen.tvm.attention_rows import attention_rows_source
from sparsecc.codegen.tvm.backend import TvmBackend
from sparsecc.codegen.tvm.rows import append_source, gate_rows_source, norm_rows_source, rotary_rows_source
from sparsecc.errors import ShapeError
from sparsecc.ir.token_ops import check_mask
from sparsecc.runtime.between import number
from sparsecc.runtime.few import DTYPES
from sparsecc.runtime.record import call, growing, grown, output, set_growing


class RowKernel:
    """A kernel for each dtype, written and loaded when it is first called."""

    def __init__(self, backend: TvmBackend, write: Callable[[str, int], str]) -> None:
        """`write(dtype, lanes)`: the kernel's text."""
        self.backend, self.write = backend, write
        self.code = lru_cache(lambda dtype: backend.load(self.write(DTYPES[dtype], backend.isa.lanes)))

    def source(self, tokens: int = 0, dtype: str = "f32") -> str:
        """The kernel's text."""
        return self.write(dtype, self.backend.isa.lanes)


class NormRows(RowKernel):
    """fn(x [B, S, N], weight [N], bias [N], eps) -> y [B, S, N]."""

    def __init__(self, backend: TvmBackend, kind: str) -> None:
        super().__init__(backend, lambda dtype, lanes: norm_rows_source(kind, dtype, lanes))

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        x, y, N = _rows(x), output(*x.shape, dtype=x.dtype), x.shape[-1]
        if x.numel():
            parts = (x, y, weight, weight if bias is None else bias)
            call(self.code(x.dtype), *_addresses(*parts), number(eps), x.numel() // N, N, x.stride(-2))
        return y


class GateRows(RowKernel):
    """fn(a [B, S, N], b [B, S, N]) -> act(a) * b."""

    def __init__(self, backend: TvmBackend, activation: str) -> None:
        super().__init__(backend, lambda dtype, lanes: gate_rows_source(activation, dtype, lanes))

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        a, b, y, N = _rows(a), _rows(b), output(*a.shape, dtype=a.dtype), a.shape[-1]
        if a.numel():
            call(self.code(a.dtype), *_addresses(a, b, y), a.numel() // N, N, a.stride(-2), b.stride(-2))
        return y


class RotaryRows(RowKernel):
    """fn(x [B, H, S, D], cos and sin [B or 1, 1, S, D]) -> [B, H, S, D], D even."""

    def __init__(self, backend: TvmBackend) -> None:
        super().__init__(backend, rotary_rows_source)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, H, S, D = x.shape
        x, cos, sin = (_consecutive(t) for t in (x, cos, sin))
        y = output(B, S, H, D, dtype=x.dtype)
        if x.numel():
            steps = [step for t in (cos, sin) for step in (t.stride(0) if t.shape[0] > 1 else 0, t.stride(2))]
            call(self.code(x.dtype), *_addresses(x, y, cos, sin), B, H, S, D // 2, *x.stride()[:3], *steps)
        return y.transpose(1, 2)


class AppendRows(RowKernel):
    """fn(cache [B, G, past, D], x [B, G, S, D]) -> contiguous [B, G, past + S, D]."""

    def __init__(self, backend: TvmBackend) -> None:
        super().__init__(backend, append_source)

    def __call__(self, cache: Tensor, x: Tensor) -> Tensor:
        (B, G, past, D), S = cache.shape, x.shape[2]
        grows, cache, x = growing(cache), cache.contiguous(), _consecutive(x)
        y = output(B, G, past + S, D, dtype=x.dtype)
        if grows:
            set_growing(y, S)
        if y.numel():
            call(self.code(x.dtype), *_addresses(cache, x, y), B * G, G, grown(past, 1) if grows else past, S, D, *x.stride()[:3])
        return y


class AttentionRows(RowKernel):
    """fn(q [B, H, S, D], k and v [B, G, Sk, D], mask [(B or 1, H or 1,) S or 1, Sk], None, scale) -> [B, H, S, D]."""

    def __init__(self, backend: TvmBackend, D: int, hides: str) -> None:
        super().__init__(backend, lambda dtype, lanes: attention_rows_source(D, hides, dtype, lanes))
        self.masked = hides == "mask"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tiles: None, scale: float) -> Tensor:
        (B, H, S, D), (G, Sk) = q.shape, k.shape[1:3]
        if v.shape != k.shape:
            raise ShapeError(f"attention: keys are {list(k.shape)} but values {list(v.shape)}")
        y = output(B, S, H, D, dtype=q.dtype)
        if y.numel() == 0 or Sk == 0:
            return y.zero_().transpose(1, 2)
        grows = growing(k) and growing(v)  # both, as a step writes them
        q, k, v = (_consecutive(t) for t in (q, k, v))
        tensors, steps = [q, k, v, y], [step for t in (q, k, v) for step in t.stride()[:3]]
        if grows:  # they are contiguous
            steps[3:] = 2 * [grown(G * Sk * D, G * D), grown(Sk * D, D), D]
        addresses = [*_addresses(*tensors), number(scale)]
        if self.masked:
            assert mask is not None
            check_mask(mask, S, Sk)
            mask = mask.contiguous()
            addresses += _addresses(mask)
            sizes = (1, 1, *mask.shape[:-1])[-3:]
            rows = [(size > 1) * step for size, step in zip(sizes, (0, 0, *mask.stride()[:-1])[-3:], strict=True)]
            steps += [grown(step, step // Sk) for step in rows] if grows else rows
        call(self.code(q.dtype), *addresses, B, H, S, grown(Sk, 1) if grows else Sk, H // G, *steps)
        return y.transpose(1, 2)


def _addresses(*tensors: Tensor) -> list[c_void_p]:
    return [c_void_p(t.data_ptr()) for t in tensors]


def _rows(x: Tensor) -> Tensor:
    """[B, S, N] whose tokens are equally far apart, each with its features side by side."""
    B, S, _ = x.shape
    even = x.stride(-1) == 1 and (B == 1 or S == 1 or x.stride(0) == S * x.stride(1))
    if even and S == 1 and B > 1 and x.stride(1) != x.stride(0):
        return x.as_strided(x.shape, (x.stride(0), x.stride(0), 1))
    return x if even else x.contiguous()


def _consecutive(x: Tensor) -> Tensor:
    """With its features side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()
