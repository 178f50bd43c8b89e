"""Running a model on calibration inputs: how it is called, what its layers see, and the gradients of a loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsecc.errors import SpecError

Loss = Callable[[Any, Any], Tensor]
"""(the model's outputs, the inputs) -> a scalar."""


def arguments(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A dict, tuple or tensor of calibration as (args, kwargs); without a KV cache, whose writes tell nothing about weights."""
    if isinstance(inputs, Mapping):
        args, kwargs = (), dict(inputs)
    else:
        args, kwargs = (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}
    parameters = list(inspect.signature(model.forward).parameters)
    if "use_cache" in parameters[len(args) :]:
        kwargs.setdefault("use_cache", False)
    return args, kwargs


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's outputs for one element of calibration."""
    args, kwargs = arguments(model, inputs)
    return model(*args, **kwargs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, each module's own mode afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def input_norms(
    model: nn.Module, modules: Mapping[tuple[str, ...], Sequence[nn.Module]], batches: Iterable[Any]
) -> dict[tuple[str, ...], Tensor]:
    """names of a weight -> root mean square of each input feature over all calibration rows, float64[K]; `modules` share that weight.

    The mean differs from the L2 norm by one factor per weight, which no comparison within it sees, and does not overflow.
    Raises SpecError for modules that are never called or see NaN.
    """
    totals: dict[tuple[str, ...], Tensor] = {}
    counts = dict.fromkeys(modules, 0)

    def watch(names: tuple[str, ...]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            if isinstance(module, nn.Conv2d):  # a channel's norm serves all taps of the window
                x = x.movedim(1, -1).repeat_interleave(module.weight[0, 0].numel(), -1)
            x = x.detach().reshape(-1, x.shape[-1]).float()
            totals[names] = totals.get(names, 0) + x.square().sum(0, dtype=torch.float64).cpu()
            counts[names] += x.shape[0]

        return hook

    watched = [(m, names) for names, shared in modules.items() for m in dict.fromkeys(shared)]
    hooks = [m.register_forward_pre_hook(watch(names), with_kwargs=True) for m, names in watched]
    try:
        with torch.no_grad(), evaluating(model):
            for inputs in batches:
                call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for names, count in counts.items():
        if not count:
            raise SpecError(f"{names[0]} was never called during calibration: exclude it or give inputs that reach it")
        if not totals[names].isfinite().all():
            raise SpecError(f"{names[0]} saw NaN or infinite inputs during calibration")
    return {names: (total / counts[names]).sqrt() for names, total in totals.items()}


def gradients(model: nn.Module, names: Sequence[str], batches: Iterable[Any], loss: Loss | None) -> Iterator[dict[str, Tensor]]:
    """For each element of calibration, d loss / d parameter, for the named parameters that it depends on.

    `loss` defaults to the outputs' own `.loss`, which models of transformers have where labels are given. Raises SpecError without one.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = [parameters[name] for name in names]
    before = [p.requires_grad for p in wanted]
    try:
        for p in wanted:
            p.requires_grad_(True)
        with torch.enable_grad(), evaluating(model):
            for inputs in batches:
                outputs = call(model, inputs)
                value = loss(outputs, inputs) if loss is not None else getattr(outputs, "loss", None)
                if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
                    raise SpecError(
                        'criterion="taylor" needs a loss: a scalar that depends on the weights. Give loss=f(outputs, inputs), or inputs '
                        "with labels for a model that returns one"
                    )
                found = torch.autograd.grad(value, wanted, allow_unused=True)
                yield {name: g for name, g in zip(names, found, strict=True) if g is not None}
    finally:
        for p, flag in zip(wanted, before, strict=True):
            p.requires_grad_(flag)
