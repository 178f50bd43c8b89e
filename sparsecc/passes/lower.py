"""lower: kernels by name; regions that stayed dense return to ATen, where Inductor fuses them with their neighbours.

    y = linear(x, [ptr, idx, val], ..., kernel="")             -->  y = linear(x, [ptr, idx, val], ..., kernel="cpu 1536x384 linear(...)")
    y = linear(x, [w], b, r, terms="f32[N, K]", epilogue="gelu")  -->  y = add(gelu(aten.linear(x, w, b)), r)
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsecc.ir.image_ops import DEPTHWISE, DIRECT, PATCHES, POOL, out_size
from sparsecc.ir.infer import value_of
from sparsecc.ir.ops import KERNELS, LINEAR
from sparsecc.ir.program import LinearView, Program
from sparsecc.ir.route_ops import KEEP, RECEIVED, ROUTE
from sparsecc.ir.token_ops import APPEND, ATTENTION, GATE, MASK_TILES, NORM, ROTARY, TOKENS
from sparsecc.passes.attention import hides
from sparsecc.passes.bundle import lower_neurons
from sparsecc.passes.context import Context
from sparsecc.passes.core import lower_cores
from sparsecc.passes.pack import tokens_of
from sparsecc.passes.site import has_few

aten = torch.ops.aten

DENSE = "dense meaning"
"""The key of what no kernel runs."""

ATEN: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "relu": (aten.relu.default, {}),
    "gelu": (aten.gelu.default, {}),
    "gelu_tanh": (aten.gelu.default, {"approximate": "tanh"}),
    "silu": (aten.silu.default, {}),
    "relu6": (aten.hardtanh.default, {"min_val": 0.0, "max_val": 6.0}),
    "hardswish": (aten.hardswish.default, {}),
}


@dataclass(frozen=True)
class Lower:
    """The pass; see the file's docstring."""

    name: str = "lower"
    requires: tuple[str, ...] = ("linears",)
    ensures: tuple[str, ...] = ("kernels",)

    def run(self, program: Program, context: Any = None) -> None:
        tuner = context.tuner if isinstance(context, Context) else None
        for view in program.linears():
            if tuner is not None and all(term.format is not None for term in view.terms):
                formats = [term.format for term in view.terms if term.format is not None]
                dtype = view.terms[0].dtype
                config = str(program.region(view.node).more.get("config", ""))
                residual = view.residual is not None
                key, kernel = tuner.kernel(formats, view.epilogue, residual, view.layout, view.shape, config, dtype, tokens_of(view.x))
                KERNELS[key] = kernel
                view.replace(kernel=key)
            elif not view.plain:
                view.replace(kernel=DENSE)  # low-rank terms and the reference target
        for node in program.graph.nodes:
            if node.target in BETWEEN:
                _name_kernel(node, None if tuner is None else tuner.between)
        lower_neurons(program, context)
        lower_cores(program, context)
        program.rewrite({LINEAR: _to_aten})


BETWEEN: dict[Any, Callable[[Any, fx.Node], tuple[str, Any]]] = {
    NORM: lambda between, node: between.norm_rows(node.args[4]) if has_few(node.args[0]) else between.norm(*node.args[4:6]),
    GATE: lambda between, node: between.gate(*node.args[2:4]),
    ROTARY: lambda between, node: between.rotary(node.args[3]),
    ATTENTION: lambda between, node: between.attention(_head_size(node), "causal" if node.args[6] else hides(node.args[3]), node.args[7]),
    APPEND: lambda between, node: between.append(),
    TOKENS: lambda between, node: between.tokens(),
    MASK_TILES: lambda between, node: between.mask_tiles(hides(node.args[0]) == "rows"),
    DEPTHWISE: lambda between, node: between.window("depthwise", node.args[4], node.args[6]),
    DIRECT: lambda between, node: between.direct(*_direct(node)),
    PATCHES: lambda between, node: between.window("patches", node.args[2], ""),
    POOL: lambda between, node: between.pool(),
    RECEIVED: lambda between, node: between.received(),
    ROUTE: lambda between, node: between.route(),
    KEEP: lambda between, node: between.keep(node.args[1]),
}
"""The kernels of what stands between linears, and the keys by which programs name them; without a kernel ("", None)."""


def _name_kernel(node: fx.Node, between: Any) -> None:
    """The kernel is the last argument."""
    key, kernel = ("", None) if between is None else BETWEEN[node.target](between, node)
    if kernel is not None:
        KERNELS[key] = kernel
    node.args = (*node.args[:-1], key if kernel is not None else DENSE)


def _direct(node: fx.Node) -> tuple[int, int, Any, str]:
    """What its kernel depends on."""
    weight, size, window, pads, epilogue = node.args[1], *node.args[3:7]
    return int(value_of(weight).shape[1]), out_size(size, window, pads)[1], window, str(epilogue)  # type: ignore[arg-type]


def _head_size(node: fx.Node) -> int:
    return int(value_of(node.all_input_nodes[0]).shape[-1])


def _to_aten(program: Program, node: fx.Node) -> fx.Node | None:
    view = LinearView(node)
    if not view.plain:
        return None
    call = program.graph.call_function
    y = call(aten.linear.default, (view.x, view.params[0], view.bias))
    if view.epilogue:
        target, kwargs = ATEN[view.epilogue]
        y = call(target, (y,), kwargs)
    if view.residual is not None:
        y = call(aten.add.Tensor, (y, view.residual))
    return y
