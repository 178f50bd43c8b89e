"""Calling a GPU kernel: what it cannot read in place is copied, scratch, the result."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsecc.codegen.kernel import DTYPES, KernelSpec, Regime
from sparsecc.codegen.triton.backend import TritonBackend
from sparsecc.codegen.triton.config import GpuConfig
from sparsecc.codegen.triton.facts import regime_of
from sparsecc.codegen.triton.launch import Launch
from sparsecc.codegen.triton.linear import tile_rows, transposes
from sparsecc.errors import ShapeError, TargetError
from sparsecc.runtime.prepared import SHAPES, Facts, PerThread, prepared_call
from sparsecc.runtime.scratch import SCRATCH, Pair, fresh


@dataclass(frozen=True)
class _Plan:
    """What a call needs to know of the kernel for one regime. `tokens`, `scratch`: of a tile, the latter in floats of all its parts."""

    launch: Launch
    rows_of_tiles: int
    tokens: int
    split: int
    scratch: int
    transposes: bool


class GpuLinear:
    """fn(x [..., K], params, bias [N], residual [..., N]) -> y [..., N] contiguous, for one shape, spec and configuration.

    Code for other numbers of tokens is made when it is first needed, from the same stored weight. x may have any strides and
    alignment: what the kernel cannot read in place is copied. Safe on any stream and device, and under CUDA graph capture.
    A shape of contiguous arguments that was seen before takes the short way, see `prepared`. Raises TargetError for tensors of another
    dtype or device than the weight's, ShapeError for x or a weight of another size.
    """

    def __init__(self, backend: TritonBackend, spec: KernelSpec, config: GpuConfig, shape: tuple[int, int]) -> None:
        self.backend, self.spec, self.shape = backend, spec, shape
        self._dtype = DTYPES[spec.dtype]
        self._configs: dict[str, GpuConfig] = {spec.regime: config}
        self._plans: dict[str, _Plan] = {}
        self._zeros: dict[torch.device, Tensor] = {}
        self._mine = PerThread()

    def prepare(self, tokens: int, dtype: torch.dtype | None = None) -> GpuLinear:
        """Make what a call with this many tokens needs."""
        self._plan(regime_of(tokens))
        return self

    def source(self, tokens: int) -> str:
        """The text of the kernel that serves this many tokens."""
        regime = regime_of(tokens)
        return self.backend.source(replace(self.spec, regime=regime), self._config(regime))

    def __call__(self, x: Tensor, params: list[Tensor], bias: Tensor | None, residual: Tensor | None) -> Tensor:
        short = self._mine.calls.get(x.shape)
        if short is not None and (y := short(x, params, bias, residual)) is not None:
            return y
        return self._any(x, params, bias, residual)

    def _any(self, x: Tensor, params: list[Tensor], bias: Tensor | None, residual: Tensor | None) -> Tensor:
        N, K = self.shape
        lead, device = x.shape[:-1], x.device
        tokens = math.prod(lead)
        self._check(x, params, bias, residual)
        y = torch.empty((*lead, N), dtype=x.dtype, device=device)
        if tokens == 0 or N == 0:
            return y
        regime = regime_of(tokens)
        plan = self._plans.get(regime) or self._plan(regime)
        given, x = (x, bias, residual), _rows(x, K)
        tensors, numbers = [x], [tokens, N, K, x.stride(0)]
        if plan.transposes:
            xt = _transposed(x)
            tensors.append(xt)
            numbers.append(xt.stride(0))
        if bias is None:
            bias = self._zero(x)
        elif not bias.is_contiguous() or bias.data_ptr() % 16:
            bias = bias.clone(memory_format=torch.contiguous_format)
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
            tensors += self._scratch(device, tiles * plan.scratch, tiles)
        plan.launch((tiles, plan.split), tensors, numbers)
        if not plan.transposes and K % 16 == 0 and _in_place(*given) and (given[2] is None or given[2].shape == y.shape):
            self._shorten(plan, y, given[0].shape, tiles, len(tensors), numbers)
        return y

    def _check(self, x: Tensor, params: list[Tensor], bias: Tensor | None, residual: Tensor | None) -> None:
        """What a kernel would read as something else, or outside of memory. Raises TargetError, ShapeError."""
        N, K = self.shape
        device, weight = x.device, params[-1].device
        if weight != device:
            raise TargetError(f"the weight is on {weight}, the input on {device}: move the input there")
        for name, tensor in (("the input", x), ("the bias", bias), ("the residual", residual)):
            if tensor is None:
                continue
            if tensor.dtype != self._dtype:
                raise TargetError(f"{name} is {tensor.dtype}, the kernel takes {self._dtype}: cast it, or compile for that dtype")
            if tensor.device != device:
                raise TargetError(f"{name} is on {tensor.device}, the weight on {weight}: move it there")
        if (residual is not None) != self.spec.residual:
            raise ShapeError(f"this kernel was made {'with' if self.spec.residual else 'without'} a residual")
        if x.shape[-1] != K or (bias is not None and bias.shape != (N,)):
            raise ShapeError(f"a layer of {N}x{K} takes inputs of {K} features and {N} biases, got {tuple(x.shape)}")

    def _shorten(self, plan: _Plan, y: Tensor, shape: torch.Size, tiles: int, pointers: int, numbers: list[int]) -> None:
        """Remember how a call with x of this shape is launched, unless Triton has to do it."""
        device, floats = y.device, tiles * plan.scratch
        launch = plan.launch.prepared(y.get_device(), (tiles, plan.split), pointers, numbers)
        driver = plan.launch.driver()
        if launch is None or driver is None or driver.capturing():  # what is allocated while capturing belongs to the graph
            return
        known: dict[int, list[int]] = {}

        def scratch(stream: int) -> list[int]:
            if stream not in known:
                partial, done = SCRATCH.on(device, stream, floats, tiles)
                known[stream] = [partial.data_ptr(), done.data_ptr()]
            return known[stream]

        facts = Facts(y.shape, y.dtype, self._zero(y), self.spec.residual, scratch if plan.split > 1 else None)
        if len(self._mine.calls) >= SHAPES:
            self._mine.calls.clear()
        self._mine.calls[shape] = prepared_call(facts, launch, driver)

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

    def _scratch(self, device: torch.device, floats: int, tiles: int) -> Pair:
        if device.type != "cuda":
            return SCRATCH.on(device, 0, floats, tiles)
        if torch.cuda.is_current_stream_capturing():
            return fresh(device, floats, tiles)
        return SCRATCH.on(device, torch._C._cuda_getCurrentRawStream(device.index), floats, tiles)


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


def _in_place(*tensors: Tensor | None) -> bool:
    """Whether kernels read all of them where they are, whatever row they start with."""
    return all(tensor is None or (tensor.is_contiguous() and tensor.data_ptr() % 16 == 0) for tensor in tensors)


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
