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
from sparsecc.codegen.tvm.backend import CpuConfig, TvmBackend
from sparsecc.formats import Panels
from sparsecc.formats.level import NM

TOKENS = 16
"""Token-minor buffers hold a multiple of this many tokens."""


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
        reach = [_panels(fmt, N, parents) * coords * fmt.block[1] for fmt, (parents, coords) in zip(spec.formats, grids, strict=True)]
        self._padded_k = -(-max(K, *reach) // group) * group
        rows = math.lcm(*(fmt.block[0] for fmt in spec.formats))
        self._chunk = -(-config.chunk // rows) * rows
        pairs = zip(spec.formats, grids, strict=True)
        self._sizes = tuple(size for fmt, (parents, coords) in pairs for size in (coords, _panels(fmt, N, parents)))
        self._width = backend.isa.lanes * config.vectors
        self._zeros = torch.zeros(N)
        self._bound: dict[int, tuple[Sequence[Tensor], tuple[c_void_p, ...]]] = {}
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
        N, K = self.shape
        lead, dtype = x.shape[:-1], x.dtype
        if dtype != torch.float32:
            wide = self(x.float(), params, None if bias is None else bias.float(), None if residual is None else residual.float())
            return wide.to(dtype)  # keeps the strides
        tokens = x.numel() // K if K else math.prod(lead)
        x2 = x if x.dim() == 2 else x.reshape(tokens, K)
        if bias is None:
            bias = self._zeros
        elif bias.dtype != torch.float32 or not bias.is_contiguous():
            bias = bias.float().contiguous()
        res2 = None if residual is None else residual.reshape(tokens, N)
        arrays = self._pointers(params)
        if tokens == 0:
            return _shaped(x.new_empty((N, 0)).t(), lead) if self.spec.layout == "token" else x.new_empty((*lead, N))
        run = self._token if tokens == 1 else self._tokens
        return _shaped(run(x2, tokens, arrays, bias, res2), lead)

    def _token(self, x: Tensor, tokens: int, arrays: tuple[c_void_p, ...], bias: Tensor, res: Tensor | None) -> Tensor:
        N, K = self.shape
        if self._padded_k > K:
            x = torch.nn.functional.pad(x, (0, self._padded_k - K))
        elif x.stride(1) != 1:
            x = x.contiguous()
        if res is not None:
            res = res.contiguous()
        stride = TOKENS if self.spec.layout == "token" else 1
        y = torch.empty(N)
        pointers = [_p(x), _p(y), _p(bias), *([] if res is None else [_p(res)])]
        self._one()(*pointers, *arrays, N, self._chunk, *self._sizes)
        if stride == 1:
            return y.view(1, N)
        out = torch.empty(N, TOKENS)
        out[:, 0] = y
        return out.as_strided((1, N), (1, TOKENS))

    def _tokens(self, x: Tensor, tokens: int, arrays: tuple[c_void_p, ...], bias: Tensor, res: Tensor | None) -> Tensor:
        N, K = self.shape
        width, padded_k = self._width, self._padded_k
        tiles = -(-tokens // width)
        token_minor = self.spec.layout == "token"
        packed = torch.empty(tiles * padded_k * width)
        by_rows = x.stride(1) == 1 or K == 1
        if not by_rows and x.stride(0) != 1:
            x, by_rows = x.contiguous(), True
        pack = self.backend.pack_rows() if by_rows else self.backend.pack_tokens()
        pack(_p(x), _p(packed), tokens, K, padded_k, x.stride(0 if by_rows else 1), width)
        kernel = self._many()
        if token_minor:
            padded = -(-tokens // TOKENS) * TOKENS
            y = torch.empty(N, padded)
            pointers, res_stride = [_p(packed), _p(y), _p(bias)], 0
            if res is not None:
                res = _token_minor(res)
                pointers, res_stride = [*pointers, _p(res)], res.stride(1)
            kernel(*pointers, *arrays, tokens, N, tiles, padded_k, self._chunk, padded, width, res_stride, *self._sizes)
            return y.as_strided((tokens, N), (1, padded))
        tiled = torch.empty(tiles * N * width)
        kernel(_p(packed), _p(tiled), _p(bias), *arrays, tokens, N, tiles, padded_k, self._chunk, width, N * width, 0, *self._sizes)
        y = torch.empty(tokens, N)
        if res is None:
            self.backend.unpack_rows(False)(_p(tiled), _p(y), tokens, N, N, width, 0)
        else:
            res = res if res.stride(1) == 1 else res.contiguous()
            self.backend.unpack_rows(True)(_p(tiled), _p(y), _p(res), tokens, N, N, width, res.stride(0))
        return y

    def _pointers(self, params: list[Tensor]) -> tuple[c_void_p, ...]:
        """Addresses of the packed weight, remembered per weight: the entry keeps the tensors, so an address cannot be reused."""
        key = params[-1].data_ptr()
        found = self._bound.get(key)
        if found is None or any(a is not b and a.data_ptr() != b.data_ptr() for a, b in zip(found[0], params, strict=True)):
            found = (tuple(params), tuple(_p(p) for p in params))
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


def _panels(fmt: Any, N: int, parents: int) -> int:
    """Panels of columns: 1 unless the format is swizzled into them."""
    return max(1, parents // -(-N // fmt.block[0])) if isinstance(fmt.swizzle, Panels) and N else 1


def _p(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())


def _token_minor(res: Tensor) -> Tensor:
    """[M, N] with consecutive tokens, readable up to the next full vector of tokens."""
    tokens, features = res.shape
    padded = -(-tokens // TOKENS) * TOKENS
    if res.stride(0) == 1 and res.stride(1) == padded:
        return res
    buffer = res.new_zeros(features, padded)
    buffer[:, :tokens] = res.t()
    return buffer.as_strided((tokens, features), (1, padded))


def _shaped(y: Tensor, lead: Sequence[int]) -> Tensor:
    """[M, N] -> [*lead, N] without moving data."""
    if len(lead) == 1:
        return y
    strides = [y.stride(0)] * len(lead)
    for i in range(len(lead) - 2, -1, -1):
        strides[i] = strides[i + 1] * lead[i + 1]
    return y.as_strided((*lead, y.shape[1]), (*strides, y.stride(1)))
