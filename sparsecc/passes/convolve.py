"""convolve: where a net's convolutions have zeros, its pictures become sequences of pixels, and 1 x 1 convolutions linears on them.

    y = convolution(x, w [N, C, 1, 1], b)        -->  y = linear(x', [w [N, C]], b)            x' [B, H * W, C] = transpose(reshape(x))
    y = convolution(x, w [N, C, kh, kw], b)      -->  y = linear(patches(x'), [w [N, C * kh * kw]], b)
                                                      y = direct(x', w, b), of few channels and without zeros
    y = convolution(x, w [C, 1, kh, kw], b, groups=C)   -->  y = depthwise(x', w, b)
    y = mean(x, [2, 3]);  relu6(x);  x + y       -->  pool(x');  relu6(x');  x' + y'
    y = convolution(pad(x, ...), ...)            -->  the pads of the op

So no value changes its layout between the net's first convolution and its last (Elsen et al., "Fast Sparse ConvNets", CVPR 2020). A cluster
is what such ops connect; it is converted if one of its convolutions has zeros that are worth storing.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import fx
from torch.fx.node import map_arg

from sparsecc.formats import ANY, Pattern
from sparsecc.ir.effects import mutates
from sparsecc.ir.image_ops import DEPTHWISE, DIRECT, PATCHES, POOL
from sparsecc.ir.infer import value_of
from sparsecc.ir.program import Program
from sparsecc.ir.types import TensorType
from sparsecc.passes.context import Context
from sparsecc.passes.convolution import ConvView, conv_region, convolutions
from sparsecc.passes.fuse import ACTIVATION_TARGETS, ADDS, activation_name
from sparsecc.passes.select import zeros_of_convolution
from sparsecc.passes.site import shape_of
from sparsecc.spec import SparsitySpec

aten = torch.ops.aten
PADS = (aten.pad.default, aten.constant_pad_nd.default)
WIDEST = 2
"""The largest horizontal stride of a window that kernels have."""
FEW_TAPS = 32
"""Pixels that a window sees, of all channels, up to which making patches would cost as much as the products."""


@dataclass(frozen=True)
class Convolve:
    """The pass; see the file's docstring."""

    name: str = "convolve"
    requires: tuple[str, ...] = ("linears", "patterns")
    ensures: tuple[str, ...] = ()

    def run(self, program: Program, context: Any = None) -> None:
        if isinstance(context, Context) and context.tuner is not None and context.tuner.between is None:
            return  # a target without kernels for pictures
        if any(mutates(node) for node in program.graph.nodes if node.op != "output"):
            return
        spec = context.spec if isinstance(context, Context) else SparsitySpec()
        found = _Members.of(program)
        zeros = {conv.node: zeros_of_convolution(program, conv, spec, enforce=False) for conv in found.convs.values()}
        for cluster in found.clusters():
            if any(zeros.get(node, ANY) != ANY for node in cluster):
                _convert(program, [node for node in program.graph.nodes if node in cluster], found.convs, zeros)
        program.finish()


@dataclass
class _Members:
    """What could be sequences of pixels: `convs`, and the ops between them."""

    convs: dict[fx.Node, ConvView] = field(default_factory=dict)
    others: set[fx.Node] = field(default_factory=set)

    @staticmethod
    def of(program: Program) -> _Members:
        """Everything that fits, whether or not it pays; what does not fit has the reason in its region."""
        made, convs = _Members(), {conv.node: conv for conv in convolutions(program)}
        for node in program.graph.nodes:
            if node in convs:
                reason = refusal(program, convs[node])
                region = conv_region(program, convs[node])
                if reason and reason != region.reason:
                    region.notes.append(reason)
                if reason:
                    continue
                made.convs[node] = convs[node]
            elif node.op == "call_function" and (made._joins(node) or is_pool(node)) and all(i in made for i in _sources(node)):
                made.others.add(node)
        return made

    def __contains__(self, node: fx.Node) -> bool:
        return node in self.convs or node in self.others

    def _joins(self, node: fx.Node) -> bool:
        """An activation, or a sum of two values of one shape."""
        if node.target in ACTIVATION_TARGETS:
            return activation_name(node) is not None and _is_picture(node)
        return node.target in ADDS and len(node.args) == 2 and not node.kwargs and len(_shapes(node)) == 1 and _is_picture(node)

    def clusters(self) -> list[set[fx.Node]]:
        """Connected members."""
        graph: nx.Graph = nx.Graph()
        graph.add_nodes_from((*self.convs, *self.others))
        for node in (*self.convs, *self.others):
            graph.add_edges_from((source, node) for source in _sources(node) if source in self)
        return [set(component) for component in nx.connected_components(graph)]


def refusal(program: Program, conv: ConvView) -> str:
    """Why a convolution cannot run on a sequence of pixels; "" if it can."""
    reason, x = conv.dense_because(), _unpadded(conv)[0]
    if reason and (not conv.depthwise or len(conv.kernel) != 2 or set(conv.dilation) != {1}):
        return reason
    if conv.depthwise and conv.stride[1] > WIDEST:
        return f"a depthwise window of horizontal stride {conv.stride[1]} stays torch's"
    if conv.weight.dtype != torch.float32 or not _is_picture(x) or not _is_picture(conv.node):
        sizes = shape_of(x)[1:]
        varies = bool(sizes) and not all(isinstance(size, int) for size in sizes)
        return "the picture's size varies: fix it with dynamic_shapes" if varies else f"pictures of {conv.weight.dtype} stay torch's"
    if conv.bias is not None and not program.is_const(conv.bias):
        return "its bias is no constant"
    return ""


def _is_picture(node: Any) -> bool:
    """float32 [B, C, H, W] of fixed C, H and W."""
    value, shape = value_of(node) if isinstance(node, fx.Node) else None, shape_of(node)
    return len(shape) == 4 and all(isinstance(size, int) and size for size in shape[1:]) and value.dtype == torch.float32  # type: ignore[union-attr]


def _sources(node: fx.Node) -> list[fx.Node]:
    """The pictures that a member reads."""
    if node.target is aten.convolution.default:
        return [_unpadded(node)[0]]
    return [i for i in node.all_input_nodes if i.op != "get_attr"]


def _shapes(node: fx.Node) -> set[Any]:
    return {tuple(map(str, shape_of(arg))) for arg in node.args}


def is_pool(node: fx.Node) -> bool:
    """The mean over all pixels."""
    if node.target is aten.adaptive_avg_pool2d.default:
        return list(node.args[1]) == [1, 1] and _is_picture(node.args[0])  # type: ignore[arg-type]
    dims = node.args[1] if node.target is aten.mean.dim and len(node.args) > 1 else None
    return bool(dims) and _is_picture(node.args[0]) and sorted(d % 4 for d in dims) == [2, 3] and not node.kwargs  # type: ignore[union-attr]


def _unpadded(conv: ConvView | fx.Node) -> tuple[fx.Node, tuple[int, int, int, int]]:
    """What a convolution reads, and zeros above, left of, below and right of it, its own and those of a pad before it."""
    node = conv.node if isinstance(conv, ConvView) else conv
    x, (top, left) = node.args[0], (list(node.args[4]) * 2)[:2]  # type: ignore[arg-type]
    pads = (top, left, top, left)
    if isinstance(x, fx.Node) and x.target in PADS and not x.kwargs and len(x.args[1]) == 4:  # type: ignore[arg-type]
        rest = x.args[2:]
        constant = rest in ((), (0,), ("constant",), ("constant", None), ("constant", 0))
        l, r, t, b = x.args[1]  # type: ignore[misc]
        if constant and min(l, r, t, b) >= 0:  # type: ignore[type-var]
            return x.args[0], (top + t, left + l, top + b, left + r)  # type: ignore[return-value]
    return x, pads  # type: ignore[return-value]


# ---- conversion


def _convert(program: Program, cluster: list[fx.Node], convs: Mapping[fx.Node, ConvView], zeros: Mapping[fx.Node, Pattern]) -> None:
    """Give every member its sequence; what others read becomes a picture again."""
    made = _Sequences(program)
    for node in cluster:
        with program.graph.inserting_before(node):
            if node in convs:
                made.of[node] = made.convolution(convs[node], zeros.get(node, ANY))
            elif node.target in ACTIVATION_TARGETS or node.target in ADDS:
                args = map_arg(node.args, made.sequence)
                made.of[node] = program.graph.call_function(node.target, args, dict(node.kwargs))  # type: ignore[arg-type]
            else:
                pooled = program.graph.call_function(POOL, (made.sequence(node.args[0]), ""))  # type: ignore[arg-type]
                made.back(node, pooled)
    inside = set(cluster)
    for node in cluster:
        if node in made.of and any(user not in inside for user in node.users):
            with program.graph.inserting_after(made.of[node]):
                flat = program.graph.call_function(aten.transpose.int, (made.of[node], 1, 2))
            with program.graph.inserting_after(flat):
                made.back(node, flat)


@dataclass
class _Sequences:
    """[B, H * W, C] of pictures, made once."""

    program: Program
    of: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def sequence(self, picture: fx.Node) -> fx.Node:
        """Where the picture comes from outside, two views of it."""
        if picture not in self.of:
            call = self.program.graph.call_function
            flat = call(aten.flatten.using_ints, (picture, 2))
            self.of[picture] = call(aten.transpose.int, (flat, 1, 2))
        return self.of[picture]

    def convolution(self, conv: ConvView, pattern: Pattern) -> fx.Node:
        program, (picture, pads) = self.program, _unpadded(conv)
        x, size, call = self.sequence(picture), list(shape_of(picture)[2:]), program.graph.call_function
        window = [*conv.kernel, *conv.stride]
        weight, region = conv.node.args[1], conv_region(program, conv)
        name = program.weight_name(weight)  # type: ignore[arg-type]
        if conv.depthwise:
            const = program.add_const(name, conv.weight.detach()[:, 0].contiguous(), name)
            y = call(DEPTHWISE, (x, const, conv.bias, size, window, list(pads), "", ""))
            program.regions[y.name] = region
            return y
        moves = window != [1, 1, 1, 1] or any(pads)
        if moves and pattern == ANY and math.prod(conv.weight.shape[1:]) <= FEW_TAPS and conv.stride[1] <= WIDEST:
            const = program.add_const(name, conv.weight.detach().contiguous(), name)
            y = call(DIRECT, (x, const, conv.bias, size, window, list(pads), "", ""))
            program.regions[y.name] = region
            return y
        if moves:
            x = call(PATCHES, (x, size, window, list(pads), ""))
        matrix = conv.matrix().contiguous()
        const = program.add_const(name, matrix, name)
        terms = (TensorType(matrix.dtype, tuple(matrix.shape), pattern),)
        y = program.linear(x, [const], conv.bias, terms).node
        program.regions[y.name] = region
        return y

    def back(self, node: fx.Node, value: fx.Node) -> None:
        """Let the node's users have `value`, in the node's own shape."""
        shape = [size if isinstance(size, int) else -1 for size in shape_of(node)]
        view = self.program.graph.call_function(aten.reshape.default, (value, shape))
        node.replace_all_uses_with(view, propagate_meta=False)
