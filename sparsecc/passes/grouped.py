"""Grouped queries of one token: a token's query heads that share keys become rows of one head, instead of keys that are copied for each.

    attention(q [B, H, 1, D], reshape(expand(unsqueeze(k, 2))), ..., mask)  -->  reshape(attention(reshape(q, [B, G, H / G, D]), k, v))

A mask of ones alone, which stands for "whatever keys there are", leaves.
"""
from __future__ import annotations

from typing import Any

import torch

from sparsecc.ir.infer import value_of
from sparsecc.ir.program import Program
from sparsecc.passes.attention import SDPA, is_causal, unrepeated

aten = torch.ops.aten


def group_queries(program: Program) -> None:
    """Where the graph repeats keys and values for a single query of fixed batch, by a mask that is the same for all heads."""
    for node in [n for n in program.graph.nodes if n.target is SDPA]:
        q, k, v = node.args[:3]
        mask: Any = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        shape = value_of(q).shape
        B, H, S, D = shape
        if S != 1 or not all(isinstance(s, int) for s in shape) or is_causal(node) or node.kwargs.get("enable_gqa"):
            continue
        if mask is not None and mask.target is aten.ones.default and mask.kwargs.get("dtype") == torch.bool:
            mask = None
        keys, values = (unrepeated(x, H, set(), node) for x in (k, v))
        G = value_of(keys).shape[1]
        if value_of(values).shape[1] != G or (mask is not None and not _for_all_heads(mask)):
            continue
        kwargs = {"scale": node.kwargs["scale"]} if "scale" in node.kwargs else {}
        call = program.graph.call_function
        with program.graph.inserting_before(node):
            rows = call(aten.reshape.default, (q, [B, G, H // G, D]))
            y = call(SDPA, (rows, keys, values, mask), kwargs)
            new = call(aten.reshape.default, (y, [B, H, 1, D]))
        program.replace(node, new)
    program.finish()


def _for_all_heads(mask: Any) -> bool:
    value = value_of(mask)
    return isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[1] == 1 and value.shape[2] == 1
