"""Launching a kernel: tensors to pointers, and a launch whose arguments nobody looks at again."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsecc.codegen.triton.compiler import compiled, function, interpreting
from sparsecc.codegen.triton.devices import Device


class Launch:
    """A kernel's text as fn(grid, tensors, integers). Compiled at the first call, per device of the machine.

    Triton's own launch path looks at every argument at every call; here the handle of the compiled function is kept, and addresses go
    straight to the driver's launcher.
    """

    def __init__(self, source: str, device: Device) -> None:
        self.source, self.device = source, device
        self._bound: dict[int, tuple[Any, Any, Any]] = {}
        self._function = function(source) if interpreting() else None
        self._lock = threading.Lock()

    def __call__(self, grid: tuple[int, int], tensors: Sequence[Tensor], numbers: Sequence[int]) -> None:
        if self._function is not None:
            self._function[grid](*tensors, *numbers)
            return
        at = tensors[0].get_device()
        run, handle, metadata = self._bound.get(at) or self._bind(at)
        stream = torch._C._cuda_getCurrentRawStream(at)
        if at == torch.cuda.current_device():
            run(*grid, 1, stream, handle, metadata, None, None, None, *[t.data_ptr() for t in tensors], *numbers)
            return
        with torch.cuda.device(at):
            run(*grid, 1, stream, handle, metadata, None, None, None, *[t.data_ptr() for t in tensors], *numbers)

    def _bind(self, at: int) -> tuple[Any, Any, Any]:
        with self._lock, torch.cuda.device(at):
            if at not in self._bound:
                kernel = compiled(self.source, self.device).kernel
                self._bound[at] = (kernel.run, kernel.function, kernel.packed_metadata)
            return self._bound[at]
