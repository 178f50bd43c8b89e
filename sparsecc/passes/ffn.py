"""Feed-forward blocks, found by their dataflow, whatever their modules are called.

    down(act(gate(x)) * up(x))        Llama and its like: SwiGLU, GeGLU, ReGLU
    fc2(act(fc1(x)))                  BERT, ViT, OPT, GPT-2

act is a key of `ACTIVATIONS`. What lies between must be used nowhere else, else skipping it would change more than the block.
"""
from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import fx

from sparsecc.ir.ops import LINEAR
from sparsecc.ir.program import LinearView, Program
from sparsecc.names import Names
from sparsecc.passes.fuse import ACTIVATION_TARGETS, activation_name

aten = torch.ops.aten
PRODUCTS = (aten.mul.Tensor, operator.mul, torch.mul)


@dataclass(frozen=True)
class Ffn:
    """One feed-forward block: its linears (gate or fc1, up or None, down or fc2), activation, and input; `names` of the module it is."""

    gate: LinearView
    up: LinearView | None
    down: LinearView
    activation: str
    x: fx.Node
    names: tuple[str, ...]

    @property
    def linears(self) -> tuple[LinearView, ...]:
        """In the order of the op's weights."""
        return tuple(view for view in (self.gate, self.up, self.down) if view is not None)

    @property
    def width(self) -> int:
        """Neurons."""
        return self.gate.shape[0]


def find_ffns(program: Program) -> tuple[list[Ffn], list[str]]:
    """The blocks, in program order, and what looks like one but isn't: a line each, with the reason."""
    found, missed = [], []
    for down in program.linears():
        hidden = down.x
        if not (is_plain(program, down) and hidden.op in ("call_function", "call_method")):
            continue
        made = _gated(program, down, hidden) if hidden.target in PRODUCTS else _plain(program, down, hidden)
        if isinstance(made, Ffn):
            found.append(made)
        elif made:
            missed.append(f"{_module(program, down)}: {made}")
    return found, missed


def _gated(program: Program, down: LinearView, product: fx.Node) -> Ffn | str | None:
    """down(act(gate(x)) * up(x)); a text says why it only looks so."""
    pair = [a for a in product.args if isinstance(a, fx.Node)]
    if len(pair) != 2 or product.kwargs:
        return None
    for a, b in (pair, pair[::-1]):
        up = _linear(program, b)
        source = a.args[0] if a.args else None
        gate = _linear(program, source)
        if up is None or gate is None or gate.x is not up.x or a is b:
            continue
        name = activation_name(a) if a.target in ACTIVATION_TARGETS else None
        if name is None:
            return f"its gate's activation {a.target} is not one of those that kernels compute"
        if _shared((product, down.node), (a, product), (b, product), (gate.node, a)):
            return "a value inside it is used elsewhere too"
        return Ffn(gate, up, down, name, gate.x, _names(program, (gate, up, down)))
    return None


def _plain(program: Program, down: LinearView, act: fx.Node) -> Ffn | str | None:
    """fc2(act(fc1(x)))"""
    fc1 = _linear(program, act.args[0] if act.args else None)
    if fc1 is None or act.target is LINEAR or fc1.x is down.x:
        return None
    name = activation_name(act) if act.target in ACTIVATION_TARGETS else None
    if name is None:
        one_to_one = len(act.all_input_nodes) == 1 and "view" not in str(act.target) and "transpose" not in str(act.target)
        return f"{act.target} between its linears is not one of the activations that kernels compute" if one_to_one else None
    if _shared((act, down.node), (fc1.node, act)):
        return "a value inside it is used elsewhere too"
    return Ffn(fc1, None, down, name, fc1.x, _names(program, (fc1, down)))


def _linear(program: Program, node: Any) -> LinearView | None:
    if not (isinstance(node, fx.Node) and node.op == "call_function" and node.target is LINEAR):
        return None
    return view if is_plain(program, view := LinearView(node)) else None


def is_plain(program: Program, view: LinearView) -> bool:
    """A plain linear with constant weight and bias, and nothing fused into it."""
    constant = program.is_const(view.params[0]) and (view.bias is None or program.is_const(view.bias))
    return view.plain and constant and not view.epilogue and view.residual is None


def _shared(*links: tuple[fx.Node, fx.Node]) -> bool:
    """Whether any of the values has another user than the one it is said to have."""
    return any(list(value.users) != [user] for value, user in links)


def _module(program: Program, view: LinearView) -> str:
    return Names.found(program).modules(program.weight_name(view.params[0]))[0]


def _names(program: Program, views: Sequence[LinearView]) -> tuple[str, ...]:
    """The module that holds all of the linears, then the linears: what globs may name it by."""
    modules = [_module(program, view) for view in views]
    return (common_module(modules), *modules)


def common_module(modules: Sequence[str]) -> str:
    """The innermost module around all of them."""
    parts = zip(*(name.split(".") for name in modules), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, parts))
