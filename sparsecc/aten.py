"""Dynamo's graphs in the ops that torch.export gives: a torch function such as `F.silu`, an operator or a method becomes ATen.

    h = F.silu(x);  y = operator.mul(h, b);  z = y.to(torch.float32)   -->   h = aten.silu(x);  y = aten.mul(h, b);  z = aten.to(y, ...)
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from sparsecc.errors import CaptureError
from sparsecc.ir.infer import value_of
from sparsecc.ir.program import get_attr, make_module


def to_aten(gm: fx.GraphModule) -> fx.GraphModule:
    """The same inputs, constants and outputs. Inputs know their fakes as "example_value"; every node of the result knows its own as "val".
    Raises CaptureError for a graph that cannot be traced, such as one with branches: of torch's own names passes know the linears."""
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    consts = {str(node.target): get_attr(gm, str(node.target)) for node in gm.graph.nodes if node.op == "get_attr"}
    fakes = [value_of(node) for node in inputs]
    mode = next((fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor)), None)
    tensors = {name: value for name, value in consts.items() if isinstance(value, torch.Tensor)}
    if mode is None or len(tensors) < len(consts):
        inside = sorted(set(consts) - set(tensors))
        raise CaptureError(f"it has functions of its own ({', '.join(inside[:4])})" if inside else "no input of it is a tensor")
    try:
        with tracing(TracingContext(mode)), mode, torch.no_grad():
            lifted = [mode.from_tensor(tensor, static_shapes=True) for tensor in tensors.values()]
            traced = make_fx(_Run(gm, list(tensors)), pre_dispatch=True)(*lifted, *fakes)
    except Exception as error:  # whatever a torch function raises on values that are not there yet
        raise CaptureError(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}") from error
    return _renamed(traced, tensors, [node.name for node in inputs])


class _Run:
    """The graph as a function of its constants and then its inputs."""

    def __init__(self, gm: fx.GraphModule, names: Sequence[str]) -> None:
        self.gm, self.names = gm, names

    def __call__(self, *values: Any) -> Any:
        consts = dict(zip(self.names, values, strict=False))
        return _Interpreter(self.gm, consts).run(*values[len(consts) :], enable_io_processing=False)


class _Interpreter(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, consts: dict[str, Any]) -> None:
        super().__init__(gm)
        self.consts = consts

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.consts[str(target)]


def _renamed(traced: fx.GraphModule, consts: dict[str, torch.Tensor], names: Sequence[str]) -> fx.GraphModule:
    """The traced graph on the constants themselves, with the inputs' own names. Tensors that code makes of literals are constants."""
    graph, values, attributes = fx.Graph(), {}, dict[str, Any](consts)
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for node, name in zip(placeholders[len(consts) :], names, strict=True):
        values[node] = graph.placeholder(name)
    for node, name in zip(placeholders, consts, strict=False):
        values[node] = graph.get_attr(name)
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            name = f"literal{node.target}"
            attributes[name] = get_attr(traced, str(node.target))
            values[node] = graph.get_attr(name)
        elif node.op != "placeholder":
            values[node] = graph.node_copy(node, values.__getitem__)
        values[node].meta = dict(node.meta)
    return make_module(attributes, graph)
