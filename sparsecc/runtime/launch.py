"""Calling a CPU kernel: strides to packing, pointers, scratch, the result in the layout that was planned."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from ctypes import c_void_p
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.tvm.backend import CpuConfig, TvmBackend, whole_chunk
from sparsecc.formats import Dense, Format, Panels
from sparsecc.formats.level import NM
from sparsecc.runtime.record import call, empty, output
from sparsecc.runtime.tokens import rows, sequences, token_minor, token_output

Pointers = tuple[c_void_p, ...]


class LinearKernel:
    """fn(x [..., K], params, bias [N], residual [..., N]) -> y [..., N] for one shape, spec and configuration.

    Safe to call from several threads: all scratch belongs to the call. Code for the other regime (one token, many tokens) is made
    when it is first needed. x may have any strides and alignment; bfloat16 and float16 activations are computed in float32.
    """

    def __init__(self, backend: TvmBackend, spec: KernelSpec, config: CpuConfig, shape: tuple[int, int]) -> None:
        self.backend, self.spec, self.config, self.shape = backend, spec, config, shape
        N, K = shape
        group = math.lcm(*(fmt.block[1] * (fmt.level.m if isinstance(fmt.level, NM) else 1) for fmt in spec.formats))
        grids = [fmt.grid(N, K) for fmt in spec.formats]
        self._padded_k = -(-max(K, *(_reach(fmt, K) for fmt in spec.formats)) // group) * group
        self._chunk = whole_chunk(spec, config)
        pairs = zip(spec.formats, grids, strict=True)
        self._sizes = tuple(size for fmt, (parents, coords) in pairs for size in (coords, _panels(fmt, N, parents)))
        self._width = backend.isa.lanes * config.vectors
        self._zeros = torch.zeros(N)
        self._bound: dict[int, tuple[Sequence[Tensor], Pointers]] = {}
        self._code: dict[str, Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def prepare(self, tokens: int) -> LinearKernel:
        """Compile what a call with this many tokens needs."""
        self._one() if tokens == 1 else self._many()
        return self

    def source(self, tokens: int) -> str:
        """The text of the kernel that serves this many tokens."""
        return self.backend.source(replace(self.spec, regime="one" if tokens == 1 else "many"), self._config(tokens))

    def __call__(self, x: Tensor, params: list[Tensor], bias: Tensor | None, residual: Tensor | None) -> Tensor:
        N = self.shape[0]
        dtype, lead = x.dtype, x.shape[:-1]
        if dtype != torch.float32:
            wide = self(x.float(), params, None if bias is None else bias.float(), None if residual is None else residual.float())
            # The planned strides, which have gaps between features: `to` would close them.
            return torch.empty_strided(wide.shape, wide.stride(), dtype=dtype).copy_(wide)
        tokens = math.prod(lead)
        arrays = self._pointers(params)
        if bias is None:
            bias = self._zeros
        elif bias.dtype != torch.float32 or not bias.is_contiguous():
            bias = bias.float().contiguous()
        if tokens == 0:
            return token_output(N, lead) if self.spec.layout == "token" else x.new_empty((*lead, N))
        return (self._token if tokens == 1 else self._tokens)(x, lead, arrays, bias, residual)

    def _token(self, x: Tensor, lead: Sequence[int], arrays: Pointers, bias: Tensor, res: Tensor | None) -> Tensor:
        N, K = self.shape
        if self._padded_k > K:
            x = torch.nn.functional.pad(x.reshape(1, K), (0, self._padded_k - K))
        elif K > 1 and x.stride(-1) != 1:
            x = x.contiguous()
        pointers = [c_void_p(x.data_ptr()), None, c_void_p(bias.data_ptr())]
        if res is not None:
            res = res.contiguous()
            pointers.append(c_void_p(res.data_ptr()))
        token = self.spec.layout == "token"
        y = empty(N) if token else output(*lead, N)
        pointers[1] = c_void_p(y.data_ptr())
        call(self._one(), *pointers, *arrays, N, self._chunk, *self._sizes)
        return token_output(N, lead).copy_(y.view(*lead, N)) if token else y

    def _tokens(self, x: Tensor, lead: Sequence[int], arrays: Pointers, bias: Tensor, res: Tensor | None) -> Tensor:
        N, token = self.shape[0], self.spec.layout == "token"
        t = sequences(x)
        if not (token or (self._padded_k == self.shape[1] and t.in_place(self.shape[1]))):
            t = rows(x)  # one sequence of all rows fills the tiles better
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

    def _config(self, tokens: int) -> CpuConfig:
        return self.config if tokens > 1 else replace(self.config, vectors=1, unroll=max(self.config.unroll, 4))

    def _one(self) -> Callable[..., Any]:
        return self._code.get("one") or self._load("one", 1)

    def _many(self) -> Callable[..., Any]:
        return self._code.get("many") or self._load("many", 2)

    def _load(self, regime: str, tokens: int) -> Callable[..., Any]:
        with self._lock:
            if regime not in self._code:
                self._code[regime] = self.backend.load(self.source(tokens))
            return self._code[regime]


def _panels(fmt: Format, N: int, parents: int) -> int:
    """Panels of columns: 1 unless the format is swizzled into them."""
    return max(1, parents // fmt.block_rows(N)) if isinstance(fmt.swizzle, Panels) and N else 1


def _reach(fmt: Format, K: int) -> int:
    """Columns that a kernel may read: levels with an index stay on blocks that are kept, all others walk whole panels."""
    whole = fmt.swizzle.width * fmt.block[1] if isinstance(fmt.swizzle, Panels) and isinstance(fmt.level, (Dense, NM)) else 1
    return -(-K // whole) * whole
