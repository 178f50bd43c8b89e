"""What may stand between packed linears, found in ATen by its dataflow: norms, gates, rotary embeddings, attention.

    layer_norm(x, [N], w, b);  w * (x * rsqrt(mean(x ** 2, -1) + eps));  rms_norm(x, [N], w)        norm
    act(a) * b                                                                                      gate
    x * cos + cat([-x[..., D/2:], x[..., :D/2]], -1) * sin                                          rotary
    cat([cache, x], -2)                                                                             append, where there are a few tokens
    scaled_dot_product_attention(q, k, v, mask)                                                     attention, see `attention`

A `Site` only says what was found and how to replace it; whether that pays is layout's to decide.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sparsecc.ir.effects import mutates
from sparsecc.ir.infer import value_of
from sparsecc.ir.program import Program
from sparsecc.ir.token_ops import APPEND, GATE, NORM, ROTARY, TOKENS
from sparsecc.passes.attention import SDPA, attention_site
from sparsecc.passes.fuse import ACTIVATION_TARGETS, activation_name
from sparsecc.passes.site import TO_THE_END, Maker, Site, cut_views, factors, has_few, has_tokens, head_views, only, shape_of

aten = torch.ops.aten


def sites(program: Program) -> list[Site]:
    """All of them, in program order. Where anything is written to, those that read at more than one place are none."""
    found = []
    writes = any(mutates(node) for node in program.graph.nodes if node.op != "output")
    for node in program.graph.nodes:
        match node.target:
            case aten.layer_norm.default | aten.rms_norm.default:
                site = _norm(program, node)
            case aten.mul.Tensor if not writes:
                site = _rms_norm(program, node) or _gate(node)
            case aten.add.Tensor if not writes:
                site = _rotary(node)
            case aten.cat.default if not writes:
                site = _append(node)
            case t if t is SDPA and not writes:
                site = attention_site(node)
            case _:
                site = None
        if site is not None:
            found.append(site)
    return found


# ---- norms


def _norm(program: Program, node: fx.Node) -> Site | None:
    """Over the last dimension alone, with a weight, and a bias in a layer norm."""
    layer = node.target is aten.layer_norm.default
    x, shape, weight, *rest = [*node.args, None, None, None][: 5 if layer else 4]
    bias, eps = rest if layer else (None, *rest)
    eps: Any = node.kwargs.get("eps", 1e-5 if layer else None) if eps is None else eps
    if eps is None:
        eps = torch.finfo(torch.float32).eps
    if not has_tokens(x) or len(shape or ()) != 1 or not all(_is_vector(program, w, x) for w in (weight, bias)[: 2 if layer else 1]):
        return None
    return _norm_site(node, x, weight, bias, eps, "layer" if layer else "rms", frozenset())


def _rms_norm(program: Program, node: fx.Node) -> Site | None:
    """w * (x * rsqrt(mean(x ** 2, [-1], True) + eps)), the part in brackets in float32 whatever x is"""
    for weight, scaled in factors(node):
        inside: set[fx.Node] = set()
        scaled = _uncast(scaled, node, inside)
        user = next(iter(inside), node)
        if not only(scaled, aten.mul.Tensor, user):
            continue
        for wide, rsqrt in factors(scaled):
            if not only(rsqrt, aten.rsqrt.default, scaled):
                continue
            plus: Any = rsqrt.args[0]
            mean: Any = plus.args[0] if only(plus, aten.add.Tensor, rsqrt) and not plus.kwargs else None
            if not only(mean, aten.mean.dim, plus) or list(mean.args[1:3]) not in ([[-1], True], [[len(shape_of(wide)) - 1], True]):
                continue
            square = mean.args[0]
            if mean.kwargs or not isinstance(plus.args[1], float | int) or not _is_square(square, wide, mean):
                continue
            x: Any = wide
            if inside:  # w * to(..., x's dtype), of to(x, float32)
                if not isinstance(wide, fx.Node) or wide.target is not aten.to.dtype or set(wide.users) != {square, scaled}:
                    continue
                x, inside = wide.args[0], inside | {wide}
                if value_of(user).dtype != value_of(x).dtype or value_of(wide).dtype != torch.float32:
                    continue
            if has_tokens(x) and _is_vector(program, weight, x) and program.const(weight).shape == shape_of(x)[-1:]:
                inside |= {scaled, rsqrt, plus, mean, square}
                return _norm_site(node, x, weight, None, float(plus.args[1]), "rms", frozenset(inside))
    return None


def _uncast(value: Any, user: fx.Node, inside: set[fx.Node]) -> Any:
    """to(x, dtype) --> x"""
    if only(value, aten.to.dtype, user) and len(value.args) == 2 and not value.kwargs:
        inside.add(value)
        return value.args[0]
    return value


def _is_square(node: Any, x: fx.Node, user: fx.Node) -> bool:
    if only(node, aten.pow.Tensor_Scalar, user):
        return tuple(node.args) in ((x, 2), (x, 2.0))
    return only(node, aten.mul.Tensor, user) and tuple(node.args) == (x, x)


def _norm_site(node: fx.Node, x: fx.Node, weight: Any, bias: Any, eps: float, kind: str, inside: frozenset[fx.Node]) -> Site:
    def build(maker: Maker, layout: str) -> fx.Node:
        return maker.program.graph.call_function(NORM, (maker.now(x), weight, bias, eps, kind, layout, ""))

    return Site(node, (x,), build, inside, ends=True)


def _is_vector(program: Program, node: Any, x: fx.Node) -> bool:
    """A constant one of x's dtype."""
    if not (isinstance(node, fx.Node) and program.is_const(node)):
        return False
    vector = program.const(node)
    return vector.ndim == 1 and vector.dtype == value_of(x).dtype and vector.is_contiguous()


# ---- gate and rotary


def _gate(node: fx.Node) -> Site | None:
    """act(a) * b for values [..., S, F] of one shape; an activation may already be a linear's epilogue."""
    for a, b in factors(node):
        if a is b or not (has_tokens(a) and has_tokens(b)) or shape_of(a) != shape_of(b) or len(shape_of(a)) != 3:
            continue
        if value_of(a).dtype != value_of(b).dtype:
            continue
        name = activation_name(a) if a.target in ACTIVATION_TARGETS and only(a, a.target, node) else None
        if name is None and b.target in ACTIVATION_TARGETS:
            continue  # the other way round
        source = a.args[0] if name else a
        if not isinstance(source, fx.Node):
            continue
        views: set[fx.Node] = set()
        for value in (source, b):
            cut_views(value, views)

        def build(maker: Maker, layout: str, source: fx.Node = source, b: fx.Node = b, name: str = name or "") -> fx.Node:
            return maker.program.graph.call_function(GATE, (maker.now(source), maker.now(b), name, layout, ""))

        return Site(node, (source, b), build, frozenset((a,) if name else ()), frozenset(views))
    return None


def _rotary(node: fx.Node) -> Site | None:
    """x * cos + cat([-x[..., D/2:], x[..., :D/2]], -1) * sin, x [B, H, S, D], cos and sin [B or 1, 1, S, D]"""
    for straight, turned in factors(node):
        if not (only(straight, aten.mul.Tensor, node) and only(turned, aten.mul.Tensor, node)):
            continue
        for (x, cos), (half, sin) in ((s, t) for s in factors(straight) for t in factors(turned)):
            inside = _half_turn(half, x, turned)
            if inside is None or not has_tokens(x) or len(shape_of(x)) != 4 or not all(_is_table(t, x) for t in (cos, sin)):
                continue
            views: set[fx.Node] = set()
            head_views(x, views)

            def build(maker: Maker, layout: str, x: fx.Node = x, tables: tuple[fx.Node, ...] = (cos, sin)) -> fx.Node:
                return maker.program.graph.call_function(ROTARY, (maker.now(x), *(_table(maker, t, layout) for t in tables), layout, ""))

            return Site(node, (x,), build, frozenset((straight, turned, *inside)), frozenset(views))
    return None


def _half_turn(node: Any, x: Any, user: fx.Node) -> tuple[fx.Node, ...] | None:
    """The nodes of cat([-x[..., D/2:], x[..., :D/2]], -1)."""
    if not isinstance(x, fx.Node) or not only(node, aten.cat.default, user) or len(node.args) < 2 or node.args[1] not in (-1, 3):
        return None
    parts = node.args[0]
    D = shape_of(x)[-1] if shape_of(x) else None
    if len(parts) != 2 or not isinstance(D, int) or D % 2 or not only(parts[0], aten.neg.default, node):
        return None
    second, first = parts[0].args[0], parts[1]
    halves = ((second, D // 2, D, parts[0]), (first, 0, D // 2, node))
    if not all(only(part, aten.slice.Tensor, user) and _is_slice(part, x, start, end, D) for part, start, end, user in halves):
        return None
    return node, parts[0], second, first


def _is_slice(node: fx.Node, x: fx.Node, start: int, end: int, size: int) -> bool:
    source, dim, first, last, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
    last = size if last is None or (isinstance(last, int) and last > TO_THE_END) else last
    return bool(source is x and dim in (-1, 3) and (first or 0) == start and last == end and step == 1 and not node.kwargs)


def _is_table(node: Any, x: fx.Node) -> bool:
    """A row for every token, one for all heads."""
    if not has_tokens(node) or value_of(node).dtype != value_of(x).dtype:
        return False
    wanted, found = [str(size) for size in shape_of(x)], [str(size) for size in shape_of(node)]
    return len(found) == 4 and found[0] in ("1", wanted[0]) and found[1] == "1" and found[2:] == wanted[2:]


def _table(maker: Maker, node: fx.Node, layout: str) -> fx.Node:
    """In that layout, once for all layers, each of which has its own unsqueeze."""
    source = node.args[0] if node.target is aten.unsqueeze.default and node.args[1] in (1, -3) else None
    wide = node if not isinstance(source, fx.Node) else maker.once(source, aten.unsqueeze.default, 1)
    return wide if layout == "row" else maker.once(wide, TOKENS, "")


# ---- the cache


def _append(node: fx.Node) -> Site | None:
    """cat([cache, x], -2) of a cache [B, G, past, D] that is an input, and a few tokens of its dtype"""
    parts, dim = (*node.args, 0)[:2]
    if not isinstance(parts, list | tuple) or len(parts) != 2 or dim not in (-2, 2) or node.kwargs:
        return None
    cache, x = list[Any](parts)
    if not (has_few(x) and isinstance(cache, fx.Node) and cache.op == "placeholder" and len(shape_of(cache)) == 4 == len(shape_of(x))):
        return None
    sizes = [[str(size) for d, size in enumerate(shape_of(part)) if d != 2] for part in parts]
    if sizes[0] != sizes[1] or value_of(cache).dtype != value_of(x).dtype:
        return None
    views: set[fx.Node] = set()
    head_views(x, views)

    def build(maker: Maker, layout: str) -> fx.Node:
        return maker.program.graph.call_function(APPEND, (cache, maker.now(x), ""))

    return Site(node, (x,), build, views=frozenset(views))
