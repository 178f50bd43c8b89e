"""layout: values between packed linears stay token-minor, as kernels read and write them, through norms, gates and attention.

    h = linear(x, ..., layout="row");  y = linear(h, ...)      -->  h = linear(x, ..., layout="token");  y = linear(h, ...)
    n = layer_norm(h, [N], w, b);      y = linear(n, ...)      -->  n = norm(h, w, b, layout="token");   y = linear(n, ...)
    g = silu(a) * b;                   y = linear(g, ...)      -->  g = gate(a, b, "silu");              y = linear(g, ...)
    r = q * cos + half_turn(q) * sin                           -->  c = tokens(cos);  r = rotary(q, c, tokens(sin))
    a = scaled_dot_product_attention(r, k, v, mask)            -->  m = tokens(mask);  a = attention(r, k, v, m, mask_tiles(m))

A value becomes token-minor only where everything that uses it reads it so. A norm may also begin the chain, where it reads rows, or
end it, where it writes them. All else joins where what it reads is token-minor and its result is read so. What would have to be
transposed for others stays as it was. How these are found in ATen stands in `between`.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from sparsecc.ir.image_ops import IMAGE_MEANINGS
from sparsecc.ir.infer import value_of
from sparsecc.ir.program import LinearView, Program
from sparsecc.ir.route_ops import RECEIVED
from sparsecc.passes.attention import SDPA, is_causal, key_heads, mask_of
from sparsecc.passes.between import sites
from sparsecc.passes.context import Attention, Context
from sparsecc.passes.lower import hides
from sparsecc.passes.pictures import return_slower
from sparsecc.passes.site import Maker, Site, fills_vectors, root


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
        plan = _Plan.of(program)
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


@dataclass
class _Plan:
    """What may change, shrunk by `settle` until every token-minor value is read as such. `owner`: the site that a node is a part of."""

    linears: set[fx.Node]
    sites: dict[fx.Node, Site] = field(default_factory=dict)
    owner: dict[fx.Node, Site] = field(default_factory=dict)
    views: set[fx.Node] = field(default_factory=set)
    token: set[fx.Node] = field(default_factory=set)

    @staticmethod
    def of(program: Program) -> _Plan:
        """Everything that could be token-minor."""
        packed = {view.node for view in program.linears() if all(term.format is not None for term in view.terms)}
        plan = _Plan({node for node in packed if fills_vectors(LinearView(node).x)})
        for site in sites(program):
            if not all(fills_vectors(read) for read in site.reads):
                continue
            plan.sites[site.node] = site
            plan.owner |= dict.fromkeys((site.node, *site.inside), site)
            plan.views |= site.views
        plan.token = plan.linears | set(plan.sites)
        return plan

    def settle(self) -> None:
        """Drop what doesn't hold until nothing changes: the largest set that is consistent."""
        changed = True
        while changed:
            changed = False
            for node in list(self.token):
                uses = list(self._uses(node))
                if not uses or not all(self._reads_tokens(value, user) for value, user in uses):
                    self.token.discard(node)
                    changed = True
            gone = [site for site in self.sites.values() if not self._holds(site)]
            if gone:
                self.drop(gone)
                changed = True

    def drop(self, gone: list[Site]) -> None:
        """These stay torch's."""
        for site in gone:
            del self.sites[site.node]
            self.token.discard(site.node)
            for node in (site.node, *site.inside):
                self.owner.pop(node, None)

    def _uses(self, value: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
        """(value or view of it, user) behind the views."""
        for user in value.users:
            if user in self.views:
                yield from self._uses(user)
            else:
                yield value, user

    def _reads_tokens(self, value: fx.Node, user: fx.Node) -> bool:
        if user in self.owner:
            return value in self.owner[user].reads
        if user.target in IMAGE_MEANINGS or user.target is RECEIVED:
            return True
        if user not in self.linears:
            return False
        view = LinearView(user)
        return (view.x is value and view.residual is not value) or (view.residual is value and view.x is not value and user in self.token)

    def _holds(self, site: Site) -> bool:
        """Whether what it reads, or gives, is token-minor: one of them if it may end the chain, else all."""
        reads = [root(read, self.views) in self.token for read in site.reads]
        return any((site.node in self.token, *reads)) if site.ends else all((site.node in self.token, *reads))


def _attention_pays(node: fx.Node, context: Any) -> bool:
    """Whether the target's kernel was the faster one; without a target the dense meaning serves either way."""
    if not isinstance(context, Context) or context.tuner is None or context.tuner.between is None:
        return True
    q, k = (value_of(arg) for arg in node.all_input_nodes[:2])
    hint = lambda size, other: size if isinstance(size, int) else (size.node.hint or other)  # noqa: E731
    B, H, S, D = (hint(size, 128) for size in q.shape)
    hidden = "causal" if is_causal(node) else hides(mask_of(node))
    return context.tuner.between.attention_pays(Attention(B, H, hint(key_heads(node), H), S, hint(k.shape[2], S), D, hidden))
