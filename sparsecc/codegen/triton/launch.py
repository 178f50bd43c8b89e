"""Launching a kernel: tensors to pointers, and a launch whose arguments nobody looks at again."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsecc.codegen.triton.compiler import MOST_REGISTERS, compiled, function, header, interpreting
from sparsecc.codegen.triton.devices import Device
from sparsecc.codegen.triton.driver import Driver, Loaded, Prepared, cuda_driver, loaded, prepared


class Launch:
    """A kernel's text as fn(grid, tensors, integers). Compiled at the first call, per device of the machine.

    Triton's own launch path looks at every argument at every call; here the handle of the compiled function is kept, and addresses go
    straight to Triton's launcher, or, where `prepared` can be had, to the driver.
    """

    def __init__(self, source: str, device: Device) -> None:
        self.source, self.device = source, device
        self._bound: dict[int, tuple[Any, Any, Any]] = {}
        self._kernels: dict[int, Any] = {}  # Triton unloads a kernel that nobody holds
        self._loaded: dict[int, Loaded | None] = {}
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

    def driver(self) -> Driver | None:
        """What launches `prepared` calls, None where Triton has to."""
        return None if self._function is not None else cuda_driver()

    def prepared(self, at: int, grid: tuple[int, int], pointers: int, numbers: Sequence[int]) -> Prepared | None:
        """The launch with this grid and these integers on a device, for one thread; None where Triton has to launch."""
        driver = self.driver()
        if driver is None:
            return None
        if at not in self._bound:
            self._bind(at)
        kernel = self._loaded[at]
        return None if kernel is None else prepared(kernel, driver.launch, grid, pointers, numbers)

    def _bind(self, at: int) -> tuple[Any, Any, Any]:
        with self._lock, torch.cuda.device(at):
            if at not in self._bound:
                kernel = compiled(self.source, self.device).kernel
                run = kernel.run  # loads it
                if getattr(kernel, "n_spills", 0):
                    kernel = compiled(self.source, self.device, MOST_REGISTERS).kernel
                    run = kernel.run
                kinds = [kind.startswith("*") for kind in header(self.source)[1].values()]
                self._loaded[at] = loaded(kernel, sum(kinds), len(kinds) - sum(kinds))
                self._kernels[at] = kernel
                self._bound[at] = (run, kernel.function, kernel.packed_metadata)
            return self._bound[at]
