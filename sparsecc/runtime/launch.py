"""Calling a CPU kernel: strides to packing, pointers, scratch, the result in the layout that was planned."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from ctypes import c_void_p
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.tvm.backend import CpuConfig, TvmBackend
from sparsecc.formats import Panels
from sparsecc.formats.level import NM

Pointers = tuple[c_void_p, ...]

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
            return _token_output(N, 0, lead) if self.spec.layout == "token" else x.new_empty((*lead, N))
        return (self._token if tokens == 1 else self._tokens)(_flat(x, tokens), tokens, lead, arrays, bias, residual)

    def _token(self, x: Flat, tokens: int, lead: Sequence[int], arrays: Pointers, bias: Tensor, res: Tensor | None) -> Tensor:
        N, K = self.shape
        tensor = x.tensor
        if self._padded_k > K:
            tensor = torch.nn.functional.pad(tensor.reshape(1, K), (0, self._padded_k - K))
        elif x.by_feature != 1:
            tensor = tensor.contiguous()
        pointers = [c_void_p(tensor.data_ptr()), None, c_void_p(bias.data_ptr())]
        if res is not None:
            res = res.contiguous()
            pointers.append(c_void_p(res.data_ptr()))
        token_minor = self.spec.layout == "token"
        y = torch.empty(N) if token_minor else torch.empty((*lead, N))
        pointers[1] = c_void_p(y.data_ptr())
        self._one()(*pointers, *arrays, N, self._chunk, *self._sizes)
        if token_minor:
            out = _token_output(N, 1, lead)
            out.view(-1).copy_(y) if out.is_contiguous() else out.copy_(y.view(out.shape))
            return out
        return y

    def _tokens(self, x: Flat, tokens: int, lead: Sequence[int], arrays: Pointers, bias: Tensor, res: Tensor | None) -> Tensor:
        N, K = self.shape
        width, padded_k, backend = self._width, self._padded_k, self.backend
        tiles = -(-tokens // width)
        if x.whole_vectors(tokens, K) and padded_k == K:
            start, x_stride, x_tile = c_void_p(x.tensor.data_ptr()), x.by_feature, width
        else:
            if x.by_feature != 1 and x.by_token != 1:
                x = _flat(x.tensor.contiguous(), tokens)
            by_rows = x.by_feature == 1
            pack = backend.pack_rows() if by_rows else backend.pack_tokens()
            start, x_stride, x_tile = c_void_p(_scratch(tiles * padded_k * width).data_ptr()), width, padded_k * width
            pack(c_void_p(x.tensor.data_ptr()), start, tokens, K, padded_k, x.by_token if by_rows else x.by_feature, width)
        token_minor = self.spec.layout == "token"
        y = _token_output(N, tokens, lead) if token_minor else torch.empty((*lead, N))
        pointers, res_stride = [start, c_void_p(y.data_ptr()), c_void_p(bias.data_ptr())], 0
        if res is not None:
            if token_minor:
                flat = _token_minor(_flat(res, tokens), tokens, N)
                res_stride = flat.by_feature
            else:
                flat = _flat(res, tokens)
                if flat.by_feature != 1:
                    flat = _flat(res.contiguous(), tokens)
                res_stride = flat.by_token
            pointers.append(c_void_p(flat.tensor.data_ptr()))
        y_stride = y.stride(-1) if token_minor else N
        self._many()(*pointers, *arrays, tokens, N, tiles, x_stride, x_tile, y_stride, res_stride, *self._sizes)
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


def _panels(fmt: Any, N: int, parents: int) -> int:
    """Panels of columns: 1 unless the format is swizzled into them."""
    return max(1, parents // -(-N // fmt.block[0])) if isinstance(fmt.swizzle, Panels) and N else 1


@dataclass(frozen=True, slots=True)
class Flat:
    """A tensor [..., F] seen as [M, F] by its strides, without a view being made."""

    tensor: Tensor
    by_token: int
    by_feature: int

    def whole_vectors(self, tokens: int, features: int) -> bool:
        """Token-minor, aligned, and readable up to the next full vector of tokens: a kernel may read it where it is."""
        if self.by_token != 1 or self.by_feature % TOKENS or self.by_feature < tokens:
            return False
        end = self.tensor.storage_offset() + (features - 1) * self.by_feature + -(-tokens // TOKENS) * TOKENS
        return self.tensor.data_ptr() % 64 == 0 and 4 * end <= self.tensor.untyped_storage().nbytes()


def _flat(tensor: Tensor, tokens: int) -> Flat:
    """Copies only if the leading dimensions cannot be walked with one stride."""
    shape, strides = tensor.shape, tensor.stride()
    step, expected = 1, -1
    for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        if size == 1:
            continue
        if expected == -1:
            step = stride
        elif stride != expected:
            return _flat(tensor.contiguous(), tokens)
        expected = stride * size
    if tokens == 1:
        step = shape[-1]
    return Flat(tensor, step, strides[-1] if shape[-1] > 1 else 1)


_LOCAL = threading.local()


def _scratch(floats: int) -> Tensor:
    """Memory that lives as long as the thread, for tiles that are written and read within one call."""
    found = getattr(_LOCAL, "scratch", None)
    if found is None or found.numel() < floats:
        found = _LOCAL.scratch = torch.empty(floats)
    return found


def _token_output(features: int, tokens: int, lead: Sequence[int]) -> Tensor:
    """A fresh token-minor [*lead, N]: a view of [N, L]."""
    padded = -(-tokens // TOKENS) * TOKENS
    strides = [1] * len(lead)
    for i in range(len(lead) - 2, -1, -1):
        strides[i] = strides[i + 1] * lead[i + 1]
    return torch.empty(features, padded).as_strided((*lead, features), (*strides, padded))


def _token_minor(res: Flat, tokens: int, features: int) -> Flat:
    """Readable by the kernel as token-minor vectors: as it is, or a copy."""
    if res.whole_vectors(tokens, features):
        return res
    padded = -(-tokens // TOKENS) * TOKENS
    buffer = torch.zeros(features, padded)
    buffer[:, :tokens] = res.tensor.reshape(tokens, features).t()
    return Flat(buffer, 1, padded)
