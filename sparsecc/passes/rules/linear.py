"""Constant weights: linears, embeddings, convolutions. A column that is not needed or holds a constant leaves; so does a row."""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from sparsecc.formats import NM, Block, Pattern
from sparsecc.ir.ops import ACTIVATIONS
from sparsecc.ir.program import LinearView
from sparsecc.passes.dims import Facts, Stop, unknown
from sparsecc.passes.links import Blocks, Groups, Link, Same, Span
from sparsecc.passes.rules.base import Flow, Need, argument, name_of

if TYPE_CHECKING:
    from sparsecc.passes.propagate import Analysis
    from sparsecc.passes.slice import Cutter


@dataclass(frozen=True)
class Linear(Flow):
    """sparsecc.linear with one dense weight. `uniform`: bool [K], features that are one and the same constant; `value`: f64 [K], those."""

    uniform: Tensor
    value: Tensor

    @property
    def view(self) -> LinearView:
        return LinearView(self.node)

    @property
    def weight(self) -> Tensor:
        """[N, K]"""
        return self.a.program.const(self.view.params[0])

    def needs(self, need: Tensor) -> Iterator[Need]:
        x = self.a.facts(self.node, self.view.x)
        if not self.facts.axes[-1]:  # one output feature
            need = need.unsqueeze(-1)
        rows = need.reshape(-1, need.shape[-1])
        columns = torch.stack([touched(self.weight, row) for row in rows])
        places = x.at(-1)
        mask = columns.reshape([*need.shape[:-1], *(int(x.factors[p].size) for p in places)])
        for place in places:
            if not x.factors[place].tracked:
                mask = mask.any(place, keepdim=True)
        mask = mask.expand(x.known.shape)
        yield Need(self.view.x, mask)
        yield Need(self.view.x, mask & x.known & ~x.spread(-1, self.uniform), True, "a constant of its own for every token")

    def links(self) -> Iterator[Link]:
        x, key = self.a.facts(self.node, self.view.x), self.a.key(self.node, self.view.x)
        for place in range(len(x.factors) - len(x.axes[-1])):
            if isinstance(x.factors[place].size, int):
                yield Same(Span(self.node, (place,)), Span(key, (place,)))
        yield from aligned_to(self.view.terms[0].zeros, self.own(-1), self.span(self.view.x, -1), 1)

    def cut(self, c: Cutter) -> None:
        x = self.view.x
        c.constant(self.node, x)
        columns = c.mask(self.a.key(self.node, x), self.a.facts(self.node, x), -1)
        c.linear(self.view, c.mask(self.node, self.facts, -1), columns, self.uniform, self.value)


def linear(a: Analysis, node: fx.Node) -> Flow:
    """y = act(W x + b)"""
    view = LinearView(node)
    if not view.plain or view.layout != "row" or not a.program.is_const(view.params[0]) or view.residual is not None:
        raise Stop("not a plain linear")
    if view.bias is not None and not a.program.is_const(view.bias):
        raise Stop("a bias that is computed")
    x, weight = a.facts(node, view.x), a.program.const(view.params[0]).detach()
    uniform, value = x.vector(-1)
    columns = uniform.to(weight.device)
    rows = ~touched(weight.t(), ~uniform)
    result = torch.zeros(len(weight), dtype=torch.float64)
    if rows.any():
        found = weight[rows.to(weight.device)][:, columns].cpu().double() @ value[uniform]
        if view.bias is not None:
            found = found + a.program.const(view.bias).detach().cpu().double()[rows]
        found = ACTIVATIONS[view.epilogue].fn(found)
        rows[rows.clone()] = found.isfinite()
        result[rows] = found[found.isfinite()]
    lead = x.known.shape[: len(x.factors) - len(x.axes[-1])]
    axes = (*x.axes[:-1], *unknown((len(weight),), (0,)).axes)
    shape = (*lead, len(weight)) if len(weight) != 1 else lead
    return Linear(a, node, Facts(axes, rows.expand(shape) if len(weight) != 1 else rows.expand((*lead, 1))[..., 0],
                                 result.expand(shape) if len(weight) != 1 else result.expand((*lead, 1))[..., 0]), uniform, value)


def aligned_to(pattern: Pattern, rows: Span, columns: Span, taps: int) -> Iterator[Link]:
    """Blocks and N:M groups of a weight stay aligned; each of `columns` is `taps` columns of it."""
    height, width = (pattern.rows, pattern.cols) if isinstance(pattern, Block) else (1, pattern.m if isinstance(pattern, NM) else 1)
    if height > 1:
        yield Blocks(rows, height)
    if taps % width:
        yield Blocks(columns, width // math.gcd(width, taps))


FIRST = 64
"""Rows that settle most columns of a weight: few are zero in all of them without being zero."""


def touched(weight: Tensor, rows: Tensor) -> Tensor:
    """bool [K]: columns of a weight [N, K] that are not zero in all of some rows, bool [N]. Reads a few rows where that will do."""
    index = rows.nonzero()[:, 0].to(weight.device)
    if not len(index):
        return torch.zeros(weight.shape[1], dtype=torch.bool)
    found = nonzero(weight[index[:FIRST]]).any(0)
    if len(index) > FIRST and not found.all():
        rest = (~found).nonzero()[:, 0]
        found[rest] = nonzero(weight.index_select(1, rest.to(weight.device)).index_select(0, index)).any(0)
    return found


def nonzero(weight: Tensor) -> Tensor:
    """bool, on the CPU; NaN is no zero."""
    return (weight.detach() != 0).cpu()


@dataclass(frozen=True)
class Embedding(Flow):
    """Rows of a table."""

    weight: fx.Node
    ids: fx.Node

    def needs(self, need: Tensor) -> Iterator[Need]:
        if self.a.is_value(self.ids):
            yield Need(self.ids, torch.ones_like(self.a.facts(self.node, self.ids).known), True, "indices of an embedding")

    def cut(self, c: Cutter) -> None:
        mask = c.mask(self.node, self.facts, -1)
        if mask is not None:
            self.node.replace_input_with(self.weight, c.indexed(self.weight, {1: mask}))


def embedding(a: Analysis, node: fx.Node) -> Flow:
    """weight[ids]: a column in which all rows agree is a constant."""
    weight, ids = argument(node, 0, "weight"), argument(node, 1, "indices")
    if not isinstance(node.target, torch._ops.OpOverload):
        weight, ids = argument(node, 1, "weight"), argument(node, 0, "input")
    if not a.program.is_const(weight):
        raise Stop("a table that is computed")
    table = a.program.const(weight).detach()
    facts = unknown(a.shape(node), (-1,))
    if table.shape[1] > 1 and len(table) > 1:
        known = _columns_of_one_value(table)
        value = torch.where(known, table[0].cpu().double(), 0.0)
        facts = Facts(facts.axes, known.expand(facts.known.shape), value.expand(facts.known.shape))
    return Embedding(a, node, facts, weight, ids)


def _columns_of_one_value(table: Tensor) -> Tensor:
    """bool [K]: where all rows agree."""
    found = (table[:FIRST] == table[0]).all(0).cpu()
    rest = found.nonzero()[:, 0]
    if len(rest):
        columns = table.index_select(1, rest.to(table.device))
        found[rest] = (columns == columns[0]).all(0).cpu()
    return found


@dataclass(frozen=True)
class Conv(Flow):
    """`foldable`: bool [C], channels that are one constant which the bias can take; `value`: f64 [C], those.

    `groups_at`: where the arguments say how many groups there are."""

    foldable: Tensor
    value: Tensor
    axis: int
    groups: int
    groups_at: int

    @property
    def x(self) -> fx.Node:
        return self.node.args[0]  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        """[O, C / groups, ...]"""
        return self.a.program.const(argument(self.node, 1, "weight"))

    def needs(self, need: Tensor) -> Iterator[Need]:
        x = self.a.facts(self.node, self.x)
        rows = need.reshape(self.groups, -1, 1)
        taps = nonzero(self.weight).flatten(2).any(2).view(self.groups, -1, self.weight.shape[1])
        mask = x.spread(self.axis, (rows & taps).any(1).reshape(-1))
        yield Need(self.x, mask)
        yield Need(self.x, mask & x.known & ~x.spread(self.axis, self.foldable), True, "a constant that padding interrupts")

    def links(self) -> Iterator[Link]:
        if self.groups > 1:
            yield Groups(self.span(self.x, self.axis), self.own(self.axis), self.groups)
        else:
            taps = math.prod(self.weight.shape[2:])
            yield from aligned_to(self.a.conv_pattern(self.node), self.own(self.axis), self.span(self.x, self.axis), taps)
        x, key = self.a.facts(self.node, self.x), self.a.key(self.node, self.x)
        for place in range(x.at(self.axis).start):
            if isinstance(x.factors[place].size, int):
                yield Same(Span(self.node, (place,)), Span(key, (place,)))

    def cut(self, c: Cutter) -> None:
        c.constant(self.node, self.x)
        key, x = self.a.key(self.node, self.x), self.a.facts(self.node, self.x)
        rows, columns = c.mask(self.node, self.facts, self.axis), c.mask(key, x, self.axis)
        if rows is None and columns is None:
            return
        weight, bias = argument(self.node, 1, "weight"), argument(self.node, 2, "bias")
        O, C = self.weight.shape[0], self.weight.shape[1] * self.groups
        rows = torch.ones(O, dtype=torch.bool) if rows is None else rows
        columns = torch.ones(C, dtype=torch.bool) if columns is None else columns
        per_group = rows.view(self.groups, -1), columns.view(self.groups, -1)
        stays = per_group[0].any(1)
        new = _grouped(self.weight.detach(), stays, *per_group)
        bias = c.folded_bias(bias, weight, self._constant(~columns), rows)
        args = [*self.node.args, *[None] * max(0, 3 - len(self.node.args))]
        args[1], args[2] = c.add_weight(weight, new), bias
        kwargs = {name: value for name, value in self.node.kwargs.items() if name not in ("weight", "bias")}
        if self.groups > 1:
            if len(args) > self.groups_at:
                args[self.groups_at] = int(stays.sum())
            else:
                kwargs["groups"] = int(stays.sum())
        self.node.args, self.node.kwargs = tuple(args), kwargs

    def _constant(self, gone: Tensor) -> Tensor | None:
        """f64 [O]: what channels that leave add to every output, None for nothing."""
        value = torch.where(gone & self.foldable, self.value, 0.0)
        return constant_part(self.weight, value, self.groups) if value.any() else None


def constant_part(weight: Tensor, value: Tensor, groups: int) -> Tensor:
    """f64 [O]: a convolution of constant channels `value` f64 [C] without padding."""
    summed = weight.detach().cpu().double().flatten(2).sum(2).view(groups, -1, weight.shape[1])
    return (summed @ value.view(groups, -1, 1)).reshape(-1)


def _grouped(weight: Tensor, stays: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The weight of the groups that stay, each with its own rows and columns, as many as the others have."""
    groups = stays.nonzero()[:, 0]
    row = torch.stack([rows[g].nonzero()[:, 0] for g in groups]).to(weight.device)
    column = torch.stack([columns[g].nonzero()[:, 0] for g in groups]).to(weight.device)
    parts = weight.view(len(stays), -1, *weight.shape[1:])
    cut = parts[groups.to(weight.device)[:, None, None], row[:, :, None], column[:, None, :]]
    return cut.reshape(-1, *cut.shape[2:]).contiguous()


def conv(a: Analysis, node: fx.Node) -> Flow:
    """conv1d, conv2d, conv3d, convolution"""
    name = name_of(node)
    if name == "convolution" and argument(node, 6, "transposed"):
        raise Stop("a transposed convolution")
    operand: Any = node.args[0]
    weight, bias = argument(node, 1, "weight"), argument(node, 2, "bias")
    if not a.program.is_const(weight) or not (bias is None or a.program.is_const(bias)):
        raise Stop("a weight that is computed")
    at = 8 if name == "convolution" else 6
    groups, W, x = int(argument(node, at, "groups", 1)), a.program.const(weight).detach(), a.facts(node, operand)
    axis = len(x.axes) - W.ndim + 1
    if any(f.tracked for p, f in enumerate(x.factors) if p not in x.at(axis)) or W.shape[0] == 1 or len(x.axes[axis]) < 1:
        raise Stop("positions that are told apart, or a single channel")
    known, value = x.vector(axis)
    foldable = known & ((value == 0) | (not _padded(argument(node, 4, "padding", 0), W)))
    value = torch.where(foldable, value, 0.0)
    taps = nonzero(W).flatten(2).any(2).view(groups, -1, W.shape[1])
    rows = ~(taps & ~foldable.view(groups, 1, -1)).any(2).reshape(-1)
    result = constant_part(W, value, groups) if value.any() else torch.zeros(W.shape[0], dtype=torch.float64)
    if bias is not None:
        result = result + a.program.const(bias).detach().cpu().double()
    rows = rows & result.isfinite()
    facts = unknown(a.shape(node), (axis,))
    axes = (*x.axes[:axis], *facts.axes[axis:])
    shape = [int(f.size) if f.tracked else 1 for one in axes for f in one]
    view = [-1 if i == sum(len(one) for one in axes[:axis]) else 1 for i in range(len(shape))]
    result = torch.where(rows, result, 0.0)
    return Conv(a, node, Facts(axes, rows.view(view).expand(shape), result.view(view).expand(shape)), foldable, value, axis, groups, at)


def _padded(padding: Any, weight: Tensor) -> bool:
    """Whether zeros are put around the input."""
    if isinstance(padding, str):
        return padding != "valid" and math.prod(weight.shape[2:]) > 1
    return any(padding) if isinstance(padding, list | tuple) else bool(padding)
