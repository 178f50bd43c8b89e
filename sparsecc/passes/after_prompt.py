"""One token after a prompt whose blocks skipped tokens: it goes through every block, or past some, on the keys that the block has.

    y = block(x, cos, sin, keys)  -->  the same with the feed-forward branch times p, if the router's probability scales it,
                                       and with the rotary tables of the place behind the block's own keys, if positions are compact
    y, keys'                      -->  go = goes(p, "threshold(0.5)"); through(x, go, y), held(keys, keys', go)      if it may go past
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparsecc.errors import SpecError
from sparsecc.ir.cache_ops import SHOWN
from sparsecc.ir.conditional_ops import GOES, HELD, HELD_SHOWN, OWN_SHARE, ROUTE_TOKEN, THROUGH
from sparsecc.ir.infer import value_of
from sparsecc.ir.program import Program, Region
from sparsecc.passes.blocks import Block, outer
from sparsecc.passes.grouped import group_queries
from sparsecc.passes.route import Routes, arguments, one_of_each
from sparsecc.passes.shorter import Shorter
from sparsecc.passes.site import return_instead
from sparsecc.routing import DepthRouter, TokenRouter
from sparsecc.skipping import Tokens

aten = torch.ops.aten


def after_prompt(program: Program, routes: Routes, chosen: Iterable[tuple[Block, Tokens, float | None, int]]) -> None:
    """For blocks with their rules, the fractions that those skip, and their places under the rules' globs, in program order."""
    moved: dict[fx.Node, fx.Node] = {}
    past = _Past(program, routes)
    for block, rule, required, at in chosen:
        source = moved.get(block.x, block.x)
        routed, p, y = rule.decode == "routed", None, block.y
        if isinstance(rule.router, DepthRouter) and (routed or rule.scale != "none"):
            with program.graph.inserting_before(block.inside[0]):
                p = routes.gate(block, source, rule.router, at)
            if rule.scale != "none":
                y = moved[block.y] = routes.scale(block, rule, p, None, source)
        if rule.positions == "compact":
            _renumber(program, block)
        if routed:
            p = past.scores(block, rule, required) if p is None else p
            moved[block.y] = past.go(block, rule, source, y, p)
    program.finish()
    group_queries(program)


@dataclass
class _Past:
    """Lets tokens go past blocks. `decisions`: by the block's result."""

    program: Program
    routes: Routes
    decisions: dict[fx.Node, fx.Node] = field(default_factory=dict)
    shares: dict[int, fx.Node] = field(default_factory=dict)

    def go(self, block: Block, rule: Tokens, source: fx.Node, y: fx.Node, p: fx.Node) -> fx.Node:
        """What the block gives now. It keeps the keys of tokens that went through; those of all it keeps already."""
        graph, output = self.program.graph, self.program.graph.output_node()
        users = list(y.users)
        with graph.inserting_before(block.inside[0]):
            decision = self.decisions[block.y] = graph.call_function(GOES, (p, str(rule.policy)))
        with graph.inserting_after(y):
            out = graph.call_function(THROUGH, (source, decision, y))
        for user in users:
            user.replace_input_with(y, out)
        for node in block.cache if rule.keys == "kept" else ():
            past: Any = node.args[0]
            with graph.inserting_before(output):
                kept = graph.call_function(HELD, (past[0], node, decision))
            kept.meta["val"] = Shorter(value_of(block.x)).rows(value_of(node), f"{decision.name}_keys")
            return_instead(self.program, node, kept)
            for user in [user for user in node.users if user.target is SHOWN]:
                with graph.inserting_before(output):
                    shown = graph.call_function(HELD_SHOWN, (user.args[1], decision))
                shown.meta["val"] = kept.meta["val"][:, 0, :, 0].bool()
                self.program.replace(user, shown)
        keys = "a key in it all the same" if rule.keys == "all" else "no key in it"
        what = "tokens after a prompt by a router"
        self.program.regions[out.name] = Region(block.names[0], (), what, f"{rule}: a token that goes past is {keys}")
        return out

    def scores(self, block: Block, rule: Tokens, required: float | None) -> fx.Node:
        """p f32[B, 1] of FTP's learned router, in front of the block."""
        assert isinstance(rule.router, TokenRouter)
        graph, at = self.program.graph, next(i for i, one in enumerate(self.routes.blocks) if one.y is block.y)
        places = {path[0] for node in outer(block.inside) - {block.x} if (path := _from_position(node)) is not None}
        if len(places) != 1:
            raise SpecError(f"{block.names[0]}: a router of tokens after a prompt needs their position, which {len(places)} inputs give")
        with graph.inserting_before(block.inside[0]):
            weights = [self.routes.const(f"router_{i}", w) for i, w in enumerate(rule.router.weights)]
            return graph.call_function(ROUTE_TOKEN, (self.share(at), places.pop(), required, weights))

    def share(self, at: int) -> fx.Node:
        """f32[B, 2]: what the token paid itself, and its rank, in the last block that it went through; all, in front of the first."""
        if at not in self.shares:
            call = self.program.graph.call_function
            if at == 0:
                x: Any = value_of(self.routes.blocks[0].x)
                how = {"dtype": torch.float32, "device": x.device}
                parts = [call(make, ([x.shape[0], 1],), how) for make in (aten.ones.default, aten.zeros.default)]
                self.shares[at] = call(aten.cat.default, (parts, 1))
            else:
                block = self.routes.blocks[at - 1]
                given = arguments(block.attention)
                paid = call(OWN_SHARE, (given["query"], one_of_each(given["key"]), given.get("attn_mask"), given.get("scale")))
                if block.y in self.decisions:
                    paid = call(THROUGH, (self.share(at - 1), self.decisions[block.y], paid))
                self.shares[at] = paid
        return self.shares[at]


def _renumber(program: Program, block: Block) -> None:
    """Tables of rotary embeddings for a place that counts the block's keys: a copy of what computes them from the token's position."""
    entering = outer(block.inside)
    past = next((node for node in sorted(entering, key=lambda n: n.name) if node.op == "placeholder" and value_of(node).ndim == 4
                 and not _is_mask(node)), None)
    tables = {node: path for node in entering - {block.x} if (path := _from_position(node)) is not None}
    position = {path[0] for path in tables.values()}
    if past is None or len(position) != 1:
        raise SpecError(f"{block.names[0]}: compact positions need its keys, and rotary tables that one input's positions give, not "
                        f"{len(position)}")
    graph = program.graph
    wanted = {node for path in tables.values() for node in path}
    mask = next((node for node in entering if node.op == "placeholder" and _is_mask(node)), None)
    with graph.inserting_before(block.inside[0]):
        made = {place: _count(graph, place, past, mask) for place in position}
        for node in [n for n in graph.nodes if n in wanted and n not in made]:
            made[node] = graph.node_copy(node, lambda n: made.get(n, n))
    for node in block.inside:
        node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: made[n] if n in tables else n)  # type: ignore[assignment]


def _is_mask(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.ndim == 4 and value.dtype == torch.bool


def _count(graph: fx.Graph, place: fx.Node, past: fx.Node, mask: fx.Node | None) -> fx.Node:
    """i64[B, 1]: how many keys [B, G, n, D] the block has, or how many of them a mask [B, 1, 1, n + 1] shows besides the token's own."""
    if mask is None:
        return graph.call_function(aten.full_like.default, (place, graph.call_function(aten.sym_size.int, (past, 2))))
    seen = graph.call_function(aten.sum.dim_IntList, (mask, [2, 3]))
    return graph.call_function(aten.sub.Tensor, (seen, 1))


def _from_position(table: fx.Node) -> Sequence[fx.Node] | None:
    """An input of whole numbers [B, 1], then what lies between it and a table of floats; None for values of another kind."""
    value: Any = value_of(table)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or table.op != "call_function":
        return None
    above: dict[fx.Node, None] = {}
    todo = [table]
    while todo:
        node = todo.pop()
        if node not in above:
            above[node] = None
            todo += node.all_input_nodes
    inputs = [node for node in above if node.op == "placeholder"]
    if len(inputs) != 1 or not isinstance(place := value_of(inputs[0]), torch.Tensor) or place.is_floating_point() or place.ndim != 2:
        return None
    return [inputs[0], *(node for node in above if node.op == "call_function")]
