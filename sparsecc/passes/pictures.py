"""Part of layout: pictures go back to torch's convolutions where those are faster in all.

    y = depthwise(linear(x', [..], b, epilogue="relu"), w, b)   -->  y' = convolution(relu(convolution(x, w, b)), w, b, groups=C)

Each convolution was measured against torch's when it was packed, each window that no linear follows is here. One alone cannot go back,
since that would cost two changes of layout; so the sums over everything that is connected decide.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import fx
from torch.fx.node import map_arg

from sparsecc.ir.image_ops import DEPTHWISE, IMAGE_MEANINGS, PATCHES, POOL, WEIGHTED
from sparsecc.ir.infer import value_of
from sparsecc.ir.ops import LINEAR, term_weight
from sparsecc.ir.program import LinearView, Program
from sparsecc.passes.context import Picture, Tuner
from sparsecc.passes.lower import ATEN
from sparsecc.passes.pack import is_entry, of_pictures, picture_of

aten = torch.ops.aten


def return_slower(program: Program, tuner: Tuner) -> None:
    """Give the connected parts whose kernels lost back to torch."""
    for cluster in _clusters(program):
        ours, torchs = _times(program, cluster, tuner)
        if ours is None or torchs is None or ours <= torchs:
            continue
        for node in cluster:
            if node.name in program.regions:
                region = program.regions[node.name]
                region.choice = region.format = "dense"
                region.reason = f"torch's convolutions are faster: {torchs:.0f} us in all, {ours:.0f} us on sequences of pixels"
        _give_back(program, cluster)
    program.finish()


def _clusters(program: Program) -> Iterator[list[fx.Node]]:
    """What is connected, in program order."""
    graph: nx.Graph = nx.Graph()
    for node in program.graph.nodes:
        if node.op == "call_function" and (node.target in IMAGE_MEANINGS or (of_pictures(node) and not is_entry(node))):
            graph.add_node(node)
            graph.add_edges_from((source, node) for source in node.all_input_nodes if source in graph)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    yield from (sorted(component, key=order.__getitem__) for component in list(nx.connected_components(graph)))


def _times(program: Program, cluster: Sequence[fx.Node], tuner: Tuner) -> tuple[float | None, float | None]:
    """Microseconds of our kernels, and of torch's; None where something was not measured."""
    ours = torchs = 0.0
    for node in cluster:
        found: tuple[Any, Any] = (0.0, 0.0)
        if node.target is LINEAR:
            more = program.region(node).more if picture_of(LinearView(node)) is not None else {}
            found = more.get("measured_us"), more.get("dense_us")
        elif node.target in WEIGHTED and tuner.between is not None:
            B, _, C = (size if isinstance(size, int) else int(size.node.hint or 1) for size in value_of(node.args[0]).shape)  # type: ignore[arg-type]
            size, window, pads = (tuple(part) for part in node.args[3:6])  # type: ignore[arg-type]
            outputs = None if node.target is DEPTHWISE else int(value_of(node).shape[2])
            found = tuner.between.window_times(Picture(B, C, size, window, pads), outputs, str(node.args[6]))  # type: ignore[arg-type]
            if None not in found and node.name in program.regions:
                program.regions[node.name].more |= {"measured_us": found[0], "dense_us": found[1]}
        if None in found:
            return None, None
        ours, torchs = ours + found[0], torchs + found[1]
    return ours, torchs


def _give_back(program: Program, cluster: Sequence[fx.Node]) -> None:
    made = _Pictures(program)
    inside = set(cluster)
    for node in cluster:
        with program.graph.inserting_before(node):
            made.node(node)
    for node in cluster:
        if node.target is POOL:
            node.replace_all_uses_with(made.of[node], propagate_meta=False)
        elif node in made.of and any(user not in inside for user in node.users):
            with program.graph.inserting_after(made.of[node]):
                flat = program.graph.call_function(aten.flatten.using_ints, (made.of[node], 2))
            with program.graph.inserting_after(flat):
                pixels = program.graph.call_function(aten.transpose.int, (flat, 1, 2))
            node.replace_all_uses_with(pixels, lambda user: user not in inside, propagate_meta=False)


@dataclass
class _Pictures:
    """[B, C, H, W] of sequences of pixels."""

    program: Program
    of: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def picture(self, node: fx.Node, size: Sequence[int] | None = None) -> fx.Node:
        """What the sequence came from, if that is known; else as many pixels as `size` says, or in one column."""
        if node not in self.of:
            source = node.args[0]
            if is_entry(node):
                self.of[node] = source.args[0]  # type: ignore[union-attr,assignment]
            else:
                _, S, C = value_of(node).shape
                flat = self.program.graph.call_function(aten.transpose.int, (node, 1, 2))
                self.of[node] = self.program.graph.call_function(aten.reshape.default, (flat, [-1, int(C), *(size or (int(S), 1))]))
        return self.of[node]

    def node(self, node: fx.Node) -> None:
        call = self.program.graph.call_function
        if node.target is PATCHES:
            self.picture(node.args[0], node.args[1])  # type: ignore[arg-type]
        elif node.target is POOL:
            self.of[node] = call(aten.mean.dim, (self.picture(node.args[0]), [2, 3]))  # type: ignore[arg-type]
        elif node.target in WEIGHTED:
            x, weight, bias, size, window, pads, epilogue, _ = node.args
            const, groups = self.program.const(weight), 1  # type: ignore[arg-type]
            if node.target is DEPTHWISE:
                const, groups = const[:, None], len(const)
            self.of[node] = self._convolution(node, x, const, bias, size, window, pads, groups, epilogue)
        elif node.target is LINEAR:
            view = LinearView(node)
            x, size, window, pads = (view.x, None, (1, 1, 1, 1), (0, 0, 0, 0)) if view.x.target is not PATCHES else view.x.args[:4]
            C = int(value_of(x).shape[2])  # type: ignore[arg-type]
            weight = term_weight(view.terms[0], [self.program.const(p) for p in view.params]).view(view.shape[0], C, *window[:2])  # type: ignore[index]
            y = self._convolution(node, x, weight, view.bias, size, window, pads, 1, view.epilogue)
            self.of[node] = y if view.residual is None else call(aten.add.Tensor, (y, self.picture(view.residual)))
        else:
            args = map_arg(node.args, self.picture)
            self.of[node] = call(node.target, args, dict(node.kwargs))  # type: ignore[arg-type]

    def _convolution(
        self, node: fx.Node, x: Any, weight: torch.Tensor, bias: Any, size: Any, window: Any, pads: Any, groups: int, epilogue: Any
    ) -> fx.Node:
        call, (top, left, bottom, right) = self.program.graph.call_function, pads
        picture = self.picture(x, size)
        if (top, left) != (bottom, right):
            picture, top, left = call(aten.constant_pad_nd.default, (picture, [left, right, top, bottom])), 0, 0
        name = self.program.weight_name(node.args[1] if node.target in WEIGHTED else LinearView(node).params[0])  # type: ignore[arg-type]
        const = self.program.add_const(name, weight.contiguous(), name)
        y = call(aten.convolution.default, (picture, const, bias, list(window[2:]), [top, left], [1, 1], False, [0, 0], groups))
        if node.name in self.program.regions:
            self.program.regions[y.name] = self.program.regions[node.name]
        if epilogue:
            target, kwargs = ATEN[epilogue]
            y = call(target, (y,), kwargs)
        return y
