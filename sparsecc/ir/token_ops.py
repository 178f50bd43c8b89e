"""What stands between linears in the dialect, so that values stay token-minor from one linear to the next.

    norm(x, weight, bias)             layer norm or RMS norm over the last dimension     x [..., N] -> [..., N]
    gate(a, b)                        act(a) * b                                         [..., F], [..., F] -> [..., F]
    rotary(x, cos, sin)               x * cos + half_turn(x) * sin, position embedding   x [B, H, S, D] -> [B, H, S, D]
    attention(q, k, v, mask, tiles)   softmax(scale * q k^T + mask) v                    q [B, H, S, D], k, v [B, G, Sk, D] -> as q
    tokens(x)                         x itself, token-minor: once for all who read it    [..., S, F] -> [..., S, F]
    mask_tiles(mask)                  what a mask hides, by tiles of TILE x TILE         [..., S, Sk] -> [..., S / TILE, Sk / TILE]
    append(cache, x)                  a KV cache, then the tokens that are new in it     [B, G, past, D], [..., S, D] -> [..., past + S, D]

`layout` is the result's: "token", or "row" where a norm ends the chain and where there are a few tokens (decode): rows of features, and
heads [B, H, S, D] that are views of [B, S, H, D]. `kernel` is a key of `KERNELS`, as in `sparsecc::linear`; without one the dense
meaning runs. All compute in float32; what comes in bf16 or fp16 is rounded where a model's own code does it.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.errors import ShapeError
from sparsecc.ir.ops import ACTIVATIONS, KERNELS, LIBRARY, LINEAR, empty_output

TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)

TILE = 64
"""Queries and keys of a mask that are hidden, open or mixed together."""

HIDDEN, OPEN, MIXED = 0.0, 1.0, 2.0
"""What `mask_tiles` says of a tile: all -inf, all 0, or anything else."""


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str, layout: str, kernel: str) -> Tensor:
    """y = (x - mean) / sqrt(variance + eps) * weight + bias; kind "rms" subtracts no mean and adds no bias."""
    fn: Any = KERNELS.get(kernel)
    if fn is not None:
        return fn(x, weight, bias, eps)
    if kind == "layer":
        y = F.layer_norm(x, weight.shape, weight, bias, eps)
    else:
        y = F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype) * weight
    return empty_output(x, x.shape[-1], layout).copy_(y)


def norm_fake(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str, layout: str, kernel: str) -> Tensor:
    """Shape, dtype and strides of the result."""
    return empty_output(x, x.shape[-1], layout)


def gate(a: Tensor, b: Tensor, activation: str, layout: str, kernel: str) -> Tensor:
    """`activation` is a key of `ACTIVATIONS`."""
    fn: Any = KERNELS.get(kernel)
    if fn is not None:
        return fn(a, b)
    return empty_output(a, a.shape[-1], layout).copy_(ACTIVATIONS[activation].fn(a) * b)


def gate_fake(a: Tensor, b: Tensor, activation: str, layout: str, kernel: str) -> Tensor:
    """Shape, dtype and strides of the result."""
    return empty_output(a, a.shape[-1], layout)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, layout: str, kernel: str) -> Tensor:
    """cos and sin [B or 1, 1, S, D]; D is even. half_turn(x) = [-x's second half, x's first half] (RoFormer, Su et al. 2021, in the
    order of features that Llama's checkpoints on the hub use)."""
    fn: Any = KERNELS.get(kernel)
    if fn is not None:
        return fn(x, cos, sin)
    first, second = x.chunk(2, -1)
    return _heads(x, x.shape[-1], layout).copy_(x * cos + torch.cat([-second, first], -1) * sin)


def rotary_fake(x: Tensor, cos: Tensor, sin: Tensor, layout: str, kernel: str) -> Tensor:
    """Shape, dtype and strides of the result."""
    return _heads(x, x.shape[-1], layout)


def _heads(x: Tensor, D: Any, layout: str) -> Tensor:
    """Uninitialised [B, H, S, D] for x [B, H, S, ...]."""
    B, H, S, _ = x.shape
    return empty_output(x, D, layout) if layout == "token" else x.new_empty((B, S, H, D)).transpose(1, 2)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tiles: Tensor | None, scale: float, causal: bool, layout: str, kernel: str
) -> Tensor:
    """G divides H: heads of q share those of k and v, neighbours first.

    `mask` [(B or 1, H or 1,) S or 1, Sk] is added to the scores; `tiles` is its `mask_tiles`, if the layout is "token". `causal`, without a
    mask: query i sees keys 0 to i. A query that may see no key gets 0, as in torch. Keys that a whole tile hides count for nothing even
    where they are NaN.
    """
    fn: Any = KERNELS.get(kernel)
    if fn is not None:
        return fn(q, k, v, mask, tiles, scale)
    bias = None if mask is None else mask.to(q.dtype)
    y = F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return _heads(q, v.shape[-1], layout).copy_(y)


def attention_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tiles: Tensor | None, scale: float, causal: bool, layout: str, kernel: str
) -> Tensor:
    """Shape, dtype and strides of the result."""
    return _heads(q, v.shape[-1], layout)


def tokens(x: Tensor, kernel: str) -> Tensor:
    """The same values."""
    fn: Any = KERNELS.get(kernel)
    return fn(x) if fn is not None else empty_output(x, x.shape[-1], "token").copy_(x)


def tokens_fake(x: Tensor, kernel: str) -> Tensor:
    """Shape, dtype and strides of the result."""
    return empty_output(x, x.shape[-1], "token")


def mask_tiles(mask: Tensor, kernel: str) -> Tensor:
    """HIDDEN, OPEN or MIXED, in float32. A mask of one row speaks for all queries."""
    fn: Any = KERNELS.get(kernel)
    if fn is not None:
        return fn(mask)
    pad = (0, -mask.shape[-1] % TILE, 0, -mask.shape[-2] % TILE)

    def everywhere(fits: Tensor) -> Tensor:
        return F.pad(fits, pad, value=True).unflatten(-1, (-1, TILE)).unflatten(-3, (-1, TILE)).all(-1).all(-2)

    found = torch.full_like(mask_tiles_fake(mask, kernel), MIXED)
    return found.masked_fill_(everywhere(mask == 0), OPEN).masked_fill_(everywhere(mask == -torch.inf), HIDDEN)


def mask_tiles_fake(mask: Tensor, kernel: str) -> Tensor:
    """Shape, dtype and strides of the result."""
    S, Sk = mask.shape[-2:]
    return mask.new_empty((*mask.shape[:-2], (S + TILE - 1) // TILE, (Sk + TILE - 1) // TILE), dtype=torch.float32)


def append(cache: Tensor, x: Tensor, kernel: str) -> Tensor:
    """Contiguous."""
    fn: Any = KERNELS.get(kernel)
    return fn(cache, x) if fn is not None else torch.cat([cache, x], -2).contiguous()


def append_fake(cache: Tensor, x: Tensor, kernel: str) -> Tensor:
    """Shape, dtype and strides of the result."""
    B, G, past, D = cache.shape
    return cache.new_empty((B, G, past + x.shape[-2], D))


def define(name: str, arguments: str, meaning: Any, fake: Any) -> Any:
    """A further op of the dialect; its last argument is the kernel."""
    LIBRARY.define(f"{name}({arguments}, str kernel) -> Tensor", tags=TAGS)
    LIBRARY.impl(name, meaning, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsecc::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.sparsecc, name).default


NORM = define("norm", "Tensor x, Tensor weight, Tensor? bias, float eps, str kind, str layout", norm, norm_fake)
GATE = define("gate", "Tensor a, Tensor b, str activation, str layout", gate, gate_fake)
ROTARY = define("rotary", "Tensor x, Tensor cos, Tensor sin, str layout", rotary, rotary_fake)
ATTENTION = define(
    "attention",
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? tiles, float scale, bool causal, str layout",
    attention,
    attention_fake,
)
TOKENS = define("tokens", "Tensor x", tokens, tokens_fake)
MASK_TILES = define("mask_tiles", "Tensor mask", mask_tiles, mask_tiles_fake)
APPEND = define("append", "Tensor cache, Tensor x", append, append_fake)
"""The overloads that stand in graphs."""

MEANINGS: dict[Any, Any] = {
    NORM: norm, GATE: gate, ROTARY: rotary, ATTENTION: attention, TOKENS: tokens, MASK_TILES: mask_tiles, APPEND: append,
}  # fmt: skip
"""What to call without the dispatcher."""

DIALECT = (LINEAR, *MEANINGS)
"""Ops that kernels run; the kernel's key is their last argument."""


def layout_of(target: Any, args: Any) -> str:
    """How the result of a dialect op lies."""
    at = {LINEAR: 6, NORM: 5, GATE: 3, ROTARY: 3, ATTENTION: 7}.get(target)
    return str(args[at]) if at is not None else "row" if target in (MASK_TILES, APPEND) else "token"


def check_mask(mask: Tensor, S: int, Sk: int) -> None:
    """Raise ShapeError unless the mask fits S queries and Sk keys."""
    if mask.ndim < 2 or mask.shape[-1] != Sk or mask.shape[-2] not in (1, S):
        raise ShapeError(f"attention: the mask is {list(mask.shape)}, wanted queries (or 1) x keys {[S, Sk]} last")
