"""Keys and values of blocks that skip tokens: ops on what goes into a KV cache.

    earlier(idx, x)                       the keys of all tokens that kept ones see        i32[B, K] -> bool[B, 1, K, S]
    trim_keys(x, idx)                     keys without columns that stand for nothing      [B, G, K, D] -> [B, G, n, D]
    shown_keys(x, idx)                    which of a cache's keys are tokens               [B, G, n, D] -> bool[B, n]
    numbered(idx, mask)                   places of each row's first tokens                i32[B, K] -> i32[B, K]
"""
from __future__ import annotations

import torch
from torch import Tensor

from sparsecc.ir.route_ops import real_tokens
from sparsecc.ir.skip_ops import _define


def earlier(idx: Tensor, x: Tensor) -> Tensor:
    """bool[B, 1, K, S]: which tokens of x [B, S, ...] causal queries idx i32[B, K] see, those up to them."""
    return idx.clamp_min(0)[:, None, :, None] >= torch.arange(x.shape[1], device=x.device)


def earlier_fake(idx: Tensor, x: Tensor) -> Tensor:
    """Shape and dtype of the result."""
    return idx.new_empty((idx.shape[0], 1, idx.shape[1], x.shape[1]), dtype=torch.bool)


def trim_keys(x: Tensor, idx: Tensor) -> Tensor:
    """x [B, G, K, D] without the columns for which idx i32[B, K] is -1 in all rows, which may be all of them."""
    return x[:, :, : int((idx >= 0).sum(-1).max())].clone(memory_format=torch.contiguous_format)


def trim_keys_fake(x: Tensor, idx: Tensor) -> Tensor:
    """A size of its own."""
    return x.new_empty((*x.shape[:2], torch.library.get_ctx().new_dynamic_size(min=0), x.shape[3]))


def shown_keys(x: Tensor, idx: Tensor) -> Tensor:
    """bool[B, n] for keys x [B, G, n, D] of the tokens idx i32[B, K >= n], -1 where there is none; or of those that bool[B, K] says."""
    idx = idx[:, : x.shape[2]]
    return idx.clone() if idx.dtype == torch.bool else idx >= 0


def shown_keys_fake(x: Tensor, idx: Tensor) -> Tensor:
    """Shape and dtype of the result."""
    return idx.new_empty((x.shape[0], x.shape[2]), dtype=torch.bool)


def numbered(idx: Tensor, mask: Tensor) -> Tensor:
    """i32[B, K], places of the first K tokens of each row that the mask [B or 1, 1 or H, S, S] does not hide, then of padding: where
    tokens idx i32[B, K] would stand if they were all that there are."""
    real = real_tokens(mask, idx.shape[0], mask.shape[-1], idx.device)
    return (~real).to(torch.uint8).sort(dim=-1, stable=True).indices[:, : idx.shape[1]].int()


def numbered_fake(idx: Tensor, mask: Tensor) -> Tensor:
    """Shape and dtype of the result."""
    return torch.empty_like(idx)


EARLIER = _define("earlier", "(Tensor idx, Tensor x) -> Tensor", earlier, earlier_fake)
TRIM = _define("trim_keys", "(Tensor x, Tensor idx) -> Tensor", trim_keys, trim_keys_fake)
SHOWN = _define("shown_keys", "(Tensor x, Tensor idx) -> Tensor", shown_keys, shown_keys_fake)
NUMBERED = _define("numbered", "(Tensor idx, Tensor mask) -> Tensor", numbered, numbered_fake)
"""The overloads that stand in graphs."""
