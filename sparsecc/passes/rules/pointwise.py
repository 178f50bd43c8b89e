"""Entry by entry: zeros survive f(0) = 0 and products, constants become f(c); operands and result are cut alike."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from sparsecc.ir.effects import mutates
from sparsecc.passes.dims import Aligned, Facts, align
from sparsecc.passes.links import Covers, Link, Same, Span
from sparsecc.passes.rules.base import Flow, Need, name_of

if TYPE_CHECKING:
    from sparsecc.passes.propagate import Analysis
    from sparsecc.passes.slice import Cutter

PRODUCTS = ("mul", "multiply")
SUMS = ("add", "sub", "iadd", "isub")
NAMES = frozenset((
    "relu", "relu6", "gelu", "silu", "tanh", "sigmoid", "hardswish", "hardsigmoid", "hardtanh", "mish", "softplus", "elu", "selu", "celu",
    "leaky_relu", "exp", "log", "erf", "sqrt", "rsqrt", "square", "sin", "cos", "neg", "abs", "pow", "clamp", "clamp_min", "clamp_max",
    "where", "masked_fill", "truediv", "div", "reciprocal", "maximum", "minimum", "log_sigmoid", "logsigmoid", "rsub", *PRODUCTS, *SUMS,
))
"""Functions and methods that torch does not tag as such."""


def is_pointwise(node: fx.Node) -> bool:
    """Whether it works entry by entry, and returns a new value."""
    if mutates(node):
        return False
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or name_of(node) in NAMES


@dataclass(frozen=True)
class Pointwise(Flow):
    """`operands`: its tensors, in the order of `aligned`."""

    aligned: Aligned
    operands: tuple[fx.Node, ...]

    @property
    def rigid(self) -> bool:
        return False

    def needs(self, need: Tensor) -> Iterator[Need]:
        for i, operand in enumerate(self.operands):
            yield Need(operand, self.aligned.lower(need, self.a.facts(self.node, operand), i))

    def links(self) -> Iterator[Link]:
        for i, operand in enumerate(self.operands):
            yield from aligned_links(self, self.aligned, i, operand)

    def cut(self, c: Cutter) -> None:
        for i, operand in enumerate(self.operands):
            if not c.constant(self.node, operand):
                gather(self, c, self.aligned, i, operand)
        for operand in self.operands:
            if self._is_constant(c, operand) and any(self._full(other) for other in self.operands if other is not operand):
                self._fold(c, operand)

    def _full(self, operand: fx.Node) -> bool:
        """Whether this operand alone gives the result its shape, and varies."""
        return not self.a.program.is_const(operand) and self.a.shape(operand) == self.a.shape(self.node)

    def _is_constant(self, c: Cutter, operand: fx.Node) -> bool:
        """Whether what stays of an operand that is computed never changes."""
        facts = self.a.facts(self.node, operand)
        if self.a.program.is_const(operand) or not facts.tracked or not facts.known.any():
            return False
        return bool((facts.known | ~c.kept(operand, facts)).all())

    def _fold(self, c: Cutter, operand: fx.Node) -> None:
        """The constant in the place of what computed it; x + 0 is x."""
        value = c.reduced(operand, self.a.facts(self.node, operand))
        if value is None:
            return
        if not value.any() and (rest := self._neutral(operand)) is not None:
            c.instead[self.node] = rest
            return
        dtype = self.a.dtype(operand)
        self.node.replace_input_with(operand, c.program.add_const(f"{operand.name}_constant", value.to(dtype).to(self.a.device(operand))))

    def _neutral(self, operand: fx.Node) -> fx.Node | None:
        """What the result is where this operand is zero: the other side of a plain sum."""
        if len(self.node.args) != 2 or self.node.kwargs or name_of(self.node) not in SUMS:
            return None
        x, y = self.node.args
        rest = x if y is operand else y if name_of(self.node) in ("add", "iadd") else None
        return rest if isinstance(rest, fx.Node) and rest is not operand and self._full(rest) else None


def pointwise(a: Analysis, node: fx.Node) -> Flow:
    """f(x, y, ...) with broadcasting."""
    operands = tuple(n for n in node.all_input_nodes if a.is_value(n))
    facts = [a.facts(node, n) for n in operands]
    aligned = align(facts, [a.program.is_const(n) for n in operands], a.shape(node))
    lifted = [aligned.lift(f, i) for i, f in enumerate(facts)]
    shape = [int(f.size) if f.tracked else 1 for axis in aligned.axes for f in axis]
    known = torch.stack(torch.broadcast_tensors(torch.ones(shape, dtype=torch.bool), *(k for k, _ in lifted))).all(0)
    value = torch.zeros(known.shape, dtype=torch.float64)
    if known.any():
        known, value = _evaluated(node, {n: v for n, (_, v) in zip(operands, lifted, strict=True)}, known)
    if name_of(node) in PRODUCTS:
        zero = [(k & (v == 0)).expand(known.shape) for k, v in lifted]
        any_zero = torch.stack(zero).any(0)
        known, value = known | any_zero, torch.where(any_zero, 0.0, value)
    return Pointwise(a, node, Facts(aligned.axes, known, value), aligned, operands)


def _evaluated(node: fx.Node, values: dict[fx.Node, Tensor], known: Tensor) -> tuple[Tensor, Tensor]:
    """The op itself on the constants."""
    nothing = torch.zeros_like(known), torch.zeros(known.shape, dtype=torch.float64)
    if any(n not in values for n in node.all_input_nodes):
        return nothing
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])  # type: ignore[arg-type]
    try:
        target: Any = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
        value = target(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError):  # an op that does not take float64, or wants bools
        return nothing
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        return nothing
    value = value.double().expand(known.shape)
    known = known & value.isfinite()
    return known, torch.where(known, value, 0.0)


def aligned_links(flow: Flow, aligned: Aligned, operand: int, node: fx.Node) -> Iterator[Link]:
    """An operand and the result stay or go together. One that is broadcast is small: it is gathered from where it keeps more."""
    key, place, at = flow.a.key(flow.node, node), 0, 0
    loose = is_loose(flow.a, aligned, operand, node)
    for mine, whole, joined in zip(aligned.parts[operand], aligned.axes, aligned.joined, strict=True):
        pairs: list[tuple[Span, Span]] = []
        if mine and joined:
            pairs = [(Span(flow.node, (at,)), Span(key, tuple(range(place, place + len(mine)))))]
        elif mine:
            pairs = [(Span(flow.node, (at + i,)), Span(key, (place + i,))) for i, f in enumerate(mine) if isinstance(f.size, int)]
        place, at = place + len(mine), at + len(whole)
        yield from (Covers(*pair) if loose else Same(*pair) for pair in pairs)


def is_loose(a: Analysis, aligned: Aligned, operand: int, node: fx.Node) -> bool:
    """Whether a value is broadcast along some axis, and so smaller than the result."""
    if a.program.is_const(node):
        return False
    return any(whole and not mine for mine, whole in zip(aligned.parts[operand], aligned.axes, strict=True))


def gather(flow: Flow, c: Cutter, aligned: Aligned, operand: int, node: fx.Node) -> None:
    """Where a loose operand keeps more than the result does, take what the result keeps."""
    if not is_loose(flow.a, aligned, operand, node):
        return
    x, rank = node, len(aligned.axes)
    missing = rank - len(flow.a.shape(node))
    for axis in range(missing, rank):
        if not aligned.parts[operand][axis]:
            continue
        have, want = c.mask(node, flow.a.facts(flow.node, node), axis - missing), c.mask(flow.node, flow.facts, axis)
        if have is not None and want is not None and not torch.equal(have, want):
            x = c.take(flow.node, x, axis - missing, want[have].nonzero()[:, 0])
    if x is not node:
        flow.node.replace_input_with(node, x)

