"""slice: what propagation found useless leaves weights, biases and shapes.

    h = linear(x, [w1], b1);  g = gelu(h);  y = linear(g, [w2], b2)         row 3 of w1 zero: h[3] is b1[3] for every input
    -->
    h = linear(x, [w1 without row 3], ...);  g = gelu(h);  y = linear(g, [w2 without column 3], b2 + w2[:, 3] * gelu(b1[3]))

Each rule cuts its own node (`Flow.cut`); here is what they share.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from sparsecc.formats import ANY, Pattern, measure
from sparsecc.ir.program import LinearView, Program
from sparsecc.ir.types import TensorType
from sparsecc.passes.dims import Facts
from sparsecc.passes.links import Key, Masks, Span

if TYPE_CHECKING:
    from sparsecc.passes.propagate import Analysis

aten = torch.ops.aten


class Cutter:
    """Cuts a program to `masks`. What takes a node's place stands in `instead` until the end: rules see the program as it was."""

    def __init__(self, a: Analysis, masks: Masks) -> None:
        self.a, self.masks = a, masks
        self.program: Program = a.program
        self.instead: dict[fx.Node, fx.Node] = {}
        self._made: dict[fx.Node, set[fx.Node]] = {}
        self._cut: dict[Any, fx.Node] = {}

    def run(self) -> None:
        """Cut every node, in order."""
        for flow in list(self.a.flows.values()):
            flow.cut(self)
        for node, new in self.instead.items():
            while new in self.instead:
                new = self.instead[new]
            made = self._made.get(node, set())
            node.replace_all_uses_with(new, delete_user_cb=lambda user, made=made: user not in made)
        for key, facts in self.a.values():
            if isinstance(key, fx.Node) and not all(self._whole(key, place) for place in range(len(facts.factors))):
                for known in ("val", "example_value"):
                    key.meta.pop(known, None)

    # ---- what stays

    def _whole(self, key: Key, place: int) -> bool:
        mask = self.masks.of.get((key, place))
        return mask is None or bool(mask.all())

    def mask(self, key: Key, facts: Facts, axis: int) -> Tensor | None:
        """bool along an axis, None where all of it stays."""
        places = facts.at(axis)
        if all(self._whole(key, place) for place in places):
            return None
        return Span(key, tuple(places)).read(self.masks)

    def count(self, key: Key, facts: Facts, axis: int) -> int | None:
        """How many stay along an axis, None where all of it does."""
        mask = self.mask(key, facts, axis)
        return None if mask is None else int(mask.sum())

    def kept(self, key: Key, facts: Facts) -> Tensor:
        """An array like `known`: what stays."""
        kept = torch.ones(facts.known.shape, dtype=torch.bool)
        for place, factor in enumerate(facts.factors):
            if factor.tracked:
                kept = kept & self.masks.of[key, place].view([-1 if p == place else 1 for p in range(kept.ndim)])
        return kept

    def reduced(self, key: Key, facts: Facts) -> Tensor | None:
        """f64: the constants that stay, with an axis of size 1 where entries are not told apart; None where an axis is mixed."""
        value = facts.value
        for place, factor in enumerate(facts.factors):
            if factor.tracked:
                value = value.index_select(place, self.masks.of[key, place].nonzero()[:, 0])
        if any(len({f.tracked for f in axis}) > 1 for axis in facts.axes):
            return None
        return value.reshape([math.prod(value.shape[p] for p in facts.at(i)) for i in range(len(facts.axes))])

    # ---- constants

    def constant(self, user: fx.Node, operand: Any) -> bool:
        """Whether the operand is a constant, which is then cut for this user."""
        if not self.program.is_const(operand):
            return False
        key = (user, operand)
        facts = self.a.facts(user, operand)
        masks = {axis: mask for axis in range(len(facts.axes)) if (mask := self.mask(key, facts, axis)) is not None}
        if masks:
            user.replace_input_with(operand, self.indexed(operand, masks))
        return True

    def indexed(self, const: fx.Node, masks: Mapping[int, Tensor | None], scale: float = 1.0) -> fx.Node:
        """A constant cut along some axes, and scaled. Users that cut it alike share it."""
        masks = {axis: mask for axis, mask in masks.items() if mask is not None}
        if not masks and scale == 1.0:
            return const
        key = (const.target, scale, *((axis, mask.numpy().tobytes()) for axis, mask in sorted(masks.items())))
        if key not in self._cut:
            tensor = self.program.const(const).detach()
            for axis, mask in masks.items():
                tensor = tensor.index_select(axis, mask.nonzero()[:, 0].to(tensor.device))
            tensor = tensor if scale == 1.0 else (tensor.double() * scale).to(tensor.dtype)
            self._cut[key] = self.add_weight(const, tensor)
        return self._cut[key]

    def add_weight(self, old: fx.Node, tensor: Tensor) -> fx.Node:
        """A new constant under an old one's name."""
        return self.program.add_const(str(old.target), tensor, self.program.weight_name(old))

    def folded_bias(self, bias: fx.Node | None, weight: fx.Node, add: Tensor | None, rows: Tensor | None) -> fx.Node | None:
        """The bias of the rows that stay, with `add` f64 [N]: what the constants that left have added to every row."""
        if add is None:
            return None if bias is None else self.indexed(bias, {0: rows})
        like = self.program.const(weight)
        old = torch.zeros(len(add), dtype=torch.float64) if bias is None else self.program.const(bias).detach().cpu().double()
        new = (old + add)[slice(None) if rows is None else rows].to(like.dtype).to(like.device)
        if bias is not None:
            return self.add_weight(bias, new)
        name = self.program.weight_name(weight).removesuffix("weight") + "bias"
        return self.program.add_const(name, new, name)

    # ---- linears

    def linear(self, view: LinearView, rows: Tensor | None, columns: Tensor | None, uniform: Tensor, value: Tensor) -> None:
        """Cut a linear. Columns that leave hold the constants `value` f64 [K] where `uniform`."""
        if rows is None and columns is None:
            return
        old, term, region = view.params[0], view.terms[0], self.program.region(view.node)
        weight, add = self.program.const(old).detach(), None
        if columns is not None:
            gone = ~columns & uniform & (value != 0)
            if gone.any():
                add = weight[:, gone.to(weight.device)].cpu().double() @ value[gone]
        new = self.indexed(old, {0: rows, 1: columns})
        cut = self.program.const(new)
        view.replace(params=[new], terms=(TensorType(term.dtype, tuple(cut.shape), self._pattern(view, term, cut)),),
                     bias=self.folded_bias(view.bias, old, add, rows))
        region.more.setdefault("whole_bytes", region.more.get("dense_bytes", weight.numel() * weight.element_size()))
        region.more |= {"shape": tuple(cut.shape), "dense_bytes": cut.numel() * cut.element_size()}
        self._note(view, "output", rows, self.a.flows[view.node].facts.vector(-1)[1])
        self._note(view, "input", columns, value)
        self.program.regions[view.node.name] = region

    def _note(self, view: LinearView, what: str, mask: Tensor | None, value: Tensor) -> None:
        if mask is not None:
            why = "constant" if value[~mask].any() else "zero"
            notes = self.program.region(view.node).notes
            notes.append(f"{int((~mask).sum())} of {len(mask)} {what} features dropped: always {why} or never read")

    def _pattern(self, view: LinearView, term: TensorType, weight: Tensor) -> Pattern:
        """What is known of the zeros that are left: looked at anew where they were found and not asked for."""
        gone = 0 in getattr(term.zeros, "extents", ())  # whole rows or columns: these have left
        if term.zeros == ANY or (self.a.required(view) and not gone):
            return still(term.zeros, weight)
        found = measure(weight)
        self.program.region(view.node).more["zeros"] = 1 - found.density
        pattern = found.explain()
        self.program.region(view.node).pattern = "" if pattern == ANY else str(pattern)
        return pattern

    # ---- more nodes

    def take(self, user: fx.Node, x: fx.Node, axis: int, index: Tensor) -> fx.Node:
        """x[index] along an axis, before `user`."""
        device = self.a.device(x)
        const = self.program.add_const("index", index.to(device))
        with self.program.graph.inserting_before(user):
            return self.program.graph.call_function(aten.index_select.default, (x, axis, const))

    def then(self, node: fx.Node, y: fx.Node, target: Any, *args: Any) -> fx.Node:
        """target(y, *args) in the place of a node, of which y is made, or which it is."""
        with self.program.graph.inserting_after(y):
            new = self.program.graph.call_function(target, (y, *args))
        self._made.setdefault(node, set()).add(new)
        self.instead[node] = new
        return new

    def after(self, node: fx.Node, axis: int, index: Tensor) -> None:
        """node[index] along an axis, in its place."""
        self.then(node, node, aten.index_select.default, axis, self.program.add_const("index", index.to(self.a.device(node))))


def still(pattern: Pattern, weight: Tensor) -> Pattern:
    """What a cut weight still satisfies: the zeros that left may have carried the sparsity."""
    candidates = [pattern, replace(pattern, sparsity=None)] if getattr(pattern, "sparsity", None) is not None else [pattern]  # type: ignore[type-var]
    return next((p for p in candidates if p.mask_violation(weight) is None), ANY)
