"""A linear with made-up activations, for the contest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.codegen.config import to_text
from sparsecc.formats import Format
from sparsecc.ir.ops import ACTIVATIONS
from sparsecc.passes.context import Problem, Tuner


class Call:
    """The problem with made-up activations, on the weight's device: as the dense code runs it, as a candidate does, and in float64."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        N, K = problem.weight.shape
        random = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=random).to(problem.weight)  # noqa: E731
        self.x, self.bias = draw(problem.tokens, K), draw(N)
        self.res = draw(problem.tokens, N) if problem.residual else None
        self.act = ACTIVATIONS[problem.epilogue].fn
        lossy = any(str(fmt.codec) != "f32" for fmt in problem.formats)
        self.rounding = 1e-2 if lossy or problem.weight.dtype != torch.float32 else 0.0

    def dense(self) -> Callable[[], Tensor]:
        """torch's own code on the weight as it is."""
        weight = self.problem.weight.contiguous()

        def run() -> Tensor:
            y = self.act(F.linear(self.x, weight, self.bias))
            return y if self.res is None else y + self.res

        return run

    def candidate(self, tuner: Tuner, fmt: Format, config: Any) -> Callable[[], Tensor]:
        """A kernel on the packed weight."""
        weight, tokens = self.problem.weight, self.problem.tokens
        shape = (weight.shape[0], weight.shape[1])
        _, made = tuner.kernel((fmt,), self.problem.epilogue, self.res is not None, "row", shape, to_text(config), weight.dtype, tokens)
        kernel: Any = made
        params = [array.to(weight.device) for array in fmt.pack(weight).values()]
        kernel.prepare(self.problem.tokens)
        return lambda: kernel(self.x, params, self.bias, self.res)

    def reference(self) -> Tensor:
        """float64."""
        y = self.act(F.linear(self.x.double(), self.problem.weight.double(), self.bias.double()))
        return y if self.res is None else y + self.res.double()
