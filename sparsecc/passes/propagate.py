"""propagate: what is constant for every input, or never read, travels through the graph, and every operation that it makes useless leaves.

    h = linear(x, [w1], b1, epilogue="relu");  y = linear(h, [w2], b2)
        row i of w1 zero, or column i of w2 zero
    -->
    h = linear(x, [w1 without row i], b1 without i, epilogue="relu");  y = linear(h, [w2 without column i], b2 + what h[i] added)

SparTA (Zheng et al., OSDI 2022) propagates such attributes through a graph; here they are facts on the factors of axes (see `dims`), so
that channels, heads and neurons keep their identity through reshapes. Per op one rule (see `rules`) says what is constant (forward), what
is needed (backward), and what must be cut together (`links`). The smallest choice that holds all that is needed is cut by `slice`.

Exact: zeros in weights count as exactly 0 (see ir/ops.py). Rows and columns go in whole blocks of the patterns involved.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sparsecc.formats import ANY, Pattern
from sparsecc.ir.effects import is_impure, mutates
from sparsecc.ir.infer import value_of
from sparsecc.ir.program import LinearView, Program
from sparsecc.ir.types import Dim
from sparsecc.passes.context import Context
from sparsecc.passes.convolution import ConvView
from sparsecc.passes.dims import Facts, Stop, constant, unknown
from sparsecc.passes.groups import describe
from sparsecc.passes.links import Key, Link, Masks, Place, Span, Whole, components, settle
from sparsecc.passes.rules import is_source, rule_of
from sparsecc.passes.rules.base import Flow, Opaque, Plain, name_of, opaque
from sparsecc.passes.rules.linear import touched
from sparsecc.passes.rules.shape import Split
from sparsecc.passes.select import zeros_of_convolution
from sparsecc.passes.slice import Cutter
from sparsecc.spec import SparsitySpec


@dataclass(frozen=True)
class Propagate:
    """The pass; see the file's docstring."""

    name: str = "propagate"
    requires: tuple[str, ...] = ("linears",)
    ensures: tuple[str, ...] = ()

    def run(self, program: Program, context: Any = None) -> None:
        if not promising(program):
            return
        analysis = Analysis(program, context.spec if isinstance(context, Context) else None)
        masks = analysis.solve()
        program.dims = describe(analysis, masks)
        if analysis.idle(masks):
            return
        Cutter(analysis, masks).run()
        program.finish()


class Analysis:
    """Facts of every value, what is needed of it, and what stays. `flows`: every node under its rule. `stops`: why a node has none."""

    def __init__(self, program: Program, spec: SparsitySpec | None = None) -> None:
        self.program, self.spec = program, spec
        self.flows: dict[fx.Node, Flow] = {}
        self.stops: dict[fx.Node, str] = {}
        self.pins: dict[Key, list[tuple[Tensor, str]]] = {}
        self.constants: dict[tuple[fx.Node, fx.Node], Facts] = {}
        self._tables: dict[fx.Node, Facts] = {}
        self._need: dict[fx.Node, Tensor] = {}
        self._pinned: dict[fx.Node, Tensor] = {}
        self._held: dict[fx.Node, Tensor] = {}
        self._forward()
        self._backward()

    # ---- what rules ask

    def is_value(self, node: Any) -> bool:
        """Whether it is a tensor, or a split of one."""
        return isinstance(node, fx.Node) and (self.program.type(node) is not None or isinstance(self.flows.get(node), Split))

    def shape(self, node: fx.Node) -> tuple[Dim, ...]:
        """Raises Stop where it is unknown."""
        found = self.program.type(node)
        if found is None:
            raise Stop("a value without a type")
        return found.shape

    def dtype(self, node: Any) -> torch.dtype:
        """Of a value."""
        found = self.program.type(node)
        assert found is not None
        return found.dtype

    def device(self, node: fx.Node) -> torch.device:
        """Of a value."""
        value = value_of(node)
        return value.device if isinstance(value, Tensor) else torch.device("cpu")

    def key(self, user: fx.Node, operand: fx.Node) -> Key:
        """Under which an operand has its masks."""
        return (user, operand) if self.program.is_const(operand) else operand

    def facts(self, user: fx.Node, operand: fx.Node) -> Facts:
        """Of an operand. Raises Stop where there are none."""
        if self.program.is_const(operand):
            if operand not in self._tables:
                self._tables[operand] = constant(self.program.const(operand))
            self.constants[user, operand] = self._tables[operand]
            return self._tables[operand]
        if operand not in self.flows:
            raise Stop("an operand that is not a value")
        return self.flows[operand].facts

    def required(self, view: LinearView) -> bool:
        """Whether the weight's pattern was asked for, or nobody can say."""
        if self.spec is None:
            return True
        return self.spec.rule_for(self.program.weight_name(view.params[0]).removesuffix(".weight")).pattern is not None

    def conv_pattern(self, node: fx.Node) -> Pattern:
        """What is known of a convolution's zeros, as a matrix [out, in * kh * kw]."""
        view = ConvView.of(self.program, node)
        return ANY if view is None else zeros_of_convolution(self.program, view, self.spec or SparsitySpec(), enforce=False)

    # ---- forward

    def _forward(self) -> None:
        written = aliases_of_written(self.program)
        for node in self.program.graph.nodes:
            if node.op == "output" or (node.op == "get_attr" and self.program.is_const(node)):
                continue
            try:
                self.flows[node] = self._flow(node, written)
            except Stop as stop:
                self.stops[node] = str(stop)
                self.flows[node] = self._opaque(node, f"{node.target}: {stop}")
            except (IndexError, TypeError, ValueError, KeyError) as error:  # arguments in a form that its rule does not know
                self.stops[node] = f"its rule does not take these arguments: {error}"
                self.flows[node] = self._opaque(node, f"{node.target}: {self.stops[node]}")

    def _flow(self, node: fx.Node, written: set[fx.Node]) -> Flow:
        if node.op in ("placeholder", "get_attr"):
            return Flow(self, node, self._unknown(node))
        rule = rule_of(node) if node.op in ("call_function", "call_method") else None
        if node in written or mutates(node):
            return self._opaque(node, "it is written to")
        told = any(f.tracked or f.free for n in node.all_input_nodes if n in self.flows for f in self.flows[n].facts.factors)
        if not told and not is_source(node):
            return Plain(self, node, self._unknown(node))
        if rule is None:
            raise Stop("there is no rule for it")
        return rule(self, node)

    def _unknown(self, node: fx.Node) -> Facts:
        found = self.program.type(node)
        return unknown(() if found is None else found.shape)

    def _opaque(self, node: fx.Node, why: str) -> Opaque:
        if self.program.type(node) is None:
            return Opaque(self, node, unknown(()), why)
        return opaque(self, node, why)

    # ---- backward

    def _backward(self) -> None:
        for node in reversed(self.program.graph.nodes):
            if node.op == "output":
                for value in node.all_input_nodes:
                    if value in self.flows:
                        self._pin(value, torch.ones_like(self.flows[value].facts.known), "the model returns it")
                continue
            flow = self.flows.get(node)
            if flow is None:
                continue
            need = self.need(node)
            if not (need.any() or isinstance(flow, Opaque) or is_impure(node)):
                continue
            for one in flow.needs(need):
                if one.operand not in self.flows:
                    continue
                if one.pin:
                    self._pin(one.operand, one.mask, one.why)
                if one.held:
                    self._held[one.operand] = self._held.get(one.operand, torch.zeros_like(one.mask)) | one.mask
                if not one.pin:
                    self._need[one.operand] = self._need.get(one.operand, torch.zeros_like(one.mask)) | one.mask

    def _pin(self, node: fx.Node, mask: Tensor, why: str) -> None:
        if mask.any():
            self._pinned[node] = self._pinned.get(node, torch.zeros_like(mask)) | mask
            self.pins.setdefault(node, []).append((mask, why))

    def wanted(self, node: fx.Node) -> Tensor:
        """bool like `known`: what somebody reads."""
        nothing = torch.zeros_like(self.flows[node].facts.known)
        pinned = self._pinned.get(node, nothing) & ~self._held.get(node, nothing)
        return self._need.get(node, nothing) | pinned

    def need(self, node: fx.Node) -> Tensor:
        """bool like `known`: what must be there. Constants need not, since who reads them can have them without."""
        facts = self.flows[node].facts
        nothing = torch.zeros_like(facts.known)
        return (self._need.get(node, nothing) & ~facts.known) | self._pinned.get(node, nothing)

    # ---- what stays

    def values(self) -> Iterator[tuple[Key, Facts]]:
        """Everything that has masks."""
        for flow in self.flows.values():
            yield from flow.values()
        yield from self.constants.items()

    def links(self) -> list[Link]:
        """All constraints."""
        found: list[Link] = []
        for node, flow in self.flows.items():
            found += [link for link in flow.links() if link.places]
            if flow.rigid:
                found += self._rigid(node)
        for value in self.program.graph.output_node().all_input_nodes:
            if value in self.flows:
                found += [Whole(Span(value, (i,))) for i, f in enumerate(self.flows[value].facts.factors) if f.free]
        return found

    def _rigid(self, node: fx.Node) -> Iterator[Link]:
        for operand in node.all_input_nodes:
            if operand in self.flows:
                yield from (Whole(Span(operand, (i,))) for i, f in enumerate(self.flows[operand].facts.factors) if f.free)

    def start(self) -> Masks:
        """What is needed, before links are heard."""
        masks = Masks()
        for key, facts in self.values():
            need = self.need(key) if isinstance(key, fx.Node) else None
            for place, factor in enumerate(facts.factors):
                if not isinstance(factor.size, int):
                    continue
                if factor.tracked and need is not None:
                    others = [d for d in range(need.ndim) if d != place]
                    masks.of[key, place] = need.any(dim=others) if others else need
                else:
                    masks.of[key, place] = torch.full((factor.size,), not (factor.tracked or factor.free))
        return masks

    def solve(self) -> Masks:
        """The smallest masks that will do. Every axis keeps at least one entry: kernels need something to work on."""
        self.first, self.all_links = self.start(), self.links()
        masks = Masks(dict(self.first.of))
        told = {(key, place) for key, facts in self.values() for place, f in enumerate(facts.factors) if f.tracked}
        self.groups: list[list[Place]] = list(components(masks.of, self.all_links))
        for group in self.groups:
            if not any(place in told for place in group):
                for place in group:
                    masks.of[place] = torch.ones_like(masks.of[place])
        settle(masks, self.all_links)
        for group in self.groups:
            for place in group:
                if not masks.of[place].any():
                    masks.of[place] = torch.arange(len(masks.of[place])) == 0
                    settle(masks, [link for link in self.all_links if set(link.places) & set(group)])
        return masks

    def idle(self, masks: Masks) -> bool:
        """Whether there is nothing to cut, and nothing that is computed though it is constant."""
        if not all(bool(mask.all()) for mask in masks.of.values()):
            return False
        return not any(flow.facts.tracked and bool(flow.facts.known.all()) for flow in self.flows.values())


def promising(program: Program) -> bool:
    """Whether anything may be dead: a zero row or column of a weight, a zero in a vector, a part of a split that nobody uses. Cheap."""
    seen: set[fx.Node] = set()
    for node in program.graph.nodes:
        if name_of(node) in SPLITS and len(node.users) < 2:
            return True
        for const in node.all_input_nodes:
            if const not in seen and program.is_const(const):
                seen.add(const)
                if _has_dead(program.const(const).detach()):
                    return True
    return False


def _has_dead(tensor: Tensor) -> bool:
    if not tensor.dtype.is_floating_point or not tensor.numel():
        return False
    if tensor.ndim < 2:
        return bool((tensor == 0).any())
    tensor = tensor.reshape(len(tensor), -1) if tensor.ndim == 2 else tensor.flatten(2).abs().amax(2)
    return not all(bool(touched(t, torch.ones(len(t), dtype=torch.bool)).all()) for t in (tensor, tensor.t()))


def aliases_of_written(program: Program) -> set[fx.Node]:
    """Values that may share memory with one that is written to."""
    written: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op != "output" and mutates(node):
            written |= {n for n in node.all_input_nodes if not program.is_const(n)}
    waiting = list(written)
    while waiting:
        node = waiting.pop()
        near = [n for n in node.all_input_nodes if is_view(node)] + [user for user in node.users if is_view(user)]
        for other in near:
            if other not in written:
                written.add(other)
                waiting.append(other)
    return written


SPLITS = ("split", "split_with_sizes", "chunk", "unbind")

_VIEWS = frozenset((
    "view", "reshape", "transpose", "permute", "t", "mT", "swapaxes", "unsqueeze", "squeeze", "expand", "slice", "narrow", "select",
    "getitem", "flatten", "unflatten", "contiguous", "detach", "alias", "to", "type_as", "float", "half", "bfloat16", "dropout", *SPLITS,
))
"""What may return its operand's memory."""


def is_view(node: fx.Node) -> bool:
    """Whether the node may return its operand's memory."""
    return node.op in ("call_function", "call_method") and name_of(node) in _VIEWS
