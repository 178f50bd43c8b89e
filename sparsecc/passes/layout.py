"""layout: values between packed linears stay token-minor, as kernels read and write them, through norms and attention.

    h = linear(x, ..., layout="row");  y = linear(h, ...)      -->  h = linear(x, ..., layout="token");  y = linear(h, ...)
    n = layer_norm(h, [N], w, b);      y = linear(n, ...)      -->  n = norm(h, w, b, layout="token");   y = linear(n, ...)
    a = scaled_dot_product_attention(q, k, v, mask)            -->  m = key_mask(mask);  a = attention(q, k, v, m)

A value becomes token-minor only where everything that uses it reads it so. A norm may also begin the chain, where it reads rows, or
end it, where it writes them. Attention
joins where its heads come from packed linears and its result goes into one. What would have to be transposed for others stays as it was.
"""
from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparsecc.ir.effects import mutates
from sparsecc.ir.infer import value_of
from sparsecc.ir.ops import TOKEN_TILE
from sparsecc.ir.program import LinearView, Program, Rule
from sparsecc.ir.token_ops import ATTENTION, KEY_MASK, NORM
from sparsecc.passes.context import Attention, Context

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
LAYER_NORM = aten.layer_norm.default
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
RESHAPES = (aten.reshape.default, aten.view.default)


@dataclass(frozen=True)
class Layout:
    """The pass; see the file's docstring."""

    name: str = "layout"
    requires: tuple[str, ...] = ("linears",)
    ensures: tuple[str, ...] = ()

    @property
    def rules(self) -> Mapping[Any, Rule]:
        return {}

    def run(self, program: Program, context: Any = None) -> None:
        if isinstance(context, Context) and context.tuner is not None and not context.tuner.token_minor:
            return
        plan = _Plan.of(program)
        plan.settle()
        slower = {node for node in plan.attentions if not _attention_pays(node, context)}
        if slower:
            plan.drop(slower)
            plan.settle()
        masks: dict[fx.Node, fx.Node] = {}
        for node in list(program.graph.nodes):  # in its order: names, and with them Inductor's cache, should not depend on hashes
            if node in plan.linears & plan.token:
                LinearView(node).replace(layout="token")
            elif node in plan.norms:
                _replace_norm(program, node, "token" if node in plan.token else "row")
            elif node in plan.attentions:
                _replace_attention(program, node, masks)
        program.finish()


@dataclass
class _Plan:
    """What may change, shrunk by `settle` until every token-minor value is read as such. `views`: nodes that cut or join heads."""

    linears: set[fx.Node]
    norms: set[fx.Node] = field(default_factory=set)
    attentions: set[fx.Node] = field(default_factory=set)
    views: set[fx.Node] = field(default_factory=set)
    token: set[fx.Node] = field(default_factory=set)

    @staticmethod
    def of(program: Program) -> _Plan:
        """Everything that could be token-minor."""
        packed = {view.node for view in program.linears() if all(term.format is not None for term in view.terms)}
        plan = _Plan({node for node in packed if _has_tokens(LinearView(node).x)})
        for node in program.graph.nodes:
            if node.target is LAYER_NORM and _norm_fits(program, node):
                plan.norms.add(node)
            elif node.target is SDPA and _attention_fits(node) and (views := _heads(node, packed)):
                plan.attentions.add(node)
                plan.views |= views
        plan.token = plan.linears | plan.norms | plan.attentions
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
            gone = {n for n in self.norms if n.args[0] not in self.token and n not in self.token}
            gone |= {n for n in self.attentions if not self._attends(n)}
            if gone:
                self.drop(gone)
                changed = True

    def drop(self, nodes: set[fx.Node]) -> None:
        """These stay torch's."""
        self.norms, self.attentions, self.token = self.norms - nodes, self.attentions - nodes, self.token - nodes

    def _uses(self, value: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
        """(value or view of it, user) behind the views."""
        for user in value.users:
            if user in self.views:
                yield from self._uses(user)
            else:
                yield value, user

    def _reads_tokens(self, value: fx.Node, user: fx.Node) -> bool:
        if user in self.norms:
            return user.args[0] is value and value not in user.args[1:]
        if user in self.attentions:
            return value in user.args[:3]
        if user not in self.linears:
            return False
        view = LinearView(user)
        return (view.x is value and view.residual is not value) or (view.residual is value and view.x is not value and user in self.token)

    def _attends(self, node: fx.Node) -> bool:
        """Its heads are token-minor, and so is what it gives."""
        return node in self.token and all(_root(arg, self.views) in self.token for arg in node.args[:3])


def _root(value: Any, views: set[fx.Node]) -> fx.Node:
    while value in views:
        value = value.args[0]
    return value


def _has_tokens(x: fx.Node) -> bool:
    """Whether sequences fill a vector: one row of tokens is read as it lies."""
    value = value_of(x)
    if not isinstance(value, torch.Tensor) or value.ndim < 2 or value.dtype != torch.float32:
        return False
    size = value.shape[-2]
    hint = size if isinstance(size, int) else size.node.hint
    return hint is None or hint >= TOKEN_TILE


def _norm_fits(program: Program, node: fx.Node) -> bool:
    """layer_norm over the last dimension alone, with weight and bias, in float32."""
    args = [*node.args, None, None, None][:4]
    fits = isinstance(args[0], fx.Node) and _has_tokens(args[0]) and len(args[1] or ()) == 1  # type: ignore[arg-type]
    return fits and all(isinstance(a, fx.Node) and program.is_const(a) and _plain(program.const(a)) for a in args[2:4])


def _plain(vector: torch.Tensor) -> bool:
    return vector.dtype == torch.float32 and vector.is_contiguous()


def _heads(node: fx.Node, packed: set[fx.Node]) -> set[fx.Node]:
    """The views that cut q, k and v out of packed linears and join the result for others; empty if there is anything else."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    if given.get("dropout_p", 0.0) or given.get("is_causal", False) or given.get("enable_gqa", False):
        return set()
    found: set[fx.Node] = set()
    for arg in node.args[:3]:
        up = _up(arg, packed)
        if len(node.args) < 3 or up is None:
            return set()
        found |= up
    down = _down(node, packed)
    return found | down if down else set()


def _up(value: Any, packed: set[fx.Node]) -> set[fx.Node] | None:
    """transpose(reshape(slice or part of a split(linear))): [B, S, F] -> [B, H, S, D]."""
    if not (isinstance(value, fx.Node) and _swaps(value)):
        return None
    split = value.args[0]
    if not isinstance(split, fx.Node) or split.target not in RESHAPES:
        return None
    whole = split.args[0]
    found = {value, split}
    if isinstance(whole, fx.Node) and whole.target is aten.slice.Tensor and whole.args[1] in (-1, 2) and len(whole.args) == 4:
        found.add(whole)
        whole = whole.args[0]
    elif isinstance(whole, fx.Node) and whole.target is operator.getitem:
        parts = whole.args[0]
        if not isinstance(parts, fx.Node) or parts.target not in SPLITS or parts.args[2:] not in ((-1,), (2,)):
            return None
        found |= {whole, parts}
        whole = parts.args[0]
    return found if whole in packed and _rank(whole) == 3 else None


def _down(node: fx.Node, packed: set[fx.Node]) -> set[fx.Node]:
    """reshape(transpose(attention)): [B, H, S, D] -> [B, S, F], into packed linears."""
    found: set[fx.Node] = set()
    if len(node.users) != 1:
        return found
    user = next(iter(node.users))
    if user.target in RESHAPES and _shape(user) == _shape(node):
        found.add(user)
        user = next(iter(user.users), user) if len(user.users) == 1 else user
    if not _swaps(user) or len(user.users) != 1:
        return set()
    joined = next(iter(user.users))
    if joined.target not in RESHAPES or _rank(joined) != 3 or not all(u in packed for u in joined.users):
        return set()
    return found | {user, joined}


def _swaps(node: fx.Node) -> bool:
    return node.target is aten.transpose.int and tuple(node.args[1:]) in ((1, 2), (2, 1)) and _rank(node) == 4


def _rank(node: Any) -> int:
    return len(_shape(node))


def _shape(node: Any) -> tuple[Any, ...]:
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _attention_fits(node: fx.Node) -> bool:
    """float32 heads that nobody writes to, and a mask, if any, for every query and key: a broadcast one stays torch's."""
    q, k = (value_of(arg) for arg in node.all_input_nodes[:2])
    if q.dtype != torch.float32 or any(_writes(arg) for arg in node.all_input_nodes[:3]):
        return False
    mask = _mask(node)
    return mask is None or [str(size) for size in _shape(mask)[-2:]] == [str(q.shape[2]), str(k.shape[2])]


def _mask(node: fx.Node) -> Any:
    return node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")


def _attention_pays(node: fx.Node, context: Any) -> bool:
    """Whether the target's kernel was the faster one; without a target the dense meaning serves either way."""
    if not isinstance(context, Context) or context.tuner is None:
        return True
    q, k = (value_of(arg) for arg in node.all_input_nodes[:2])
    hint = lambda size, other: size if isinstance(size, int) else (size.node.hint or other)  # noqa: E731
    B, H, S, D = (hint(size, 128) for size in q.shape)
    return context.tuner.attention_pays(Attention(B, H, hint(k.shape[1], H), S, hint(k.shape[2], S), D, _mask(node) is not None))


def _writes(node: fx.Node) -> bool:
    return any(mutates(user) for user in node.users)


def _replace_norm(program: Program, node: fx.Node, layout: str) -> None:
    x, _, weight, bias = node.args[:4]
    eps = node.args[4] if len(node.args) > 4 else node.kwargs.get("eps", 1e-5)
    with program.graph.inserting_before(node):
        new = program.graph.call_function(NORM, (x, weight, bias, eps, "layer", layout, ""))
    program.replace(node, new)


def _replace_attention(program: Program, node: fx.Node, masks: dict[fx.Node, fx.Node]) -> None:
    """One key_mask per mask serves all layers. What a bool mask adds is its logarithm: 0 where a query may see a key, else -inf."""
    q, k, v = node.args[:3]
    mask = _mask(node)
    scale = node.kwargs.get("scale")
    if scale is None:
        scale = 1 / math.sqrt(int(_shape(q)[-1]))
    if isinstance(mask, fx.Node):
        if mask not in masks:
            added = mask
            if value_of(mask).dtype == torch.bool:
                added = _after(program, mask, aten.to.dtype, torch.float32)
                added = _after(program, added, aten.log.default)
            elif value_of(mask).dtype != torch.float32:
                added = _after(program, mask, aten.to.dtype, torch.float32)
            masks[mask] = _after(program, added, KEY_MASK, "")
        mask = masks[mask]
    with program.graph.inserting_before(node):
        new = program.graph.call_function(ATTENTION, (q, k, v, mask, scale, ""))
    program.replace(node, new)


def _after(program: Program, node: fx.Node, target: Any, *args: Any) -> fx.Node:
    """target(node, *args), right behind the node."""
    with program.graph.inserting_after(node):
        return program.graph.call_function(target, (node, *args))
