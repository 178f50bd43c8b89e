"""What may stand between packed linears, found in ATen by its dataflow: norms, gates, rotary embeddings, attention.

    layer_norm(x, [N], w, b);  w * (x * rsqrt(mean(x ** 2, -1) + eps));  rms_norm(x, [N], w)        norm
    act(a) * b                                                                                      gate
    x * cos + cat([-x[..., D/2:], x[..., :D/2]], -1) * sin                                          rotary
    scaled_dot_product_attention(q, k, v, mask), k and v with as many heads as q by expand          attention

A `Site` only says what was found and how to replace it; whether that pays is layout's to decide.
"""
from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparsecc.ir.effects import mutates
from sparsecc.ir.infer import value_of
from sparsecc.ir.ops import TOKEN_TILE
from sparsecc.ir.program import Program
from sparsecc.ir.token_ops import ATTENTION, GATE, MASK_TILES, NORM, ROTARY, TOKENS
from sparsecc.passes.fuse import ACTIVATION_TARGETS, activation_name

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
RESHAPES = (aten.reshape.default, aten.view.default)
_END = 2**62  # slices to "the end" carry 2**63 - 1


@dataclass(frozen=True)
class Site:
    """One op of the dialect in the making: it gives `node`'s value, reads `reads` token-minor, and makes all of `inside` useless.

    `views`: nodes that cut what it reads out of wider values, or join its result; they stay. `ends`: it may also read rows, or write them.
    `build(maker, layout)` makes the op, before `node`.
    """

    node: fx.Node
    reads: tuple[fx.Node, ...]
    build: Callable[[Maker, str], fx.Node]
    inside: frozenset[fx.Node] = frozenset()
    views: frozenset[fx.Node] = frozenset()
    ends: bool = False


@dataclass
class Maker:
    """Makes the ops of sites, in program order. What many of them share is made once, where it comes from."""

    program: Program
    made: dict[fx.Node, fx.Node] = field(default_factory=dict)
    shared: dict[Any, fx.Node] = field(default_factory=dict)

    def replace(self, site: Site, layout: str) -> None:
        """Put the op in the site's place."""
        with self.program.graph.inserting_before(site.node):
            new = site.build(self, layout)
        self.made[site.node] = new
        self.program.replace(site.node, new)

    def now(self, node: fx.Node) -> fx.Node:
        """What has taken a node's place."""
        return self.made.get(node, node)

    def once(self, node: fx.Node, target: Any, *args: Any) -> fx.Node:
        """target(node, *args), right behind the node."""
        key = (node, target, args)
        if key not in self.shared:
            with self.program.graph.inserting_after(node):
                self.shared[key] = self.program.graph.call_function(target, (node, *args))
        return self.shared[key]


def sites(program: Program) -> list[Site]:
    """All of them, in program order."""
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
            case t if t is SDPA:
                site = _attention(node)
            case _:
                site = None
        if site is not None:
            found.append(site)
    return found


def has_tokens(x: Any) -> bool:
    """Whether sequences fill a vector: one row of tokens is read as it lies."""
    value = value_of(x) if isinstance(x, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.ndim < 2 or value.dtype != torch.float32:
        return False
    size = value.shape[-2]
    hint = size if isinstance(size, int) else size.node.hint
    return hint is None or hint >= TOKEN_TILE


def root(value: Any, views: Sequence[fx.Node] | set[fx.Node] | frozenset[fx.Node]) -> fx.Node:
    """What a view is a view of."""
    while value in views:
        value = value.args[0]
    return value


# ---- norms


def _norm(program: Program, node: fx.Node) -> Site | None:
    """Over the last dimension alone, in float32, with a weight, and a bias in a layer norm."""
    layer = node.target is aten.layer_norm.default
    x, shape, weight, *rest = [*node.args, None, None, None][: 5 if layer else 4]
    bias, eps = rest if layer else (None, *rest)
    eps = node.kwargs.get("eps", 1e-5 if layer else None) if eps is None else eps
    if eps is None:
        eps = torch.finfo(torch.float32).eps
    if not has_tokens(x) or len(shape or ()) != 1 or not all(_is_vector(program, w) for w in (weight, bias)[: 2 if layer else 1]):
        return None
    return _norm_site(node, x, weight, bias, eps, "layer" if layer else "rms", frozenset())


def _rms_norm(program: Program, node: fx.Node) -> Site | None:
    """w * (x * rsqrt(mean(x ** 2, [-1], True) + eps))"""
    for weight, scaled in _factors(node):
        if not _is_vector(program, weight) or not _only(scaled, aten.mul.Tensor, node):
            continue
        for x, rsqrt in _factors(scaled):
            if not (has_tokens(x) and _only(rsqrt, aten.rsqrt.default, scaled)):
                continue
            plus = rsqrt.args[0]
            mean = plus.args[0] if _only(plus, aten.add.Tensor, rsqrt) and not plus.kwargs else None
            if not _only(mean, aten.mean.dim, plus) or list(mean.args[1:3]) not in ([[-1], True], [[len(_shape(x)) - 1], True]):
                continue
            square = mean.args[0]
            if mean.kwargs or not isinstance(plus.args[1], float | int) or not _is_square(square, x, mean):
                continue
            if program.const(weight).shape == _shape(x)[-1:]:
                inside = frozenset((scaled, rsqrt, plus, mean, square))
                return _norm_site(node, x, weight, None, float(plus.args[1]), "rms", inside)
    return None


def _is_square(node: Any, x: fx.Node, user: fx.Node) -> bool:
    if _only(node, aten.pow.Tensor_Scalar, user):
        return tuple(node.args) in ((x, 2), (x, 2.0))
    return _only(node, aten.mul.Tensor, user) and tuple(node.args) == (x, x)


def _norm_site(node: fx.Node, x: fx.Node, weight: Any, bias: Any, eps: float, kind: str, inside: frozenset[fx.Node]) -> Site:
    def build(maker: Maker, layout: str) -> fx.Node:
        return maker.program.graph.call_function(NORM, (maker.now(x), weight, bias, eps, kind, layout, ""))

    return Site(node, (x,), build, inside, ends=True)


def _is_vector(program: Program, node: Any) -> bool:
    if not (isinstance(node, fx.Node) and program.is_const(node)):
        return False
    vector = program.const(node)
    return vector.ndim == 1 and vector.dtype == torch.float32 and vector.is_contiguous()


# ---- gate and rotary


def _gate(node: fx.Node) -> Site | None:
    """act(a) * b for values [..., S, F] of one shape; an activation may already be a linear's epilogue."""
    for a, b in _factors(node):
        if a is b or not (has_tokens(a) and has_tokens(b)) or _shape(a) != _shape(b) or len(_shape(a)) != 3:
            continue
        name = activation_name(a) if a.target in ACTIVATION_TARGETS and _only(a, a.target, node) else None
        if name is None and b.target in ACTIVATION_TARGETS:
            continue  # the other way round
        source = a.args[0] if name else a
        if not isinstance(source, fx.Node):
            continue
        views: set[fx.Node] = set()
        for value in (source, b):
            _cut(value, views)

        def build(maker: Maker, layout: str, source: fx.Node = source, b: fx.Node = b, name: str = name or "") -> fx.Node:
            return maker.program.graph.call_function(GATE, (maker.now(source), maker.now(b), name, ""))

        return Site(node, (source, b), build, frozenset((a,) if name else ()), frozenset(views))
    return None


def _rotary(node: fx.Node) -> Site | None:
    """x * cos + cat([-x[..., D/2:], x[..., :D/2]], -1) * sin, x [B, H, S, D], cos and sin [B or 1, 1, S, D]"""
    for straight, turned in _factors(node):
        if not (_only(straight, aten.mul.Tensor, node) and _only(turned, aten.mul.Tensor, node)):
            continue
        for (x, cos), (half, sin) in ((s, t) for s in _factors(straight) for t in _factors(turned)):
            inside = _half_turn(half, x, turned)
            if inside is None or not has_tokens(x) or len(_shape(x)) != 4 or not all(_is_table(t, x) for t in (cos, sin)):
                continue
            views: set[fx.Node] = set()
            _heads(x, views)

            def build(maker: Maker, layout: str, x: fx.Node = x, tables: tuple[fx.Node, ...] = (cos, sin)) -> fx.Node:
                return maker.program.graph.call_function(ROTARY, (maker.now(x), *(_table(maker, t) for t in tables), ""))

            return Site(node, (x,), build, frozenset((straight, turned, *inside)), frozenset(views))
    return None


def _half_turn(node: Any, x: Any, user: fx.Node) -> tuple[fx.Node, ...] | None:
    """The nodes of cat([-x[..., D/2:], x[..., :D/2]], -1)."""
    if not isinstance(x, fx.Node) or not _only(node, aten.cat.default, user) or len(node.args) < 2 or node.args[1] not in (-1, 3):
        return None
    parts = node.args[0]
    D = _shape(x)[-1] if _shape(x) else None
    if len(parts) != 2 or not isinstance(D, int) or D % 2 or not _only(parts[0], aten.neg.default, node):
        return None
    second, first = parts[0].args[0], parts[1]
    halves = ((second, D // 2, D, parts[0]), (first, 0, D // 2, node))
    if not all(_only(part, aten.slice.Tensor, user) and _is_slice(part, x, start, end, D) for part, start, end, user in halves):
        return None
    return node, parts[0], second, first


def _is_slice(node: fx.Node, x: fx.Node, start: int, end: int, size: int) -> bool:
    source, dim, first, last, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
    last = size if last is None or (isinstance(last, int) and last > _END) else last
    return source is x and dim in (-1, 3) and (first or 0) == start and last == end and step == 1 and not node.kwargs


def _is_table(node: Any, x: fx.Node) -> bool:
    """float32, a row for every token, one for all heads."""
    if not has_tokens(node):
        return False
    wanted, found = [str(size) for size in _shape(x)], [str(size) for size in _shape(node)]
    return len(found) == 4 and found[0] in ("1", wanted[0]) and found[1] == "1" and found[2:] == wanted[2:]


def _table(maker: Maker, node: fx.Node) -> fx.Node:
    """Token-minor, once for all layers, each of which has its own unsqueeze."""
    source = node.args[0] if node.target is aten.unsqueeze.default and node.args[1] in (1, -3) else None
    wide = node if not isinstance(source, fx.Node) else maker.once(source, aten.unsqueeze.default, 1)
    return maker.once(wide, TOKENS, "")


# ---- attention


def _attention(node: fx.Node) -> Site | None:
    """float32 heads that nobody writes to, with no mask, a causal one or one for every key, and a result that joins to [B, S, F]."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    q, k, v = (given.get(name) for name in names[:3])
    if given.get("dropout_p") or not all(isinstance(x, fx.Node) and has_tokens(x) and len(_shape(x)) == 4 for x in (q, k, v)):
        return None
    mask, causal = given.get("attn_mask"), bool(given.get("is_causal"))
    inside: set[fx.Node] = set()
    views: set[fx.Node] = set()
    k, v = (_unrepeated(x, _shape(q)[1], inside, node) for x in (k, v))
    reads = (q, k, v)
    down = _join(node)
    if not down or any(mutates(user) for x in reads for user in x.users) or not _heads_fit(*reads):
        return None
    if mask is not None and not _mask_fits(_unexpanded(mask), q, k):
        return None
    for x in reads:
        _heads(x, views)
    scale = given.get("scale")
    scale = 1 / math.sqrt(int(_shape(q)[-1])) if scale is None else scale

    def build(maker: Maker, layout: str) -> fx.Node:
        added, tiles = (None, None) if mask is None else _mask(maker, mask)
        args = (*(maker.now(x) for x in reads), added, tiles, scale, causal, "")
        return maker.program.graph.call_function(ATTENTION, args)

    return Site(node, reads, build, frozenset(inside), frozenset(views | down))


def mask_of(node: fx.Node) -> Any:
    """The mask of torch's attention, without the rows that expand gave it."""
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    return None if mask is None else _unexpanded(mask)


def is_causal(node: fx.Node) -> bool:
    """Whether torch's attention was told so."""
    return bool(node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False))


def key_heads(node: fx.Node) -> Any:
    """G of torch's attention, before its heads were repeated."""
    return _shape(_unrepeated(node.args[1], _shape(node.args[0])[1], set(), node))[1]


def _heads_fit(q: fx.Node, k: fx.Node, v: fx.Node) -> bool:
    (_, H, _, D), (_, G, Sk, _) = _shape(q), _shape(k)
    return [str(size) for size in _shape(v)[1:]] == [str(G), str(Sk), str(D)] and isinstance(G, int) and isinstance(H, int) and H % G == 0


def _unrepeated(value: fx.Node, H: Any, inside: set[fx.Node], user: fx.Node) -> fx.Node:
    """reshape(expand(unsqueeze(x, 2), [B, G, H / G, S, D]), [B, H, S, D]) --> x"""
    chain = [value]
    for target in (RESHAPES, (aten.expand.default,), (aten.unsqueeze.default,)):
        node = chain[-1]
        if not isinstance(node, fx.Node) or node.target not in target or (len(chain) < 4 and len(node.users) != 1):
            return value
        chain.append(node.args[0])  # type: ignore[arg-type]
    *nodes, x = chain
    if nodes[2].args[1] not in (2, -3) or len(_shape(nodes[1])) != 5 or len(_shape(x)) != 4 or not set(nodes[0].users) <= {user}:
        return value
    if [str(s) for s in (*_shape(x)[:1], H, *_shape(x)[2:])] != [str(s) for s in _shape(value)]:
        return value
    inside.update(nodes)
    return x


def _unexpanded(mask: fx.Node) -> fx.Node:
    source = mask
    while source.target is aten.expand.default and len(_shape(source.args[0])) == len(_shape(source)):
        source = source.args[0]  # type: ignore[assignment]
    return source


def _mask_fits(mask: fx.Node, q: fx.Node, k: fx.Node) -> bool:
    """bool or floats for every key, and for every query or for all at once."""
    value, B, H, S = value_of(mask), *(str(size) for size in _shape(q)[:3])
    if not isinstance(value, torch.Tensor) or not 2 <= value.ndim <= 4 or not (value.dtype == torch.bool or value.is_floating_point()):
        return False
    *lead, rows, keys = [str(size) for size in value.shape]
    fits = len(lead) < 2 or lead[0] in ("1", B)
    return keys == str(_shape(k)[2]) and rows in ("1", S) and fits and (not lead or lead[-1] in ("1", H)) and keys != "1"


def _mask(maker: Maker, mask: fx.Node) -> tuple[fx.Node, fx.Node]:
    """What is added to the scores and its tiles, once for all layers. A bool mask adds its logarithm: 0 where a query may see a key, else
    -inf."""
    added = _unexpanded(mask)
    dtype = value_of(added).dtype
    if dtype != torch.float32:
        added = maker.once(added, aten.to.dtype, torch.float32)
    if dtype == torch.bool:
        added = maker.once(added, aten.log.default)
    rows = _shape(_unexpanded(mask))[-2]
    if not (isinstance(rows, int) and rows == 1):
        added = maker.once(added, TOKENS, "")
    return added, maker.once(added, MASK_TILES, "")


def _heads(value: fx.Node, views: set[fx.Node]) -> None:
    """The views of transpose(reshape(x or a part of it)): [B, S, F] -> [B, H, S, D]."""
    if not _swaps(value):
        return
    split = value.args[0]
    if isinstance(split, fx.Node) and split.target in RESHAPES and len(_shape(split.args[0])) == 3:
        views |= {value, split}
        _cut(split.args[0], views)


def _cut(value: Any, views: set[fx.Node]) -> None:
    """The views of a slice, or of a part of a split, along the features of [B, S, F]."""
    if not isinstance(value, fx.Node):
        return
    if value.target is aten.slice.Tensor and value.args[1] in (-1, 2) and len(value.args) == 4:
        views.add(value)
    elif value.target is operator.getitem:
        parts = value.args[0]
        if isinstance(parts, fx.Node) and parts.target in SPLITS and parts.args[2:] in ((-1,), (2,)):
            views |= {value, parts}


def _join(node: fx.Node) -> set[fx.Node]:
    """reshape(transpose(attention)): [B, H, S, D] -> [B, S, F]."""
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
    return found | {user, joined} if joined.target in RESHAPES and len(_shape(joined)) == 3 else set()


def _swaps(node: fx.Node) -> bool:
    return node.target is aten.transpose.int and tuple(node.args[1:]) in ((1, 2), (2, 1)) and len(_shape(node)) == 4


# ---- graphs


def _only(node: Any, target: Any, user: fx.Node) -> bool:
    """Whether this is a call of `target` that nobody else uses."""
    return isinstance(node, fx.Node) and node.target is target and list(node.users) == [user]


def _factors(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """Both readings of a product, or a sum."""
    if len(node.args) == 2 and not node.kwargs:
        a, b = node.args
        yield a, b
        yield b, a


def _shape(node: Any) -> tuple[Any, ...]:
    value = value_of(node) if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()
