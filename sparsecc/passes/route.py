"""Learned routers in front of blocks: where the scores of a block's tokens come from.

    FTP: scores = route(importance, mask, 0.3, [fc1, bias, fc2, bias]),  importance = received(q, k, mask) of the block before
    MoD: scores = eligible(p, mask, first, end),                         p = token_gate(norm(x), w)

A token's importance is the attention that the last token paid it in the last block that it went through: blocks before the one that
routes have run already. In front of the first block it is what attention without weights would pay, softmax(x_last x^T / sqrt(D)).
"""
from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from sparsecc.errors import SpecError
from sparsecc.ir.infer import value_of
from sparsecc.ir.ops import LINEAR
from sparsecc.ir.program import LinearView, Program
from sparsecc.ir.route_ops import ELIGIBLE, GATHER_KEPT, HIDE_KEYS, RECEIVED, ROUTE, SCATTER_KEPT, SEEN, TOKEN_GATE, Seen
from sparsecc.passes.attention import is_causal
from sparsecc.passes.blocks import Block
from sparsecc.passes.site import RESHAPES
from sparsecc.routing import DepthRouter, TokenRouter
from sparsecc.skipping import Tokens

aten = torch.ops.aten
_COUNT = itertools.count()


@dataclass
class Routes:
    """Scores for the blocks of a program, in program order. `cuts`: indices and counts of the blocks that are cut by now."""

    program: Program
    blocks: Sequence[Block]
    cuts: dict[fx.Node, tuple[fx.Node, fx.Node | None]] = field(default_factory=dict)
    paid: dict[int, fx.Node] = field(default_factory=dict)
    consts: dict[int, fx.Node] = field(default_factory=dict)
    masks: dict[Any, fx.Node] = field(default_factory=dict)
    whole: set[fx.Node] = field(default_factory=set)
    """Results of cut blocks whose keys are all tokens."""

    def scores(self, block: Block, source: fx.Node, mask: fx.Node | None, rule: Tokens, required: float | None, at: int) -> tuple[
        fx.Node, fx.Node | None
    ]:
        """(scores, the probabilities that a branch may be scaled by), at the graph's insert point. `at`: the block's place under its
        glob."""
        call = self.program.graph.call_function
        if isinstance(rule.router, TokenRouter):
            weights = [self.const(f"router_{i}", w) for i, w in enumerate(rule.router.weights)]
            place = next(i for i, one in enumerate(self.blocks) if one.y is block.y)
            return call(ROUTE, (self.importance(place, mask), mask, required, weights, "")), None
        assert isinstance(rule.router, DepthRouter)
        p = self.gate(block, source, rule.router, at)
        return call(ELIGIBLE, (p, mask, *(rule.span or (None, None)))), p

    def gate(self, block: Block, source: fx.Node, router: DepthRouter, at: int) -> fx.Node:
        """The probabilities [B, S] that a router gives the tokens."""
        if len(router.weights) > 1 and at >= len(router.weights):
            count = len(router.weights)
            raise SpecError(f"mixture_of_depths: the checkpoint has {count} routers, {block.names[0]} is block {at + 1} under its glob")
        weight = router.weights[0 if len(router.weights) == 1 else at]
        width = int(value_of(block.x).shape[-1])
        if weight.shape[1] != width:
            stream = f"the stream of {block.names[0]} has {width} features"
            raise SpecError(f"mixture_of_depths: router.weight is {list(weight.shape)}, but {stream}")
        read = source if router.reads == "stream" else self._before_linears(block, source)
        dtype = value_of(block.x).dtype
        args = (read, self.const("depth_router", weight, dtype), source)
        return self.program.graph.call_function(TOKEN_GATE, args)

    def _before_linears(self, block: Block, source: fx.Node) -> fx.Node:
        """What the block's first linear reads, of all tokens: a copy of the norm before it."""
        read = next(LinearView(node).x for node in block.inside if node.target is LINEAR)
        inside = set(block.inside)
        wanted: set[fx.Node] = set()
        todo = [read]
        while todo:
            node = todo.pop()
            if node in inside and node not in wanted:
                wanted.add(node)
                todo += node.all_input_nodes
        copies = {block.x: source}  # behind a cut block its readers have been given the source already
        for node in block.inside:
            if node in wanted:
                copies[node] = self.program.graph.node_copy(node, lambda n: copies.get(n, n))
        return copies.get(read, read)

    def importance(self, at: int, mask: fx.Node | None) -> fx.Node:
        """f32[B, S]: what the blocks in front of one have paid. A token that went past the last of them has what it was paid before."""
        if at in self.paid:
            return self.paid[at]
        call = self.program.graph.call_function
        if at == 0:
            heads = call(aten.unsqueeze.default, (self.blocks[0].x, 1))
            paid = call(RECEIVED, (heads, heads, mask, None, None, ""))
        else:
            block = self.blocks[at - 1]
            if block.y in self.whole:
                name = block.names[0]
                raise SpecError(f"ftp: a learned router ranks tokens by what they are paid as keys of {name}: use keys='kept' there")
            idx, count = self.cuts.get(block.y, (None, None))
            given = arguments(block.attention)
            args = (given["query"], one_of_each(given["key"]), given.get("attn_mask"), count, given.get("scale"), "")
            paid = call(RECEIVED, args)
            if idx is not None:
                paid = call(SCATTER_KEPT, (self.importance(at - 1, mask), idx, paid))
        self.paid[at] = paid
        return paid

    def hide(self, block: Block, idx: fx.Node) -> None:
        """No query of the block's attention sees keys that stand for nothing. Causal ones don't: those keys are the last."""
        node = block.attention
        mask = arguments(node).get("attn_mask")
        if mask is None and is_causal(node):
            return
        if (mask, idx) not in self.masks:
            with self.program.graph.inserting_before(node):
                self.masks[mask, idx] = self.program.graph.call_function(HIDE_KEYS, (mask, idx))
        with_mask(node, self.masks[mask, idx])

    def scale(self, block: Block, rule: Tokens, p: fx.Node, idx: fx.Node | None, x: fx.Node) -> fx.Node:
        """Multiply what the rule names by the kept tokens' p, or by every one's; returns what the block gives now. x: the kept tokens that
        it reads."""
        graph = self.program.graph
        after = block.y.target in (aten.layer_norm.default, aten.rms_norm.default)
        if rule.scale == "mlp":
            down = block.ffn.down.node
            users = list(down.users)
            with graph.inserting_after(down):
                scaled = graph.call_function(aten.mul.Tensor, (down, None))
            for user in users:
                user.replace_input_with(down, scaled)
            with graph.inserting_before(scaled):
                scaled.args = (down, self._column(p, idx, value_of(down).ndim, value_of(block.x).dtype))
            return block.y
        if after:
            raise SpecError(f"mixture_of_depths(scale='block'): the norms of {block.names[0]} stand behind its sums, it adds nothing")
        users = list(block.y.users)
        last = block.y
        with graph.inserting_after(last):
            marker = graph.call_function(aten.add.Tensor, (x, None))
        with graph.inserting_before(marker):
            delta = graph.call_function(aten.sub.Tensor, (block.y, x))
            column = self._column(p, idx, 3, value_of(block.x).dtype)
            marker.args = (x, graph.call_function(aten.mul.Tensor, (delta, column)))
        for user in users:
            user.replace_input_with(block.y, marker)
        return marker

    def _column(self, p: fx.Node, idx: fx.Node | None, ndim: int, dtype: torch.dtype) -> fx.Node:
        """p of the kept tokens, [B, K, 1] or [B * K, 1]."""
        call = self.program.graph.call_function
        some = p if idx is None else call(GATHER_KEPT, (p, idx, [1]))
        some = call(aten.unsqueeze.default, (some, -1)) if ndim == 3 else call(aten.reshape.default, (some, [-1, 1]))
        return some if dtype == torch.float32 else call(aten.to.dtype, (some, dtype))

    def const(self, hint: str, tensor: Tensor, dtype: torch.dtype = torch.float32) -> fx.Node:
        """One node per tensor, whoever uses it."""
        if id(tensor) not in self.consts:
            self.consts[id(tensor)] = self.program.add_const(hint, tensor.to(dtype))
        return self.consts[id(tensor)]


def counter(name: str) -> tuple[str, Seen]:
    """The text by which `keep` names a counter, and the counter."""
    key = f"{name}:{next(_COUNT)}"
    seen = SEEN[key] = Seen()
    return key, seen


def padding(block: Block) -> fx.Node | None:
    """The mask from outside that says which tokens are padding, if there is one."""
    mask = arguments(block.attention).get("attn_mask")
    return next((node for node, dims in block.tokens.items() if len(dims) == 2), mask if mask in block.tokens else None)


def arguments(node: fx.Node) -> dict[str, Any]:
    """Those of torch's attention by their names."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def with_mask(node: fx.Node, mask: fx.Node) -> None:
    """Give torch's attention a mask in the place of the one that it has, or of its causality."""
    given = arguments(node)
    given |= {"attn_mask": mask, "is_causal": False}
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    node.args = tuple(given.pop(name, 0.0) for name in names)
    node.kwargs = given


def one_of_each(key: Any) -> Any:
    """Key heads before they were repeated for grouped queries: reshape(expand(unsqueeze(k, 2)))."""
    node, targets = key, (RESHAPES, (aten.expand.default,), (aten.unsqueeze.default,))
    for target in targets:
        if not isinstance(node, fx.Node) or node.target not in target:
            return key
        node = node.args[0]
    value: Any = value_of(node) if isinstance(node, fx.Node) else None
    return node if isinstance(value, torch.Tensor) and value.ndim == 4 else key
