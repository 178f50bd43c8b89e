"""Calling the kernels for one token, or a few: what a decoder does hundreds of times per token, so a call is bound once.

A bound call is the bytes that the kernel takes as arguments, but for the addresses of x, the result and the residual. It is found by the
identity of the stored values, which it keeps alive; their addresses are compared, since a tensor may be given other memory.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable
from ctypes import c_void_p
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, empty_like, get_num_threads

from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.tvm.backend import CpuConfig, TvmBackend
from sparsecc.codegen.tvm.few_tiles import tiled
from sparsecc.codegen.tvm.native import REFUSED, RESULT, Native
from sparsecc.codegen.tvm.spmv import GROUP, TILES, WIDE
from sparsecc.codegen.tvm.terms import serves_few
from sparsecc.formats import Format, Panels, Shared
from sparsecc.runtime.record import RECORDERS, call, empty, output, recording

TASK_BYTES = 1 << 19
"""Of a weight that is read for several tiles of tokens: so much stays in a core's cache."""

BOUND = 1024
"""Bound calls that a kernel keeps."""


class _Local(threading.local):
    """A thread's memory for kernels. Defaults, because looking for an attribute that isn't there takes as long as a small kernel."""

    memory: Tensor | None = None
    floats = 0
    address = 0


_LOCAL = _Local()
HEAD, HEAD_RESIDUAL = struct.Struct("6q"), struct.Struct("8q")
"""x, the result, the residual and `work`, as TVM wants them."""

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True, slots=True)
class Bound:
    """The call of one weight, bias, shape and dtype of x, and number of threads.

    `count`: of arguments, `tail`: those behind `work`, which is of `floats`; `first`: the bias, or zeros; `like`: the result's shape and
    dtype. The tensors are kept, so that nothing else gets their identity.
    """

    kernel: Callable[..., int]
    count: ctypes.c_int
    tail: bytes
    floats: int
    params: tuple[Tensor, ...]
    bias: Tensor | None
    first: Tensor
    values_at: int
    first_at: int
    x_shape: torch.Size
    dtype: torch.dtype
    like: Tensor
    threads: int


class FewTokens:
    """fn(x [..., K], params, bias, residual) -> y [..., N], rows of features, in x's dtype."""

    def __init__(self, backend: TvmBackend, spec: KernelSpec, config: CpuConfig, shape: tuple[int, int]) -> None:
        self.backend, self.spec, self.config, self.shape = backend, spec, config, shape
        N, K = shape
        self.shared = any(isinstance(fmt.level, Shared) for fmt in spec.formats)
        self.wide = all(tiled(fmt, backend.isa) for fmt in spec.formats)
        self.few = all(serves_few(fmt, backend.isa) for fmt in spec.formats)
        self._reach = max(_columns(fmt, K) for fmt in spec.formats) // 64 * 64 + 128
        self._pitch = max(fmt.block_rows(N) * fmt.block[0] for fmt in spec.formats) // 64 * 64 + 128
        self._sizes = tuple(size for fmt in spec.formats for size in (fmt.grid(N, K)[1], panels(fmt, N, fmt.grid(N, K)[0])))
        self._last: dict[int, Bound] = {}
        self._none: dict[torch.dtype, Tensor] = {}
        self._code: dict[tuple[int, str], Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def serves(self, tokens: int) -> bool:
        """Whether this is the code for so many tokens."""
        if self.shared:
            return False
        return tokens == 1 or (self.few and tokens <= GROUP)

    def source(self, tokens: int, dtype: str = "f32") -> str:
        """The text of the kernel."""
        tile = self._tile(tokens)
        spec = replace(self.spec, regime="one" if tile == 1 else "few", dtype=dtype, layout="row", ragged=False)
        return self.backend.source(spec, replace(self.config, vectors=tile))

    def _tile(self, tokens: int) -> int:
        """Tokens that the kernel takes together. Up to eight, multiply-adds cost less than expanding into memory."""
        return WIDE if self.wide and tokens > TILES[-1] else next((t for t in TILES if t >= tokens), TILES[-1])

    def load(self, tokens: int, dtype: str) -> Callable[..., Any]:
        """The kernel, compiled when it is first asked for."""
        key = self._tile(tokens), dtype
        if key not in self._code:
            self._code[key] = self.backend.load(self.source(tokens, dtype))
        return self._code[key]

    def quick(self, x: Tensor, params: list[Tensor], bias: Tensor | None, residual: Tensor | None) -> Tensor | None:
        """The result, if the last call with this weight was bound for such tensors; None if not. One function, because this is on every
        call's path: a frame, or an attribute of a tensor, takes a tenth of a microsecond."""
        values = params[-1]
        bound = self._last.get(id(values))
        if (
            bound is None
            or params[0] is not bound.params[0]
            or bias is not bound.bias
            or x.shape != bound.x_shape
            or x.dtype is not bound.dtype
            or values.data_ptr() != bound.values_at
            or (bias is not None and bias.data_ptr() != bound.first_at)
            or get_num_threads() != bound.threads
            or not x.is_contiguous()
            or RECORDERS.recorder is not None
            or (residual is not None and not (residual.dtype is bound.dtype and residual.is_contiguous()))
        ):
            return None
        y = empty_like(bound.like)
        work = _LOCAL.address if _LOCAL.floats >= bound.floats else scratch(bound.floats)
        if residual is None:
            head = HEAD.pack(4, x.data_ptr(), 4, y.data_ptr(), 4, work)
        else:
            head = HEAD_RESIDUAL.pack(4, x.data_ptr(), 4, y.data_ptr(), 4, residual.data_ptr(), 4, work)
        if bound.kernel(None, head + bound.tail, bound.count, RESULT):
            raise RuntimeError(REFUSED.format(1, 1))
        return y

    def __call__(self, x: Tensor, params: list[Tensor], bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """`serves` the number of tokens, which is not 0. The bias is of x's dtype."""
        x = x if x.is_contiguous() else x.contiguous()
        residual = None if residual is None else residual.to(x.dtype).contiguous()
        if not recording() and self._bind(x, params, bias):
            y = self.quick(x, params, bias, residual)
            if y is not None:
                return y
        code, args, floats, keep = self._call(x, params, bias)
        y, work = output(*x.shape[:-1], self.shape[0], dtype=x.dtype), empty(floats)
        call(code, *(c_void_p(t.data_ptr()) for t in (x, y, residual, work) if t is not None), *args)
        del keep
        return y

    def _call(self, x: Tensor, params: list[Tensor], bias: Tensor | None) -> tuple[Callable[..., Any], tuple[Any, ...], int, Tensor]:
        """The code, its arguments behind `work`, the floats of that, and the bias or zeros, whose address is among the arguments."""
        N, K = self.shape
        tokens, threads = x.numel() // K, get_num_threads()
        first = self._zeros(x.dtype) if bias is None else bias.contiguous()
        parts = 1 if tokens <= self._tile(tokens) else max(1, -(-sum(p.nbytes for p in params) // (threads * TASK_BYTES)))
        args = (
            *(c_void_p(tensor.data_ptr()) for tensor in (first, *params)),
            tokens, N, K, self._reach, self._pitch, K, N, N, threads * parts, *self._sizes,
        )  # fmt: skip
        floats = (1 if tokens == 1 else GROUP) * (self._pitch + (3 if self.wide else 2) * self._reach)
        return self.load(tokens, DTYPES[x.dtype]), args, floats, first

    def _bind(self, x: Tensor, params: list[Tensor], bias: Tensor | None) -> bool:
        """Remember the call as the weight's last; False if it cannot be."""
        code, args, floats, first = self._call(x, params, bias)
        if not isinstance(code, Native) or (bias is not None and first is not bias):  # a copy would not see what is written into the bias
            return False
        count = ctypes.c_int((4 if self.spec.residual else 3) + len(args))
        like = torch.empty(*x.shape[:-1], self.shape[0], dtype=x.dtype)
        bound = Bound(
            code.kernel, count, code.tail(args), floats, tuple(params), bias, first, params[-1].data_ptr(), first.data_ptr(),
            x.shape, x.dtype, like, get_num_threads(),
        )  # fmt: skip
        with self._lock:
            while len(self._last) >= BOUND:
                self._last.pop(next(iter(self._last)))
            self._last[id(params[-1])] = bound
        return True

    def _zeros(self, dtype: torch.dtype) -> Tensor:
        """A bias for calls without one. Recorded calls know its address."""
        if dtype not in self._none:
            self._none[dtype] = torch.zeros(self.shape[0], dtype=dtype)
        return self._none[dtype]


def scratch(floats: int) -> int:
    """The address of this thread's memory for kernels, valid until it asks for more."""
    if _LOCAL.floats < floats:
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
