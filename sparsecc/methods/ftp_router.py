"""FTP's learned router, trained (AMD, arXiv 2412.11494): the model stays as it is, 4 x 64 x 1 weights learn which tokens its blocks need.

Three losses: the router imitates the static one, less and less (guide); a block that skips fewer tokens than its schedule says is punished,
one that skips more isn't (constraint); the model's output stays what it was (distillation). Decisions are hard, gradients pass through them
as if they were the probability. In training skipped tokens pass a block unchanged but are keys in it still.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsecc.errors import SpecError
from sparsecc.ir.route_ops import RECEIVED, features, logits, probability, real_tokens, received
from sparsecc.ir.skip_ops import recency
from sparsecc.methods.ftp import Known, Model, output_of
from sparsecc.passes.context import Context
from sparsecc.passes.lower import Lower
from sparsecc.passes.manager import run_passes
from sparsecc.passes.route import Routes, padding
from sparsecc.passes.skip import blocks_under
from sparsecc.routing import FTP_FEATURES, FTP_HIDDEN, FTP_TENSORS, SCHEDULE
from sparsecc.skipping import ftp


def train(
    model: nn.Module, data: Iterable[Any], schedule: Sequence[float] | float, glob: str = "*", steps: int = 60, rate: float = 0.02,
    guide: float = 1.0, constraint: float = 10.0, distillation: float = 1.0, seed: int = 0,
) -> dict[str, Tensor]:
    """A router for `sparsecc.ftp`, with its schedule: a dict that `safetensors.torch.save_file` writes.

    data: inputs of the model (tensor, tuple, or dict), taken in turns. guide, constraint, distillation: weights of the losses, the first of
    which falls to 0 over the steps. Raises SpecError for a bad schedule, without data, or without blocks.
    """
    runs = [Run(model, inputs, glob, ftp(schedule).schedule) for inputs in data]
    if not runs:
        raise SpecError("ftp_router.train: the data is empty")
    if steps < 1:
        raise SpecError(f"ftp_router.train(steps={steps}): 1 or more")
    weights = start(seed)
    optimizer = torch.optim.Adam(weights, rate)
    for step in range(steps):
        run = runs[step % len(runs)]
        moved, decisions = run(weights)
        loss = distillation * moved
        for p, required, static, real in decisions:
            loss = loss + constraint * unmet(p, required, real) + guide * (1 - step / steps) * imitation(p, static, real)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    made = {name: w.detach().clone() for name, w in zip(FTP_TENSORS, weights, strict=True)}
    return {**made, SCHEDULE: torch.tensor(runs[0].schedule, dtype=torch.float32)}


def start(seed: int) -> list[Tensor]:
    """Weights to begin with, in the order of `FTP_TENSORS`."""
    random = torch.Generator().manual_seed(seed)
    made = [torch.randn(FTP_HIDDEN, FTP_FEATURES, generator=random), torch.randn(FTP_HIDDEN, generator=random) / 2,
            torch.randn(1, FTP_HIDDEN, generator=random) / FTP_HIDDEN**0.5, torch.zeros(1)]  # fmt: skip
    return [w.requires_grad_() for w in made]


def unmet(p: Tensor, required: float, real: Tensor) -> Tensor:
    """The constraint, one-sided: the square of how far the fraction of skipped tokens is below the required one; 0 where it is above."""
    skipped = 1 - through(p)[real].mean()
    return (required - skipped).clamp_min(0).square()


def imitation(p: Tensor, static: Tensor, real: Tensor) -> Tensor:
    """Cross-entropy of p f32[B, S] and the static router's decisions bool[B, S]."""
    return F.binary_cross_entropy(p[real].clamp(1e-6, 1 - 1e-6), static[real].float())


def through(p: Tensor) -> Tensor:
    """1 or 0 by p > 0.5, with p's gradient."""
    return (p > 0.5).float() + p - p.detach()


class Run:
    """The model on one batch, with a router's decisions in it: `run(weights)` gives the mean squared change of its output, relative to the
    output's, and per block (p, required fraction, the static router's decisions, tokens that are no padding)."""

    def __init__(self, model: nn.Module, inputs: Any, glob: str, schedule: Sequence[float]) -> None:
        found = Model(model, inputs, glob)
        self.flat = found.flat
        program = found.program.clone()
        blocks = blocks_under(program, glob)
        rule = ftp(schedule)
        self.schedule = tuple(rule.skipped(i, len(blocks)) or 0.0 for i in range(len(blocks)))
        routes = Routes(program, blocks)
        for at, (block, required) in enumerate(zip(blocks, self.schedule, strict=True)):
            if not required:
                continue
            users, graph = list(block.y.users), program.graph
            with graph.inserting_before(block.inside[0]):
                p = graph.call_function(self._decide, (routes.importance(at, padding(block)), block.x, padding(block), required))
            with graph.inserting_after(block.y):
                mixed = graph.call_function(_mixed, (block.x, block.y, p))
            for user in users:
                user.replace_input_with(block.y, mixed)
        for node in program.graph.nodes:
            if node.target is RECEIVED:
                node.target = _received
        self.program = run_passes(program, (Known(), Lower()), Context(), disable=(), stop_after=None).program
        self.wanted = output_of(found.bind([0.0] * len(blocks))())
        self.weights: Sequence[Tensor] = ()
        self.decisions: list[tuple[Tensor, float, Tensor, Tensor]] = []

    def __call__(self, weights: Sequence[Tensor]) -> tuple[Tensor, list[tuple[Tensor, float, Tensor, Tensor]]]:
        self.weights, self.decisions = weights, []
        found = output_of(fx.Interpreter(self.program.gm).run(*self.flat, enable_io_processing=False))
        return (found - self.wanted).square().mean() / self.wanted.square().mean(), self.decisions

    def _decide(self, importance: Tensor, x: Tensor, mask: Tensor | None, required: float) -> Tensor:
        real = real_tokens(mask, *importance.shape, importance.device)  # type: ignore[call-arg]
        p = probability(logits(features(importance, real, required), list(self.weights)))
        order = recency(x, mask)
        keep = (real.sum(-1, keepdim=True) * (1 - required)).ceil()
        static = (order.argsort(-1, descending=True).argsort(-1) < keep) & real
        self.decisions.append((p, required, static, real))
        return p


def _mixed(x: Tensor, y: Tensor, p: Tensor) -> Tensor:
    return x + through(p)[..., None].to(x.dtype) * (y - x)


def _received(q: Tensor, k: Tensor, mask: Tensor | None, count: Tensor | None, scale: float | None, kernel: str) -> Tensor:
    return received(q.detach(), k.detach(), mask, count, scale)
