"""torch's attention as a site: softmax(scale * q k^T + mask) v between packed linears.

    scaled_dot_product_attention(q, k, v, mask), k and v with as many heads as q by expand      -->  attention(q, k, v, m, mask_tiles(m))
"""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from sparsecc.ir.infer import value_of
from sparsecc.ir.token_ops import ATTENTION, MASK_TILES, TOKENS
from sparsecc.passes.site import RESHAPES, Maker, Site, fills_vectors, has_few, head_views, hints, same_tokens, shape_of, swaps

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


def attention_site(node: fx.Node) -> Site | None:
    """Heads with no mask, a causal one or one for every key, and a result that joins to [B, S, F]."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    heads: list[Any] = [given.get(name) for name in names[:3]]
    q, k, v = heads
    if given.get("dropout_p") or not all(isinstance(x, fx.Node) and len(shape_of(x)) == 4 for x in heads):
        return None
    if not (has_few(q) or all(fills_vectors(x) for x in heads)) or len({value_of(x).dtype for x in heads}) > 1:
        return None
    mask, causal = given.get("attn_mask"), bool(given.get("is_causal"))
    inside: set[fx.Node] = set()
    views: set[fx.Node] = set()
    k, v = (unrepeated(x, shape_of(q)[1], inside, node) for x in (k, v))
    reads = (q, k, v)
    down = _join(node)
    if not down or not _heads_fit(*reads):
        return None
    if mask is not None and not _mask_fits(_unexpanded(mask), q, k):
        return None
    for x in reads:
        head_views(x, views)
    scale = given.get("scale")
    scale = 1 / math.sqrt(int(shape_of(q)[-1])) if scale is None else scale

    def build(maker: Maker, layout: str) -> fx.Node:
        added, tiles = (None, None) if mask is None else _mask(maker, mask, layout)
        args = (*(maker.now(x) for x in reads), added, tiles, scale, causal, layout, "")
        return maker.program.graph.call_function(ATTENTION, args)

    return Site(node, reads, build, frozenset(inside), frozenset(views | down))


def mask_of(node: fx.Node) -> Any:
    """The mask of torch's attention, without the rows that expand gave it."""
    mask: Any = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    return None if mask is None else _unexpanded(mask)


def hides(mask: Any) -> str:
    """What a mask hides, as kernels call it: one row may speak for all queries."""
    if mask is None:
        return ""
    rows = value_of(mask).shape[-2]
    return "keys" if isinstance(rows, int) and rows == 1 else "rows"


def is_causal(node: fx.Node) -> bool:
    """Whether torch's attention was told so."""
    return bool(node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False))


def key_heads(node: fx.Node) -> Any:
    """G of torch's attention, before its heads were repeated."""
    return shape_of(unrepeated(node.args[1], shape_of(node.args[0])[1], set(), node))[1]


def _heads_fit(q: fx.Node, k: fx.Node, v: fx.Node) -> bool:
    (_, H, _, D), (_, G, Sk, _) = shape_of(q), shape_of(k)
    if not (isinstance(G, int) and isinstance(H, int) and H % G == 0):
        return False
    alike = [str(size) for size in shape_of(v)[1:]] == [str(G), str(Sk), str(D)]
    return alike or (has_few(q) and hints(shape_of(v)[1:]) == hints((G, Sk, D)))


def unrepeated(value: Any, H: Any, inside: set[fx.Node], user: fx.Node) -> Any:
    """reshape(expand(unsqueeze(x, 2), [B, G, H / G, S, D]), [B, H, S, D]) --> x"""
    chain: list[Any] = [value]
    for target in (RESHAPES, (aten.expand.default,), (aten.unsqueeze.default,)):
        node = chain[-1]
        if not isinstance(node, fx.Node) or node.target not in target or len(node.users) != 1:
            return value
        chain.append(node.args[0])
    *nodes, x = chain
    if nodes[2].args[1] not in (2, -3) or len(shape_of(nodes[1])) != 5 or len(shape_of(x)) != 4 or list(value.users) != [user]:
        return value
    if [str(s) for s in (*shape_of(x)[:1], H, *shape_of(x)[2:])] != [str(s) for s in shape_of(value)]:
        return value
    inside.update(nodes)
    return x


def _unexpanded(mask: fx.Node) -> fx.Node:
    source: Any = mask
    while source.target is aten.expand.default and len(shape_of(source.args[0])) == len(shape_of(source)):
        source = source.args[0]
    return source


def _mask_fits(mask: fx.Node, q: fx.Node, k: fx.Node) -> bool:
    """bool or floats for every key, and for every query or for all at once."""
    value, B, H, S = value_of(mask), *(str(size) for size in shape_of(q)[:3])
    if not isinstance(value, torch.Tensor) or not 2 <= value.ndim <= 4 or not (value.dtype == torch.bool or value.is_floating_point()):
        return False
    *lead, rows, keys = [str(size) for size in value.shape]
    fits = len(lead) < 2 or lead[0] in ("1", B)
    same = keys == str(shape_of(k)[2]) or (has_few(q) and hints(value.shape[-1:]) == hints(shape_of(k)[2:3]))
    return same and rows in ("1", S) and fits and (not lead or lead[-1] in ("1", H)) and keys != "1"


def _mask(maker: Maker, mask: fx.Node, layout: str) -> tuple[fx.Node, fx.Node | None]:
    """What is added to the scores and, for many queries, its tiles, once for all layers. A bool mask adds its logarithm: 0 where a query
    may see a key, else -inf."""
    added = _unexpanded(mask)
    dtype = value_of(added).dtype
    if dtype != torch.float32:
        added = maker.once(added, aten.to.dtype, torch.float32)
    if dtype == torch.bool:
        added = maker.once(added, aten.log.default)
    if layout == "row":
        return added, None
    rows = shape_of(_unexpanded(mask))[-2]
    if not (isinstance(rows, int) and rows == 1):
        added = maker.once(added, TOKENS, "")
    return added, maker.once(added, MASK_TILES, "")


def _join(node: fx.Node) -> set[fx.Node]:
    """reshape(transpose(attention)): [B, H, S, D] -> [B, S, F]."""
    found: set[fx.Node] = set()
    if len(node.users) != 1:
        return found
    user = next(iter(node.users))
    if user.target in RESHAPES and shape_of(user) == shape_of(node):
        found.add(user)
        user = next(iter(user.users), user) if len(user.users) == 1 else user
    if not swaps(user) or len(user.users) != 1:
        return set()
    joined = next(iter(user.users))
    return found | {user, joined} if joined.target in RESHAPES and same_tokens(user, joined, 3) else set()
