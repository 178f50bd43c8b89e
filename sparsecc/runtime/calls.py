"""A linear with made-up activations, for the contest."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.codegen.config import to_text
from sparsecc.codegen.kernel import FEW
from sparsecc.formats import Format
from sparsecc.ir.ops import ACTIVATIONS
from sparsecc.passes.context import Problem, Tuner

FOOTPRINT, COPIES = 128 << 20, 64
"""Bytes of copies of a weight that is timed with a few tokens on a CPU, and how many copies at most."""


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
        turn = itertools.cycle(self._copies([self.problem.weight.contiguous()]))

        def run() -> Tensor:
            y = self.act(F.linear(self.x, next(turn)[0], self.bias))
            return y if self.res is None else y + self.res

        return run

    def candidate(self, tuner: Tuner, fmt: Format, config: Any) -> Callable[[], Tensor]:
        """A kernel on the packed weight."""
        weight, tokens = self.problem.weight, self.problem.tokens
        shape = (weight.shape[0], weight.shape[1])
        _, made = tuner.kernel((fmt,), self.problem.epilogue, self.res is not None, "row", shape, to_text(config), weight.dtype, tokens)
        kernel: Any = made
        turn = itertools.cycle(self._copies([array.to(weight.device) for array in fmt.pack(weight).values()]))
        kernel.prepare(tokens, weight.dtype)
        return lambda: kernel(self.x, next(turn), self.bias, self.res)

    def _copies(self, params: list[Tensor]) -> list[list[Tensor]]:
        """The weight as often as it takes to find it out of the caches, as a token of a model does whose other layers ran meanwhile. With
        many tokens it is read once for all of them, and a GPU's cache is flushed by the one who times."""
        if self.problem.tokens > FEW or self.problem.weight.device.type != "cpu":
            return [params]
        count = min(COPIES, -(-FOOTPRINT // max(1, sum(p.nbytes for p in params))))
        return [params, *([p.clone() for p in params] for _ in range(count - 1))]

    def reference(self) -> Tensor:
        """float64."""
        y = self.act(F.linear(self.x.double(), self.problem.weight.double(), self.bias.double()))
        return y if self.res is None else y + self.res.double()
