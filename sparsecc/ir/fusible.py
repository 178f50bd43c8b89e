"""Ops that Inductor takes apart: what moves tokens is pointwise arithmetic on indices, which fuses with what stands around it.

    gather_tokens(x, idx), then a norm             one loop that reads the kept rows of x and writes them normed
    gather_tokens(mask, idx, [2, 3])               the mask's own arithmetic, for the kept rows and columns alone
    down(h) + x, then scatter_tokens               one loop that adds, and writes every row of the result once
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsecc.ir import cache_ops, route_ops, skip_ops


def scattered(x: Tensor, idx: Tensor, y: Tensor) -> Tensor:
    """`scatter_tokens` and `scatter_kept`, read the other way round: every row of x [B, S] or [B, S, D] looks for itself in idx i32[B, K],
    where -1 stands for nothing."""
    (B, S), K = x.shape[:2], idx.shape[1]
    numbers = torch.arange(K, device=x.device).expand(idx.shape[0], K)
    place = numbers.new_full((idx.shape[0], S + 1), -1).scatter(1, torch.where(idx < 0, S, idx).long(), numbers)[:, :S].expand(B, S)
    found = place.clamp_min(0)
    if x.ndim == 2:
        return torch.where(place >= 0, y.gather(1, found).to(x.dtype), x)
    taken = y.gather(1, found.unsqueeze(-1).expand(B, S, x.shape[2])).to(x.dtype)
    return torch.where((place >= 0).unsqueeze(-1), taken, x)


FUSIBLE: dict[Any, Any] = {
    skip_ops.GATHER: skip_ops.gather_tokens, skip_ops.SCATTER: scattered, skip_ops.RECENCY: skip_ops.recency,
    route_ops.GATHER_KEPT: route_ops.gather_kept, route_ops.SCATTER_KEPT: scattered, route_ops.HIDE_KEYS: route_ops.hide_keys,
    route_ops.TOKEN_GATE: route_ops.token_gate, route_ops.ELIGIBLE: route_ops.eligible,
    cache_ops.EARLIER: cache_ops.earlier,
}  # fmt: skip
"""Their meanings, as Inductor sees them."""
