"""Scores of channels and heads: float64[units] for each group, the lowest leave first.

l1, l2: norm of all weights of a unit, rows that compute it and columns that read it (Li et al., "Pruning Filters for Efficient ConvNets",
        2017; over coupled layers as in Fang et al., "DepGraph", 2023). Biases and norms do not count.
taylor: (sum over its columns of w * dL/dw)^2, mean over calibration: the first-order change of the loss when the unit is zero
        (Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019, group form). The columns suffice, because
        sum w dL/dw = sum h dL/dh for what they read.
cfsp:   share of each weight matrix, times the norm of the activation (Wang et al., "CFSP", 2024, fine step); how much a block turns its
        input is the coarse one. The released code divides along the other axis, where all shares are equal; here they are over channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sparsecc.errors import SpecError
from sparsecc.prune.calibrate import Loss, gradients, input_norms
from sparsecc.prune.groups import Group, Member

Scores = list[Tensor]

STEEPNESS = 26.2
"""CFSP's sigmoid over the mean angle per token: its code sums 128 x 2048 tokens and divides by 1e4."""


def scores(
    model: nn.Module, groups: Sequence[Group], criterion: str, batches: Iterable[Any], loss: Loss | None
) -> tuple[Scores, Tensor | None]:
    """The score of every unit of every group; for cfsp also the importance of each group's block, float64[groups].

    Raises SpecError for a criterion that lacks what it needs, and for scores that are not finite.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    coarse = None
    if criterion in ("magnitude", "l1", "l2"):
        found = [_norms(group, parameters, 2 if criterion == "l2" else 1) for group in groups]
    elif criterion == "taylor":
        found = _taylor(model, groups, parameters, batches, loss)
    else:
        found, coarse = _cfsp(model, groups, parameters, batches)
    for group, score in zip(groups, found, strict=True):
        if len(bad := (~score.isfinite()).nonzero()):
            raise SpecError(
                f"{group.name}: unit {int(bad[0])} of {group.units} has the score {float(score[bad[0]])}: its weights, those coupled "
                "to it, or the calibration hold NaN or infinity"
            )
    return found, coarse


def per_unit(values: Tensor, member: Member, units: int) -> Tensor:
    """Sums a parameter-shaped tensor over the entries of each unit -> float64[units]"""
    over = [d for d in range(values.ndim) if member.units.shape[d] == 1 and values.shape[d] > 1]
    values = values.detach().to("cpu", torch.float64)
    values = (values.sum(over, keepdim=True) if over else values).expand(member.units.shape)
    inside = member.units >= 0
    return torch.zeros(units, dtype=torch.float64).index_add_(0, member.units[inside], values[inside])


def _norms(group: Group, parameters: Mapping[str, Tensor], power: int) -> Tensor:
    total = torch.zeros(group.units, dtype=torch.float64)
    for member in _weights(group):
        total += per_unit(parameters[member.name].detach().double().abs() ** power, member, group.units)
    return total ** (1 / power)


def _weights(group: Group) -> list[Member]:
    """The members that are scored: rows and columns of weights that belong to single units."""
    return [m for m in group.members if m.role != "scales" and not m.shared]


def _taylor(
    model: nn.Module, groups: Sequence[Group], parameters: Mapping[str, Tensor], batches: Iterable[Any], loss: Loss | None
) -> Scores:
    reads = [[m for m in group.members if m.role == "reads"] for group in groups]
    totals = [torch.zeros(group.units, dtype=torch.float64) for group in groups]
    count = 0
    names = list(dict.fromkeys(m.name for members in reads for m in members))
    for found in gradients(model, names, batches, loss):
        count += 1
        for total, members in zip(totals, reads, strict=True):
            change = torch.zeros_like(total)
            for m in members:
                if m.name in found:
                    change += per_unit(parameters[m.name].detach().double() * found[m.name].double(), m, len(total))
            total += change**2
    if not count:
        raise SpecError('criterion="taylor" needs calibration=, an iterable of model inputs; this one is empty')
    return [total / count for total in totals]


def _cfsp(
    model: nn.Module, groups: Sequence[Group], parameters: Mapping[str, Tensor], batches: Iterable[Any]
) -> tuple[Scores, Tensor]:
    readers = []
    for group in groups:
        read = [m for m in group.members if m.role == "reads"]
        if group.owner is not None or len(read) != 1 or any(parameters[m.name].ndim != 2 for m in _weights(group)):
            raise SpecError(f'{group.name}: criterion="cfsp" scores channels of FFNs, which one linear reads: use l1, l2 or taylor')
        readers.append(read[0])
    angles = _Angles(model, [_block_of(model, group.name) for group in groups])
    modules = {m.name: (model.get_submodule(m.name.rpartition(".")[0]),) for m in readers}
    with angles:
        norms = input_norms(model, {(name,): found for name, found in modules.items()}, batches)
    found = []
    for group, reader in zip(groups, readers, strict=True):
        share = torch.zeros(group.units, dtype=torch.float64)
        for member in _weights(group):
            w = parameters[member.name].detach().double().abs()
            axis = 0 if member.units.shape[1] == 1 else 1
            whole = w.sum(axis, keepdim=True)
            share += per_unit(torch.where(whole > 0, w / whole, 0), member, group.units) / w.shape[1 - axis]
        found.append(share * per_unit(norms[reader.name,][None], reader, group.units))
    return found, torch.tensor(angles.means(), dtype=torch.float64)


def keep_ratios(importance: Tensor) -> Tensor:
    """CFSP's coarse step: relative kept widths of blocks, by a sigmoid around the mean importance. float64[groups], mean 1."""
    ratios = torch.sigmoid(STEEPNESS * (importance - importance.mean()))
    return ratios / ratios.mean()


class _Angles(ExitStack):
    """Inside, watches blocks: the mean over tokens of arccos(cos(x_in, x_out)) / pi of each, so how much it turns its input."""

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        super().__init__()
        self._blocks = blocks
        self._sums: dict[str, tuple[float, int]] = {name: (0.0, 0) for name in blocks}
        for name in self._sums:
            self.callback(model.get_submodule(name).register_forward_hook(self._watch(name), with_kwargs=True).remove)

    def means(self) -> list[float]:
        return [total / max(1, count) for total, count in (self._sums[name] for name in self._blocks)]

    def _watch(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            y = output if isinstance(output, Tensor) else next(v for v in output if isinstance(v, Tensor))
            if x.shape != y.shape:
                raise SpecError(f'{name}: criterion="cfsp" compares a block\'s input and output, but these are {x.shape} and {y.shape}')
            cos = torch.cosine_similarity(x.double(), y.double(), dim=-1).clamp(-1, 1)
            total, count = self._sums[name]
            self._sums[name] = (total + float((cos.arccos() / math.pi).sum()), count + cos.numel())

        return hook


def _block_of(model: nn.Module, parameter: str) -> str:
    """The innermost element of a ModuleList or Sequential that holds the parameter: a transformer layer, usually."""
    parts = parameter.split(".")
    for end in range(len(parts) - 2, 0, -1):
        if isinstance(model.get_submodule(".".join(parts[: end - 1])), nn.ModuleList | nn.Sequential):
            return ".".join(parts[:end])
    raise SpecError(f'{parameter}: criterion="cfsp" compares blocks, the elements of a ModuleList or Sequential, and this is in none')
