"""Calling a CPU kernel: strides to packing, pointers, scratch, the result in the layout that was planned."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from ctypes import c_void_p
from typing import Any

import torch
from torch import Tensor

from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.tvm.backend import CpuConfig, TvmBackend
from sparsecc.codegen.tvm.half import paired
from sparsecc.formats import Dense, Format, Panels
from sparsecc.formats.level import NM
from sparsecc.runtime.few import DTYPES, FewTokens, panels
from sparsecc.runtime.record import call, output, recording
from sparsecc.runtime.tokens import rounded, rows, sequences, token_minor, token_output

Pointers = tuple[c_void_p, ...]


class LinearKernel:
    """fn(x [..., K], params, bias [N], residual [..., N]) -> y [..., N] for one shape, spec and configuration.

    Safe to call from several threads: all scratch belongs to the call. Code for another regime (one token, a few, many) is made when
    it is first needed. x may have any strides and alignment; bfloat16 and float16 activations are computed in float32.
    """

    def __init__(self, backend: TvmBackend, spec: KernelSpec, config: CpuConfig, shape: tuple[int, int]) -> None:
        self.backend, self.spec, self.config, self.shape = backend, spec, config, shape
        N, K = shape
        group = math.lcm(*(fmt.block[1] * (fmt.level.m if isinstance(fmt.level, NM) else 1) for fmt in spec.formats))
        grids = [fmt.grid(N, K) for fmt in spec.formats]
        self._padded_k = -(-max(K, *(_reach(fmt, K) for fmt in spec.formats)) // group) * group
        pairs = zip(spec.formats, grids, strict=True)
        self._sizes = tuple(size for fmt, (parents, coords) in pairs for size in (coords, panels(fmt, N, parents)))
        self._few = FewTokens(backend, spec, config, shape)
        self._quick = self._few.quick if spec.layout == "row" else None
        self._width = backend.isa.lanes * config.vectors
        self._zeros = torch.zeros(N)
        self._bound: dict[int, tuple[Sequence[Tensor], Pointers]] = {}
        self._code: Callable[..., Any] | None = None
        self._lock = threading.Lock()

    def prepare(self, tokens: int, dtype: torch.dtype = torch.float32) -> LinearKernel:
        """Compile what a call with this many tokens needs."""
        if self._few.serves(tokens):
            self._few.load(tokens, DTYPES[dtype])
        else:
            self._many()
        return self

    def source(self, tokens: int) -> str:
        """The text of the kernel that serves this many tokens."""
        return self._few.source(tokens) if self._few.serves(tokens) else self.backend.source(self.spec, self.config)

    def __call__(self, x: Tensor, params: list[Tensor], bias: Tensor | None, residual: Tensor | None) -> Tensor:
        if self._quick is not None and (y := self._quick(x, params, bias, residual)) is not None:
            return y
        N, K = self.shape
        tokens = x.numel() // K if K else math.prod(x.shape[:-1])
        # Several tokens that lie token-minor stay so, and within a chain one does: torch would have to copy it.
        by_rows = (tokens == 1 and not recording()) or (x.stride(-1) == 1 and self.spec.layout == "row")
        known = x.dtype in DTYPES and (bias is None or bias.dtype == x.dtype)
        if tokens and K and by_rows and known and self._few.serves(tokens):
            y = self._few(x, params, bias, residual)
            if self.spec.layout == "row":
                return y
            made = token_output(N, x.shape[:-1])
            return (made if x.dtype == torch.float32 else torch.empty_strided(made.shape, made.stride(), dtype=x.dtype)).copy_(y)
        dtype, lead = x.dtype, x.shape[:-1]
        if dtype != torch.float32:
            wide = self(x.float(), params, None if bias is None else bias.float(), None if residual is None else residual.float())
            # The planned strides, which have gaps between features: `to` would close them.
            return torch.empty_strided(wide.shape, wide.stride(), dtype=dtype).copy_(wide)
        arrays = self._pointers(params)
        if bias is None:
            bias = self._zeros
        elif bias.dtype != torch.float32 or not bias.is_contiguous():
            bias = bias.float().contiguous()
        if tokens == 0:
            return token_output(N, lead) if self.spec.layout == "token" else x.new_empty((*lead, N))
        return self._tokens(x, lead, arrays, bias, residual)

    def _tokens(self, x: Tensor, lead: Sequence[int], arrays: Pointers, bias: Tensor, res: Tensor | None) -> Tensor:
        N, token = self.shape[0], self.spec.layout == "token"
        t = sequences(x)
        if not (token or (self._padded_k == self.shape[1] and t.in_place(self.shape[1]))):
            t = rows(x)  # one sequence of all rows fills the tiles better
        if self.config.dot != "fma":
            t = rounded(self.backend, token_minor(self.backend, t), self.shape[1], self._padded_k, paired(self.spec.formats[0]))
        else:
            t = token_minor(self.backend, t, self._padded_k)
        per = -(-t.S // self._width)
        y = token_output(N, lead) if token else output(*lead, N)
        pointers = [c_void_p(t.tensor.data_ptr()), c_void_p(y.data_ptr()), c_void_p(bias.data_ptr())]
        y_steps, res_steps = sequences(y).steps if token else (N, 0, 0), (0, 0, 0)
        if res is not None:
            r = token_minor(self.backend, res) if token else rows(res)
            if not token and r.by_feature != 1:
                r = rows(res.contiguous())
            res_steps = r.steps if token else (r.by_token, 0, 0)
            pointers.append(c_void_p(r.tensor.data_ptr()))
        call(self._many(), *pointers, *arrays, t.S, N, t.B * per, per, *t.steps, *y_steps, *res_steps, *self._sizes)
        return y

    def _pointers(self, params: list[Tensor]) -> Pointers:
        """Addresses of the packed weight, remembered per weight: the entry keeps the tensors, so an address cannot be reused."""
        key = params[-1].data_ptr()
        found = self._bound.get(key)
        if found is None or any(a is not b and a.data_ptr() != b.data_ptr() for a, b in zip(found[0], params, strict=True)):
            found = (tuple(params), tuple(c_void_p(p.data_ptr()) for p in params))
            self._bound[key] = found
        return found[1]

    def _many(self) -> Callable[..., Any]:
        with self._lock:
            if self._code is None:
                self._code = self.backend.load(self.backend.source(self.spec, self.config))
            return self._code


def _reach(fmt: Format, K: int) -> int:
    """Columns that a kernel may read: levels with an index stay on blocks that are kept, all others walk whole panels."""
    whole = fmt.swizzle.width * fmt.block[1] if isinstance(fmt.swizzle, Panels) and isinstance(fmt.level, (Dense, NM)) else 1
    return -(-K // whole) * whole
