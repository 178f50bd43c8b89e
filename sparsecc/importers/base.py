"""What every importer works with: a checkpoint as plain tensors, and how it gets into a module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsecc.errors import CheckpointError
from sparsecc.formats import Cols, Pattern, Rows

State = dict[str, Tensor]


@dataclass(frozen=True)
class Convention:
    """One way in which published methods leave sparsity behind.

    recognises: (model, checkpoint) -> whether this is it
    load:       (model, checkpoint, **options) -> notes; brings the module into the shape and values that the checkpoint means, in place
    explicit:   only when asked for by name, since what it does is no longer what the checkpoint computes, or cannot be told from it
    """

    name: str
    recognises: Callable[[nn.Module, State], bool]
    load: Callable[..., Iterable[str]]
    explicit: bool = False


@dataclass(frozen=True)
class Imported:
    """A module with its zeros in place, and the pattern of whole rows or columns that each of its linears satisfies, for `sparsity=`."""

    model: nn.Module
    patterns: Mapping[str, Pattern]
    convention: str
    notes: tuple[str, ...] = ()


def ends(state: Mapping[str, Any], *suffixes: str) -> list[str]:
    """The prefixes that have all of these suffixes: "a.b" for "a.b.weight_orig", "a.b.weight_mask"."""
    first, *others = suffixes
    found = [key.removesuffix(first) for key in state if key.endswith(first)]
    return [p for p in found if all(p + other in state for other in others)]


def take(state: State, *keys: str) -> list[Tensor]:
    """Removes these tensors from the checkpoint and returns them. Raises CheckpointError for one that is missing."""
    missing = [key for key in keys if key not in state]
    if missing:
        raise CheckpointError(f"the checkpoint lacks {', '.join(missing)}, which belongs to {keys[0]}")
    return [state.pop(key) for key in keys]


def linear_at(model: nn.Module, name: str, what: str) -> nn.Linear:
    """The linear of that name. Raises CheckpointError naming what the checkpoint has for it."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise CheckpointError(f"{what} belongs to {name}, which is no linear here: build the model that the checkpoint was made of")
    return module


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, under every name."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def check_names(model: nn.Module, state: Mapping[str, Tensor], without: Iterable[str] = ()) -> None:
    """Raises CheckpointError for tensors that the model has no place for, and parameters but `without` that the checkpoint lacks."""
    own = tensors_of(model)
    extra = [key for key in state if key not in own]
    if extra:
        raise CheckpointError(
            f"no importer knows what {', '.join(extra[:4])} means ({len(extra)} such tensors): known are {', '.join(_known())}; "
            "name one with convention=, or bring the checkpoint into the model's own names"
        )
    given = {id(own[key]) for key in state}
    missing = [key for key, p in model.named_parameters() if id(p) not in given and key not in set(without)]
    if missing:
        raise CheckpointError(f"the checkpoint lacks {', '.join(missing[:4])}: it is only a part of this model")


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies a checkpoint into a module; names and shapes are checked first."""
    check_names(model, state)
    own = tensors_of(model)
    wrong = [key for key, value in state.items() if value.shape != own[key].shape]
    if wrong:
        key = wrong[0]
        raise CheckpointError(
            f"{key} is {list(state[key].shape)} in the checkpoint and {list(own[key].shape)} in the model: convention='narrow' takes the "
            "checkpoint's widths"
        )
    with torch.no_grad():
        for key, value in state.items():
            own[key].copy_(value)


def _known() -> list[str]:
    from sparsecc.importers import CONVENTIONS

    return [one.name for one in CONVENTIONS]


def patterns_of(model: nn.Module) -> dict[str, Pattern]:
    """Linears with whole rows or columns of zeros -> a pattern that holds, rows or columns, whichever are more."""
    found: dict[str, Pattern] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not module.weight.numel() or module.weight.layout != torch.strided:
            continue
        nonzero = module.weight.detach() != 0
        rows, cols = (1 - int(nonzero.any(axis).sum()) / nonzero.shape[1 - axis] for axis in (1, 0))
        for share, kind in sorted(((rows, Rows), (cols, Cols)), key=lambda pair: -pair[0]):
            pattern = kind(math.floor(share * 1e4) / 1e4) if 0 < share < 1 else None
            if pattern is not None and pattern.sparsity and pattern.mask_violation(module.weight) is None:
                found[name] = pattern
                break
    return found
