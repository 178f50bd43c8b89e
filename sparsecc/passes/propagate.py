"""propagate: features that are always zero, or that nobody reads, leave both linears that they connect.

    h = linear(x, [w1], b1, epilogue="relu");  y = linear(h, [w2], b2)
        row i of w1 and b1[i] zero, or column i of w2 zero
    -->
    h = linear(x, [w1 without row i], b1 without i, epilogue="relu");  y = linear(h, [w2 without column i], b2)

A group is a set of values that share one feature axis: results of linears joined by elementwise ops (a gate times an up
projection), read only by linears. Exact: a dropped feature contributed 0 to every sum (zeros in weights count as exactly 0, see
ir/ops.py). Rows and columns go in whole blocks of the patterns involved, so blocks and N:M groups stay aligned.
"""
from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sparsecc.formats import ANY, NM, Block, Pattern
from sparsecc.ir.effects import mutates
from sparsecc.ir.infer import same_shape
from sparsecc.ir.ops import ACTIVATIONS, LINEAR
from sparsecc.ir.program import TYPE_KEY, LinearView, Program, Rule
from sparsecc.ir.types import TensorType

aten = torch.ops.aten

_UNARY_NAMES = ("relu", "gelu", "silu", "tanh", "neg", "abs", "sin", "erf", "sqrt", "clone", "contiguous", "detach", "square")
KEEPS_ZERO: set[Any] = {
    *(getattr(aten, name).default for name in _UNARY_NAMES if hasattr(aten, name)),
    *(getattr(torch, name) for name in _UNARY_NAMES if hasattr(torch, name)),
    F.relu, F.gelu, F.silu, F.tanh, F.hardswish, F.mish, operator.neg, aten.hardswish.default, aten.mish.default,
    *_UNARY_NAMES,
}
"""f(0) == 0, elementwise."""
FILLS_ZERO: set[Any] = {aten.sigmoid.default, torch.sigmoid, F.sigmoid, "sigmoid", aten.exp.default, torch.exp, "exp"}
"""Elementwise, but zeros don't survive."""
PRODUCTS: set[Any] = {aten.mul.Tensor, operator.mul, torch.mul, "mul"}
SUMS: set[Any] = {aten.add.Tensor, aten.sub.Tensor, operator.add, operator.sub, torch.add, torch.sub, "add", "sub"}
ELEMENTWISE = KEEPS_ZERO | FILLS_ZERO | PRODUCTS | SUMS


@dataclass(frozen=True)
class Propagate:
    """The pass; see the file's docstring."""

    name: str = "propagate"
    requires: tuple[str, ...] = ("linears",)
    ensures: tuple[str, ...] = ()

    @property
    def rules(self) -> Mapping[Any, Rule]:
        return {}

    def run(self, program: Program, context: Any = None) -> None:
        changed = True
        while changed:  # dropping columns of a weight can empty its rows: each round drops at least one feature
            changed = any([_shrink(program, group) for group in reversed(groups(program))])


@dataclass(frozen=True)
class Group:
    """Values [..., features] of one feature axis: who makes it, the ops on it, and the linears that read it."""

    producers: tuple[LinearView, ...]
    values: tuple[fx.Node, ...]
    readers: tuple[LinearView, ...]
    features: int


def groups(program: Program) -> list[Group]:
    """The closed groups of the program, in program order."""
    graph: nx.Graph = nx.Graph()
    for node in program.graph.nodes:
        if _is_linear(node):
            graph.add_node(node)
        elif _is_elementwise(program, node):
            for source in node.all_input_nodes:
                graph.add_edge(source, node)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    found = (_closed(program, sorted(component, key=order.__getitem__)) for component in nx.connected_components(graph))
    return sorted((g for g in found if g is not None), key=lambda g: order[g.values[0]])


def _closed(program: Program, values: list[fx.Node]) -> Group | None:
    """The component as a group, if nothing else makes or reads its values and all weights may be cut."""
    inside = set(values)
    producers = [LinearView(v) for v in values if _is_linear(v)]
    if len(producers) + sum(1 for v in values if v.target in ELEMENTWISE) != len(values) or not producers:
        return None
    readers: dict[fx.Node, LinearView] = {}
    for value in values:
        for user in value.users:
            if user in inside and not _is_linear(user):
                continue
            if not _is_linear(user) or LinearView(user).x is not value or user.all_input_nodes.count(value) != 1 or user in inside:
                return None
            readers[user] = LinearView(user)
    if not readers or any(p.residual is not None for p in producers):
        return None
    features = {p.shape[0] for p in producers}
    if len(features) != 1 or not all(_cuttable(program, v) for v in (*producers, *readers.values())):
        return None
    return Group(tuple(producers), tuple(values), tuple(readers.values()), features.pop())


def _is_linear(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is LINEAR


def _is_elementwise(program: Program, node: fx.Node) -> bool:
    """An elementwise op whose tensor operands all have the result's shape; other operands are numbers."""
    if node.op not in ("call_function", "call_method") or node.target not in ELEMENTWISE or mutates(node):
        return False
    mine = program.type(node)
    return bool(node.all_input_nodes) and mine is not None and all(same_shape(program.type(i), mine) for i in node.all_input_nodes)


def _cuttable(program: Program, view: LinearView) -> bool:
    constant = program.is_const(view.params[0]) and (view.bias is None or program.is_const(view.bias))
    return view.plain and view.layout == "row" and constant


# ---- which features matter


def _zeros(program: Program, group: Group) -> dict[fx.Node, Tensor]:
    """bool[features] per value: where it is zero for every input."""
    zero: dict[fx.Node, Tensor] = {}
    for value in group.values:
        inputs = [zero[i] for i in value.all_input_nodes if i in zero]
        if _is_linear(value):
            zero[value] = _zero_rows(program, LinearView(value))
        elif value.target in PRODUCTS:
            zero[value] = torch.stack(inputs).any(0)
        elif value.target in KEEPS_ZERO or (value.target in SUMS and len(inputs) == _operands(value)):
            zero[value] = torch.stack(inputs).all(0)
        else:
            zero[value] = torch.zeros(group.features, dtype=torch.bool)
    return zero


def _operands(node: fx.Node) -> int:
    """How many of the two operands are tensors, counting x + x twice; a number added to zeros fills them."""
    return len(node.all_input_nodes) if all(isinstance(a, fx.Node) for a in node.args[:2]) else -1


def _zero_rows(program: Program, view: LinearView) -> Tensor:
    zero = (program.const(view.params[0]) == 0).all(1)
    if view.bias is not None:
        zero = zero & (program.const(view.bias) == 0)
    return (zero if ACTIVATIONS[view.epilogue].keeps_zero else torch.zeros_like(zero)).cpu()


def live_features(program: Program, group: Group) -> Tensor:
    """bool[features]: those that are neither zero nor unread by at least one reader. At least one, in whole blocks."""
    zero = _zeros(program, group)
    live = torch.zeros(group.features, dtype=torch.bool)
    for reader in group.readers:
        live |= ~zero[reader.x] & (program.const(reader.params[0]) != 0).any(0).cpu()
    step = math.lcm(*(_height(p) for p in group.producers), *(_width(r) for r in group.readers))
    padded = F.pad(live, (0, -group.features % step))
    live = padded.view(-1, step).any(1).repeat_interleave(step)[: group.features]
    if not live.any():
        live[:step] = True  # kernels need a feature to work on; it contributes 0
    return live


def _height(view: LinearView) -> int:
    pattern = view.terms[0].zeros
    return pattern.rows if isinstance(pattern, Block) else 1


def _width(view: LinearView) -> int:
    pattern = view.terms[0].zeros
    return pattern.cols if isinstance(pattern, Block) else pattern.m if isinstance(pattern, NM) else 1


# ---- cutting


def _shrink(program: Program, group: Group) -> bool:
    live = live_features(program, group)
    kept = int(live.sum())
    if kept == group.features:
        return False
    index = live.nonzero()[:, 0]
    for view in group.producers:
        _cut(program, view, index, 0)
        _note(program, view, f"{group.features - kept} of {group.features} output features dropped: always zero or never read")
    for view in group.readers:
        _cut(program, view, index, 1)
        _note(program, view, f"{group.features - kept} of {group.features} input features dropped: always zero or never read")
    for value in group.values:
        found = program.type(value)
        for key in ("val", "example_value"):
            value.meta.pop(key, None)
        if found is not None:
            value.meta[TYPE_KEY] = found.with_(shape=(*found.shape[:-1], kept))
    return True


def _cut(program: Program, view: LinearView, index: Tensor, dim: int) -> None:
    """Keep only these rows (0, with the bias) or columns (1) of the weight."""
    old, term = view.params[0], view.terms[0]
    weight = program.const(old).detach().index_select(dim, index.to(program.const(old).device))
    new = program.add_const(str(old.target), weight, program.weight_name(old))
    region = program.region(view.node)
    cut = TensorType(term.dtype, tuple(weight.shape), _still(term.zeros, weight))
    view.replace(params=[new], terms=(cut,))
    if dim == 0 and view.bias is not None:
        bias = program.const(view.bias).detach().index_select(0, index.to(weight.device))
        view.replace(bias=program.add_const(str(view.bias.target), bias, program.weight_name(view.bias)))
    program.regions[view.node.name] = region


def _still(pattern: Pattern, weight: Tensor) -> Pattern:
    """What the cut weight still satisfies: the zeros that left may have carried the sparsity."""
    candidates = [pattern, replace(pattern, sparsity=None)] if getattr(pattern, "sparsity", None) is not None else [pattern]
    return next((p for p in candidates if p.mask_violation(weight) is None), ANY)


def _note(program: Program, view: LinearView, text: str) -> None:
    program.region(view.node).notes.append(text)
