"""Budgets: what all linears and convolutions of a model may cost afterwards, and how many units of each group have to leave for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sparsecc.autotune.cost import Machine, predict_dense
from sparsecc.errors import SpecError
from sparsecc.prune.calibrate import call, evaluating
from sparsecc.prune.criteria import keep_ratios
from sparsecc.prune.groups import Group

Cost = Callable[[int, int, int], float]
"""(rows N, columns K, tokens M) of y[M, N] = x[M, K] W^T -> what it costs, in any unit."""


@dataclass(frozen=True)
class Budget:
    """The pruned model's linears and convolutions cost at most `share` of what they cost dense, on the example inputs.

    most:     the largest fraction of a group that may leave
    multiple: kept units of a group are a multiple of this, where it has so many
    """

    share: float
    cost: Cost
    name: str
    most: float = 0.8
    multiple: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise SpecError(f"{self.name} is the share that stays, between 0 and 1, not {self.share}")
        if not 0 < self.most < 1 or self.multiple < 1:
            raise SpecError(f"{self.name}: most={self.most} must lie between 0 and 1, multiple={self.multiple} be positive")


def flops(share: float, most: float = 0.8, multiple: int = 1) -> Budget:
    """At most `share` of the multiply-adds of linears and convolutions remain."""
    return Budget(share, lambda N, K, M: 2.0 * N * K * M, f"flops({share})", most, multiple)


def latency(share: float, most: float = 0.8, multiple: int = 1, cost: Cost | None = None) -> Budget:
    """At most `share` of the predicted time of linears and convolutions remains, on this machine with torch's threads.

    The time is the roofline of `autotune/cost.py` over measured arithmetic and bandwidth; `cost` puts measured or other times in its place.
    """
    return Budget(share, cost or _seconds(Machine.measured(torch.get_num_threads())), f"latency({share})", most, multiple)


def _seconds(machine: Machine) -> Cost:
    @cache
    def seconds(N: int, K: int, M: int) -> float:
        return predict_dense(N, K, M, machine) if N and K else 0.0

    return seconds


@dataclass(frozen=True)
class _Layer:
    """A weight [N, K] that M tokens go through, and which groups take of its rows and columns: [(group, member)]."""

    N: int
    K: int
    M: int
    parts: tuple[tuple[int, Any], ...]


class Steps:
    """The order in which a group's units leave. With grouped query heads, one of every key/value head leaves at a time, so that all keep
    the same number."""

    def __init__(self, group: Group, score: Tensor) -> None:
        self.group = group
        if group.owner is None or int(group.owner.max()) + 1 == group.units:
            self.order = score.argsort(stable=True)[:, None]
        else:
            counts = group.owner.bincount()
            if not bool((counts == counts[0]).all()):
                raise SpecError(f"{group.name}: groups that do not divide: its key/value heads serve {counts.tolist()} query heads")
            each = [(group.owner == o).nonzero()[:, 0] for o in range(len(counts))]
            self.order = torch.stack([heads[score[heads].argsort(stable=True)] for heads in each], 1)
        self.scores = score[self.order].sum(1)

    def __len__(self) -> int:
        return len(self.order)

    def removed(self, count: int) -> Tensor:
        """bool[units] after so many steps."""
        gone = torch.zeros(self.group.units, dtype=torch.bool)
        gone[self.order[:count].reshape(-1)] = True
        return gone

    def at_sparsity(self, sparsity: float) -> int:
        """The steps for at least this fraction of units. Raises SpecError if none would be left."""
        kept = int((1 - sparsity) * len(self) + 1e-9)
        if kept < 1:
            what = "channels" if self.group.size == 1 else "heads"
            raise SpecError(f"{self.group.name}: {self.group.pattern} would leave none of its {self.group.units} {what}: ask for less")
        return len(self) - kept


def allocate(model: nn.Module, steps: Sequence[Steps], budget: Budget, example: Any, importance: Tensor | None) -> list[int]:
    """How many steps each group takes so that the budget is met.

    Without `importance` all steps compete: the lowest score (relative to its group's mean) per cost saved goes first. With it (CFSP, one
    number a group) kept widths are in proportion to `keep_ratios`. Raises SpecError if the budget is out of reach.
    """
    layers = _layers(model, [s.group for s in steps], example)

    def cost(counts: Sequence[int]) -> float:
        return sum(_cost(layer, steps, counts, budget.cost) for layer in layers)

    caps = [min(len(s) - 1, int(budget.most * len(s))) for s in steps]
    dense = cost([0] * len(steps))
    target = budget.share * dense
    if (least := cost(_rounded(caps, steps, caps, budget.multiple))) > target:
        raise SpecError(
            f"{budget.name} is out of reach: with {100 * budget.most:g} % of every named group removed, {least / dense:.2f} of the cost "
            "stays. Name more layers, or raise most="
        )
    plans = _by_score(steps, caps, cost, dense) if importance is None else _by_block(steps, caps, importance)
    low, high = 0, len(plans) - 1
    while low < high:
        middle = (low + high) // 2
        if cost(_rounded(plans[middle], steps, caps, budget.multiple)) <= target:
            high = middle
        else:
            low = middle + 1
    return _rounded(plans[low], steps, caps, budget.multiple)


class _Ranking(Sequence[list[int]]):
    """Plan i: the first i of all steps, in `order` (the group of each)."""

    def __init__(self, order: Tensor, groups: int) -> None:
        self._order, self._groups = order, groups

    def __len__(self) -> int:
        return len(self._order) + 1

    def __getitem__(self, i: int) -> list[int]:  # type: ignore[override]  # slices are not asked for
        return self._order[:i].bincount(minlength=self._groups).tolist()


def _by_score(steps: Sequence[Steps], caps: Sequence[int], cost: Callable[[Sequence[int]], float], dense: float) -> Sequence[list[int]]:
    keys, owners = [], []
    for g, one in enumerate(steps):
        half = [max(1, len(one) // 2) if i == g else 0 for i in range(len(steps))]
        saved = max((dense - cost(half)) / half[g], 1e-12 * dense)
        relative = one.scores / one.scores.mean().clamp(min=1e-300)
        keys.append((relative / saved)[: caps[g]])
        owners.append(torch.full((caps[g],), g))
    return _Ranking(torch.cat(owners)[torch.cat(keys).argsort(stable=True)], len(steps))


def _by_block(steps: Sequence[Steps], caps: Sequence[int], importance: Tensor) -> Sequence[list[int]]:
    ratios = keep_ratios(importance).tolist()
    plans = []
    for thousandths in range(0, 1001):
        scale = (1000 - thousandths) / 1000 / min(ratios)
        plans.append([min(cap, len(s) - min(len(s), int(scale * r * len(s)))) for s, cap, r in zip(steps, caps, ratios, strict=True)])
    return plans


def _rounded(counts: Sequence[int], steps: Sequence[Steps], caps: Sequence[int], multiple: int) -> list[int]:
    """Kept steps down to a multiple; a group that has no multiple to keep keeps what it has."""
    out = []
    for count, one in zip(counts, steps, strict=True):
        kept = len(one) - count
        out.append(len(one) - (max(multiple, kept - kept % multiple) if len(one) >= multiple and count else kept))
    return out


def _layers(model: nn.Module, groups: Sequence[Group], example: Any) -> list[_Layer]:
    """Every linear and convolution that the example goes through."""
    found: dict[str, _Layer] = {}
    parts: dict[str, list[tuple[int, Any]]] = {}
    for g, group in enumerate(groups):
        for member in group.members:
            if member.role != "scales":
                parts.setdefault(member.name, []).append((g, member))
    names = _weight_names(model)
    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and id(module.weight) in names:
            hooks.append(module.register_forward_hook(_counter(names[id(module.weight)], parts, found)))
    try:
        with torch.no_grad(), evaluating(model):
            call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())


def _counter(name: str, parts: Mapping[str, list[tuple[int, Any]]], found: dict[str, _Layer]) -> Any:
    def hook(module: Any, args: Any, output: Tensor) -> None:
        N = module.weight.shape[0]
        before = found[name].M if name in found else 0
        found[name] = _Layer(N, module.weight.numel() // N, before + output.numel() // N, tuple(parts.get(name, ())))

    return hook


def _weight_names(model: nn.Module) -> dict[int, str]:
    first: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        first.setdefault(id(p), name)
    return first


def _cost(layer: _Layer, steps: Sequence[Steps], counts: Sequence[int], cost: Cost) -> float:
    rows = cols = 1.0
    for g, member in layer.parts:
        if counts[g]:
            dead = float(steps[g].group.dead(member, steps[g].removed(counts[g])).double().mean())
            rows, cols = (rows - dead, cols) if member.role == "writes" else (rows, cols - dead)
    return cost(round(layer.N * max(rows, 0.0)), round(layer.K * max(cols, 0.0)), layer.M)
