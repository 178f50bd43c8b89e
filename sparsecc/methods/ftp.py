"""FTP: a fine-grained token-wise pruner (AMD, arXiv 2412.11494): per block a router sends some tokens past it.

The static router keeps the first token and the latest ones; what decides the quality is how many tokens each block skips. `search` finds
that schedule: a genetic algorithm over the fractions, judged by how far the model's output moves on data, at a cost that is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsecc.autotune.measure import interleaved
from sparsecc.capture import Captured, capture
from sparsecc.errors import SpecError
from sparsecc.passes.canonicalize import Canonicalize
from sparsecc.passes.context import Context
from sparsecc.passes.lower import Lower
from sparsecc.passes.manager import run_passes
from sparsecc.passes.skip import Skip, blocks_under
from sparsecc.skipping import Tokens, ftp
from sparsecc.spec import SparsitySpec

LEVELS = tuple(i / 10 for i in range(10))
"""Fractions that a block may skip."""
MEASURED = (0.0, 0.3, 0.6, 0.9)


@dataclass(frozen=True)
class Found:
    """A schedule, as a value for a sparsity dict; how far the output moves (mean squared, relative to the output's), and the measured cost
    of its blocks as a fraction of the dense ones'."""

    tokens: Tokens
    error: float
    cost: float


class Model:
    """A captured model that can be run with any schedule, on one batch of inputs."""

    def __init__(self, model: nn.Module, inputs: Any, glob: str) -> None:
        args, kwargs = ((), dict(inputs)) if isinstance(inputs, dict) else ((inputs,) if isinstance(inputs, Tensor) else tuple(inputs), {})
        if hasattr(getattr(model, "config", None), "use_cache"):
            kwargs.setdefault("use_cache", False)
        self.glob = glob
        self.captured: Captured = capture(model, args, kwargs)
        self.flat = self.captured.flatten(args, kwargs)
        self.program = run_passes(self.captured.program, (Canonicalize(),), disable=(), stop_after=None).program
        self.blocks = len(blocks_under(self.program, glob))
        if not self.blocks:
            raise SpecError(f"{glob!r} names no transformer block that was recognised")

    def bind(self, schedule: Sequence[float], positions: str = "original") -> Callable[[], Sequence[Any]]:
        """The model with a schedule, op by op."""
        context = Context(SparsitySpec.parse({self.glob: ftp(schedule, positions=positions)}))
        program = run_passes(self.program, (Known(), Skip(), Lower()), context, disable=(), stop_after=None).program
        return lambda: program.run(*self.flat)

    def costs(self, seconds: float = 4.0) -> dict[float, float]:
        """Time by the fraction that every block skips, that of the dense model being 1: the shape of the cost, measured here."""
        calls = {str(s): self.bind([s] * self.blocks) for s in MEASURED}
        times = interleaved(calls, seconds)
        return {s: times[str(s)].ratio for s in MEASURED}


@dataclass(frozen=True)
class Known:
    """Stands for the passes that ran before."""

    name: str = "known"
    requires: tuple[str, ...] = ()
    ensures: tuple[str, ...] = ("linears",)

    def run(self, program: Any, context: Any = None) -> None:
        """Nothing."""


def search(
    model: nn.Module, data: Iterable[Any], skipped: float, glob: str = "*", population: int = 12, generations: int = 10, seed: int = 0,
    costs: dict[float, float] | None = None,
) -> Found:
    """The schedule whose output moves least among those that cost no more than skipping `skipped` in every block.

    data: inputs of the model (tensor, tuple, or dict), of which the first is also timed. `costs`: what `Model.costs` measured.
    Raises SpecError for a fraction outside [0, 1), without data, or without blocks.
    """
    ftp(skipped)
    models = [Model(model, inputs, glob) for inputs in data]
    if not models:
        raise SpecError("ftp search: the data is empty")
    count = models[0].blocks
    costs = costs or models[0].costs()
    price = lambda schedule: sum(cost_at(costs, s) for s in schedule) / count  # noqa: E731
    budget = cost_at(costs, skipped) + 1e-6
    wanted = [output_of(one.bind([0.0] * count)()) for one in models]

    def error(schedule: Sequence[float]) -> float:
        found = [output_of(one.bind(schedule)()) for one in models]
        return sum(float((f - w).square().mean() / w.square().mean()) for f, w in zip(found, wanted, strict=True)) / len(models)

    random = torch.Generator().manual_seed(seed)
    judged: dict[tuple[float, ...], float] = {}

    def judge(schedule: tuple[float, ...]) -> float:
        if schedule not in judged:
            judged[schedule] = error(schedule)
        return judged[schedule]

    start = [fitted(s, price, budget, random) for s in _first(count, skipped, population, random)]
    pool = sorted(set(start), key=judge)
    for _ in range(generations):
        parents = pool[: max(2, population // 3)]
        children = [fitted(_child(parents, random), price, budget, random) for _ in range(population)]
        pool = sorted({*parents, *children}, key=judge)
    best = pool[0]
    return Found(ftp(best), judge(best), price(best) / cost_at(costs, 0.0))


def cost_at(costs: dict[float, float], skipped: float) -> float:
    """The measured cost at a fraction, in a straight line between measured ones."""
    at = sorted(costs)
    low = max((s for s in at if s <= skipped), default=at[0])
    high = min((s for s in at if s >= skipped), default=at[-1])
    return costs[low] if low == high else costs[low] + (costs[high] - costs[low]) * (skipped - low) / (high - low)


def fitted(
    schedule: Sequence[float], price: Callable[[Sequence[float]], float], budget: float, random: torch.Generator
) -> tuple[float, ...]:
    """The schedule with more skipped, at random blocks, until it costs no more than the budget."""
    found = list(schedule)
    while price(found) > budget:
        below = [i for i, s in enumerate(found) if s < LEVELS[-1]]
        if not below:
            break
        i = below[int(torch.randint(len(below), (), generator=random))]
        found[i] = LEVELS[LEVELS.index(found[i]) + 1]
    return tuple(found)


def _first(count: int, skipped: float, population: int, random: torch.Generator) -> list[tuple[float, ...]]:
    """Uniform, the ends spared, and random ones around them."""
    near = min(LEVELS, key=lambda s: abs(s - skipped))
    middle = tuple(0.0 if i in (0, count - 1) and count > 2 else near for i in range(count))
    return [(near,) * count, middle, *(_mutated(middle, random, 0.5) for _ in range(max(0, population - 2)))]


def _child(parents: Sequence[tuple[float, ...]], random: torch.Generator) -> tuple[float, ...]:
    a, b = (parents[int(torch.randint(len(parents), (), generator=random))] for _ in range(2))
    mixed = tuple(x if float(torch.rand((), generator=random)) < 0.5 else y for x, y in zip(a, b, strict=True))
    return _mutated(mixed, random, 0.2)


def _mutated(schedule: Sequence[float], random: torch.Generator, rate: float) -> tuple[float, ...]:
    def step(s: float) -> float:
        if float(torch.rand((), generator=random)) >= rate:
            return s
        at = LEVELS.index(s) + (1 if float(torch.rand((), generator=random)) < 0.5 else -1) * int(torch.randint(1, 4, (), generator=random))
        return LEVELS[min(len(LEVELS) - 1, max(0, at))]

    return tuple(step(s) for s in schedule)


def output_of(values: Sequence[Any]) -> Tensor:
    """The largest output: logits, or the last hidden state."""
    return max((v for v in values if isinstance(v, Tensor)), key=Tensor.numel).double()
