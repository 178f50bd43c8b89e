"""Products of two values, softmax, attention. What is multiplied by zero for every input is not needed: a head whose values are dead
takes its queries and keys along, which Compresso (Guo et al. 2023) leaves behind alive.

A product is seen in the space of all its axes, as a pointwise product that is then summed: x [.., M, K] @ y [.., K, N] in [.., M, K, N].
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from sparsecc.passes.dims import Aligned, Axes, Factor, Facts, Stop, align, of_axes
from sparsecc.passes.links import Copies, Covers, Key, Link, Same, Span
from sparsecc.passes.rules.base import Flow, Need, argument, moved

if TYPE_CHECKING:
    from sparsecc.passes.propagate import Analysis
    from sparsecc.passes.slice import Cutter


@dataclass(frozen=True)
class Softmax(Flow):
    """Along an axis that stays as it is; the others pass."""

    operand: fx.Node
    axis: int

    def needs(self, need: Tensor) -> Iterator[Need]:
        x = self.a.facts(self.node, self.operand)
        for place in x.at(self.axis):
            need = need.any(place, keepdim=True).expand(need.shape)
        yield Need(self.operand, need, any(x.factors[p].tracked for p in x.at(self.axis)), "a softmax over it")

    def links(self) -> Iterator[Link]:
        key = self.a.key(self.node, self.operand)
        for place, factor in enumerate(self.facts.factors):
            if isinstance(factor.size, int):
                yield Same(Span(self.node, (place,)), Span(key, (place,)))


def softmax(a: Analysis, node: fx.Node) -> Flow:
    """softmax and log_softmax: every entry depends on all of its row."""
    operand = node.all_input_nodes[0]
    made = moved(a, node, list(range(len(a.facts(node, operand).axes))))
    return Softmax(a, node, of_axes(made.facts.axes), operand, int(argument(node, 1, "dim")) % len(made.facts.axes))


@dataclass(frozen=True)
class Side:
    """An operand in the space of a product: `facts` has its rank. `key`: whose masks it has. `times`: heads of q per head of this one."""

    node: fx.Node
    facts: Facts
    key: Key
    times: int = 1


@dataclass(frozen=True)
class Product(Flow):
    """`space`: all sides in one space; `kept`: its axes that the result has, in order."""

    sides: tuple[Side, ...]
    space: Aligned
    kept: tuple[int, ...]

    @property
    def rigid(self) -> bool:
        return False

    @property
    def sum_key(self) -> Key:
        """The key of the space's own masks."""
        return self.node, "product"

    def values(self) -> Iterator[tuple[Key, Facts]]:
        yield self.node, self.facts
        yield self.sum_key, of_axes(self.space.axes)
        for side in self.sides:
            if side.times > 1:
                yield side.key, side.facts

    def at(self, axis: int) -> range:
        """Positions of an axis' factors in the space."""
        start = sum(len(a) for a in self.space.axes[:axis])
        return range(start, start + len(self.space.axes[axis]))

    def raised(self, need: Tensor) -> Tensor:
        """An array of the result in the space."""
        for axis in range(len(self.space.axes)):
            if axis not in self.kept:
                for place in self.at(axis):
                    need = need.unsqueeze(place)
        return need

    def zero(self, side: int) -> Tensor:
        """Where an operand is zero for every input."""
        known, value = self.space.lift(self.sides[side].facts, side)
        return known & (value == 0)

    def side_needs(self, side: int, mask: Tensor, why: str) -> Iterator[Need]:
        """From the space to an operand: what varies is needed, what is constant must stand there too."""
        one = self.sides[side]
        lowered = self.space.lower(mask, one.facts, side)
        known = one.facts.known
        if one.times > 1:
            axis = self.a.facts(self.node, one.node).at(-3)[0]
            lowered, known = (t.unflatten(axis, (-1, one.times)).any(axis + 1) for t in (lowered, known))
        yield Need(one.node, lowered)
        yield Need(one.node, lowered & known, True, why)

    def links(self) -> Iterator[Link]:
        for i, side in enumerate(self.sides):
            yield from self.space_links(i, side.key, covers=False)
            if side.times > 1:
                yield Copies(Span(side.key, tuple(side.facts.at(-5))), self.span(side.node, -3), side.times)
        own = 0
        for axis in self.kept:
            for place in self.at(axis):
                if isinstance(self.facts.factors[own].size, int):
                    yield Same(Span(self.node, (own,)), Span(self.sum_key, (place,)))
                own += 1

    def space_links(self, side: int, key: Key, covers: bool) -> Iterator[Link]:
        """Between an operand's factors and those of the space."""
        place = at = 0
        for mine, whole, joined in zip(self.space.parts[side], self.space.axes, self.space.joined, strict=True):
            link = Covers if covers else Same
            if mine and joined:
                yield link(Span(self.sum_key, (at,)), Span(key, tuple(range(place, place + len(mine)))))
            elif mine:
                for i, factor in enumerate(mine):
                    if isinstance(factor.size, int):
                        yield link(Span(self.sum_key, (at + i,)), Span(key, (place + i,)))
            place, at = place + len(mine), at + len(whole)

    def cut(self, c: Cutter) -> None:
        for side in self.sides:
            c.constant(self.node, side.node)


def _spaced(facts: Facts, *missing: int) -> Facts:
    """With axes of size 1 put in at these places of the result."""
    axes: list[tuple[Factor, ...]] = list(facts.axes)
    for place in missing:
        axes.insert(place % (len(axes) + 1), ())
    return replace(facts, axes=tuple(axes))


def _kept(axes: Axes, kept: tuple[int, ...]) -> Axes:
    return tuple(axes[i] for i in kept)


@dataclass(frozen=True)
class Matmul(Product):
    """x [.., M, K] @ y [.., K, N] in [.., M, K, N]"""

    def needs(self, need: Tensor) -> Iterator[Need]:
        live = self.raised(need) & ~self.zero(0) & ~self.zero(1)
        for side in (0, 1):
            yield from self.side_needs(side, live, "a constant times what varies")


def matmul(a: Analysis, node: fx.Node) -> Flow:
    """matmul, bmm of two values"""
    x_node, y_node = argument(node, 0, "input"), argument(node, 1, "other", node.kwargs.get("mat2"))
    if not (a.is_value(x_node) and a.is_value(y_node)):
        raise Stop("an operand without a type")
    x, y = a.facts(node, x_node), a.facts(node, y_node)
    if min(len(x.axes), len(y.axes)) < 2:
        raise Stop("a product with a vector")
    out = a.shape(node)
    shape = (*out[:-1], a.shape(x_node)[-1], out[-1])
    sides = (Side(x_node, _spaced(x, -1), a.key(node, x_node)), Side(y_node, _spaced(y, len(y.axes) - 2), a.key(node, y_node)))
    space = align([side.facts for side in sides], [False, False], shape)
    kept = tuple(i for i in range(len(shape)) if i != len(shape) - 2)
    flow = Matmul(a, node, of_axes(_kept(space.axes, kept)), sides, space, kept)
    full = torch.Size([int(f.size) if f.tracked else 1 for axis in space.axes for f in axis])
    dead = (flow.zero(0) | flow.zero(1)).expand(full)
    for place in flow.at(len(shape) - 2):
        dead = dead.all(place, keepdim=True)
    dead = dead.reshape(flow.facts.known.shape)
    return replace(flow, facts=Facts(flow.facts.axes, dead, torch.zeros_like(flow.facts.value)))


# ---- scaled_dot_product_attention

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@dataclass(frozen=True)
class Attention(Product):
    """softmax(scale * q k^T + mask) v in [.., S, Sk, D, Dv]; `mask`: the fourth side, which is gathered from."""

    def needs(self, need: Tensor) -> Iterator[Need]:
        raised = rows = self.raised(need)
        for place in self.at(len(self.space.axes) - 1):
            rows = rows.any(place, keepdim=True)
        live = rows & ~self.zero(0) & ~self.zero(1)
        for side in (0, 1):
            yield from self.side_needs(side, live, "a constant times what varies")
        one = self.sides[2]
        lowered = self.space.lower(raised, one.facts, 2)
        if one.times > 1:
            axis = self.a.facts(self.node, one.node).at(-3)[0]
            lowered = lowered.unflatten(axis, (-1, one.times)).any(axis + 1)
        yield Need(one.node, lowered)
        if len(self.sides) > 3:
            yield Need(self.sides[3].node, self.space.lower(rows, self.sides[3].facts, 3))

    def links(self) -> Iterator[Link]:
        yield from replace(self, sides=self.sides[:3]).product_links()
        if len(self.sides) > 3:
            yield from self.space_links(3, self.sides[3].key, covers=True)

    def product_links(self) -> Iterator[Link]:
        """Those of q, k and v."""
        return super().links()

    def cut(self, c: Cutter) -> None:
        super().cut(c)
        given: dict[str, Any] = dict(zip(_NAMES, self.node.args, strict=False)) | self.node.kwargs
        q = given["query"]
        head = self.a.facts(self.node, q)
        if c.count(self.a.key(self.node, q), head, -1) is not None and given.get("scale") is None:
            given["scale"] = 1 / math.sqrt(int(head.length(-1)))  # of the features that the model had
        if len(self.sides) > 3 and not self.a.program.is_const(given["attn_mask"]):
            given["attn_mask"] = self._gathered_mask(c, given["attn_mask"])
        if any(side.times > 1 for side in self.sides):
            self._regroup(c, given)
        self.node.args = tuple(given.pop(name) for name in _NAMES[:3])
        self.node.kwargs = given

    def _gathered_mask(self, c: Cutter, mask: fx.Node) -> fx.Node:
        facts, rank = self.a.facts(self.node, mask), len(self.space.axes)
        for axis in range(len(facts.axes)):
            whole = rank - 2 - len(facts.axes) + axis
            if not self.space.parts[3][whole]:
                continue
            have, want = c.mask(self.a.key(self.node, mask), facts, axis), c.mask(self.sum_key, of_axes(self.space.axes), whole)
            have = torch.ones(len(want), dtype=torch.bool) if have is None and want is not None else have
            if have is not None and want is not None and not torch.equal(have, want):
                mask = c.take(self.node, mask, axis, want[have].nonzero()[:, 0])
        return mask

    def _regroup(self, c: Cutter, given: dict[str, Any]) -> None:
        """Heads of k and v that serve different numbers of queries' heads are copied for each."""
        for name, side in (("key", self.sides[1]), ("value", self.sides[2])):
            copies, source = c.masks.of[side.key, side.facts.at(-5)[0]], c.masks.of[self.span(side.node, -3).places[0]]
            counts = copies.view(-1, side.times).sum(1)[source]
            if len(set(counts.tolist())) > 1:
                index = torch.repeat_interleave(torch.arange(len(counts)), counts)
                given[name] = c.take(self.node, given[name], len(self.a.shape(side.node)) - 3, index)
                given["enable_gqa"] = False


def attention(a: Analysis, node: fx.Node) -> Flow:
    """scaled_dot_product_attention"""
    given: dict[str, Any] = dict(zip(_NAMES, node.args, strict=False)) | node.kwargs
    if given.get("dropout_p"):
        raise Stop("dropout in training")
    nodes: list[Any] = [given.get(name) for name in _NAMES[:4]]
    q_node, k_node, v_node, mask_node = nodes
    q, k, v = (a.facts(node, n) for n in (q_node, k_node, v_node))
    S, Sk, D, Dv = a.shape(q_node)[-2], a.shape(k_node)[-2], a.shape(q_node)[-1], a.shape(v_node)[-1]
    sides = [Side(q_node, _spaced(_spaced(q, len(q.axes) - 1), len(q.axes) + 1), a.key(node, q_node))]
    for node_, facts, spare in ((k_node, k, -1), (v_node, v, 3)):
        times, key = 1, a.key(node, node_)
        if given.get("enable_gqa") and a.shape(node_)[-3] not in (1, a.shape(q_node)[-3]):  # one head is one for all, as in any product
            times, key = _times(q, facts), (node, "heads", node_)
            facts = _repeated(facts, times)
        wide = _spaced(facts, len(facts.axes) - 2)
        wide = _spaced(wide, len(wide.axes)) if spare == -1 else _spaced(wide, len(wide.axes) - 1)
        sides.append(Side(node_, wide, key, times))
    if a.is_value(mask_node):
        sides.append(Side(mask_node, _spaced(_spaced(a.facts(node, mask_node), -1), -1), a.key(node, mask_node)))
    shape = (*a.shape(q_node)[:-2], S, Sk, D, Dv)
    space = align([side.facts for side in sides], [False] * 3 + [True] * (len(sides) - 3), shape)
    rank = len(shape)
    kept = (*range(rank - 3), rank - 1)
    flow = Attention(a, node, of_axes(_kept(space.axes, kept)), tuple(sides), space, kept)
    known, value = space.lift(sides[2].facts, 2)
    if mask_node is not None:
        known = known & (value == 0)  # a row of which the mask hides everything is 0: a weighted mean of constants only where none is
    full = [int(f.size) if f.tracked else 1 for axis in flow.facts.axes for f in axis]
    for place in reversed([*flow.at(rank - 3), *flow.at(rank - 2)]):
        known, value = known.any(place), value.select(place, 0)
    known, value = known.expand(full), torch.where(known, value, 0.0).expand(full)
    return replace(flow, facts=Facts(flow.facts.axes, known, value))


def _times(q: Facts, k: Facts) -> int:
    have, want = k.length(-3), q.length(-3)
    if not (isinstance(have, int) and isinstance(want, int)) or len(k.axes[-3]) != 1:
        raise Stop("the number of heads varies")
    return want // have


def _repeated(facts: Facts, times: int) -> Facts:
    """Each head `times` times in a row."""
    axes, place = list(facts.axes), facts.at(-3)[0]
    factor = facts.factors[place]
    axes[-3] = (Factor(int(factor.size) * times, True),)
    known, value = ((t if factor.tracked else t.expand([int(factor.size) if i == place else d for i, d in enumerate(t.shape)]))
                    .repeat_interleave(times, place) for t in (facts.known, facts.value))
    return Facts(tuple(axes), known, value)
