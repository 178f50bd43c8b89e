"""Calling the kernels for one token, or a few: what a decoder does hundreds of times per token, so a call is bound once.

A bound call is the bytes that the kernel takes as arguments, but for the addresses of x, the result and the residual.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from ctypes import c_void_p
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.tvm.backend import CpuConfig, TvmBackend
from sparsecc.codegen.tvm.native import Native
from sparsecc.codegen.tvm.spmv import GROUP, TILES
from sparsecc.codegen.tvm.terms import serves_few
from sparsecc.formats import Format, Panels, Shared
from sparsecc.runtime.record import call, empty, output, recording

TASK_BYTES = 1 << 19
"""Of a weight that is read for several tiles of tokens: so much stays in a core's cache."""

BOUND = 1024
"""Bound calls that a kernel keeps."""

_LOCAL = threading.local()

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class Bound:
    """One weight, bias, number of tokens, dtype and number of threads. `floats`: of `work`; `keep`: tensors whose addresses these are."""

    code: Callable[..., Any]
    fast: Callable[[bytes], None] | None
    tail: bytes
    args: tuple[Any, ...]
    floats: int
    tokens: int
    keep: tuple[Any, ...]


class FewTokens:
    """fn(x [..., K], params, bias, residual) -> y [..., N], rows of features, in x's dtype."""

    def __init__(self, backend: TvmBackend, spec: KernelSpec, config: CpuConfig, shape: tuple[int, int]) -> None:
        self.backend, self.spec, self.config, self.shape = backend, spec, config, shape
        N, K = shape
        self.shared = any(isinstance(fmt.level, Shared) for fmt in spec.formats)
        self.few = all(serves_few(fmt, backend.isa) for fmt in spec.formats)
        self._reach = max(_columns(fmt, K) for fmt in spec.formats) // 64 * 64 + 128
        self._pitch = max(fmt.block_rows(N) * fmt.block[0] for fmt in spec.formats) // 64 * 64 + 128
        self._sizes = tuple(size for fmt in spec.formats for size in (fmt.grid(N, K)[1], panels(fmt, N, fmt.grid(N, K)[0])))
        self._head = struct.Struct("8q" if spec.residual else "6q")
        self._single = {dims: (*(1,) * (dims - 1), N) for dims in range(1, 5)}  # a shape is slow to make
        self._bound: dict[tuple[Any, ...], Bound] = {}
        self._code: dict[tuple[int, str], Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def serves(self, tokens: int) -> bool:
        """Whether this is the code for so many tokens."""
        if self.shared:
            return False
        return tokens == 1 or (self.few and tokens <= GROUP)

    def source(self, tokens: int, dtype: str = "f32") -> str:
        """The text of the kernel."""
        tile = next((t for t in TILES if t >= tokens), TILES[-1])
        spec = replace(self.spec, regime="one" if tile == 1 else "few", dtype=dtype, layout="row", ragged=False)
        return self.backend.source(spec, replace(self.config, vectors=tile))

    def load(self, tokens: int, dtype: str) -> Callable[..., Any]:
        """The kernel, compiled when it is first asked for."""
        key = next((t for t in TILES if t >= tokens), TILES[-1]), dtype
        if key not in self._code:
            self._code[key] = self.backend.load(self.source(tokens, dtype))
        return self._code[key]

    def bound(self, x: Tensor, params: list[Tensor], bias: Tensor | None) -> Bound | None:
        """The call, if it was bound before; x is contiguous."""
        return self._bound.get(_key(x, params, bias))

    def __call__(self, x: Tensor, params: list[Tensor], bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """`serves` the number of tokens, which is not 0. The bias is of x's dtype."""
        x = x if x.is_contiguous() else x.contiguous()
        if bias is not None and not bias.is_contiguous():
            bias = bias.contiguous()
        return self.run(self.bound(x, params, bias) or self._bind(x, params, bias), x, residual)

    def run(self, bound: Bound, x: Tensor, residual: Tensor | None) -> Tensor:
        """One call, on a contiguous x."""
        shape = self._single.get(x.dim()) if bound.tokens == 1 else None
        shape = shape or (*x.shape[:-1], self.shape[0])
        if residual is not None:
            residual = residual if residual.dtype == x.dtype and residual.is_contiguous() else residual.to(x.dtype).contiguous()
        if bound.fast is None or recording():
            y = output(*shape, dtype=x.dtype)
            work = empty(bound.floats)
            call(bound.code, *(c_void_p(t.data_ptr()) for t in (x, y, residual, work) if t is not None), *bound.args)
            return y
        y = torch.empty(shape, dtype=x.dtype)
        work = _work(bound.floats)
        if residual is None:
            head = self._head.pack(4, x.data_ptr(), 4, y.data_ptr(), 4, work)
        else:
            head = self._head.pack(4, x.data_ptr(), 4, y.data_ptr(), 4, residual.data_ptr(), 4, work)
        bound.fast(head + bound.tail)
        return y

    def _bind(self, x: Tensor, params: list[Tensor], bias: Tensor | None) -> Bound:
        N, K = self.shape
        tokens, threads = x.numel() // K, torch.get_num_threads()
        code = self.load(tokens, DTYPES[x.dtype])
        first = torch.zeros(N, dtype=x.dtype) if bias is None else bias
        parts = 1 if tokens <= TILES[-1] else max(1, -(-sum(p.nbytes for p in params) // (threads * TASK_BYTES)))
        args = (
            *(c_void_p(tensor.data_ptr()) for tensor in (first, *params)),
            tokens, N, K, self._reach, self._pitch, K, N, N, threads * parts, *self._sizes,
        )  # fmt: skip
        count = self._head.size // 16 + len(args)
        fast, tail = code.bind(count, args) if isinstance(code, Native) else (None, b"")
        floats = (1 if tokens == 1 else GROUP) * (self._pitch + 2 * self._reach)
        bound = Bound(code, fast, tail, args, floats, tokens, (first, *params))
        with self._lock:
            while len(self._bound) >= BOUND:
                self._bound.pop(next(iter(self._bound)))
            self._bound[_key(x, params, bias)] = bound
        return bound


def _key(x: Tensor, params: list[Tensor], bias: Tensor | None) -> tuple[Any, ...]:
    bias_at = 0 if bias is None else (bias.data_ptr(), bias.stride(0))
    return params[0].data_ptr(), params[-1].data_ptr(), bias_at, x.numel(), x.dtype, torch.get_num_threads()


def _work(floats: int) -> int:
    """The address of this thread's memory for kernels, valid until it asks for more."""
    if getattr(_LOCAL, "floats", 0) < floats:
        _LOCAL.memory, _LOCAL.floats = torch.empty(floats), floats
        _LOCAL.address = _LOCAL.memory.data_ptr()
    return _LOCAL.address


def panels(fmt: Format, N: int, parents: int) -> int:
    """Panels of columns: 1 unless the format is swizzled into them."""
    return max(1, parents // fmt.block_rows(N)) if isinstance(fmt.swizzle, Panels) and N else 1


def _columns(fmt: Format, K: int) -> int:
    """Columns of whole blocks, groups and panels."""
    whole = fmt.block[1] * (fmt.swizzle.width if isinstance(fmt.swizzle, Panels) else getattr(fmt.level, "m", 1))
    return -(-max(K, 1) // whole) * whole
