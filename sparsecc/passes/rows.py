"""rows: what stands between packed linears of a few tokens (decode) becomes kernels on rows, so that a step is one chain of kernels.

    n = mul(w, mul(x, rsqrt(...)));    y = linear(n, ...)        -->  n = norm(x, w, layout="row");  y = linear(n, ...)
    g = silu(a) * b;                   y = linear(g, ...)        -->  g = gate(a, b, "silu", layout="row")
    r = q * cos + half_turn(q) * sin                             -->  r = rotary(q, cos, sin, layout="row")
    k = cat([cache, r], -2)                                      -->  k = append(cache, r)
    a = scaled_dot_product_attention(r, k, v, mask)              -->  a = attention(r, k, v, mask, layout="row")

What has no packed linear and no such op beside it stays torch's. How these are found in ATen stands in `between`.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsecc.ir.program import Program
from sparsecc.passes.attention import SDPA
from sparsecc.passes.between import sites
from sparsecc.passes.context import Context
from sparsecc.passes.site import Maker, Site, has_few, root

aten = torch.ops.aten


@dataclass(frozen=True)
class Rows:
    """The pass; see the file's docstring."""

    name: str = "rows"
    requires: tuple[str, ...] = ("linears",)
    ensures: tuple[str, ...] = ()

    def run(self, program: Program, context: Any = None) -> None:
        if isinstance(context, Context) and context.tuner is not None and context.tuner.between is None:
            return
        kept = _beside_kernels(program, [site for site in sites(program) if has_few(site.reads[0])])
        maker = Maker(program)
        for node in list(program.graph.nodes):
            if node in kept:
                maker.replace(kept[node], "row")
        program.finish()


def _beside_kernels(program: Program, found: list[Site]) -> dict[fx.Node, Site]:
    """Those that read what a kernel writes, or write what one reads, directly or by way of others of them."""
    kept = {site.node: site for site in found}
    linears = {view.node for view in program.linears() if all(term.format is not None for term in view.terms) and has_few(view.x)}
    views = set().union(*(site.views for site in found))
    reached, waiting = set(linears), list(linears)
    neighbours: dict[fx.Node, set[fx.Node]] = {}
    for site in found:
        for read in site.reads:
            source = root(read, views)
            neighbours.setdefault(source, set()).add(site.node)
            neighbours.setdefault(site.node, set()).add(source)
    for node in linears:
        for read in node.all_input_nodes:
            source = root(read, views)
            if source in kept:
                neighbours.setdefault(node, set()).add(source)
    while waiting:
        for node in neighbours.get(waiting.pop(), ()):
            if node in kept and node not in reached:
                reached.add(node)
                waiting.append(node)
    attended = {read for node in reached if node.target is SDPA for read in kept[node].reads}
    return {node: site for node, site in kept.items() if node in reached and (node.target is not aten.cat.default or node in attended)}
