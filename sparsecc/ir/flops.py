"""Multiplications and additions of a program's matrix products: linears, convolutions, attention. What a smaller program saves."""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from sparsecc.ir.infer import value_of
from sparsecc.ir.ops import LINEAR, term_weight
from sparsecc.ir.program import LinearView, Program


def flops(program: Program) -> int:
    """Of one call, sizes that vary taken from the example: two per weight that is not stored as zero, or per pair of entries."""
    return sum(node_flops(program, node) for node in program.graph.nodes if node.op in ("call_function", "call_method"))


def node_flops(program: Program, node: fx.Node) -> int:
    """Of one node; 0 for what is no product."""
    if node.target is LINEAR:
        return _linear(program, LinearView(node))
    name = node.target._schema.name.partition("::")[2] if isinstance(node.target, torch._ops.OpOverload) else \
        str(getattr(node.target, "__name__", node.target))
    match name:
        case "linear":
            return 2 * math.prod(shape(node)) * shape(node.args[1])[-1]
        case "conv1d" | "conv2d" | "conv3d" | "convolution":
            return 2 * math.prod(shape(node)) * math.prod(shape(node.args[1])[1:])
        case "depthwise" | "direct":
            return 2 * math.prod(shape(node)) * math.prod(shape(node.args[1])[1:])
        case "matmul" | "mm" | "bmm":
            return 2 * math.prod(shape(node)) * shape(node.args[0])[-1]
        case "addmm" | "baddbmm":
            return 2 * math.prod(shape(node)) * shape(node.args[1])[-1]
        case "scaled_dot_product_attention" | "attention":
            q, k = shape(node.args[0]), shape(node.args[1])
            return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + shape(node)[-1])
    return 0


def _linear(program: Program, view: LinearView) -> int:
    tokens, count = math.prod(shape(view.x)[:-1]), 0
    for term, params in zip(view.terms, view.term_params, strict=True):
        if term.rank is not None:
            count += sum(math.prod(shape(p)) for p in params)
        elif term.format is None:
            count += math.prod(int(d) for d in term.shape)
        else:
            count += int(term_weight(term, [program.const(p) for p in params]).count_nonzero())
    return 2 * tokens * count


def shape(node: Any) -> list[int]:
    """Of the example."""
    return [size if isinstance(size, int) else int(size.node.hint or 1) for size in value_of(node).shape]
