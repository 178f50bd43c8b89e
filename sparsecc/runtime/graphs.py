"""A whole module as one launch: CUDA graphs for programs whose sizes are fixed."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsecc.ir.effects import mutates
from sparsecc.ir.infer import value_of
from sparsecc.ir.program import Program

WARM_UP = 2
"""Calls before the capture: kernels compile, caches and workspaces are allocated."""


def capturable(program: Program) -> bool:
    """Whether every size is fixed, every input is on the GPU, and nothing but results is written."""
    for node in program.graph.nodes:
        if node.op != "output" and mutates(node):
            return False
    values = [value_of(node) for node in program.inputs]
    return bool(values) and all(
        isinstance(value, torch.Tensor) and value.device.type == "cuda" and all(isinstance(size, int) for size in value.shape)
        for value in values
    )


@dataclass(frozen=True)
class _Captured:
    graph: Any
    inputs: list[torch.Tensor]
    outputs: list[Any]


class Graphed:
    """fn(*flat inputs) -> flat outputs: `run`, captured once per stream and replayed with the inputs copied in and the outputs out.

    Calls on several streams do not share buffers. Within somebody else's capture `run` itself is recorded. Where the capture fails the
    module goes on uncaptured, with a warning.
    """

    def __init__(self, run: Callable[..., Sequence[Any]]) -> None:
        self._run = run
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._failed = False
        self._lock = threading.Lock()

    def __call__(self, *inputs: torch.Tensor) -> Sequence[Any]:
        if self._failed or torch.cuda.is_current_stream_capturing():
            return self._run(*inputs)
        device = inputs[0].device
        with torch.cuda.device(device), self._lock:
            key = (device.index or 0, torch.cuda.current_stream().cuda_stream)
            if key not in self._captured:
                try:
                    self._captured[key] = self._capture(inputs)
                except RuntimeError as error:
                    self._failed = True
                    first = str(error).partition("\n")[0]
                    warnings.warn(f"sparsecc: no CUDA graph can be captured of this module ({first}); it runs by kernels", stacklevel=2)
            if not self._failed:
                found = self._captured[key]
                for mine, given in zip(found.inputs, inputs, strict=True):
                    mine.copy_(given)
                found.graph.replay()
                return [out.clone() if isinstance(out, torch.Tensor) else out for out in found.outputs]
        return self._run(*inputs)

    def _capture(self, inputs: Sequence[torch.Tensor]) -> _Captured:
        mine = [given.clone() for given in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._run(*mine)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            outputs = list(self._run(*mine))
        return _Captured(graph, mine, outputs)
