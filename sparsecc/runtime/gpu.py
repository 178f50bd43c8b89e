"""Calling a GPU kernel: what it cannot read in place is copied, scratch, the result."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsecc.codegen.kernel import KernelSpec, Regime
from sparsecc.codegen.triton.backend import TritonBackend
from sparsecc.codegen.triton.config import GpuConfig
from sparsecc.codegen.triton.facts import regime_of
from sparsecc.codegen.triton.linear import tile_rows, transposes
from sparsecc.errors import TargetError


@dataclass(frozen=True)
class _Plan:
    """What a call needs to know of the kernel for one regime. `tokens`, `scratch`: of a tile, the latter in floats of all its parts."""

    launch: Callable[..., Any]
    rows_of_tiles: int
    tokens: int
    split: int
    scratch: int
    transposes: bool


class GpuLinear:
    """fn(x [..., K], params, bias [N], residual [..., N]) -> y [..., N] contiguous, for one shape, spec and configuration.

    Code for other numbers of tokens is made when it is first needed, from the same stored weight. x may have any strides and
    alignment: what the kernel cannot read in place is copied. Safe on any stream and device, and under CUDA graph capture.
    """

    def __init__(self, backend: TritonBackend, spec: KernelSpec, config: GpuConfig, shape: tuple[int, int]) -> None:
        self.backend, self.spec, self.shape = backend, spec, shape
        self._configs: dict[str, GpuConfig] = {spec.regime: config}
        self._plans: dict[str, _Plan] = {}
        self._zeros: dict[torch.device, Tensor] = {}
        self._counters: dict[tuple[torch.device, int], Tensor] = {}
        self._lock = threading.Lock()

    def prepare(self, tokens: int, dtype: torch.dtype | None = None) -> GpuLinear:
        """Make what a call with this many tokens needs."""
        self._plan(regime_of(tokens))
        return self

    def source(self, tokens: int) -> str:
        """The text of the kernel that serves this many tokens."""
        regime = regime_of(tokens)
        return self.backend.source(replace(self.spec, regime=regime), self._config(regime))

    def __call__(self, x: Tensor, params: list[Tensor], bias: Tensor | None, residual: Tensor | None) -> Tensor:
        N, K = self.shape
        lead, device = x.shape[:-1], x.device
        tokens = math.prod(lead)
        y = torch.empty((*lead, N), dtype=x.dtype, device=device)
        if tokens == 0 or N == 0:
            return y
        if params[-1].device != device:
            raise TargetError(f"the weight is on {params[-1].device}, the input on {device}: move the input there")
        regime = regime_of(tokens)
        plan = self._plans.get(regime) or self._plan(regime)
        x = _rows(x, K)
        tensors, numbers = [x], [tokens, N, K, x.stride(0)]
        if plan.transposes:
            xt = _transposed(x)
            tensors.append(xt)
            numbers.append(xt.stride(0))
        if bias is None:
            bias = self._zero(x)
        elif bias.dtype != x.dtype or not bias.is_contiguous() or bias.data_ptr() % 16:
            bias = bias.to(x.dtype).clone(memory_format=torch.contiguous_format)
        tensors += (y, bias)
        if residual is not None:
            residual = residual.expand(*lead, N).reshape(tokens, N)
            if residual.stride(1) != 1 or residual.data_ptr() % 16 or not (self.spec.ragged or residual.stride(0) % 16 == 0):
                residual = residual.clone(memory_format=torch.contiguous_format)
            tensors.append(residual)
            numbers.append(residual.stride(0))
        tensors += params
        tiles = plan.rows_of_tiles * -(-tokens // plan.tokens)
        if plan.split > 1:
            tensors += (torch.empty(tiles * plan.scratch, dtype=torch.float32, device=device), self._counter(device, tiles))
        plan.launch((tiles, plan.split), tensors, numbers)
        return y

    def _config(self, regime: Regime) -> GpuConfig:
        if regime not in self._configs:
            self._configs[regime] = self.backend.space(replace(self.spec, regime=regime))[0]
        return self._configs[regime]

    def _plan(self, regime: Regime) -> _Plan:
        if regime not in self._plans:
            spec, config = replace(self.spec, regime=regime), self._config(regime)
            rows, tokens = tile_rows(spec, config), 1 if regime == "one" else config.bm
            launch = self.backend.load(self.backend.source(spec, config))
            scratch = config.split * rows * tokens
            self._plans[regime] = _Plan(launch, -(-self.shape[0] // rows), tokens, config.split, scratch, transposes(spec))
        return self._plans[regime]

    def _zero(self, x: Tensor) -> Tensor:
        if x.device not in self._zeros:
            self._zeros[x.device] = torch.zeros(self.shape[0], dtype=x.dtype, device=x.device)
        return self._zeros[x.device]

    def _counter(self, device: torch.device, tiles: int) -> Tensor:
        """Counters of finished parts, zero before and after every launch; what may run side by side has its own: streams, and graphs,
        which are captured on one stream and replayed on others."""
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return torch.zeros(tiles, dtype=torch.int32, device=device)
        stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
        with self._lock:
            found = self._counters.get((device, stream))
            if found is None or found.numel() < tiles:
                found = self._counters[device, stream] = torch.zeros(tiles, dtype=torch.int32, device=device)
            return found


@dataclass(frozen=True)
class Elsewhere:
    """A kernel for a device that isn't here: it can be read, not run."""

    backend: TritonBackend
    spec: KernelSpec
    config: Any
    shape: tuple[int, int]

    def source(self, tokens: int) -> str:
        """The text of the kernel, of the regime that it was chosen for."""
        return self.backend.source(self.spec, self.config)

    def __call__(self, x: Tensor, params: list[Tensor], bias: Tensor | None, residual: Tensor | None) -> Tensor:
        raise TargetError(f"this model was compiled for {self.backend.device.target}, to be looked at; on that machine use target='cuda'")


def _rows(x: Tensor, K: int) -> Tensor:
    """x as [M, K] whose rows begin on 16 bytes, 16 elements apart or a multiple of that: the tensor itself, or a copy."""
    flat = x if x.ndim == 2 else x.reshape(-1, K)
    step, along = flat.stride()
    if along == 1 and step % 16 == 0 and step >= K and flat.data_ptr() % 16 == 0:
        return flat
    copy = torch.empty(len(flat), -(-K // 16) * 16, dtype=x.dtype, device=x.device)[:, :K]
    return copy.copy_(flat)


def _transposed(x: Tensor) -> Tensor:
    """x^T [K, M], rows on 16 bytes."""
    tokens, K = x.shape
    return torch.empty(K, -(-tokens // 16) * 16, dtype=x.dtype, device=x.device)[:, :tokens].copy_(x.T)
