"""What a model's feed-forward blocks do on data: the activations that thresholds are set by, and how many are zero.

The blocks are found by `passes/ffn.py`, so this needs no module names and serves every model that `neurons` serves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsecc.capture import capture
from sparsecc.errors import SpecError
from sparsecc.ir.program import Program
from sparsecc.passes.canonicalize import Canonicalize
from sparsecc.passes.ffn import Ffn, find_ffns
from sparsecc.passes.manager import run_passes

UNIONS = (1, 2, 4, 8, 16)
"""Numbers of neighbouring tokens whose active neurons are counted together."""


@dataclass(frozen=True)
class Batch:
    """One block on one batch: `a` [M, F] behind the activation, `up` [M, F] or None, M tokens of all sequences in order."""

    name: str
    ffn: Ffn
    a: Tensor
    up: Tensor | None


def activations(model: nn.Module, data: Iterable[Any]) -> Iterator[Batch]:
    """Every feed-forward block on every batch, as `watched`. Raises SpecError where there are none, too."""

    def find(program: Program) -> tuple[list[Ffn], list[fx.Node]]:
        ffns, missed = find_ffns(program)
        if not ffns:
            raise SpecError("no feed-forward block was recognised in the model" + "".join(f"\n  {line}" for line in missed[:4]))
        return ffns, [node for ffn in ffns for node in _values(ffn) if node is not None]

    for ffns, found in watched(model, data, find):
        for ffn in ffns:
            act, up = _values(ffn)
            yield Batch(ffn.names[0], ffn, found[act], None if up is None else found[up])


def watched(
    model: nn.Module, data: Iterable[Any], find: Callable[[Program], tuple[Any, list[fx.Node]]]
) -> Iterator[tuple[Any, dict[fx.Node, Tensor]]]:
    """For every batch what `find` says of the captured program, and the values [M, ...] of the nodes that it names, M tokens in order.

    `data` yields inputs of the model: a tensor, a tuple, or a dict of keyword arguments. Padding counts like text: give data without it.
    Raises SpecError where there is no data, CaptureError.
    """
    programs: dict[Any, tuple[Any, fx.GraphModule, Any, list[fx.Node]]] = {}
    empty = True
    for inputs in data:
        empty = False
        args, kwargs = _arguments(inputs)
        if isinstance(kwargs, dict) and hasattr(model, "config") and hasattr(model.config, "use_cache"):
            kwargs.setdefault("use_cache", False)
        shape = tuple(tuple(t.shape) for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        if shape not in programs:
            captured = capture(model, args, kwargs)
            program = run_passes(captured.program, (Canonicalize(),), disable=(), stop_after=None).program
            programs[shape] = captured, program.gm, *find(program)
        captured, gm, what, nodes = programs[shape]
        watch = _Watch(gm, nodes)
        with torch.no_grad():
            watch.run(*captured.flatten(args, kwargs), enable_io_processing=False)
        yield what, watch.found
    if empty:
        raise SpecError("calibration data is empty: give an iterable of model inputs")


class _Watch(fx.Interpreter):
    """Runs the program and keeps some of its values."""

    def __init__(self, gm: fx.GraphModule, nodes: Iterable[fx.Node]) -> None:
        super().__init__(gm)
        self.wanted = set(nodes)
        self.found: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.found[n] = value.reshape(-1, value.shape[-1])
        return value


def _values(ffn: Ffn) -> tuple[fx.Node, fx.Node | None]:
    """The nodes of a and of up."""
    return next(iter(ffn.gate.node.users)), None if ffn.up is None else ffn.up.node


def profile(model: nn.Module, data: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """By block: the fraction of activations that are not zero, and of neurons that m neighbouring tokens use together, m in UNIONS.

    What decides whether skipping pays for one token (decode), a few (speculation), or many (Li et al., The Lazy Neuron Phenomenon, 2023).
    """
    sums: dict[str, dict[Any, list[float]]] = {}
    for batch in activations(model, data):
        found = sums.setdefault(batch.name, {})
        used = batch.a != 0
        for m in UNIONS:
            groups = used.shape[0] // m
            if groups:
                together = used[: groups * m].view(groups, m, -1).any(1)
                found.setdefault(m, []).append(together.float().mean().item())
    return {name: {"active": sum(found[1]) / len(found[1]), "union": {m: sum(v) / len(v) for m, v in found.items()}}
            for name, found in sums.items()}


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return ((inputs,) if isinstance(inputs, Tensor) else tuple(inputs)), {}
