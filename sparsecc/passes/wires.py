"""Which entries of constants may change places: every entry of every axis is a wire, and wires that meet anywhere move together.

    h = linear(x, [w1], b1);  g = gelu(h);  y = linear(g, [w2])        wire i: row i of w1, entry i of b1, column i of w2

The rules of `propagate` carry the wires: here facts hold, in place of constants, the number of the wire that an entry is on. Number 0 is
what cannot be told apart. Two wires may change places where the program treats them alike: the neurons of a feed-forward block, the
features of one head, the channels between two convolutions. `Wires.moved` proves it for a whole choice, entry by entry, before anything
is done.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from sparsecc.ir.effects import mutates
from sparsecc.ir.ops import LINEAR
from sparsecc.ir.program import LinearView, Program
from sparsecc.passes.dims import Factor, Facts, Stop, unknown
from sparsecc.passes.propagate import Analysis
from sparsecc.passes.rules.attention import Attention, Matmul, Product, Softmax
from sparsecc.passes.rules.base import Flow, Metadata, Moved, Opaque, Plain, argument, name_of
from sparsecc.passes.rules.norm import LastNorm, PerChannel, Pooled, Reduced
from sparsecc.passes.rules.pointwise import Pointwise
from sparsecc.passes.rules.shape import Expanded, Item, Joined, Part, Reshaped, Split

UNTOLD = "it meets a value whose entries are not told apart"
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")


@dataclass(frozen=True)
class Use:
    """A constant as one node reads it. `ends`: for each axis the wires along it, i64 [size], 0 where it stays."""

    const: fx.Node
    user: fx.Node
    ends: tuple[Tensor, ...]


@dataclass(frozen=True)
class Meeting:
    """Entries of several values that are combined, i64 [entries] each, at places that stay, i64 [entries]. `out`: the result's wires, if it
    has its own."""

    wires: tuple[Tensor, ...]
    place: Tensor
    out: Tensor | None = None


@dataclass
class Found:
    """`label` i64 [wires]: those that move together have one, -1 for those that stay; `cell` i64 [labels]: labels of one cell may change
    places."""

    label: Tensor
    cell: Tensor
    cause: dict[int, str] = field(default_factory=dict)


class Wires(Analysis):
    """All wires of a program. `sources`: the wires that begin at one place, in order."""

    def __init__(self, program: Program) -> None:
        self.count = 1
        self.sources: list[Tensor] = []
        self.uses: list[Use] = []
        self.meetings: list[Meeting] = []
        self.joints: list[tuple[Tensor, Tensor]] = []
        self.stays: list[tuple[Tensor, str]] = []
        super().__init__(program)

    def _backward(self) -> None:
        """What stays: outputs of the model, and what an op without a rule reads."""
        for value in self.program.graph.output_node().all_input_nodes:
            if value in self.flows:
                self.stay(self.flows[value].facts.value, "the model returns it")
        for node, flow in self.flows.items():
            if isinstance(flow, Opaque):
                for operand in node.all_input_nodes:
                    self.stay_all(node, operand, flow.why)
        used = {(use.user, use.const) for use in self.uses}
        for node in self.program.graph.nodes:
            for const in node.all_input_nodes:
                if self.program.is_const(const) and (node, const) not in used:
                    self.use(const, node)

    # ---- wires

    def fresh(self, size: int) -> Tensor:
        """i64 [size]: new wires from one place."""
        made = torch.arange(self.count, self.count + size)
        self.count += size
        self.sources.append(made)
        return made

    def stay(self, wires: Tensor, why: str) -> None:
        """These do not move."""
        self.stays.append((_ints(wires), why))

    def stay_all(self, node: fx.Node, operand: fx.Node, why: str) -> None:
        """Nothing that a node reads here moves."""
        if operand in self.flows:
            self.stay(self.flows[operand].facts.value, why)
        elif (node, operand) in self.constants:
            self.stay(self.constants[node, operand].value, why)

    def join(self, a: Tensor, b: Tensor) -> None:
        """These move together, entry by entry."""
        a, b = (_ints(t) for t in torch.broadcast_tensors(a, b))
        self.joints.append((a, b))

    def use(self, const: fx.Node, user: fx.Node, ends: dict[int, Tensor] | None = None) -> None:
        """A constant whose axes lie along these wires; the others stay."""
        shape = self.program.const(const).shape
        self.uses.append(Use(const, user, tuple(_ints((ends or {}).get(i, torch.zeros(n))) for i, n in enumerate(shape))))

    def facts(self, user: fx.Node, operand: fx.Node) -> Facts:
        """Of an operand; a vector has wires of its own, other constants stay."""
        if not self.program.is_const(operand):
            return super().facts(user, operand)
        if (user, operand) not in self.constants:
            shape = self.program.const(operand).shape
            sizes = [n for n in shape if n != 1]
            value = self.fresh(sizes[0]).double() if len(sizes) == 1 else torch.zeros(1, dtype=torch.float64).expand(sizes)
            if len(sizes) == 1:
                self.use(operand, user, {next(i for i, n in enumerate(shape) if n != 1): value})
            axes = tuple(() if n == 1 else (Factor(n, True),) for n in shape)
            self.constants[user, operand] = Facts(axes, torch.ones(1, dtype=torch.bool).expand(value.shape), value.reshape(sizes))
        return self.constants[user, operand]

    # ---- one node

    def _flow(self, node: fx.Node, written: set[fx.Node]) -> Flow:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and name_of(node) != "dropout":
            tracked = any(self.flows[n].facts.tracked for n in node.all_input_nodes if n in self.flows)
            if tracked and name_of(node) != "scaled_dot_product_attention":
                raise Stop("it draws random numbers")
        kept = node in written or mutates(node)
        if not kept and node.target is LINEAR:
            return self._linear(node)
        if not kept and name_of(node) == "embedding":
            return self._embedding(node)
        if not kept and name_of(node) in CONVOLUTIONS:
            return self._conv(node)
        flow = super()._flow(node, written)
        if type(flow) in (Plain, Metadata, Flow, Opaque):
            return flow
        value = self._carried(flow).double()
        return replace(flow, facts=Facts(flow.facts.axes, torch.ones_like(value, dtype=torch.bool), value))

    def _linear(self, node: fx.Node) -> Flow:
        view = LinearView(node)
        if not view.plain or view.residual is not None or not self.program.is_const(view.params[0]):
            raise Stop("not a plain linear")
        if view.bias is not None and not self.program.is_const(view.bias):
            raise Stop("a bias that is computed")
        x, (rows, columns) = self.facts(node, view.x), self.program.const(view.params[0]).shape
        ends = self._along(x, -1)
        out = self.fresh(rows) if rows > 1 else torch.zeros(1)
        lead = x.value.shape[: len(x.factors) - len(x.axes[-1])]
        if ends is None:
            self.stay(x.value, "a linear reads it once for each of other entries that are told apart")
            self.stay(out, "a linear writes it once for each of other entries that are told apart")
            ends = torch.zeros(columns)
        self.use(view.params[0], node, {0: out, 1: ends})
        if view.bias is not None:
            self.use(view.bias, node, {0: out})
        axes = (*x.axes[:-1], *unknown((rows,), (0,)).axes)
        value = out.double().expand((*lead, rows)) if rows > 1 else torch.zeros(lead, dtype=torch.float64)
        return Flow(self, node, Facts(axes, torch.ones_like(value, dtype=torch.bool), value))

    def _embedding(self, node: fx.Node) -> Flow:
        overload = isinstance(node.target, torch._ops.OpOverload)
        weight, ids = (argument(node, 0, "weight"), argument(node, 1, "indices")) if overload else (
            argument(node, 1, "weight"), argument(node, 0, "input"))
        facts = unknown(self.shape(node), (-1,))
        if not self.program.is_const(weight) or not facts.axes[-1]:
            raise Stop("a table that is computed, or of one column")
        self.stay_all(node, ids, "indices of an embedding")
        out = self.fresh(facts.value.shape[-1])
        self.use(weight, node, {1: out})
        return Flow(self, node, Facts(facts.axes, torch.ones_like(facts.known), out.double().expand(facts.value.shape)))

    def _conv(self, node: fx.Node) -> Flow:
        weight, bias = argument(node, 1, "weight"), argument(node, 2, "bias")
        at = 8 if name_of(node) == "convolution" else 6
        if at == 8 and argument(node, 6, "transposed"):
            raise Stop("a transposed convolution")
        if not self.program.is_const(weight) or not (bias is None or self.program.is_const(bias)):
            raise Stop("a weight that is computed")
        operand: Any = node.args[0]
        x, groups, W = self.facts(node, operand), int(argument(node, at, "groups", 1)), self.program.const(weight)
        axis = len(x.axes) - W.ndim + 1
        ends, facts = self._along(x, axis), unknown(self.shape(node), (axis,))
        each = groups == W.shape[0] and W.shape[1] == 1 and groups > 1
        if ends is None or W.shape[0] == 1 or not (groups == 1 or (each and len(ends) == groups)):
            raise Stop("positions that are told apart, a single channel, or groups of channels")
        out = ends if each else self.fresh(W.shape[0])
        self.use(weight, node, {0: out} if each or len(ends) == 1 else {0: out, 1: ends})
        if bias is not None:
            self.use(bias, node, {0: out})
        axes = (*x.axes[:axis], *facts.axes[axis:])
        place = sum(len(one) for one in axes[:axis])
        shape = [len(out) if i == place else 1 for i in range(sum(len(one) for one in axes))]
        value = out.double().reshape(shape)
        return Flow(self, node, Facts(axes, torch.ones_like(value, dtype=torch.bool), value))

    def _along(self, x: Facts, axis: int) -> Tensor | None:
        """The wires along an axis; None where others of its axes are told apart, too."""
        places = x.at(axis)
        if any(size > 1 for p, size in enumerate(x.value.shape) if p not in places):
            return None
        sizes = [int(x.factors[p].size) if p in places else 1 for p in range(x.value.ndim)]
        return _ints(x.value.expand(sizes))

    def _carried(self, flow: Flow) -> Tensor:
        """The wires of a result, like its `known`."""
        if isinstance(flow, Pointwise):
            return self._pointwise(flow)
        if isinstance(flow, Matmul | Attention):
            return self._attention(flow) if isinstance(flow, Attention) else self._matmul(flow)
        if type(flow) in (Moved, Reshaped, Expanded, Part, Item, Split, Joined):
            return flow.facts.value
        if isinstance(flow, Softmax):
            x = self.facts(flow.node, flow.operand)
            if any(x.factors[p].tracked for p in x.at(flow.axis)):
                self.stay(x.value, "a softmax over it")
            return x.value
        if isinstance(flow, Reduced):
            return self._reduced(flow)
        if isinstance(flow, LastNorm):
            return self._normed(flow, -1, [w for w in (flow.weight, flow.bias) if w is not None], flow.operand)
        if type(flow) in (PerChannel, Pooled):
            return self._normed(flow, flow.axis, list(flow.constants), flow.operand)  # type: ignore[attr-defined]
        for operand in flow.node.all_input_nodes:
            self.stay_all(flow.node, operand, f"{name_of(flow.node)} reads it")
        return torch.zeros_like(flow.facts.value)

    def _normed(self, flow: Flow, axis: int, constants: list[fx.Node], operand: fx.Node) -> Tensor:
        x = self.facts(flow.node, operand)
        ends = self._along(x, axis)
        if ends is None and axis == -1:
            self.stay(x.value, "a norm over it, once for each of other entries that are told apart")
        for const in dict.fromkeys(constants):
            ends = ends if ends is not None and len(ends) == len(self.program.const(const)) else None
            self.use(const, flow.node, None if ends is None else {0: ends})
            if ends is None:
                self.stay(x.value, UNTOLD)
        spread = x.value.reshape([*x.value.shape[: x.at(axis).stop], *[1] * (flow.facts.value.ndim - x.at(axis).stop)])
        return spread.expand(flow.facts.value.shape)

    def _reduced(self, flow: Reduced) -> Tensor:
        x = self.facts(flow.node, flow.operand)
        gone = sorted((p for axis in flow.axes for p in x.at(axis)), reverse=True)
        summed = any(x.value.shape[p] > 1 for p in gone)
        if summed and any(n > 1 for p, n in enumerate(x.value.shape) if p not in gone):
            self.stay(x.value, "a sum over a part of what is told apart")
        value = torch.zeros_like(x.value) if summed else x.value
        for place in gone:
            value = value.select(place, 0)
        return value

    def _pointwise(self, flow: Pointwise) -> Tensor:
        """Operands of the whole size meet entry by entry; smaller ones stay, and say which entries are at one place."""
        shape = [int(f.size) if f.tracked else 1 for axis in flow.aligned.axes for f in axis]
        whole: list[Tensor] = []
        place = torch.zeros(shape, dtype=torch.int64)
        untold = False
        for i, operand in enumerate(flow.operands):
            facts = self.facts(flow.node, operand)
            wires, at, lacks = flow.aligned.lift(facts, i)[1], 0, False
            for mine, factors in zip(flow.aligned.parts[i], flow.aligned.axes, strict=True):
                for n, p in enumerate(range(at, at + len(factors))):
                    if shape[p] > 1 and wires.shape[p] == 1:
                        lacks = True
                        untold |= bool(mine) and not mine[min(n, len(mine) - 1)].free
                at += len(factors)
            if facts.value.numel() > wires.numel():
                self.stay(facts.value, UNTOLD)
            if lacks or wires.numel() < place.numel():
                self.stay(wires, "it is one value for many entries")
            else:
                whole.append(wires.expand(shape))
            if lacks and wires.numel() > 1:
                place = place * 1_000_003 + wires.long()
        if untold or not whole:
            for wires in whole:
                self.stay(wires, UNTOLD)
            return torch.zeros(shape, dtype=torch.float64)
        for other in whole[1:]:
            self.join(whole[0], other)
        if len(whole) > 1 or place.any():
            self.meetings.append(Meeting(tuple(_ints(w) for w in whole), _ints(place)))
        return whole[0]

    # ---- products

    def _matmul(self, flow: Matmul) -> Tensor:
        rank = len(flow.space.axes)
        x, y = (flow.space.lift(side.facts, i)[1] for i, side in enumerate(flow.sides))
        told = [any(flow.space.axes[a][i].tracked for i in range(len(flow.space.axes[a]))) for a in (rank - 3, rank - 2, rank - 1)]
        if sum(told) > 1:
            return self._stuck(flow, (x, y))
        if told[1]:
            self._sum(x, y)
            return torch.zeros(flow.facts.value.shape, dtype=torch.float64)
        result = y if told[2] else x if told[0] else None
        drop = sorted(flow.at(rank - 2), reverse=True)
        return self._through(result, drop, flow) if result is not None else torch.zeros(flow.facts.value.shape, dtype=torch.float64)

    def _attention(self, flow: Attention) -> Tensor:
        rank = len(flow.space.axes)
        told = [any(f.tracked for f in flow.space.axes[a]) for a in range(rank - 4, rank)]
        q, k, v = (flow.space.lift(flow.sides[i].facts, i)[1] for i in range(3))
        if told[0] or told[1]:
            return self._stuck(flow, (q, k, v))
        for i, side in enumerate(flow.sides[3:]):
            self.stay(flow.space.lift(side.facts, 3 + i)[1], "an attention mask")
        if told[2]:
            self._sum(q, k)
        drop = sorted([*flow.at(rank - 3), *flow.at(rank - 2)], reverse=True)
        return self._through(v, drop, flow) if told[3] else torch.zeros(flow.facts.value.shape, dtype=torch.float64)

    def _sum(self, a: Tensor, b: Tensor) -> None:
        """Products of pairs, added up: pairs stay pairs, at places that stay."""
        if a.shape != b.shape:
            small = [t for t in (a, b) if t.numel() < max(a.numel(), b.numel())]
            for t in (a, b):
                self.stay(t, UNTOLD if small else "")
            return
        self.join(a, b)
        self.meetings.append(Meeting((_ints(a), _ints(b)), _ints(_leading(a.shape))))

    def _through(self, value: Tensor, drop: list[int], flow: Product) -> Tensor:
        """Weighted means of a value's entries: the result has wires of its own beside them, at places that stay."""
        for place in drop:
            value = value.select(place, 0)
        value = value.expand(flow.facts.value.shape)
        out = self.fresh(value.numel())
        self.sources.pop()  # where they go follows from the meeting
        self.join(value, out.view(value.shape))
        self.meetings.append(Meeting((_ints(value),), _ints(_leading(value.shape)), out))
        return out.view(value.shape)

    def _stuck(self, flow: Product, wires: tuple[Tensor, ...]) -> Tensor:
        for one in wires:
            self.stay(one, "a product over several axes that are told apart")
        return torch.zeros(flow.facts.value.shape, dtype=torch.float64)


    # ---- who may change places

    def found(self) -> Found:
        """Labels of all wires, and the cells in which they may change places."""
        a, b = (torch.cat([pair[i] for pair in (*self.joints, *shared(self))] or [torch.zeros(0, dtype=torch.int64)]) for i in (0, 1))
        loose = (a == 0) != (b == 0)
        self.stay(torch.cat([a[loose], b[loose]]), UNTOLD)
        label = _united(self.count, a[(a > 0) & (b > 0)], b[(a > 0) & (b > 0)])
        cause: dict[int, str] = {}
        stays = torch.zeros(self.count, dtype=torch.bool)
        stays[0] = True
        for wires, why in self.stays:
            gone = label[wires]
            new = gone[~stays[gone]]
            stays[gone] = True
            cause |= dict.fromkeys(new.unique().tolist(), why)
        sign = torch.zeros(self.count, dtype=torch.int64)
        for i, source in enumerate(self.sources):
            sign.index_add_(0, label[source], _mixed(torch.full_like(source, 3 * i)))
        for i, use in enumerate(self.uses):
            for axis, ends in enumerate(use.ends):
                sign.index_add_(0, label[ends], _mixed(torch.full_like(ends, 3 * (8 * i + axis) + 1)))
        for i, meeting in enumerate(self.meetings):
            sign.index_add_(0, label[meeting.wires[0]], _mixed(_mixed(meeting.place) + 3 * i + 2))
        cell = sign.unique(return_inverse=True)[1]
        cell[stays] = -1
        return Found(label, cell, cause)

    def moved(self, found: Found, target: Tensor) -> list[tuple[Tensor, ...]]:
        """For every use and axis i64 [size]: where each entry comes from, once label i has the place of label target[i].

        Follows every entry through the program. Raises Stop where what meets would be something else than before.
        """
        image = torch.arange(self.count)
        for source in self.sources:
            label = found.label[source]
            if not torch.equal(target[label], label):
                image[source] = source[matched(label, target[label])]
        for meeting in self.meetings:
            if all(torch.equal(image[wires], wires) for wires in meeting.wires):
                continue
            before, after = _mixed(meeting.place), _mixed(meeting.place)
            for wires in meeting.wires:
                before, after = _mixed(before + wires), _mixed(after + image[wires])
            index = matched(before, after)
            if meeting.out is not None:
                image[meeting.out] = meeting.out[index]
        return [tuple(matched(ends, image[ends]) for ends in use.ends) for use in self.uses]


def matched(before: Tensor, after: Tensor) -> Tensor:
    """index with before[index] == after, each entry once. Raises Stop where they hold different things."""
    a, b = before.argsort(stable=True), after.argsort(stable=True)
    if not torch.equal(before[a], after[b]):
        raise Stop("what meets would be something else")
    index = torch.empty_like(a)
    index[b] = a
    return index


def _united(count: int, a: Tensor, b: Tensor) -> Tensor:
    """i64 [count]: for every wire the smallest that it is joined with, over pairs (a, b)."""
    label = torch.arange(count)
    while True:
        least = torch.minimum(label[a], label[b])
        new = label.clone()
        for side in (a, b):
            new.scatter_reduce_(0, label[side], least, "amin")
        new = new[new]
        new = new[new]
        if torch.equal(new, label):
            return label
        label = new


def _mixed(x: Tensor) -> Tensor:
    """i64 -> i64, scattered (the finalizer of splitmix64, wrapping around)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _ints(wires: Tensor) -> Tensor:
    return wires.reshape(-1).long()


def _leading(shape: torch.Size) -> Tensor:
    """For every entry its index on all axes that vary but the last of them."""
    size = shape.numel()
    last = next((n for n in reversed(shape) if n > 1), 1)
    return torch.arange(size) // last


def shared(wires: Wires) -> Iterator[tuple[Tensor, Tensor]]:
    """Wires along one axis of one tensor that several nodes read: it is stored once."""
    first: dict[Any, Use] = {}
    for use in wires.uses:
        tensor = wires.program.const(use.const)
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        other = first.setdefault(key, use)
        if other is not use:
            yield from zip(other.ends, use.ends, strict=True)
