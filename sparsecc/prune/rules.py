"""What each op does to channel numbers; `flow.py` says what these are.

A rule takes the walk, a node and the shapes of the model's parameters, and returns the value of the node: channel numbers, a part of a
parameter, a tuple of these, or None where nothing belongs to a channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from sparsecc.prune.flow import Attention, Const, Flow, constant_along, folded, tensors, thin

aten = torch.ops.aten
Shapes = Mapping[str, torch.Size]
Rule = Callable[[Flow, fx.Node, Shapes], Any]

IDENTITY = {"dropout", "alias", "clone", "contiguous", "to", "detach", "_to_copy", "lift_fresh_copy", "feature_dropout",
            "_assert_tensor_metadata"}  # fmt: skip
MOVES = {
    "view", "reshape", "_unsafe_view", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice", "select", "cat", "stack",
    "split", "split_with_sizes", "chunk", "unbind", "flatten", "unflatten", "repeat", "repeat_interleave", "flip", "roll", "movedim",
    "narrow", "pixel_shuffle", "channel_shuffle", "numpy_T", "swapaxes", "index_select", "expand_as", "tile", "concat",
}  # fmt: skip
REDUCTIONS = {"mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "norm"}
ALONG = {"softmax", "_softmax", "log_softmax", "cumsum"}
POOLS = {"max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "upsample_nearest2d",
         "upsample_bilinear2d", "max_pool3d", "avg_pool3d", "adaptive_avg_pool3d"}  # fmt: skip


def apply(flow: Flow, node: fx.Node, shapes: Shapes) -> Any:
    """The value of a call: by its op's rule, else blocked."""
    name = getattr(node.target, "_opname", str(node.target))
    values = [flow.env.get(arg) for arg in node.all_input_nodes]
    if name in RULES:
        return RULES[name](flow, node, shapes)
    if all(value is None for value in values):
        return None
    if name in IDENTITY:
        return flow.env[node.all_input_nodes[0]]
    if name in MOVES:
        return _move(flow, node, shapes)
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _elementwise(flow, node, shapes, name)
    if any(isinstance(value, Tensor | tuple) for value in values):
        _block(flow, node, f"{name} has no rule")
    return None


def _shape(node: fx.Node) -> torch.Size:
    return node.meta["val"].shape


def _arg(node: fx.Node, name: str) -> Any:
    """An argument by its name in the op's schema; its default where it isn't given."""
    for i, one in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if one.name == name:
            return node.args[i] if i < len(node.args) else node.kwargs.get(name, one.default_value)
    return None


def _value(flow: Flow, node: fx.Node, name: str) -> Any:
    found = _arg(node, name)
    return flow.env.get(found) if isinstance(found, fx.Node) else None


def _block(flow: Flow, node: fx.Node, reason: str) -> None:
    for arg in node.all_input_nodes:
        for ids in tensors(flow.env.get(arg)):
            flow.block(ids, f"{reason} (at {node.name})")


def _columns(flow: Flow, ids: Tensor, dim: int, node: fx.Node) -> Tensor:
    """[...] -> [size of dim], one channel for each index; several at different positions become one."""
    rows = thin(ids).movedim(dim, -1)
    rows = rows.reshape(-1, rows.shape[-1]).expand(-1, ids.shape[dim])
    if len(rows) > 1:
        rows = torch.unique(rows, dim=0)
    for row in rows[1:]:
        flow.channels.join(rows[0], row)
    mixed = ((rows < 0).any(0) & (rows >= 0).any(0)).expand(rows.shape)
    flow.block(rows[mixed], f"they stand beside values that are no channels (at {node.name})")
    return rows.amax(0)


def _linear(flow: Flow, node: fx.Node, x: Any, weight: Any, bias: Any, shapes: Shapes) -> Any:
    if not isinstance(weight, Const) or weight.index.ndim != 2:
        _block(flow, node, "they meet a weight that is no parameter")
        return None
    if isinstance(x, Tensor):
        flow.use(weight, "reads", _columns(flow, x, -1, node)[None], shapes)
    made = flow.made_by(weight, 0)
    flow.use(weight, "writes", made[:, None], shapes)
    if isinstance(bias, Const):
        flow.use(bias, "scales", made, shapes)
    return made.expand(_shape(node))


def linear(flow: Flow, node: fx.Node, shapes: Shapes) -> Any:
    return _linear(flow, node, _value(flow, node, "input"), _value(flow, node, "weight"), _value(flow, node, "bias"), shapes)


def addmm(flow: Flow, node: fx.Node, shapes: Shapes) -> Any:
    weight = _transposed(_value(flow, node, "mat2"))
    return _linear(flow, node, _value(flow, node, "mat1"), weight, _value(flow, node, "self"), shapes)


def _transposed(value: Any) -> Any:
    whole = isinstance(value, Const) and value.index.ndim == 2
    return Const(value.name, value.index.t(), False) if whole else value


def conv(flow: Flow, node: fx.Node, shapes: Shapes) -> Any:
    """x [B, I, ...], weight [O, I / groups, ...]; a depthwise filter is one channel with the one that it reads."""
    x, weight, bias, groups = (*(_value(flow, node, n) for n in ("input", "weight", "bias")), _arg(node, "groups"))
    if not isinstance(weight, Const):
        _block(flow, node, "they meet a weight that is no parameter")
        return None
    made = flow.made_by(weight, 0)
    ones = [1] * (weight.index.ndim - 2)
    if isinstance(x, Tensor):
        reads = _columns(flow, x, 1, node).view(groups, -1)
        if reads.shape[1] == 1 and groups > 1:
            flow.channels.join(made, reads.repeat_interleave(len(made) // groups), product=True)
        else:
            reads = reads.repeat_interleave(len(made) // groups, 0) if groups > 1 else reads
            flow.use(weight, "reads", reads.view(*reads.shape, *ones), shapes)
    flow.use(weight, "writes", made.view(-1, 1, *ones), shapes)
    if isinstance(bias, Const):
        flow.use(bias, "scales", made, shapes)
    return made.view(-1, *ones).expand(_shape(node))


def embedding(flow: Flow, node: fx.Node, shapes: Shapes) -> Any:
    table = _value(flow, node, "weight")
    if not isinstance(table, Const):
        return None
    made = flow.made_by(table, 1)
    flow.use(table, "writes", made[None], shapes)
    return made.expand(_shape(node))


def norm(flow: Flow, node: fx.Node, shapes: Shapes) -> Any:
    """Every channel stays itself; that statistics mix them is the divisor's matter, which stays."""
    x = _value(flow, node, "input")
    if not isinstance(x, Tensor):
        return x
    trailing = 0 if _arg(node, "normalized_shape") is not None else x.ndim - 2
    for part in ("weight", "bias"):
        if isinstance(vector := _value(flow, node, part), Const):
            _scale(flow, vector, vector.index.view(*vector.index.shape, *([1] * trailing)), x, shapes)
    return x


def _scale(flow: Flow, const: Const, index: Tensor, ids: Tensor, shapes: Shapes) -> None:
    """A parameter that meets channels element by element: an entry that meets a single one belongs to it."""
    index, ids = torch.broadcast_tensors(index, ids)
    for dim in range(ids.ndim):
        if ids.stride(dim) == 0 and index.stride(dim) == 0:
            index, ids = index.narrow(dim, 0, 1), ids.narrow(dim, 0, 1)
    index, ids = index.reshape(-1), ids.reshape(-1)
    size = shapes[const.name].numel()
    low = torch.full((size,), torch.iinfo(torch.int64).max).scatter_reduce_(0, index, ids, "amin")
    high = torch.full((size,), -1).scatter_reduce_(0, index, ids, "amax")
    flow.use(Const(const.name, const.index), "scales", torch.where(low == high, low, -1).view(shapes[const.name]), shapes)


def _elementwise(flow: Flow, node: fx.Node, shapes: Shapes, name: str) -> Any:
    values = [flow.env.get(arg) for arg in node.all_input_nodes]
    live = [v.expand(_shape(node)) for v in values if isinstance(v, Tensor)]
    if not live:
        return None
    out = live[0]
    for other in live[1:]:
        a, b = out, other
        for dim in range(a.ndim):
            if a.stride(dim) == 0 and b.stride(dim) == 0:
                a, b = a.narrow(dim, 0, 1), b.narrow(dim, 0, 1)
        flow.channels.join(a, b, product=name.rstrip("_") == "mul")
        out = torch.where(a >= 0, a, b).expand(_shape(node)) if (a < 0).any() else a.expand(_shape(node))
    for value in values:
        if isinstance(value, Const):
            _scale(flow, value, value.index, out, shapes)
    if name.endswith("_"):
        flow.env[node.all_input_nodes[0]] = out
    return out


def _move(flow: Flow, node: fx.Node, shapes: Shapes) -> Any:
    """The same op on the numbers."""
    values = {arg: flow.env.get(arg) for arg in node.all_input_nodes}
    alone = len(values) == 1

    def number(arg: fx.Node) -> Any:
        match values[arg]:
            case Const() as const:
                return const.index if alone else _own_channels(flow, const, shapes)
            case None:
                value = arg.meta["val"]
                return value if node.target is aten.index_select.default else torch.full(value.shape, -1)
            case ids:
                return ids

    target = aten.reshape.default if node.target in (aten.view.default, aten._unsafe_view.default) else node.target
    try:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), number)  # type: ignore[misc]
        moved = target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError):
        _block(flow, node, f"{node.name} cannot be followed")
        return None
    const = next(iter(values.values()))
    if alone and isinstance(const, Const):
        whole = isinstance(moved, Tensor) and moved.shape == const.index.shape and torch.equal(moved, const.index)
        parts = [Const(const.name, part, whole) for part in tensors(moved)]
        return parts[0] if isinstance(moved, Tensor) else tuple(parts)
    return tuple(folded(part) for part in moved) if isinstance(moved, list | tuple) else folded(moved)


def _own_channels(flow: Flow, const: Const, shapes: Shapes) -> Tensor:
    """A parameter used as a value, such as a class token: its last dimension is channels of its own."""
    made = flow.made_by(const, -1)
    flow.use(const, "scales", made.expand(const.index.shape), shapes)
    return made.expand(const.index.shape)


def reduction(flow: Flow, node: fx.Node, shapes: Shapes) -> Any:
    """Over positions a channel stays one; over channels it becomes a statistic, to which a removed channel adds 0."""
    x = flow.env.get(node.all_input_nodes[0])
    if not isinstance(x, Tensor):
        return None
    dims = _arg(node, "dim")
    dims = list(range(x.ndim)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    kept = constant_along(x, dims)
    if not _arg(node, "keepdim"):
        kept = kept.squeeze(tuple(dims))
    return kept.expand(_shape(node))


def along(flow: Flow, node: fx.Node, shapes: Shapes) -> Any:
    """Ops that mix the elements of one dimension: only channels that fill it alone pass."""
    x, dim = flow.env.get(node.all_input_nodes[0]), _arg(node, "dim")
    if not isinstance(x, Tensor):
        return None
    same = constant_along(x, [dim])
    if bool((same.expand(x.shape) != x).any()):
        _block(flow, node, f"{node.name} runs over them")
        return None
    return same.expand(x.shape)


def pool(flow: Flow, node: fx.Node, shapes: Shapes) -> Any:
    """x [B, C, ...] -> [B, C, fewer or more positions]"""
    x = flow.env.get(node.all_input_nodes[0])
    if not isinstance(x, Tensor):
        return None
    return constant_along(x, range(2, x.ndim)).expand(_shape(node))


def matmul(flow: Flow, node: fx.Node, shapes: Shapes) -> Any:
    """Weights on the right are linears; a product of two values is a half of attention."""
    a, b = (flow.env.get(arg) if isinstance(arg, fx.Node) else None for arg in node.args[:2])
    if isinstance(b, Const) and b.index.ndim == 2:
        return _linear(flow, node, a, _transposed(b), None, shapes)
    if a is None and b is None:
        return None
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        queries, keys = constant_along(a, [-2])[..., 0, :], constant_along(b, [-1])[..., 0]
        if bool((queries >= 0).all() and (keys >= 0).all()) and queries.shape[-1] == a.shape[-1] > 1:
            return _new_scores(flow, queries, keys).expand(_shape(node))
        weights, values = constant_along(a, [-2, -1])[..., 0, 0], constant_along(b, [-2])[..., 0, :]
        if bool((values >= 0).all()) and all(score in flow.scores for score in torch.unique(weights).tolist()):
            q, k = (torch.stack([flow.scores[int(s)][i] for s in weights.reshape(-1)]).unflatten(0, weights.shape) for i in (0, 1))
            return _attention(flow, node, q, k, values)
    _block(flow, node, "they meet other values in a matrix product")
    return None


def _one_batch(ids: Tensor) -> Tensor:
    """[batch, heads, features] -> [1, heads, features]: a dimension along which numbers repeat becomes 1."""
    return thin(folded(ids))


def _new_scores(flow: Flow, queries: Tensor, keys: Tensor) -> Tensor:
    """One number for each head: its scores, from which attention is recognised. [heads, K] twice -> [heads, 1, 1]"""
    queries, keys = _one_batch(queries), _one_batch(keys)
    shape = torch.broadcast_shapes(queries.shape[:-1], keys.shape[:-1])
    q, k = queries.expand(*shape, -1).reshape(-1, queries.shape[-1]), keys.expand(*shape, -1).reshape(-1, keys.shape[-1])
    made = flow.channels.new(len(q))
    flow.scores.update((int(score), (q[i], k[i])) for i, score in enumerate(made))
    return made.view(*shape, 1, 1)


def _attention(flow: Flow, node: fx.Node, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v [..., heads, features] without positions -> the result's numbers, of the node's shape [batch, heads, tokens, features]."""
    q, k, v = _one_batch(q), _one_batch(k), _one_batch(v)
    shape = torch.broadcast_shapes(q.shape[:-1], k.shape[:-1], v.shape[:-1])
    q, k, v = (x.expand(*shape, -1).reshape(-1, x.shape[-1]) for x in (q, k, v))
    made = flow.channels.new(v.numel()).view(v.shape)
    flow.attentions.append(Attention(node.name, q, k, v, made))
    return made.view(*shape, 1, -1).expand(_shape(node))


def attention(flow: Flow, node: fx.Node, shapes: Shapes) -> Any:
    q, k, v = (_value(flow, node, name) for name in ("query", "key", "value"))
    if not all(isinstance(x, Tensor) for x in (q, k, v)):
        _block(flow, node, "attention over values that are no channels")
        return None
    q, k, v = (constant_along(x, [-2])[..., 0, :] for x in (q, k, v))
    if k.ndim > 1 and k.shape[-2] not in (1, q.shape[-2]):
        k, v = (x.repeat_interleave(q.shape[-2] // x.shape[-2], -2) for x in (k, v))
    if bool((q < 0).any() or (k < 0).any() or (v < 0).any()):
        _block(flow, node, "attention over values that are no channels")
        return None
    return _attention(flow, node, q, k, v)


RULES: dict[str, Rule] = {
    "linear": linear,
    "addmm": addmm,
    "mm": matmul,
    "matmul": matmul,
    "bmm": matmul,
    "embedding": embedding,
    "scaled_dot_product_attention": attention,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), conv),
    **dict.fromkeys(("layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm"), norm),
    **dict.fromkeys(REDUCTIONS, reduction),
    **dict.fromkeys(ALONG, along),
    **dict.fromkeys(POOLS, pool),
}
