"""Blocks that a token after a prompt may go past: ops that decide, and that join both ways.

    own_share(q, k, mask, scale)          what a token's attention pays the token itself    [B, H, 1, D] -> f32[B, 2]
    route_token(share, place, ...)        FTP's learned router on one token                 f32[B, 2], i64[B, 1] -> f32[B, 1]
    goes(scores, policy)                  which rows go through a block                     f32[B, 1] -> bool[B]
    through(x, goes, y)                   y of rows that do, x of the others
    held(past, longer, goes)              the block's keys or values afterwards             [B, G, n (+ 1), D]
    held_shown(shown, goes)               which of them are tokens of the row               bool[B, n + 1] -> bool[B, n (+ 1)]

What only `through` and `held` read is computed where any row goes through, and not at all where none does (`runtime/conditional.py`). Then
`y` and `longer` are None.
"""
from __future__ import annotations

import torch
from torch import Tensor

from sparsecc.errors import SelectionError
from sparsecc.ir.policy import parse_policy
from sparsecc.ir.route_ops import logits, probability
from sparsecc.ir.skip_ops import _define


def own_share(q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Of one token's attention softmax(scale * q k^T + mask), averaged over heads: what the last key, its own, gets, and how many others
    get as much or more. q [B, H, 1, D], k [B, G, n, D] with H a multiple of G, mask bool [B or 1, 1, 1, n or 1]."""
    B, H, _, D = q.shape
    G, n = k.shape[1:3]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q.to(compute).reshape(B, G, H // G, D) @ k.to(compute).transpose(-1, -2)).view(B, H, n)
    scores = scores * (D**-0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, 0], -torch.inf)
    paid = scores.softmax(-1).mean(1)
    paid = paid if mask is None else paid.masked_fill(~mask[:, 0, 0], -1.0)
    own = paid[:, -1:]
    return torch.cat([own, (paid[:, :-1] >= own).sum(-1, keepdim=True)], -1).float()


def own_share_fake(q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Shape and dtype of the result."""
    return q.new_empty((q.shape[0], 2), dtype=torch.float32)


def route_token(share: Tensor, place: Tensor, required: float, weights: list[Tensor]) -> Tensor:
    """p f32[B, 1] by FTP's learned router on what it sees of tokens at the places i64[B, 1]; `share` as of `own_share`."""
    number = place + 1
    seen = torch.cat([place / number, share[:, :1], share[:, 1:] / number, torch.full_like(share[:, :1], required)], -1)
    return probability(logits(seen, weights))[:, None]


def route_token_fake(share: Tensor, place: Tensor, required: float, weights: list[Tensor]) -> Tensor:
    """Shape and dtype of the result."""
    return share.new_empty((share.shape[0], 1))


def goes(scores: Tensor, policy: str) -> Tensor:
    """bool[B]: the rows whose score a threshold keeps. Raises SelectionError where one is NaN."""
    if bool(scores.isnan().any()):
        row = int(scores.isnan().nonzero()[0, 0])
        raise SelectionError(f"goes {policy}: the score of the token of row {row} is NaN, by which nothing can be decided")
    return parse_policy(policy).mask(scores)[:, 0]


def goes_fake(scores: Tensor, policy: str) -> Tensor:
    """Shape and dtype of the result."""
    return scores.new_empty(scores.shape[:1], dtype=torch.bool)


def through(x: Tensor, goes: Tensor, y: Tensor | None) -> Tensor:
    """[B, ...]: y where a row goes through, x elsewhere."""
    if y is None:
        return x.clone()
    return torch.where(goes.view(-1, *[1] * (x.ndim - 1)), y.to(x.dtype), x)


def through_fake(x: Tensor, goes: Tensor, y: Tensor | None) -> Tensor:
    """Shape and dtype of the result."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def held(past: Tensor, longer: Tensor | None, goes: Tensor) -> Tensor:
    """`longer`, whose last column stands for nothing in rows that went past the block; `past` where all rows did."""
    return (longer if longer is not None and bool(goes.any()) else past).clone()


def held_fake(past: Tensor, longer: Tensor | None, goes: Tensor) -> Tensor:
    """A size of its own."""
    return past.new_empty((*past.shape[:2], torch.library.get_ctx().new_dynamic_size(min=0), past.shape[3]))


def held_shown(shown: Tensor, goes: Tensor) -> Tensor:
    """Which of what `held` gives are tokens, of bool[B, n + 1] for `longer` if every row went through."""
    return torch.cat([shown[:, :-1], (shown[:, -1] & goes)[:, None]], 1) if bool(goes.any()) else shown[:, :-1].clone()


def held_shown_fake(shown: Tensor, goes: Tensor) -> Tensor:
    """A size of its own."""
    return shown.new_empty((shown.shape[0], torch.library.get_ctx().new_dynamic_size(min=0)))


OWN_SHARE = _define("own_share", "(Tensor q, Tensor k, Tensor? mask, float? scale) -> Tensor", own_share, own_share_fake)
ROUTE_TOKEN = _define(
    "route_token", "(Tensor share, Tensor place, float required, Tensor[] weights) -> Tensor", route_token, route_token_fake)
GOES = _define("goes", "(Tensor scores, str policy) -> Tensor", goes, goes_fake)
THROUGH = _define("through", "(Tensor x, Tensor goes, Tensor? y) -> Tensor", through, through_fake)
HELD = _define("held", "(Tensor past, Tensor? longer, Tensor goes) -> Tensor", held, held_fake)
HELD_SHOWN = _define("held_shown", "(Tensor shown, Tensor goes) -> Tensor", held_shown, held_shown_fake)
"""The overloads that stand in graphs."""
