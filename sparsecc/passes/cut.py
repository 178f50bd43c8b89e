"""Blocks on some of their tokens, for `skip`: gather before a block, scatter behind it.

    y = block(x, cos, sin, mask)  -->  y = scatter_tokens(x, idx, block(gather_tokens(x, idx), ...))

Of a block whose skipped tokens stay keys, what leads to keys and values is computed for all tokens, queries and the rest for the kept ones.
"""
from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparsecc.ir.cache_ops import EARLIER, NUMBERED, SHOWN, TRIM
from sparsecc.ir.infer import value_of
from sparsecc.ir.policy import Policy
from sparsecc.ir.program import Program, Region
from sparsecc.ir.route_ops import ELIGIBLE, GATHER_KEPT, KEEP, SCATTER_KEPT
from sparsecc.ir.skip_ops import GATHER, RECENCY, SCATTER, SELECT
from sparsecc.passes.attention import is_causal
from sparsecc.passes.blocks import Block
from sparsecc.passes.route import Routes, arguments, counter, padding, with_mask
from sparsecc.passes.shorter import Shorter, is_table, renumbered
from sparsecc.passes.site import return_instead
from sparsecc.skipping import Tokens

aten = torch.ops.aten
ABOVE_ALL = 2.0
"""More than any probability."""


@dataclass
class Cutter:
    """Runs blocks on some of their tokens. Blocks that keep as many share their indices, and what was gathered by them."""

    program: Program
    tokens: int
    shorter: Shorter
    routes: Routes
    indices: dict[Any, tuple[fx.Node, fx.Node, fx.Node | None]] = field(default_factory=dict)
    gathered: dict[Any, fx.Node] = field(default_factory=dict)
    scattered: dict[fx.Node, tuple[fx.Node, fx.Node, fx.Node]] = field(default_factory=dict)
    moved: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def cut(self, block: Block, rule: Tokens, fraction: float | None, at: int) -> None:
        """Gather before the block, scatter behind it. Blocks come in program order, each with its place under the rule's glob."""
        source = self.moved.get(block.x, block.x)
        mask = padding(block)
        policy, p, seen = rule.policy or Policy("ratio", round(1 - (fraction or 0.0), 6)), None, None
        with self.program.graph.inserting_before(block.inside[0]):
            by: Any = (RECENCY, mask)
            if rule.router != "static":
                by, p = self.routes.scores(block, source, mask, rule, fraction, at)
            if rule.by_scores:
                idx, size, count, seen = self._keep(by, policy, block.names[0])
            elif rule.cached and mask is not None:
                idx, size, count = self._keep_padded(by, source, policy, mask)
            else:
                idx, size, count = self._select(by, source, policy)
            swapped = {source: self._take(source, idx, (1,), count), **dict.fromkeys(block.sizes, size)}
            places = self._renumbered(size, idx, mask if rule.cached else None) if rule.positions == "compact" else idx
        if rule.keys == "all":
            self._shorten_queries(block, swapped, idx, count)
        else:
            self._shorten(block, swapped, idx, places, count)
        y = block.y if p is None or rule.scale == "none" else self.routes.scale(block, rule, p, idx, swapped[source])
        self.routes.cuts[block.y] = idx, count
        before = self.program.regions.get(source.name) if self.scattered.get(source, (None, None))[1] is idx else None
        out = self._scatter(block, source, idx, y, count)
        expected = 1 - fraction if fraction is not None else policy.value if policy.name == "ratio" and not rule.by_scores else None
        more = {"m": self.tokens} | ({} if expected is None else {"expected_kept": expected}) | ({} if seen is None else {"seen": seen})
        if before is not None:  # its scatter is useless now, and goes
            more["also"] = (*before.more.get("also", ()), before.name)
        what = f"skips {fraction:.0%} of tokens" if fraction is not None else f"tokens by {policy}"
        keys = "skipped tokens are keys in it" if rule.keys == "all" else "skipped tokens are no keys in it"
        self.program.regions[out.name] = Region(block.names[0], (), what, f"{rule}: {keys}", more=more)

    def _scatter(self, block: Block, source: fx.Node, idx: fx.Node, y: fx.Node, count: fx.Node | None) -> fx.Node:
        """The block's result for all tokens, in the place of y."""
        users = list(y.users)
        base, same, _ = self.scattered.get(source, (source, None, None))
        base = base if same is idx else source
        with self.program.graph.inserting_after(y):
            out = self.program.graph.call_function(SCATTER if count is None else SCATTER_KEPT, (base, idx, y))
        for user in users:
            user.replace_input_with(y, out)
        self.scattered[out], self.moved[block.y] = (base, idx, y), out
        return out

    def _shorten(self, block: Block, swapped: dict[fx.Node, fx.Node], idx: fx.Node, places: fx.Node, count: fx.Node | None) -> None:
        """All of the block on the kept tokens, of which alone it then keeps keys and values."""
        for node, dims in block.tokens.items():
            with self.program.graph.inserting_before(next(inner for inner in block.inside if node in inner.all_input_nodes)):
                swapped[node] = self._take(node, places if is_table(node, dims) else idx, dims, count)
        self.shorter.move(block.inside, swapped, idx)
        if count is None:
            return
        self.routes.hide(block, idx)
        for node in block.cache:
            with self.program.graph.inserting_after(node):
                trimmed = self.program.graph.call_function(TRIM, (node, idx))
            trimmed.meta["val"] = self.shorter.rows(value_of(node), f"{idx.name}_keys")
            return_instead(self.program, node, trimmed)
            for user in [user for user in node.users if user.target is SHOWN]:
                trimmed.append(user)
                user.args = (trimmed, idx)
                user.meta.pop("val", None)

    def _shorten_queries(self, block: Block, swapped: dict[fx.Node, fx.Node], idx: fx.Node, count: fx.Node | None) -> None:
        """What does not lead to keys and values on the kept tokens; keys and values are of all tokens."""
        graph, attention = self.program.graph, block.attention
        given = arguments(attention)
        whole = _leads_to({given["key"], given["value"]}, set(block.inside))
        own = [node for node in block.inside if node not in whole]
        entering = dict(block.tokens)
        for node in block.inside:
            if node in whole and any(user in own and user is not attention for user in node.users):
                entering[node] = self._dims(node)
        mask = given.get("attn_mask")
        for node, dims in entering.items():
            reader = next((inner for inner in own if node in inner.all_input_nodes), None)
            if reader is not None:
                with graph.inserting_before(reader):
                    swapped[node] = self._take(node, idx, dims[:1] if node is mask else dims, count)
        if mask is None and is_causal(attention):
            with graph.inserting_before(attention):
                with_mask(attention, graph.call_function(EARLIER, (idx, self.moved.get(block.x, block.x))))
        self.shorter.move(own, swapped, idx)
        self.routes.whole.add(block.y)

    def _dims(self, node: fx.Node) -> tuple[int, ...]:
        """The dimensions of a value that are the sequence."""
        full = str(self.shorter.like.shape[1].node.expr)
        return tuple(d for d, s in enumerate(value_of(node).shape) if not isinstance(s, int) and str(s.node.expr) == full)

    def _renumbered(self, count: fx.Node, idx: fx.Node, mask: fx.Node | None) -> fx.Node:
        """0, 1, 2, ... as indices [1, K]; where a mask says which tokens are padding, the places of the others."""
        if mask is not None:
            if (idx, mask) not in self.gathered:
                self.gathered[idx, mask] = self.program.graph.call_function(NUMBERED, (idx, mask))
            return self.gathered[idx, mask]
        if count not in self.gathered:
            self.gathered[count] = renumbered(self.program.graph, count)
        return self.gathered[count]

    def _take(self, node: fx.Node, idx: fx.Node, dims: tuple[int, ...], count: fx.Node | None) -> fx.Node:
        """The kept rows of a value. Those of a value that the same indices were scattered into are what was scattered."""
        if node in self.scattered and self.scattered[node][1] is idx and dims == (1,):
            return self.scattered[node][2]
        key = (node, idx, dims)
        if key not in self.gathered:
            gather = GATHER if count is None else GATHER_KEPT
            self.gathered[key] = self.program.graph.call_function(gather, (node, idx, list(dims)))
        return self.gathered[key]

    def _select(self, by: Any, source: fx.Node, policy: Policy) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        """(indices, their number, None): scores, or what they are computed by, and a policy that keeps a fixed number of them."""
        key = (by, str(policy))
        if key not in self.indices:
            call = self.program.graph.call_function
            scores = by if isinstance(by, fx.Node) else call(by[0], (source, by[1]))
            idx = call(operator.getitem, (call(SELECT, (scores, str(policy))), 0))
            idx.meta["val"] = self._example(policy)
            self.indices[key] = idx, call(aten.sym_size.int, (idx, 1)), None
        return self.indices[key]

    def _keep_padded(self, by: Any, source: fx.Node, policy: Policy, mask: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        """As `_select`, but of each row's tokens as many as it would keep without padding."""
        key = (by, str(policy), mask)
        if key not in self.indices:
            call = self.program.graph.call_function
            if isinstance(by, fx.Node):
                scores = call(aten.clamp_max.default, (by, ABOVE_ALL))  # protected tokens are counted, too
            else:
                ranks = call(aten.to.dtype, (call(by[0], (source, by[1])), torch.float32))
                scores = call(ELIGIBLE, (ranks, mask, None, None))
            self.indices[key] = self._keep(scores, policy, "")[:3]
        return self.indices[key]

    def _keep(self, scores: fx.Node, policy: Policy, name: str) -> tuple[fx.Node, fx.Node, fx.Node, Any]:
        """(indices, their number, how many of them each row has, what counts them)"""
        call = self.program.graph.call_function
        key, seen = counter(name) if name else ("", None)
        chosen = call(KEEP, (scores, str(policy), key, ""))
        idx, count = (call(operator.getitem, (chosen, i)) for i in range(2))
        idx.meta["val"] = self._example(policy)
        like = self.shorter.like
        with like.fake_mode:
            count.meta["val"] = torch.empty(like.shape[:1], dtype=torch.int32)
        chosen.meta["val"] = (idx.meta["val"], count.meta["val"])
        self.indices[scores, key] = idx, (size := call(aten.sym_size.int, (idx, 1))), count
        return idx, size, count, seen

    def _example(self, policy: Policy) -> Any:
        tokens = int(self.shorter.like.shape[1].node.hint or 128)
        return self.shorter.indices(f"kept_{len(self.indices)}", policy.size(tokens) or tokens // 2)


def _leads_to(ends: set[Any], inside: set[fx.Node]) -> set[fx.Node]:
    """What these values are computed from, inside of a block, they too."""
    found: set[fx.Node] = set()
    todo = [node for node in ends if node in inside]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += [source for source in node.all_input_nodes if source in inside]
    return found
