"""Routing tokens at run time: ops that score tokens, and that move as many of them as the scores say.

    received(q, k, mask, count, ...)      the attention that each token receives from the last one   [B, H, S, D] -> f32[B, S]
    route(importance, mask, ...)          FTP's learned router on four numbers per token             f32[B, S] -> f32[B, S]
    token_gate(h, weight, like)           the router of mixture-of-depths                            [B, S, D] -> f32[B, S]
    eligible(p, mask, first, end)         scores of tokens of which only some compete                f32[B, S] -> f32[B, S]
    keep(scores, policy, seen, ...)       kept tokens, as many as the scores say                     f32[B, S] -> i32[B, K], i32[B]
    gather_kept(x, idx, dims)             their rows
    hide_keys(mask, idx)                  the mask of an attention among them
    scatter_kept(x, idx, y)               x with their rows replaced

Scores of tokens are probabilities or anything else that is finite; +inf stands for a token that is kept whatever the policy says, -inf for
padding, which no policy keeps. Rows of a batch may keep different numbers of tokens: `idx` has the largest of them, rounded up to whole
vectors of tokens, and -1 behind the last token of each row. The first token is computed once more there, for nothing: nobody sees it as a
key, and the result is dropped. `kernel` is a key of `KERNELS`, as in `sparsecc::linear`; without one the dense meaning runs.
"""
from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.errors import SelectionError
from sparsecc.ir.ops import KERNELS, LIBRARY, TOKEN_TILE
from sparsecc.ir.policy import Policy, parse_policy
from sparsecc.ir.skip_ops import diagonal, gather_tokens, gather_tokens_fake
from sparsecc.ir.token_ops import TAGS


class Seen:
    """Tokens kept so far, and out of how many."""

    def __init__(self) -> None:
        self.active, self.of = 0, 0

    @property
    def kept(self) -> float | None:
        """None before the first call."""
        return self.active / self.of if self.of else None


SEEN: WeakValueDictionary[str, Seen] = WeakValueDictionary()
"""Counters by the text that `keep` names them by. They live as long as an explanation holds them."""


def real_tokens(mask: Tensor | None, B: int, S: int, device: torch.device) -> Tensor:
    """bool[B, S]: tokens that are no padding, which a mask bool or float [..., S or 1, S] hides from themselves."""
    if mask is None:
        return torch.ones(B, S, dtype=torch.bool, device=device)
    mask = mask.view(*[1] * (4 - mask.ndim), *mask.shape)
    own = (mask[..., 0, :] if mask.shape[-2] == 1 and S > 1 else diagonal(mask))[:, 0]
    return (own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2).expand(B, S)


def received(q: Tensor, k: Tensor, mask: Tensor | None, count: Tensor | None, scale: float | None, kernel: str = "") -> Tensor:
    """softmax(scale * q_last k^T + mask), averaged over heads: f32[B, S], 0 for padding; one row of an attention.

    q [B, H, S, D], k [B, G, S, D] with H a multiple of G; the last token is the last real one: not hidden from itself by the mask
    [B or 1, H or 1, S or 1, S], and among the first `count` i32[B]. Causal attention hides nothing from it.
    """
    fn: Any = KERNELS.get(kernel)
    if fn is not None:
        return fn(q, k, mask, count, scale)
    B, H, S, D = q.shape
    G = k.shape[1]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    wide = k.to(compute).transpose(-1, -2)
    factor = D**-0.5 if scale is None else scale
    if mask is None and count is None:
        one = q[:, :, -1:].to(compute).reshape(B, G, H // G, D)
        return ((one @ wide).view(B, H, S) * factor).softmax(-1).mean(1).float()
    real = real_tokens(mask, B, S, q.device)
    if count is not None:
        real = real & (torch.arange(S, device=q.device) < count[:, None])
    last = (S - 1 - real.flip(-1).int().argmax(-1)).view(B, 1, 1, 1)
    one = q.gather(2, last.expand(B, H, 1, D)).to(compute).reshape(B, G, H // G, D)
    logits = (one @ wide).view(B, H, S) * factor
    if mask is not None:
        mask = mask.view(*[1] * (4 - mask.ndim), *mask.shape)
        row = mask[:, :, 0]
        if mask.shape[-2] > 1:
            row = mask.expand(B, *mask.shape[1:]).gather(2, last.expand(B, mask.shape[1], 1, S))[:, :, 0]
        logits = logits.masked_fill(~row, -torch.inf) if row.dtype == torch.bool else logits + row
    share = logits.masked_fill(~real[:, None], -torch.inf).softmax(-1).mean(1)
    return torch.where(real, share, 0.0).float()


def received_fake(q: Tensor, k: Tensor, mask: Tensor | None, count: Tensor | None, scale: float | None, kernel: str) -> Tensor:
    """Shape and dtype of the result."""
    return q.new_empty((q.shape[0], q.shape[2]), dtype=torch.float32)


def features(importance: Tensor, real: Tensor, required: float) -> Tensor:
    """f32[B, S, 4], what FTP's router sees of a token: its place and its rank by importance f32[B, S], both over the number of real tokens
    (of equal ones the first ranks higher), the importance itself, and the fraction that the block is to skip."""
    place, rivals = real.cumsum(-1), torch.where(real, importance, -torch.inf)
    order = rivals.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    number = place[:, -1:].clamp_min(1)
    return torch.stack([(place - 1) / number, importance, rank / number, torch.full_like(importance, required)], -1)


def logits(x: Tensor, weights: list[Tensor]) -> Tensor:
    """[..., 1 or 2] of features [..., 4]: fc2(relu(fc1 x)), `weights` fc1 [64, 4], its bias, fc2 [1 or 2, 64], its bias."""
    return F.linear(F.relu(F.linear(x, weights[0], weights[1])), weights[2], weights[3])


def probability(y: Tensor) -> Tensor:
    """[...] that a token is kept, of one logit or of two [..., 1 or 2], the second of which is for keeping."""
    return y[..., 0].sigmoid() if y.shape[-1] == 1 else y.softmax(-1)[..., 1]


def route(importance: Tensor, mask: Tensor | None, required: float, weights: list[Tensor], kernel: str = "") -> Tensor:
    """Scores f32[B, S] of FTP's learned router. The first and the last real token are kept in any case."""
    fn: Any = KERNELS.get(kernel)
    if fn is not None:
        return fn(importance, mask, required, weights)
    real = real_tokens(mask, *importance.shape, importance.device)  # type: ignore[call-arg]
    place = real.cumsum(-1)
    number = place[:, -1:]
    p = probability(logits(features(importance, real, required), weights))
    p = torch.where((place == 1) | (place == number), torch.inf, p)
    return torch.where(real, p, -torch.inf)


def route_fake(importance: Tensor, mask: Tensor | None, required: float, weights: list[Tensor], kernel: str) -> Tensor:
    """Shape and dtype of the result."""
    return torch.empty_like(importance)


def token_gate(h: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """p f32[B, S] of h [B, S, D] or [B * S, D]: softmax(weight h)[1] for a weight [2, D], sigmoid(weight h) for [1, D].

    `like` [B, S, D] has the shape."""
    return probability(F.linear(h, weight.to(h.dtype)).float()).reshape(like.shape[0], like.shape[1]).contiguous()


def token_gate_fake(h: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """Shape and dtype of the result."""
    return h.new_empty(like.shape[:2], dtype=torch.float32)


def eligible(p: Tensor, mask: Tensor | None, first: int | None, end: int | None) -> Tensor:
    """Scores f32[B, S]: p where a token competes, which those of the slice [first:end] of a row's tokens do, +inf for the others, -inf for
    padding."""
    real = real_tokens(mask, *p.shape, p.device)  # type: ignore[call-arg]
    if first is not None or end is not None:
        place, number = real.cumsum(-1) - 1, real.sum(-1, keepdim=True)
        low, high = (_bound(number, v, default) for v, default in ((first, 0), (end, p.shape[1])))
        p = torch.where((place < low) | (place >= high), torch.inf, p)
    return torch.where(real, p, -torch.inf)


def _bound(number: Tensor, at: int | None, default: int) -> Tensor:
    """The end of a slice of as many tokens as each row has, [B, 1]."""
    at = default if at is None else at
    return torch.full_like(number, at) if at >= 0 else (number + at).clamp_min(0)


def eligible_fake(p: Tensor, mask: Tensor | None, first: int | None, end: int | None) -> Tensor:
    """Shape and dtype of the result."""
    return torch.empty_like(p)


def kept(scores: Tensor, rule: Policy) -> Tensor:
    """bool[B, S]: +inf always, -inf never, the others as the policy has it among them, row by row."""
    if rule.name in ("threshold", "atleast"):
        return rule.mask(scores)
    if rule.fixed:
        best = scores.sort(dim=-1, descending=True, stable=True).indices
        numbers = [rule.size(n) for n in scores.isfinite().sum(-1).tolist()]
        count = (scores == torch.inf).sum(-1) + torch.tensor(numbers, device=scores.device)
        first = torch.arange(scores.shape[1], device=scores.device) < count.unsqueeze(-1)
        return torch.empty_like(first).scatter_(-1, best, first)
    mask = scores == torch.inf
    finite = scores.isfinite()
    for row, some, found in zip(scores, finite, mask, strict=True):
        if bool(some.any()):
            found[some] = rule.mask(row[some])
    return mask


def keep(scores: Tensor, policy: str, seen: str, kernel: str = "") -> tuple[Tensor, Tensor]:
    """(idx i32[B, K], count i32[B]): the kept tokens of each row in ascending order and their number, which the host reads back.

    A row may keep none. Raises SelectionError where a score is NaN.
    """
    fn: Any = KERNELS.get(kernel)
    idx, count, real, bad = (fn or listed)(scores, policy)
    if bad is not None:
        raise SelectionError(f"keep {policy}: the score of token {bad[1]} of sequence {bad[0]} is NaN, by which nothing can be selected")
    numbers = count.tolist()
    counter = SEEN.get(seen)
    if counter is not None:
        counter.active += sum(numbers)
        counter.of += real
    size = min(scores.shape[1], -(-max(1, *numbers) // TOKEN_TILE) * TOKEN_TILE)
    return idx[:, :size].contiguous(), count


def listed(scores: Tensor, policy: str) -> tuple[Tensor, Tensor, int, list[int] | None]:
    """(the kept tokens of each row i32[B, S] with -1 behind them, how many they are i32[B], how many tokens are no padding, where a NaN
    is)."""
    nan = scores.isnan()
    bad = nan.nonzero()[0].tolist() if bool(nan.any()) else None
    if bad is not None:
        return scores.int(), scores.int(), 0, bad
    S = scores.shape[1]
    mask = kept(scores, parse_policy(policy))
    at = torch.where(mask, torch.arange(S, device=scores.device), S).sort(-1).values
    return torch.where(at < S, at, -1).int(), mask.sum(-1, dtype=torch.int32), int((scores > -torch.inf).sum()), None


def keep_fake(scores: Tensor, policy: str, seen: str, kernel: str) -> tuple[Tensor, Tensor]:
    """Shapes: the number of columns is known at run time only."""
    size = torch.library.get_ctx().new_dynamic_size(min=1)
    return scores.new_empty((scores.shape[0], size), dtype=torch.int32), scores.new_empty(scores.shape[:1], dtype=torch.int32)


def gather_kept(x: Tensor, idx: Tensor, dims: list[int]) -> Tensor:
    """As `gather_tokens`; the first token's entries where idx is -1."""
    return gather_tokens(x, idx.clamp_min(0), dims)


def hide_keys(mask: Tensor | None, idx: Tensor) -> Tensor:
    """The mask bool or float [B or 1, 1 or H, K or 1, K], or none, with keys hidden where idx i32[B, K] is -1."""
    shown = (idx >= 0)[:, None, None]
    if mask is None:
        return shown
    return mask & shown if mask.dtype == torch.bool else mask.masked_fill(~shown, -torch.inf)


def hide_keys_fake(mask: Tensor | None, idx: Tensor) -> Tensor:
    """Shape and dtype of the result."""
    if mask is None:
        return idx.new_empty((idx.shape[0], 1, 1, idx.shape[1]), dtype=torch.bool)
    return mask.new_empty((idx.shape[0], *mask.shape[1:]))


def scatter_kept(x: Tensor, idx: Tensor, y: Tensor) -> Tensor:
    """x [B, S] or [B, S, D] with row idx[b, k] of each sequence replaced by y[b, k], where idx isn't -1."""
    out = x.clone(memory_format=torch.contiguous_format)
    batch, at = (idx >= 0).nonzero(as_tuple=True)
    if len(x) == 1:
        return out.index_copy_(1, idx[0, : len(at)].long(), y[:, : len(at)].to(x.dtype))
    out[batch, idx[batch, at].long()] = y[batch, at].to(x.dtype)
    return out


def scatter_kept_fake(x: Tensor, idx: Tensor, y: Tensor) -> Tensor:
    """Shape and dtype of the result."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _define(name: str, schema: str, meaning: Any, fake: Any) -> Any:
    LIBRARY.define(f"{name}{schema}", tags=TAGS)
    LIBRARY.impl(name, meaning, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsecc::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.sparsecc, name).default


RECEIVED = _define(
    "received", "(Tensor q, Tensor k, Tensor? mask, Tensor? count, float? scale, str kernel) -> Tensor", received, received_fake)
ROUTE = _define("route", "(Tensor importance, Tensor? mask, float required, Tensor[] weights, str kernel) -> Tensor", route, route_fake)
TOKEN_GATE = _define("token_gate", "(Tensor h, Tensor weight, Tensor like) -> Tensor", token_gate, token_gate_fake)
ELIGIBLE = _define("eligible", "(Tensor p, Tensor? mask, int? first, int? end) -> Tensor", eligible, eligible_fake)
KEEP = _define("keep", "(Tensor scores, str policy, str seen, str kernel) -> (Tensor, Tensor)", keep, keep_fake)
GATHER_KEPT = _define("gather_kept", "(Tensor x, Tensor idx, int[] dims) -> Tensor", gather_kept, gather_tokens_fake)
HIDE_KEYS = _define("hide_keys", "(Tensor? mask, Tensor idx) -> Tensor", hide_keys, hide_keys_fake)
SCATTER_KEPT = _define("scatter_kept", "(Tensor x, Tensor idx, Tensor y) -> Tensor", scatter_kept, scatter_kept_fake)
"""The overloads that stand in graphs."""
