"""The short way to a GPU kernel: what a call of one shape has to look at and write, and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecc.codegen.triton.driver import STREAM_AT, Driver, Prepared
from sparsecc.errors import TargetError

Call = Callable[[Tensor, list[Tensor], "Tensor | None", "Tensor | None"], "Tensor | None"]

SHAPES = 64
"""Shapes that a thread keeps prepared for one kernel."""


WEIGHTS = 1024
"""Layers of one shape whose addresses are kept. Packed weights are the compiler's own, so they stay where they are."""


class PerThread(threading.local):
    """`calls`: prepared calls by the shape of x."""

    def __init__(self) -> None:
        self.calls: dict[torch.Size, Call] = {}


@dataclass(frozen=True)
class Facts:
    """What a prepared call relies on. `shape` and `dtype` are y's. `zero`: what stands for a missing bias; `scratch(stream)`:
    addresses of partial sums and counters for the tiles of this shape, None if the kernel does not split."""

    shape: torch.Size
    dtype: torch.dtype
    zero: Tensor
    residual: bool
    scratch: Callable[[int], list[int]] | None


def prepared_call(facts: Facts, launch: Prepared, driver: Driver) -> Call:
    """fn(x, params, bias, residual) -> y, or None for arguments that are not as they were when this was made.

    Layers of one shape share it. Everything a call needs is a local of this function: an attribute costs as much as a check. y is made
    like a tensor of y's shape that has memory for one element, which torch does in less than half of the time of `torch.empty(shape)`.
    """
    shape, dtype, scratch, with_residual, features = facts.shape, facts.dtype, facts.scratch, facts.residual, facts.shape[-1]
    at, zero, like = facts.zero.get_device(), facts.zero.data_ptr(), facts.zero.new_empty(1).expand(facts.shape)
    current_device, stream_of, capturing = driver.device, driver.stream, driver.capturing
    address, empty_like = Tensor.data_ptr, torch.empty_like
    write, memory, run, (config, function, table, extra) = launch.write, launch.memory, launch.launch, launch.given
    weights: dict[int, tuple[Tensor, list[int]]] = {}

    def addresses_of(params: list[Tensor]) -> list[int] | None:
        if params[-1].get_device() != at:
            return None
        if len(weights) >= WEIGHTS:
            weights.clear()
        weights[id(params[-1])] = (params[-1], found := [address(param) for param in params])
        return found

    def call(x: Tensor, params: list[Tensor], bias: Tensor | None, residual: Tensor | None) -> Tensor | None:
        here, last = address(x), params[-1]
        if here & 15 or x.dtype is not dtype or not x.is_contiguous() or not x.get_device() == at == current_device():
            return None
        known = weights.get(id(last))
        packed = known[1] if known is not None and known[0] is last else addresses_of(params)
        if packed is None:
            return None
        added = zero
        if bias is not None:
            added = address(bias)
            if added & 15 or bias.dtype is not dtype or bias.get_device() != at or bias.numel() != features or not bias.is_contiguous():
                return None
        rest = packed
        if with_residual:
            if residual is None or residual.shape != shape or residual.dtype is not dtype or residual.get_device() != at:
                return None
            there = address(residual)
            if there & 15 or not residual.is_contiguous():
                return None
            rest = [there, *packed]
        stream = stream_of(at)
        if scratch is not None:
            if capturing():
                return None
            rest = rest + scratch(stream)
        y = empty_like(like)
        write(memory, STREAM_AT, stream, here, address(y), added, *rest)
        if failed := run(config, function, table, extra):
            raise TargetError(f"the GPU's driver refused a launch: CUDA error {failed}")
        return y

    return call
