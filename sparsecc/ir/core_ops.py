"""CoreMatching's ops: a prompt chooses the neurons and the tokens that count (Wang et al., ICML 2025).

    core_prompt(x, weights, ..., kept)       a feed-forward block; writes its core neurons           [B, S, D] -> [B, S, D], i32[B, S]
    core_tokens(scores, candidates, policy)  which tokens stay                                       i32[B, S] -> i32[B, S], i32[B]
    shrink(idx, count)                       as many indices as there are                            i32[B, S] -> i32[B, n]
    core_released(a, candidates, reference)  the same as the authors' release has it                 [B, S, F] -> bool[B, S]
    span(x, start, end)                      places of a span                                        [B, S, ...] -> bool[B, S]

A token's core neurons are the largest rho of its positive activations, a sentence's those that most tokens have; a token's score is how
many of the sentence's core neurons it activates. All of it counts integers: nothing is rounded. Of equal values the lower index wins.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.errors import SelectionError
from sparsecc.ir.ops import ACTIVATIONS, KERNELS
from sparsecc.ir.policy import knee, parse_policy
from sparsecc.ir.skip_ops import SETS, _define, neurons_fake, request_scores, select, unbundle


def core_prompt(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], kept: Tensor, storage: str, activation: str, score: str, scored: bool,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """(y, scores): the block of all neurons, as `request_neurons` has it for a prompt; `kept` i32[K] becomes its core neurons.

    scores i32[B, S], if `scored`: the kept neurons whose activation, the input of down, is positive. `kernel` counts for `score`.
    Raises SelectionError for NaN activations.
    """
    gate, up, down = unbundle(weights, storage)
    assert gate is not None
    a = ACTIVATIONS[activation].fn(F.linear(x, gate, biases[0]))
    if up is not None:
        a = a * F.linear(x, up, biases[1])
    fn: Any = KERNELS.get(kernel)
    counts = None if fn is None else fn(a, score)
    counts = request_scores(a, score) if counts is None else counts
    SETS.choose(kept, counts)
    return F.linear(a, down, biases[-1]), core_scores(a, kept) if scored else kept.new_empty(0)


def core_scores(a: Tensor, kept: Tensor) -> Tensor:
    """i32[...] of activations [..., F]: how many of the neurons `kept` are positive."""
    return (a.index_select(-1, kept.long()) > 0).sum(-1, dtype=torch.int32)


def core_prompt_fake(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], kept: Tensor, storage: str, activation: str, score: str, scored: bool,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Shapes."""
    y = neurons_fake(x, weights, biases, None, storage, activation, "all", kernel)
    return y, x.new_empty(x.shape[:-1] if scored else (0,), dtype=torch.int32)


def core_tokens(scores: Tensor, candidates: Tensor, policy: str, kernel: str) -> tuple[Tensor, Tensor]:
    """(idx i32[B, S], count i32[B]): in ascending order the tokens that stay, -1 behind the last.

    scores i32[B, S]; candidates bool[B, S] may leave, the last token excepted: those that the policy keeps by its scores stay, as do all
    others. Raises SelectionError for more than one sequence, of which each would keep another number, for one without candidates, and for
    one of a single token.
    """
    if scores.shape[0] != 1:
        raise SelectionError(f"core_tokens: a batch of {scores.shape[0]} prompts, of which each keeps another number: give one at a time")
    if scores.shape[1] < 2:
        raise SelectionError("core_tokens: a prompt of one token has none to leave: give the whole prompt")
    free = candidates[0].clone()
    free[-1] = False
    at = free.nonzero().flatten()
    if not at.numel():
        raise SelectionError("core_tokens: no image tokens are in the prompt (its last token is none): check candidates=, or the inputs")
    keep = ~free
    keep[at] = parse_policy(policy).mask(scores[0, at])
    idx, count = select(keep[None].to(torch.int32), "nonzero")
    fn: Any = KERNELS.get(kernel)
    if fn is not None:  # counts for the explanation
        fn(keep.nonzero().flatten(), free.numel() - at.numel(), at.numel())
    return idx, count


def core_tokens_fake(scores: Tensor, candidates: Tensor, policy: str, kernel: str) -> tuple[Tensor, Tensor]:
    """Shapes."""
    return torch.empty_like(scores), scores.new_empty(scores.shape[:1])


def core_released(a: Tensor, candidates: Tensor, reference: int, kernel: str) -> Tensor:
    """bool[1, S]: tokens that the authors' released code keeps: those that are no candidates, and those that share more positive
    activations a [1, S, F] (or [S, F]) with token `reference` (from the end if negative) than the one at the knee.

    candidates bool[1, S]. Raises SelectionError for a batch, a prompt without candidates or that token, NaN activations.
    """
    if candidates.shape[0] != 1:
        raise SelectionError(f"core_released: a batch of {candidates.shape[0]} prompts: give one at a time")
    S = candidates.shape[1]
    active = a.reshape(S, -1)
    at = candidates[0].nonzero().flatten()
    if not -S <= reference < S or not at.numel():
        images = f"{at.numel()} of them an image's"
        raise SelectionError(f"core_released: a prompt of {S} tokens, {images}, has none of these or no token {reference} to compare with")
    if bool(active.isnan().any()):
        raise SelectionError("the prompt gives NaN activations, by which no tokens can be chosen")
    scores = (active.index_select(0, at)[:, active[reference] > 0] > 0).sum(-1)
    kept = scores > knee(scores)
    keep = ~candidates[0]
    keep[at] = kept
    fn: Any = KERNELS.get(kernel)
    if fn is not None:  # counts for the explanation
        fn(keep.nonzero().flatten(), S - at.numel(), at.numel())
    return keep[None]


def core_released_fake(a: Tensor, candidates: Tensor, reference: int, kernel: str) -> Tensor:
    """Shape and dtype of the result."""
    return torch.empty_like(candidates)


def span(x: Tensor, start: int, end: int) -> Tensor:
    """bool[B, S] for x [B, S, ...]: the places from `start` up to `end`. Raises SelectionError where they reach past the last one."""
    B, S = x.shape[:2]
    if end > S:
        raise SelectionError(f"core_matching(candidates=({start}, {end})) reaches past the prompt, which has {S} tokens")
    at = torch.arange(S, device=x.device)
    return ((at >= start) & (at < end)).expand(B, S).contiguous()


def span_fake(x: Tensor, start: int, end: int) -> Tensor:
    """Shape and dtype of the result."""
    return x.new_empty(x.shape[:2], dtype=torch.bool)


def shrink(idx: Tensor, count: Tensor) -> Tensor:
    """i32[B, n]: the indices without what pads them. The one place where a number that the values decide becomes a size."""
    return idx[:, : int(count.max())].contiguous()


def shrink_fake(idx: Tensor, count: Tensor) -> Tensor:
    """A size of its own."""
    return idx.new_empty((idx.shape[0], torch.library.get_ctx().new_dynamic_size(min=2)))


PROMPT = _define(
    "core_prompt",
    "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor(a!) kept, str storage, str activation, str score, bool scored, str kernel)"
    " -> (Tensor, Tensor)",
    core_prompt, core_prompt_fake,
)  # fmt: skip
CORE_TOKENS = _define("core_tokens", "(Tensor scores, Tensor candidates, str policy, str kernel) -> (Tensor, Tensor)", core_tokens,
                      core_tokens_fake)  # fmt: skip
RELEASED = _define("core_released", "(Tensor a, Tensor candidates, int reference, str kernel) -> Tensor", core_released, core_released_fake)
SPAN = _define("span", "(Tensor x, int start, int end) -> Tensor", span, span_fake)
SHRINK = _define("shrink", "(Tensor idx, Tensor count) -> Tensor", shrink, shrink_fake)
"""The overloads that stand in graphs."""
