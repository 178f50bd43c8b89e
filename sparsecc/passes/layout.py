"""layout: values between packed linears stay token-minor, as kernels read and write them, through norms, gates and attention.

    h = linear(x, ..., layout="row");  y = linear(h, ...)      -->  h = linear(x, ..., layout="token");  y = linear(h, ...)
    n = layer_norm(h, [N], w, b);      y = linear(n, ...)      -->  n = norm(h, w, b, layout="token");   y = linear(n, ...)
    g = silu(a) * b;                   y = linear(g, ...)      -->  g = gate(a, b, "silu");              y = linear(g, ...)
    r = q * cos + half_turn(q) * sin                           -->  c = tokens(cos);  r = rotary(q, c, tokens(sin))
    a = scaled_dot_product_attention(r, k, v, mask)            -->  m = tokens(mask);  a = attention(r, k, v, m, mask_tiles(m))

Which values can be stands in `token_minor`, and how what is between linears is found in ATen in `between`.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from sparsecc.ir.infer import value_of
from sparsecc.ir.program import LinearView, Program
from sparsecc.passes.attention import SDPA, is_causal, key_heads, mask_of
from sparsecc.passes.context import Attention, Context
from sparsecc.passes.lower import hides
from sparsecc.passes.pictures import return_slower
from sparsecc.passes.site import Maker
from sparsecc.passes.token_minor import TokenMinor


@dataclass(frozen=True)
class Layout:
    """The pass; see the file's docstring."""

    name: str = "layout"
    requires: tuple[str, ...] = ("linears",)
    ensures: tuple[str, ...] = ()

    def run(self, program: Program, context: Any = None) -> None:
        if isinstance(context, Context) and context.tuner is not None and context.tuner.between is None:
            return
        if isinstance(context, Context) and context.tuner is not None:
            return_slower(program, context.tuner)
        packed = (view.node for view in program.linears() if all(term.format is not None for term in view.terms))
        plan = TokenMinor.of(program, packed)
        plan.settle()
        slower = [site for site in plan.sites.values() if site.node.target is SDPA and not _attention_pays(site.node, context)]
        if slower:
            plan.drop(slower)
            plan.settle()
        maker = Maker(program)
        for node in list(program.graph.nodes):  # in its order: names, and with them Inductor's cache, should not depend on hashes
            if node in plan.linears & plan.token:
                LinearView(node).replace(layout="token")
            elif node in plan.sites:
                maker.replace(plan.sites[node], "token" if node in plan.token else "row")
        program.finish()


def _attention_pays(node: fx.Node, context: Any) -> bool:
    """Whether the target's kernel was the faster one; without a target the dense meaning serves either way."""
    if not isinstance(context, Context) or context.tuner is None or context.tuner.between is None:
        return True
    q, k = (value_of(arg) for arg in node.all_input_nodes[:2])
    hint = lambda size, other: size if isinstance(size, int) else (size.node.hint or other)  # noqa: E731
    B, H, S, D = (hint(size, 128) for size in q.shape)
    hidden = "causal" if is_causal(node) else hides(mask_of(node))
    return context.tuner.between.attention_pays(Attention(B, H, hint(key_heads(node), H), S, hint(k.shape[2], S), D, hidden))
