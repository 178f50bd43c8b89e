"""Which values can be token-minor: part of the passes layout, which makes them so, and pack, which asks how a linear will be called.

A value becomes token-minor only where everything that uses it reads it so; what the program returns besides, as keys and values for a
cache, is copied into rows. A norm may also begin the chain, where it reads rows, or end it, where it writes them. All else joins where what
it reads is token-minor and its result is read so. What would have to be transposed for others stays as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import fx

from sparsecc.ir.image_ops import IMAGE_MEANINGS
from sparsecc.ir.infer import value_of
from sparsecc.ir.program import LinearView, Program
from sparsecc.ir.route_ops import RECEIVED
from sparsecc.passes.attention import SDPA, hides, is_causal, key_heads, mask_of
from sparsecc.passes.between import sites
from sparsecc.passes.context import Attention
from sparsecc.passes.site import Site, copies, fills_vectors, root


@dataclass
class TokenMinor:
    """What may change, shrunk by `settle` until every token-minor value is read as such. `owner`: the site that a node is a part of."""

    linears: set[fx.Node]
    sites: dict[fx.Node, Site] = field(default_factory=dict)
    owner: dict[fx.Node, Site] = field(default_factory=dict)
    views: set[fx.Node] = field(default_factory=set)
    token: set[fx.Node] = field(default_factory=set)

    @staticmethod
    def of(program: Program, packed: Iterable[fx.Node], attention: Mapping[Attention, bool] = MappingProxyType({})) -> TokenMinor:
        """Everything that is token-minor if these linears run on packed weights, and attention unless `attention` says that torch runs
        it."""
        plan = TokenMinor({node for node in packed if fills_vectors(LinearView(node).x)})
        for site in sites(program):
            if not all(fills_vectors(read) for read in site.reads):
                continue
            plan.sites[site.node] = site
            plan.owner |= dict.fromkeys((site.node, *site.inside), site)
            plan.views |= site.views
        plan.token = plan.linears | set(plan.sites)
        plan.settle()
        torchs = [site for site in plan.sites.values() if site.node.target is SDPA and not attention.get(_attention(site.node), True)]
        if torchs:
            plan.drop(torchs)
            plan.settle()
        return plan

    def attentions(self) -> list[Attention]:
        """What kernels would run."""
        return [_attention(site.node) for site in self.sites.values() if site.node.target is SDPA]

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

    def layouts(self, node: fx.Node) -> tuple[str, str]:
        """Of what a linear reads and of what it writes, after `settle`."""
        read = node in self.linears and root(LinearView(node).x, self.views) in self.token
        return "token" if read else "row", "token" if node in self.linears & self.token else "row"

    def drop(self, gone: list[Site]) -> None:
        """These stay torch's."""
        for site in gone:
            del self.sites[site.node]
            self.token.discard(site.node)
            for node in (site.node, *site.inside):
                self.owner.pop(node, None)

    def _uses(self, value: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
        """(value or view of it, user) behind the views, but for what the program returns."""
        for user in value.users:
            if user in self.views:
                yield from self._uses(user)
            elif user.op != "output" and not copies(user):
                yield value, user

    def returned(self, value: fx.Node) -> Iterator[fx.Node]:
        """The value, or views of it, that the program returns."""
        for user in value.users:
            if user in self.views:
                yield from self.returned(user)
            elif user.op == "output":
                yield value

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


def _attention(node: fx.Node) -> Attention:
    q, k = (value_of(arg) for arg in node.all_input_nodes[:2])
    hint = lambda size, other: size if isinstance(size, int) else (size.node.hint or other)  # noqa: E731
    B, H, S, D = (hint(size, 128) for size in q.shape)
    hidden = "causal" if is_causal(node) else hides(mask_of(node))
    return Attention(B, H, hint(key_heads(node), H), S, hint(k.shape[2], S), D, hidden, q.dtype)
