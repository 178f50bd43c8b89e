"""Convolutions in ATen: one op for all of them, batch norms folded into their weights, and what they are by field names.

    y = aten.conv2d(x, w, b, ...)                   -->  y = aten.convolution(x, w, b, stride, padding, dilation, False, [0, 0], groups)
    z = aten.batch_norm(convolution(x, w, b), ...)  -->  z = convolution(x, w * s, (b - mean) * s + beta),  s = gamma / sqrt(var + eps)
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sparsecc.ir.program import Program, Region, Rule

aten = torch.ops.aten
CONVOLUTION = aten.convolution.default
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Fold = Callable[[Program, Any], fx.Node | None]


@dataclass(frozen=True)
class ConvView:
    """An aten.convolution by field names; `kernel`, `stride`, `padding`, `dilation` have an entry per dimension of the picture."""

    node: fx.Node
    weight: Tensor

    @staticmethod
    def of(program: Program, node: fx.Node) -> ConvView | None:
        """None unless the node is a convolution whose weight is a constant of floats."""
        if node.op != "call_function" or node.target is not CONVOLUTION or not program.is_const(node.args[1]):
            return None
        weight = program.const(node.args[1])  # type: ignore[arg-type]
        return ConvView(node, weight) if weight.dtype in FLOATS and weight.layout == torch.strided else None

    @property
    def x(self) -> fx.Node:
        return self.node.args[0]  # type: ignore[return-value]

    @property
    def bias(self) -> Any:
        return self.node.args[2]

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[2:])

    @property
    def stride(self) -> tuple[int, ...]:
        return self._each(3)

    @property
    def padding(self) -> tuple[int, ...]:
        return self._each(4)

    @property
    def dilation(self) -> tuple[int, ...]:
        return self._each(5)

    @property
    def transposed(self) -> bool:
        return bool(self.node.args[6])

    @property
    def groups(self) -> int:
        return int(self.node.args[8])  # type: ignore[arg-type]

    @property
    def depthwise(self) -> bool:
        """One window for every channel."""
        return self.groups > 1 and self.weight.shape[1] == 1 and self.groups == self.weight.shape[0]

    @property
    def plain(self) -> bool:
        """A 1 x 1 convolution of all channels: a linear at every pixel, as a spec for all weights means it."""
        return self.groups == 1 and not self.transposed and len(self.kernel) == 2 and set(self.kernel) == {1}

    def matrix(self) -> Tensor:
        """The weight as [out, in * kh * kw]; [out, in] of a 1 x 1 convolution."""
        return self.weight.detach().flatten(1)

    def dense_because(self) -> str:
        """Why its zeros cannot be used; "" if they can."""
        if len(self.kernel) != 2:
            return f"a {len(self.kernel)}-dimensional convolution stays dense"
        if self.transposed:
            return "a transposed convolution stays dense"
        if self.depthwise:
            return "depthwise: a window for every channel, run dense"
        if self.groups > 1:
            return f"a convolution of {self.groups} groups stays dense"
        return "a dilated convolution stays dense" if set(self.dilation) != {1} else ""

    def _each(self, index: int) -> tuple[int, ...]:
        values = list(self.node.args[index])  # type: ignore[arg-type]
        return tuple(int(v) for v in (values * len(self.kernel) if len(values) == 1 else values))


def convolutions(program: Program) -> list[ConvView]:
    """Those with constant weights, in program order."""
    return [view for node in program.graph.nodes if (view := ConvView.of(program, node)) is not None]


def conv_region(program: Program, view: ConvView) -> Region:
    """The notes on it, named after its weight; made on first use."""
    if view.node.name not in program.regions:
        weight = program.weight_name(view.node.args[1])  # type: ignore[arg-type]
        program.regions[view.node.name] = Region(weight.removesuffix(".weight"), (weight,))
    return program.regions[view.node.name]


def conv_rules(fold: Fold) -> Mapping[Any, Rule]:
    """What canonicalize does with convolutions; `fold` makes a constant of a node that is always the same."""

    def convolution(program: Program, node: fx.Node) -> fx.Node | None:
        return _convolution(program, node, fold)

    def batch_norm(program: Program, node: fx.Node) -> fx.Node | None:
        return _batch_norm(program, node, fold)

    convs = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv2d.padding, F.conv1d, F.conv2d, F.conv3d)
    norms = (aten.batch_norm.default, F.batch_norm)
    transposed = (aten.conv_transpose2d.input, F.conv_transpose2d)
    rules = {**dict.fromkeys((*convs, CONVOLUTION), convolution), **dict.fromkeys(norms, batch_norm)}
    return rules | dict.fromkeys(transposed, lambda program, node: _transposed(program, node, fold))


def _convolution(program: Program, node: fx.Node, fold: Fold) -> fx.Node | None:
    """aten.convolution with a folded weight and bias; None if it is that already, or its weight varies."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    if node.target is CONVOLUTION:
        weight = fold(program, node.args[1])
        if weight is not None and weight is not node.args[1]:
            node.update_arg(1, weight)
            return node
        return None
    values = dict(zip(names, (None, None, None, 1, 0, 1, 1), strict=True)) | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    weight = fold(program, values["weight"])
    if weight is None or program.const(weight).dtype not in FLOATS:
        return None
    kernel = program.const(weight).shape[2:]
    each = lambda value: [value] * len(kernel) if isinstance(value, int) else list(value)  # noqa: E731
    stride, dilation, padding = each(values["stride"]), each(values["dilation"]), values["padding"]
    if isinstance(padding, str):
        spans = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
        if padding == "same" and any(span % 2 for span in spans):
            return None  # more zeros on one side, which aten.convolution cannot say
        padding = [span // 2 if padding == "same" else 0 for span in spans]
    bias = None if values["bias"] is None else fold(program, values["bias"]) or values["bias"]
    if any(isinstance(v, str) for v in (*stride, *dilation)):
        return None
    args = (values["input"], weight, bias, stride, each(padding), dilation, False, [0] * len(kernel), values["groups"])
    return program.graph.call_function(CONVOLUTION, args)


def _transposed(program: Program, node: fx.Node, fold: Fold) -> fx.Node | None:
    """aten.convolution says whether it is transposed; so explanations find it."""
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    defaults = dict(zip(names, (None, None, None, 1, 0, 0, 1, 1), strict=True))
    values = defaults | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    weight = fold(program, values["weight"])
    if weight is None or program.const(weight).dtype not in FLOATS:
        return None
    each = lambda value: [value] * 2 if isinstance(value, int) else list(value)  # noqa: E731
    stride, padding, dilation, more = (each(values[key]) for key in ("stride", "padding", "dilation", "output_padding"))
    args = (values["input"], weight, values["bias"], stride, padding, dilation, True, more, values["groups"])
    return program.graph.call_function(CONVOLUTION, args)


def _batch_norm(program: Program, node: fx.Node, fold: Fold) -> fx.Node | None:
    """The convolution before it with other constants, if only the norm reads it. Exact but for rounding: computed in float64."""
    order = ("weight", "bias", "mean", "var") if node.target is aten.batch_norm.default else ("mean", "var", "weight", "bias")
    names = ("x", *order, "training", "momentum", "eps")
    given = {"running_mean": "mean", "running_var": "var", "input": "x"}
    values: dict[str, Any] = dict(zip(names, node.args, strict=False)) | {given.get(k, k): v for k, v in node.kwargs.items()}
    x = values["x"]
    view = ConvView.of(program, x) if isinstance(x, fx.Node) else None
    if view is None or view.transposed or len(x.users) > 1 or values.get("training"):
        return None
    nodes = [values.get(key) for key in ("mean", "var", "weight", "bias")] + [view.bias]
    folded = [None if n is None else fold(program, n) for n in nodes]
    if any(n is not None and f is None for n, f in zip(nodes, folded, strict=True)) or None in folded[:2]:
        return None
    mean, var, gamma, beta, bias = (None if f is None else program.const(f).double() for f in folded)
    assert mean is not None and var is not None
    scale = (var + float(values.get("eps", 1e-5))).rsqrt() * (1 if gamma is None else gamma)
    shift = ((0 if bias is None else bias) - mean) * scale + (0 if beta is None else beta)
    old, dtype = view.node.args[1], view.weight.dtype
    name = program.weight_name(old)  # type: ignore[arg-type]
    weight = view.weight.detach().double() * scale.view(-1, *[1] * (view.weight.ndim - 1))
    consts = (program.add_const(name, weight.to(dtype), name), program.add_const(f"{name}_shift", shift.to(dtype), _bias_name(name)))
    return program.graph.call_function(CONVOLUTION, (view.x, *consts, *view.node.args[3:]))


def _bias_name(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"
