"""The short way to a GPU kernel: what a call of one shape has to look at and write, and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecc.codegen.triton.driver import Driver, Prepared

Call = Callable[[Tensor, list[Tensor], "Tensor | None", "Tensor | None"], "Tensor | None"]

SHAPES = 64
"""Shapes that a thread keeps prepared for one kernel."""


class PerThread(threading.local):
    """`calls`: prepared calls by the shape of x."""

    def __init__(self) -> None:
        self.calls: dict[torch.Size, Call] = {}


@dataclass(frozen=True)
class Facts:
    """What a prepared call relies on. `shape`, `dtype` and `device` are y's. `zero`: what stands for a missing bias; `scratch(stream)`:
    addresses of partial sums and counters for the tiles of this shape, None if the kernel does not split."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    zero: Tensor
    residual: bool
    scratch: Callable[[int], tuple[int, int]] | None


def prepared_call(facts: Facts, launch: Prepared, driver: Driver) -> Call:
    """fn(x, params, bias, residual) -> y, or None for arguments that are not as they were when this was made.

    Layers of one shape share it. Everything a call needs is a local of this function: an attribute costs as much as a check.
    """
    shape, dtype, device, scratch, wanted = facts.shape, facts.dtype, facts.device, facts.scratch, facts.residual
    at, zero, features = facts.zero.get_device(), facts.zero.data_ptr(), facts.shape[-1]
    current_device, stream_of, capturing, empty, address = driver.device, driver.stream, driver.capturing, torch.empty, Tensor.data_ptr

    def call(x: Tensor, params: list[Tensor], bias: Tensor | None, residual: Tensor | None) -> Tensor | None:
        here = address(x)
        if here & 15 or x.dtype is not dtype or not x.is_contiguous():
            return None
        if not x.get_device() == at == params[-1].get_device() == current_device():
            return None
        added = zero
        if bias is not None:
            added = address(bias)
            if added & 15 or bias.dtype is not dtype or bias.get_device() != at or bias.numel() != features or not bias.is_contiguous():
                return None
        y = empty(shape, dtype=dtype, device=device)
        addresses = [here, address(y), added]
        if wanted:
            if residual is None or residual.shape != shape or residual.dtype is not dtype or residual.get_device() != at:
                return None
            there = address(residual)
            if there & 15 or not residual.is_contiguous():
                return None
            addresses.append(there)
        addresses += map(address, params)
        stream = stream_of(at)
        if scratch is not None:
            if capturing():
                return None
            addresses += scratch(stream)
        launch(stream, *addresses)
        return y

    return call
