"""What stands between linears in the dialect, so that values stay token-minor from one linear to the next: `sparsecc::norm`,
`sparsecc::attention`, and `sparsecc::key_mask`, which prepares a mask once for all layers.

    norm(x, weight, bias)       layer norm or RMS norm over the last dimension     x [..., N] -> [..., N]
    attention(q, k, v, mask)    softmax(scale * q k^T + mask^T) v                  q [B, H, S, D], k and v [B, G, Sk, D] -> [B, H, S, D]
    key_mask(mask)              what is added to the scores, keys first            f32[(B, H,) S, Sk] -> f32[B or 1, H or 1, Sk, S]

`kernel` is a key of `KERNELS`, as in `sparsecc::linear`; without one the dense meaning runs.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.ir.ops import KERNELS, LIBRARY, LINEAR, empty_output, token_row

TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str, layout: str, kernel: str) -> Tensor:
    """y = (x - mean) / sqrt(variance + eps) * weight + bias; kind "rms" subtracts no mean and adds no bias."""
    fn: Any = KERNELS.get(kernel)
    if fn is not None:
        return fn(x, weight, bias, eps)
    y = F.layer_norm(x, weight.shape, weight, bias, eps) if kind == "layer" else F.rms_norm(x, weight.shape, weight, eps)
    return empty_output(x, x.shape[-1], layout).copy_(y)


def norm_fake(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str, layout: str, kernel: str) -> Tensor:
    """Shape, dtype and strides of the result."""
    return empty_output(x, x.shape[-1], layout)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, kernel: str) -> Tensor:
    """The result is token-minor. `mask` comes from `key_mask`. A query whose every key is masked by -inf gets 0, as in torch."""
    fn: Any = KERNELS.get(kernel)
    if fn is not None:
        return fn(q, k, v, mask, scale)
    bias = None if mask is None else mask.transpose(-1, -2).to(q.dtype)
    y = F.scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return empty_output(q, v.shape[-1], "token").copy_(y)


def attention_fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, kernel: str) -> Tensor:
    """Shape, dtype and strides of the result."""
    return empty_output(q, v.shape[-1], "token")


def key_mask(mask: Tensor, kernel: str) -> Tensor:
    """The same values; a broadcast batch or head is stored once."""
    mask = _once(mask)
    fn: Any = KERNELS.get(kernel)
    return fn(mask) if fn is not None else _empty_mask(mask).copy_(mask.transpose(-1, -2))


def key_mask_fake(mask: Tensor, kernel: str) -> Tensor:
    """Shape, dtype and strides of the result."""
    return _empty_mask(_once(mask))


def _once(mask: Tensor) -> Tensor:
    mask = mask[(None,) * (4 - mask.ndim)]
    for dim in (0, 1):
        mask = mask.narrow(dim, 0, 1) if mask.stride(dim) == 0 else mask
    return mask


def _empty_mask(mask: Tensor) -> Tensor:
    B, H, S, Sk = mask.shape
    return mask.new_empty((B, H, Sk, token_row(S)), dtype=torch.float32)[..., :S]


LIBRARY.define("norm(Tensor x, Tensor weight, Tensor? bias, float eps, str kind, str layout, str kernel) -> Tensor", tags=TAGS)
LIBRARY.define("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, str kernel) -> Tensor", tags=TAGS)
LIBRARY.define("key_mask(Tensor mask, str kernel) -> Tensor", tags=TAGS)
for _name, _meaning, _fake in (("norm", norm, norm_fake), ("attention", attention, attention_fake), ("key_mask", key_mask, key_mask_fake)):
    LIBRARY.impl(_name, _meaning, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsecc::{_name}", _fake, lib=LIBRARY)

NORM = torch.ops.sparsecc.norm.default
ATTENTION = torch.ops.sparsecc.attention.default
KEY_MASK = torch.ops.sparsecc.key_mask.default
"""The overloads that stand in graphs."""

DIALECT = (LINEAR, NORM, ATTENTION, KEY_MASK)
"""Ops that kernels run; the kernel's key is their last argument."""
