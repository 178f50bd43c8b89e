"""Skipping at run time: ops that select, run a feed-forward block on the neurons that are active, and move tokens.

    select(scores, policy)                which entries of each row are kept       [..., n] -> i32[..., cap], i32[...]
    neurons(x, gate, up, down, ...)       a feed-forward block on active neurons   [..., D] -> [..., D]
                                          or, without a gate, a linear on active inputs
    request_neurons(x, ..., kept, ...)    the same on neurons that the prompt chose, which stand in `kept`
    recency(x, mask)                      scores: the first token, then the latest [B, S, D] -> i64[B, S]
    gather_tokens(x, idx, dims)           rows of kept tokens                      [B or 1, ..., S, ...] -> [B, ..., K, ...]
    scatter_tokens(x, idx, y)             x with those rows replaced               [B, S, D], [B, K, D] -> [B, S, D]

A token-conditional block is what stands between a gather and a scatter: ordinary ops on fewer rows, of which every pass and kernel takes
its part. Indices are sorted. `kernel` is a key of `KERNELS`, as in `sparsecc::linear`; without one the dense meaning runs.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.errors import SelectionError, ShapeError
from sparsecc.ir.ops import ACTIVATIONS, KERNELS, LIBRARY
from sparsecc.ir.policy import cut, parse_policy, ratio_of
from sparsecc.ir.token_ops import TAGS


def select(scores: Tensor, policy: str) -> tuple[Tensor, Tensor]:
    """(idx, count): the kept indices of each row in ascending order, -1 behind the last, and how many they are.

    cap is what the policy always keeps, or n where that depends on the scores. Raises SelectionError where a score is NaN.
    """
    rule, n = parse_policy(policy), scores.shape[-1]
    if scores.is_floating_point() and bool(scores.isnan().any()):
        bad = scores.isnan().nonzero()[0].tolist()
        raise SelectionError(f"select {policy}: the score at {bad} is NaN, by which nothing can be selected")
    mask = rule.mask(scores)
    count = mask.sum(-1, dtype=torch.int32)
    cap = rule.size(n)
    cap = n if cap is None else cap
    at = torch.arange(n, device=scores.device).expand_as(mask)
    idx = torch.where(mask, at, n).sort(-1).values[..., :cap]
    return torch.where(idx < n, idx, -1).int(), count


def select_fake(scores: Tensor, policy: str) -> tuple[Tensor, Tensor]:
    """Shapes; the number that a ratio keeps follows the row's symbolic length."""
    rule, n = parse_policy(policy), scores.shape[-1]
    cap: Any = n
    if rule.name == "topk":
        cap = torch.sym_min(n, int(rule.value or 0))
    elif rule.name == "ratio":
        num, den = ratio_of(float(rule.value or 0))
        cap = (n * num + den - 1) // den
    idx = scores.new_empty((*scores.shape[:-1], cap), dtype=torch.int32)
    return idx, scores.new_empty(scores.shape[:-1], dtype=torch.int32)


def active(pre: Tensor, activation: str, policy: str, level: Tensor | None) -> Tensor:
    """a [..., F]: the activation of a row, zero where the policy drops the neuron. NaN is kept, so that it shows in the result.

    Top-k and thresholds rank |a|. `stat` is soft: act(max(pre - theta, 0)), theta from the row before the activation. `level` [F] or [1]
    takes the place of a threshold's number.
    """
    rule = parse_policy(policy)
    if rule.name == "stat":
        return ACTIVATIONS[activation].fn(F.relu(pre - cut(pre, float(rule.value or 0)).unsqueeze(-1)))
    a = ACTIVATIONS[activation].fn(pre)
    size = a.abs()
    if level is not None:
        drop = size <= level if rule.name == "threshold" else size < level
    else:
        drop = ~rule.mask(torch.where(size.isnan(), torch.inf, size))
    return a.masked_fill(drop & ~a.isnan(), 0)


def neurons(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], level: Tensor | None,
    storage: str, activation: str, select: str, kernel: str,
) -> Tensor:
    """y = down (active(gate x + b) * (up x + b)) + b, or without up, or y = down active(x) + b: a linear on its active inputs alone.

    x [..., D], or [..., F] without a gate. `storage` "rows": weights are (gate [F, D], (up [F, D],)) down [D, F], biases one for each or
    None. "bundle": (gate [F, D] and) [F, rows, D] with a neuron's row of up, if there is one, and column of down, perhaps the two
    tensors of a sketch (`runtime/neurons`), which changes no value; biases as before.
    """
    fn: Any = KERNELS.get(kernel)
    if fn is not None:
        return fn(x, weights, biases, level)
    return masked_dense(x, weights, biases, level, storage, activation, select)


def masked_dense(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], level: Tensor | None, storage: str, activation: str, select: str
) -> Tensor:
    """The dense meaning, in float32 (float64 for float64 inputs), rounded to x's dtype at the end."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    gate, up, down = (None if t is None else t.to(compute) for t in unbundle(weights, storage))
    bias = [None if b is None else b.to(compute) for b in biases]
    assert down is not None
    wide = x.to(compute)
    a = active(wide if gate is None else F.linear(wide, gate, bias[0]), activation, select, level)
    if up is not None:
        a = a * F.linear(wide, up, bias[1])
    return F.linear(a, down, bias[-1]).to(x.dtype)


def unbundle(weights: Sequence[Tensor], storage: str) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(gate [F, D] or None, up [F, D] or None, down [D, F]), as views."""
    gate = weights[0] if len(weights) > 1 else None
    if storage == "rows":
        return gate, weights[1] if len(weights) == 3 else None, weights[-1]
    bundle = weights[0 if gate is None else 1]
    return gate, bundle[:, 0] if bundle.shape[1] == 2 else None, bundle[:, -1].t()


def neurons_fake(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], level: Tensor | None,
    storage: str, activation: str, select: str, kernel: str,
) -> Tensor:
    """Shape and dtype of the result. Raises ShapeError for weights that do not fit each other."""
    gate, up, down = unbundle(weights, storage)
    n, d = (down.shape[1],) * 2 if gate is None else gate.shape
    if x.shape[-1] != d or down.shape[1] != n or (up is not None and tuple(up.shape) != (n, d)):
        raise ShapeError(f"neurons: x {list(x.shape)}, weights {[list(w.shape) for w in weights]} stored as {storage!r} do not fit")
    return x.new_empty((*x.shape[:-1], down.shape[0]))


@dataclass
class Sets:
    """How often prompts have chosen neurons, in all: who has gathered weights by such a set looks at it again when this has grown."""

    chosen: int = 0

    def choose(self, kept: Tensor, scores: Tensor) -> None:
        """Write the neurons of the highest scores [F] into kept i32[K]."""
        kept.copy_(select(scores, f"topk({kept.numel()})")[0])
        self.chosen += 1


SETS = Sets()
CORE_SHARE = 0.2
"""rho of CoreInfer: the largest part of a token's positive activations that counts."""


def request_scores(a: Tensor, score: str) -> Tensor:
    """[F] of the activations [M, F] of a prompt, inputs of down. Raises SelectionError for NaN activations.

    "griffin": the norm over tokens of |a_n| / |a| (Dong et al. 2024), f32. "core(rho)": how many tokens have the neuron among the largest
    rho of their own positive activations, rounded up (CoreMatching, Wang et al. 2025), i32. "core": the same with one number for
    all tokens, CORE_SHARE of their mean number of positive ones, rounded down (CoreInfer, Wang et al. 2024).
    """
    a = a.reshape(-1, a.shape[-1])
    if bool(a.isnan().any()):
        raise SelectionError("the prompt gives NaN activations, by which no neurons can be chosen")
    if score == "griffin":
        a = a.float()
        return (a / a.norm(dim=-1, keepdim=True).clamp_min(1e-30)).norm(dim=0)
    positive = (a > 0).sum(-1, keepdim=True)
    num, den = ratio_of(float(score[5:-1]) if score != "core" else CORE_SHARE)
    limits = positive.sum() * num // (den * a.shape[0]) if score == "core" else (positive * num + den - 1) // den
    ranks = torch.sort(a, dim=-1, descending=True, stable=True).indices.argsort(-1)
    return (ranks < limits).sum(0, dtype=torch.int32)


def request_neurons(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], kept: Tensor, storage: str, activation: str, score: str, kernel: str
) -> Tensor:
    """A feed-forward block whose prompt (more than one token per sequence) chooses the neurons i32[K] that the tokens after it use.

    A prompt is computed in full and writes `kept`, one set for all sequences of the batch; one token per sequence uses only those
    neurons, or all of them while `kept` holds -1.
    """
    gate, up, down = unbundle(weights, storage)
    assert gate is not None
    if x.ndim < 2 or x.shape[-2] == 1:
        fn: Any = KERNELS.get(kernel)
        if fn is not None:
            return fn(x, weights, biases, kept)
        if int(kept[0]) < 0:
            return masked_dense(x, weights, biases, None, storage, activation, "all")
        rows = kept.long()
        parts = [gate[rows], *([] if up is None else [up[rows]]), down[:, rows]]
        some = [b if b is None or i == len(biases) - 1 else b[rows] for i, b in enumerate(biases)]
        return masked_dense(x, parts, some, None, "rows", activation, "all")
    a = ACTIVATIONS[activation].fn(F.linear(x, gate, biases[0]))
    if up is not None:
        a = a * F.linear(x, up, biases[1])
    SETS.choose(kept, request_scores(a, score))
    return F.linear(a, down, biases[-1])


def request_neurons_fake(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], kept: Tensor, storage: str, activation: str, score: str, kernel: str
) -> Tensor:
    """Shape and dtype of the result."""
    return neurons_fake(x, weights, biases, None, storage, activation, "all", kernel)


def gather_tokens(x: Tensor, idx: Tensor, dims: list[int]) -> Tensor:
    """The entries `idx` i32[B, K] of each sequence, along one or two of x's dimensions; its first one is B, or 1 for all sequences."""
    wide = idx.long()
    if x.shape[0] == 1 and wide.shape[0] == 1:
        for dim in dims:
            x = x.index_select(dim, wide[0])
        return x
    x = x.expand(wide.shape[0], *x.shape[1:])
    for dim in dims:
        shape = [1] * x.ndim
        shape[0], shape[dim] = wide.shape
        sizes = list(x.shape)
        sizes[dim] = wide.shape[1]
        x = x.gather(dim, wide.view(shape).expand(sizes))
    return x


def gather_tokens_fake(x: Tensor, idx: Tensor, dims: list[int]) -> Tensor:
    """Shape and dtype of the result."""
    sizes: list[Any] = [idx.shape[0], *x.shape[1:]]
    for dim in dims:
        sizes[dim] = idx.shape[1]
    return x.new_empty(sizes)


def scatter_tokens(x: Tensor, idx: Tensor, y: Tensor) -> Tensor:
    """x [B, S, D] with row idx[b, k] of each sequence replaced by y[b, k]; all others pass unchanged."""
    wide = idx.long()
    if x.shape[0] == 1:
        return x.index_copy(1, wide[0], y)
    return x.scatter(1, wide.unsqueeze(-1).expand_as(y), y)


def scatter_tokens_fake(x: Tensor, idx: Tensor, y: Tensor) -> Tensor:
    """Shape and dtype of the result."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def diagonal(mask: Tensor) -> Tensor:
    """[..., S] of [..., S, S]: what is said of each token itself. By indices, which Inductor fuses without warning of its own code."""
    at = torch.arange(mask.shape[-1], device=mask.device)
    return mask[..., at, at]


def recency(x: Tensor, mask: Tensor | None) -> Tensor:
    """Scores i64[B, S] of FTP's static router for x [B, S, D]: the first token, then the latest ones, the others in reverse; behind all of
    them padding, tokens that a mask bool or float [B or 1, 1 or H, S, S] hides from themselves."""
    B, S = x.shape[:2]
    score = torch.arange(S, device=x.device).expand(B, S)
    real = torch.ones(B, S, dtype=torch.bool, device=x.device)
    if mask is not None:
        own = diagonal(mask)[:, 0]
        real = (own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2).expand(B, S)
    first = real.int().argmax(-1, keepdim=True)
    return torch.where(score == first, 2 * S, torch.where(real, score + S, score))


def recency_fake(x: Tensor, mask: Tensor | None) -> Tensor:
    """Shape and dtype of the result."""
    return x.new_empty(x.shape[:2], dtype=torch.int64)


def _define(name: str, schema: str, meaning: Any, fake: Any) -> Any:
    LIBRARY.define(f"{name}{schema}", tags=TAGS)
    LIBRARY.impl(name, meaning, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsecc::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.sparsecc, name).default


SELECT = _define("select", "(Tensor scores, str policy) -> (Tensor, Tensor)", select, select_fake)
NEURONS = _define(
    "neurons",
    "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor? level, str storage, str activation, str select, str kernel) -> Tensor",
    neurons, neurons_fake,
)  # fmt: skip
REQUEST = _define(
    "request_neurons",
    "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor(a!) kept, str storage, str activation, str score, str kernel) -> Tensor",
    request_neurons, request_neurons_fake,
)  # fmt: skip
RECENCY = _define("recency", "(Tensor x, Tensor? mask) -> Tensor", recency, recency_fake)
GATHER = _define("gather_tokens", "(Tensor x, Tensor idx, int[] dims) -> Tensor", gather_tokens, gather_tokens_fake)
SCATTER = _define("scatter_tokens", "(Tensor x, Tensor idx, Tensor y) -> Tensor", scatter_tokens, scatter_tokens_fake)
"""The overloads that stand in graphs."""
