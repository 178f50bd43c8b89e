"""What a rule is: from a node to a `Flow`, which carries facts forward, needs backward, says what goes together, and cuts."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from sparsecc.ir.types import Dim
from sparsecc.passes.dims import Facts, Stop, unknown
from sparsecc.passes.links import Key, Link, Same, Span

if TYPE_CHECKING:
    from sparsecc.passes.propagate import Analysis
    from sparsecc.passes.slice import Cutter


@dataclass(frozen=True)
class Need:
    """Entries of an operand that matter (an array like its `known`). pin: even where they are constants, because of `why`; held: although
    nobody reads them."""

    operand: fx.Node
    mask: Tensor
    pin: bool = False
    why: str = ""
    held: bool = False


@dataclass(frozen=True)
class Flow:
    """One node under its rule."""

    a: Analysis
    node: fx.Node
    facts: Facts

    @property
    def rigid(self) -> bool:
        """Whether the number of copies along an axis matters to it."""
        return True

    def values(self) -> Iterator[tuple[Key, Facts]]:
        """What has masks on its account."""
        yield self.node, self.facts

    def needs(self, need: Tensor) -> Iterator[Need]:
        """Of the operands, for those entries of the result."""
        yield from ()

    def links(self) -> Iterator[Link]:
        """What must be cut together."""
        yield from ()

    def cut(self, c: Cutter) -> None:
        """Change the node so that it computes what stays. Operands that are values have been cut."""

    def span(self, operand: fx.Node, axis: int) -> Span:
        """A whole axis of an operand."""
        return Span(self.a.key(self.node, operand), tuple(self.a.facts(self.node, operand).at(axis)))

    def own(self, axis: int) -> Span:
        """A whole axis of the result."""
        return Span(self.node, tuple(self.facts.at(axis)))


RuleOf = Callable[["Analysis", fx.Node], Flow]
"""From a node to its flow. Raises Stop where it cannot follow."""


@dataclass(frozen=True)
class Opaque(Flow):
    """Nothing is known of the result, and everything that it reads stays as it is."""

    why: str = ""

    def needs(self, need: Tensor) -> Iterator[Need]:
        for operand in self.node.all_input_nodes:
            if self.a.is_value(operand):
                yield Need(operand, torch.ones_like(self.a.facts(self.node, operand).known), True, self.why)


@dataclass(frozen=True)
class Plain(Flow):
    """Tells nothing apart, and reads nothing that is: it needs all of its operands, or none."""

    def needs(self, need: Tensor) -> Iterator[Need]:
        for operand in self.node.all_input_nodes:
            if operand in self.a.flows:
                yield Need(operand, torch.ones_like(self.a.flows[operand].facts.known))


def opaque(a: Analysis, node: fx.Node, why: str) -> Opaque:
    """For a node without a rule."""
    return Opaque(a, node, unknown(a.shape(node)), why)


@dataclass(frozen=True)
class Metadata(Flow):
    """Reads sizes that slicing leaves alone, or nothing."""


def metadata(a: Analysis, node: fx.Node) -> Flow:
    """sym_size and the like: only sizes that vary are asked for, and those are never cut."""
    return Metadata(a, node, unknown(()))


@dataclass(frozen=True)
class Moved(Flow):
    """The operand's factors in another order, some axes of size 1 more or less. `order`: new factor -> old."""

    operand: fx.Node
    order: tuple[int, ...]

    @property
    def rigid(self) -> bool:
        return False

    def needs(self, need: Tensor) -> Iterator[Need]:
        back = [self.order.index(i) for i in range(len(self.order))]
        yield Need(self.operand, need.permute(back))

    def links(self) -> Iterator[Link]:
        key = self.a.key(self.node, self.operand)
        for new, old in enumerate(self.order):
            if isinstance(self.facts.factors[new].size, int):
                yield Same(Span(self.node, (new,)), Span(key, (old,)))

    def cut(self, c: Cutter) -> None:
        c.constant(self.node, self.operand)


def moved(a: Analysis, node: fx.Node, axes: list[int | None]) -> Moved:
    """A result whose axis i is the operand's axis axes[i], or new and of size 1 where that is None."""
    operand = node.all_input_nodes[0]
    x = a.facts(node, operand)
    order = [place for axis in axes if axis is not None for place in x.at(axis)]
    if len(order) != len(x.factors):
        raise Stop("an axis that is told apart disappears")
    new = tuple(() if axis is None else x.axes[axis] for axis in axes)
    return Moved(a, node, Facts(new, x.known.permute(order), x.value.permute(order)), operand, tuple(order))


def same(a: Analysis, node: fx.Node) -> Moved:
    """The operand itself."""
    rank = len(a.facts(node, node.all_input_nodes[0]).axes)
    return moved(a, node, list(range(rank)))


def name_of(node: fx.Node) -> str:
    """aten.view.default, torch.Tensor.view and "view" are all "view"."""
    if node.op == "call_method":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.partition("::")[2]
    return getattr(node.target, "__name__", str(node.target))


def argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    """An argument by position or name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def fixed(size: Dim, what: str) -> int:
    """A size as an int. Raises Stop."""
    if not isinstance(size, int):
        raise Stop(f"{what} varies")
    return size
