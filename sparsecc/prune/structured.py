"""Removing channels and heads with everything that is coupled to them. Weights keep their size and get zeros; slicing is the compiler's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sparsecc.errors import CaptureError, SpecError
from sparsecc.formats import Channels, Heads
from sparsecc.prune.budget import Budget, Steps, allocate
from sparsecc.prune.calibrate import Loss
from sparsecc.prune.criteria import scores
from sparsecc.prune.flow import trace
from sparsecc.prune.groups import Coupled, Group, coupled_groups, groups_of
from sparsecc.prune.report import PruneRow

CRITERIA = ("magnitude", "l1", "l2", "taylor", "cfsp")


@dataclass(frozen=True)
class How:
    """The arguments of `prune` that concern channels and heads."""

    criterion: str
    calibration: Iterable[Any] | None = None
    example_inputs: Any = None
    loss: Loss | None = None
    budget: Budget | None = None
    groups: Sequence[Coupled] | None = None


@dataclass(frozen=True)
class Removal:
    """The units of a group that leave: bool[units]."""

    group: Group
    units: Tensor


def plan(model: nn.Module, named: Mapping[str, Channels | Heads], insist: Iterable[str], how: How) -> tuple[list[Removal], dict[str, str]]:
    """What is to be removed, and the parameters left alone with the reason. Changes nothing.

    named: parameter -> pattern; those of `insist` raise SpecError where they cannot be pruned so, others are left alone.
    """
    if how.criterion not in CRITERIA:
        raise SpecError(f"criterion={how.criterion!r} compares entries of one weight; channels and heads take {', '.join(CRITERIA)}")
    if how.criterion in ("taylor", "cfsp") and how.calibration is None:
        raise SpecError(f'criterion="{how.criterion}" needs calibration=, an iterable of model inputs')
    _check_floors(named, how.budget)
    example, batches = _first(how)
    skipped: dict[str, str] = {}
    if how.groups is not None:
        groups = coupled_groups(how.groups, named, dict(model.named_modules(remove_duplicate=False)))
    else:
        groups, skipped = groups_of(_trace(model, example, named), named, insist)
    for group in groups:
        _check_members(model, group)
    found, importance = scores(model, groups, how.criterion, batches, how.loss)
    steps = [Steps(group, score) for group, score in zip(groups, found, strict=True)]
    if how.budget is not None and groups:
        if example is None:
            raise SpecError("budget= needs calibration= or example_inputs=: costs are those of one call of the model")
        counts = allocate(model, steps, how.budget, example, importance)
    else:
        counts = [s.at_sparsity(s.group.pattern.sparsity or 0) for s in steps]
    removals = [Removal(s.group, s.removed(count)) for s, count in zip(steps, counts, strict=True)]
    for removal in removals:
        _check_rows(model, removal)
    return removals, skipped


def remove(model: nn.Module, removals: Sequence[Removal]) -> list[PruneRow]:
    """Zeroes what is planned, in place. One row for each weight that changed; biases and norms go along."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = _modules(model)
    before: dict[str, float] = {}
    patterns: dict[str, list[str]] = {}
    with torch.no_grad():
        for removal in removals:
            group = removal.group
            for member in group.members:
                parameter = parameters[member.name]
                if parameter.ndim > 1:
                    before.setdefault(member.name, density(parameter))
                    said = str(group.pattern) if member.name in group.named else f"{group.pattern} of {_module(group.name)}"
                    patterns.setdefault(member.name, []).append(said)
                parameter.masked_fill_(group.dead(member, removal.units).to(parameter.device), 0)
    named = {name for removal in removals for name in removal.group.named}
    return [
        PruneRow(modules[name], "; ".join(dict.fromkeys(patterns[name])), was, now)
        for name, was in before.items()
        if (now := density(parameters[name])) != was or name in named
    ]


def density(weight: Tensor) -> float:
    """Fraction of nonzeros, 0 for an empty weight."""
    return int(weight.count_nonzero()) / weight.numel() if weight.numel() else 0.0


def _module(parameter: str) -> str:
    return parameter.removesuffix(".weight")


def _modules(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Parameter -> the modules that share it, under its first name."""
    groups: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(p), []).append(name)
    return {names[0]: tuple(map(_module, names)) for names in groups.values()}


def _first(how: How) -> tuple[Any, Iterable[Any]]:
    """(an example input or None, the calibration with nothing missing)"""
    batches = iter(how.calibration if how.calibration is not None else ())
    if how.example_inputs is not None:
        return how.example_inputs, batches
    for first in batches:
        return first, chain([first], batches)
    return None, ()


def _trace(model: nn.Module, example: Any, named: Mapping[str, Channels | Heads]) -> Any:
    if example is None:
        name, pattern = next(iter(named.items()))
        raise SpecError(
            f"{_module(name)}: what is coupled to {pattern} is found by following the model on example inputs: give example_inputs= or "
            "calibration=, or name the layers with groups=; rows(...) prunes one weight alone"
        )
    try:
        return trace(model, example)
    except CaptureError as error:
        raise SpecError(f"coupled layers cannot be found: {error}. Name them with groups=[sparsecc.Coupled(rows=..., cols=...)]") from error


def _check_floors(named: Mapping[str, Channels | Heads], budget: Budget | None) -> None:
    for name, pattern in named.items():
        if pattern.sparsity is None and budget is None:
            with_floor = "channels(0.3)" if isinstance(pattern, Channels) else f"heads(0.25, {pattern.dim})"
            raise SpecError(f"{_module(name)}: {pattern} fixes no sparsity: give one, such as {with_floor}, or budget=sparsecc.flops(0.5)")
        if pattern.sparsity is not None and budget is not None:
            raise SpecError(f"{_module(name)}: {pattern} fixes a sparsity and so does {budget.name}: leave one of them out")


def _check_members(model: nn.Module, group: Group) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for member in group.members:
        p = parameters.get(member.name)
        if p is None or not p.is_floating_point() or p.layout != torch.strided or p.is_meta:
            raise SpecError(f"{group.name} is coupled to {member.name}, which is not a plain floating parameter: load or densify it first")


def _check_rows(model: nn.Module, removal: Removal) -> None:
    """Raises SpecError if what is to be removed is not whole rows, or not blocks of rows, of a named weight."""
    group = removal.group
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for member in group.members:
        weight = parameters[member.name]
        if member.name in group.named and member.role == "writes" and weight.ndim == 2 and member.units.shape[1] == 1 and not member.shared:
            kept = (~group.dead(member, removal.units)).expand(weight.shape).float()
            broken = group.pattern.mask_violation(kept)
            if broken:
                raise SpecError(f"{member.name}: {group.pattern} cannot be met: {broken}")
