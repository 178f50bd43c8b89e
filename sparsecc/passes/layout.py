"""layout: values between packed linears stay token-minor, as kernels read and write them, through norms, gates and attention.

    h = linear(x, ..., layout="row");  y = linear(h, ...)      -->  h = linear(x, ..., layout="token");  y = linear(h, ...)
    n = layer_norm(h, [N], w, b);      y = linear(n, ...)      -->  n = norm(h, w, b, layout="token");   y = linear(n, ...)
    g = silu(a) * b;                   y = linear(g, ...)      -->  g = gate(a, b, "silu");              y = linear(g, ...)
    r = q * cos + half_turn(q) * sin                           -->  c = tokens(cos);  r = rotary(q, c, tokens(sin))
    a = scaled_dot_product_attention(r, k, v, mask)            -->  m = tokens(mask);  a = attention(r, k, v, m, mask_tiles(m))

Which values can be stands in `token_minor`, and how what is between linears is found in ATen in `between`. Of models in bf16 and fp16 they
are float32, see `widen`.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsecc.ir.program import LinearView, Program
from sparsecc.passes.context import Context
from sparsecc.passes.pictures import return_slower
from sparsecc.passes.site import Maker, return_rows
from sparsecc.passes.token_minor import TokenMinor
from sparsecc.passes.widen import widen


@dataclass(frozen=True)
class Layout:
    """The pass; see the file's docstring."""

    name: str = "layout"
    requires: tuple[str, ...] = ("linears",)
    ensures: tuple[str, ...] = ()

    def run(self, program: Program, context: Any = None) -> None:
        tuner = context.tuner if isinstance(context, Context) else None
        if tuner is not None and tuner.between is None:
            return
        if tuner is not None:
            return_slower(program, tuner)
        packed = (view.node for view in program.linears() if all(term.format is not None for term in view.terms))
        plan = TokenMinor.of(program, packed, context.attention if isinstance(context, Context) else {})
        for value in [one for node in plan.token for one in plan.returned(node)]:
            return_rows(program, value, value)
        maker = Maker(program)
        for node in list(program.graph.nodes):  # in its order: names, and with them Inductor's cache, should not depend on hashes
            if node in plan.linears & plan.token:
                LinearView(node).replace(layout="token")
            elif node in plan.sites:
                maker.replace(plan.sites[node], "token" if node in plan.token else "row")
        widen(program)
        program.finish()
