"""fuse: what surrounds a linear moves into it.

    y = linear(x, [w]);  z = add(y, b)             -->  z = linear(x, [w], b)
    y = linear(x, [w], b);  z = gelu(y)            -->  z = linear(x, [w], b, epilogue="gelu")
    y = linear(x, [w], b);  z = add(y, r)          -->  z = linear(x, [w], b, r)
    q = linear(x, [wq]);  k = linear(x, [wk])      -->  y = linear(x, [wq; wk]);  q = slice(y, ...);  k = slice(y, ...)

The last one only where all of them have zeros of one kind, so that one kernel serves them.
"""
from __future__ import annotations

import operator
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from sparsecc.formats import ANY, Block, Cols, Pattern
from sparsecc.ir.effects import mutates
from sparsecc.ir.image_ops import WEIGHTED
from sparsecc.ir.infer import same_shape
from sparsecc.ir.ops import LINEAR
from sparsecc.ir.program import LinearView, Program, Region, Rule
from sparsecc.ir.types import TensorType

aten = torch.ops.aten


@dataclass(frozen=True)
class Fuse:
    """The pass; see the file's docstring. `dense_siblings` also merges linears without known zeros, which gains nothing sparse."""

    dense_siblings: bool = False
    name: str = "fuse"
    requires: tuple[str, ...] = ("linears",)
    ensures: tuple[str, ...] = ()

    def run(self, program: Program, context: Any = None) -> None:
        program.rewrite(BIAS_RULES)
        for group in _siblings(program, self.dense_siblings):
            _merge(program, group)
        residual = partial(_residual, writes=Writes(program))
        program.rewrite(RULES | dict.fromkeys(ADDS, residual))


class Writes:
    """Where in the program tensors are written to; reads must not move across."""

    def __init__(self, program: Program) -> None:
        self.at: dict[fx.Node, float] = {node: i for i, node in enumerate(program.graph.nodes)}
        self.places = [i for node, i in self.at.items() if node.op != "output" and mutates(node)]

    def move_before(self, node: fx.Node, place: fx.Node) -> None:
        """Move a node down to just before another."""
        place.prepend(node)
        self.at[node] = self.at[place] - 0.5

    def between(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether anything is written after `a` and before `b`."""
        first, last = sorted((self.at[a], self.at[b]))
        return bisect_left(self.places, last) > bisect_right(self.places, first)


# ---- activation, bias, residual


def _single(node: Any) -> LinearView | None:
    """The linear that a value is, if it may still grow: one user, no residual, no kernel."""
    if not (isinstance(node, fx.Node) and node.op == "call_function" and node.target is LINEAR and len(node.users) == 1):
        return None
    view = LinearView(node)
    return view if view.residual is None and not view.kernel else None


def _activation(program: Program, node: fx.Node) -> fx.Node | None:
    """gelu(linear(...)) --> linear(..., epilogue="gelu"); it stays where the linear is, so no read moves"""
    source = node.args[0] if node.args else node.kwargs.get("input")
    name, view = activation_name(node), _single(source)
    if name is not None and isinstance(source, fx.Node) and source.target in WEIGHTED and len(source.users) == 1 and not source.args[6]:
        source.update_arg(6, name)
        return source
    if view is None or view.epilogue or name is None:
        return None
    view.replace(epilogue=name)
    return view.node


def activation_name(node: fx.Node) -> str | None:
    """The key in `ACTIVATIONS` of a node whose target is in `ACTIVATION_TARGETS`."""
    name = ACTIVATION_TARGETS[node.target]
    if name == "hardtanh":
        low, high = (*node.args[1:3], *(node.kwargs.get(key, default) for key, default in (("min_val", -1), ("max_val", 1))))[:2]
        return "relu6" if (low, high) == (0, 6) else None
    if name != "gelu":
        return name
    approximate = node.args[1] if len(node.args) > 1 else node.kwargs.get("approximate", "none")
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(approximate))


def _bias(program: Program, node: fx.Node) -> fx.Node | None:
    """add(linear(x, [w]), b) with a constant b [N] --> linear(x, [w], b)"""
    for y, b in _addends(node):
        view = _single(y)
        if view is None or view.bias is not None or view.epilogue or not program.is_const(b):
            continue
        if program.const(b).shape == (view.shape[0],) and program.const(b).dtype == view.terms[0].dtype:
            view.replace(bias=b)
            return view.node
    return None


def _residual(program: Program, node: fx.Node, writes: Writes | None = None) -> fx.Node | None:
    """add(linear(...), r) with r of the same shape --> linear(..., residual=r)"""
    pairs = [(view, r) for y, r in _addends(node) if (view := _single(y)) is not None and isinstance(r, fx.Node) and r is not y]
    if not pairs:
        return None
    writes = writes or Writes(program)
    # Of two linears the later one takes the other: then nothing moves.
    for view, r in sorted(pairs, key=lambda pair: -writes.at[pair[0].node]):
        ytype, rtype = program.type(view.node), program.type(r)
        if not same_shape(ytype, rtype) or ytype is None or not ytype.dtype.is_floating_point or writes.between(view.node, node):
            continue
        if writes.at[r] > writes.at[view.node]:
            writes.move_before(view.node, node)
        view.replace(residual=r)
        return view.node
    return None


def _addends(node: fx.Node) -> list[tuple[Any, Any]]:
    """Both readings of a plain addition; for an in-place one only that which writes into the linear's own result."""
    if len(node.args) < 2 or node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
        return []
    a, b = node.args[:2]
    return [(a, b)] if mutates(node) else [(a, b), (b, a)]


ACTIVATION_TARGETS: dict[Any, str] = {
    **dict.fromkeys((aten.relu.default, F.relu, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    **dict.fromkeys((aten.gelu.default, F.gelu), "gelu"),
    **dict.fromkeys((aten.silu.default, F.silu), "silu"),
    **dict.fromkeys((aten.relu6.default, F.relu6), "relu6"),
    **dict.fromkeys((aten.hardtanh.default, F.hardtanh), "hardtanh"),
    **dict.fromkeys((aten.hardswish.default, F.hardswish), "hardswish"),
}
ADDS: tuple[Any, ...] = (aten.add.Tensor, operator.add, operator.iadd, torch.add, "add", "add_")
BIAS_RULES: dict[Any, Rule] = dict.fromkeys(ADDS, _bias)
RULES: dict[Any, Rule] = {**dict.fromkeys(ACTIVATION_TARGETS, _activation), **dict.fromkeys(ADDS, _residual)}


# ---- siblings


def _siblings(program: Program, dense: bool) -> list[list[LinearView]]:
    """Linears of the same x and the same kind of zeros, not yet grown, with nothing written between them."""
    groups: dict[Any, list[LinearView]] = defaultdict(list)
    for view in program.linears():
        if not view.plain or view.residual is not None or view.epilogue or view.layout != "row":
            continue
        if not program.is_const(view.params[0]) or not (view.bias is None or program.is_const(view.bias)):
            continue
        family = _family(view.terms[0])
        if family is None and not dense:
            continue
        codec = program.region(view.node).more.get("codec")
        groups[view.x, view.terms[0].dtype, view.shape[1], family, codec].append(view)
    writes = Writes(program)
    return [g for g in groups.values() if len(g) > 1 and not writes.between(g[0].node, g[-1].node) and _aligned(g)]


def _family(term: TensorType) -> Any:
    """Patterns that stack along N: equal but for the sparsity. None where nothing is known or stacking would lose it."""
    if term.zeros == ANY or isinstance(term.zeros, Cols):
        return None
    return replace(term.zeros, sparsity=None) if hasattr(term.zeros, "sparsity") else term.zeros


def _aligned(group: Sequence[LinearView]) -> bool:
    """Whether every part starts on a block boundary of the whole."""
    pattern = group[0].terms[0].zeros
    height = pattern.rows if isinstance(pattern, Block) else 1
    return all(view.shape[0] % height == 0 for view in group[:-1])


def _stacked(patterns: Sequence[Pattern]) -> Pattern:
    """The pattern of matrices on top of each other: the weakest sparsity, none if one has none."""
    floors = [getattr(p, "sparsity", None) for p in patterns]
    if not hasattr(patterns[0], "sparsity"):
        return patterns[0]
    return replace(patterns[0], sparsity=None if None in floors else min(floors))  # type: ignore[type-var]


def _merge(program: Program, group: list[LinearView]) -> None:
    """One linear in the place of the first, and a slice of its result in the place of each."""
    first = group[0]
    region = _merged_region(program, group)
    weight = torch.cat([program.const(v.params[0]) for v in group])
    terms = (first.terms[0].with_(shape=tuple(weight.shape), pattern=_stacked([v.terms[0].zeros for v in group])),)
    weight_node = program.add_const(joint_name(region.weights), weight, joint_name(region.weights))
    bias_node = None
    if any(v.bias is not None for v in group):
        bias = torch.cat([program.const(v.bias) if v.bias is not None else weight.new_zeros(v.shape[0]) for v in group])
        name = joint_name([w.removesuffix(".weight") + ".bias" for w in region.weights])
        bias_node = program.add_const(name, bias, name)
    with program.graph.inserting_before(first.node):
        merged = program.linear(first.x, [weight_node], bias_node, terms).node
    program.regions[merged.name] = region
    start = 0
    for view in group:
        with program.graph.inserting_before(view.node):
            part = program.graph.call_function(aten.slice.Tensor, (merged, -1, start, start + view.shape[0]))
        start += view.shape[0]
        _keep_viewable(view.node)
        program.replace(view.node, part)
        for key in ("val", "example_value"):  # the slice has other strides than the linear had
            part.meta.pop(key, None)


def _merged_region(program: Program, group: Sequence[LinearView]) -> Region:
    regions = [program.region(v.node) for v in group]
    merged = Region(joint_name([r.name for r in regions]), tuple(w for r in regions for w in r.weights), more=dict(regions[0].more))
    merged.pattern, merged.reason = regions[0].pattern, regions[0].reason
    merged.notes = [note for r in regions for note in r.notes]
    return merged


def joint_name(names: Sequence[str]) -> str:
    """`a.query.weight`, `a.key.weight` -> `a.{query,key}.weight`; names without anything in common are joined by " + "."""
    parts = [name.split(".") for name in names]
    head = _common_start(parts)
    tail = _common_start([p[len(head) :][::-1] for p in parts])[::-1]
    if not (head or tail):
        return " + ".join(names)
    middle = [".".join(p[len(head) : len(p) - len(tail)]) for p in parts]
    return ".".join([*head, f"{{{','.join(middle)}}}", *tail])


def _common_start(parts: Sequence[Sequence[str]]) -> list[str]:
    together = takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    return [column[0] for column in together]


def _keep_viewable(node: fx.Node) -> None:
    """A slice is not contiguous: users that take a view of it must be free to copy."""
    for user in node.users:
        if user.target is aten.view.default:
            user.target = aten.reshape.default
        elif user.op == "call_method" and user.target == "view" and not any(isinstance(a, torch.dtype) for a in user.args):
            user.target = "reshape"


