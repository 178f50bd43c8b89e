"""Batches of prompts that differ: each row does what it does alone, and what the masked dense model does on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparsecc
from sparsecc.errors import SelectionError, SpecError
from sparsecc.methods.cached import Cached
from sparsecc.methods.griffin import griffin
from tests.methods.test_cached import EAGER, SLOW, dense, static
from tests.passes.routed import Oracle, depth_router, depths, ftp_router, llama

COUNT = 5
LENGTHS = (21, 33, 1)


def padded(lengths: tuple[int, ...], side: str, seed: int = 1) -> dict[str, Tensor]:
    """Prompts with padding on the left, on the right, or in the middle of them. No id stands twice in one: no two tokens are equal."""
    S, random = max(lengths), torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(lengths), S, dtype=torch.long)
    for row, n in zip(mask, lengths, strict=True):
        at = torch.arange(S)
        row[{"left": at[S - n :], "right": at[:n], "apart": torch.randperm(S, generator=random)[:n].sort().values}[side]] = 1
    return {"input_ids": torch.stack([torch.randperm(128, generator=random)[:S] for _ in lengths]), "attention_mask": mask}


def rows(inputs: dict[str, Tensor]) -> list[Tensor]:
    """The prompts alone, i64[1, n]."""
    return [ids[real != 0][None] for ids, real in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


def check(decoder: Cached, model: Any, inputs: dict[str, Tensor], keep: Any, keys: str = "kept", **how: Any) -> None:
    """Every row against the oracle of the row alone: keep(ids) says which of its tokens each block keeps."""
    state, alone = decoder.prefill(**inputs), rows(inputs)
    keeps = [keep(ids) for ids in alone]
    first = [ids.shape[1] for ids in alone]
    for t in range(COUNT):
        token = state.logits.argmax(-1)
        for b, (ids, kept) in enumerate(zip(alone, keeps, strict=True)):
            wanted = dense(model, ids, kept, keys, **how)[:, -1]
            assert torch.allclose(state.logits[b], wanted, atol=2e-5)
            assert token[b, 0] == wanted.argmax()
            counts = [first[b] if keys == "all" else int(k.sum()) for k in kept]
            assert [int(n[b]) for n in state.lengths] == [n + t for n in counts]
            alone[b] = torch.cat([ids, token[b][None]], 1)
        state = decoder.step(token, state)
    wanted = torch.cat([ids[:, n:] for ids, n in zip(alone, first, strict=True)])
    assert torch.equal(decoder.generate(COUNT, **inputs), wanted)


SCHEDULE = [0.5, 0.0, 0.9]


@pytest.mark.parametrize("keys", ["kept", pytest.param("all", marks=SLOW)])
def test_a_schedule_counts_the_tokens_of_each_row(keys: str) -> None:
    model = llama(3)
    decoder = Cached(model, {"layers.*": sparsecc.ftp(SCHEDULE, keys=keys)}, padded(LENGTHS, "left"), **EAGER)
    keep = lambda ids: [static(ids.shape[1], s) for s in SCHEDULE]  # noqa: E731
    for lengths, side in ((LENGTHS, "left"), ((1, 7, 40), "right"), ((12, 3, 9), "apart")):
        check(decoder, model, padded(lengths, side), keep, keys)


@SLOW
def test_a_row_is_what_it_is_alone() -> None:
    """In the same object: prompts of one length have a graph without masks."""
    model, inputs = llama(3), padded(LENGTHS, "left")
    spec = {"layers.*": sparsecc.ftp(SCHEDULE), "*.mlp": sparsecc.neurons(top=0.5)}
    batch, one = Cached(model, spec, inputs, **EAGER), Cached(model, spec, {"input_ids": rows(inputs)[0]}, **EAGER)
    together = batch.generate(COUNT, **inputs)
    for ids, found in zip(rows(inputs)[:2], together, strict=False):
        assert torch.equal(one.generate(COUNT, input_ids=ids)[0], found)
        longer = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
        mask = torch.arange(longer.shape[1])[None] >= 3
        assert torch.equal(one.generate(COUNT, input_ids=longer, attention_mask=mask)[0], found)
    assert list(batch.tokens) == [True] and list(one.tokens) == [False]


@SLOW
@pytest.mark.parametrize("policy", [None, "schedule"])
def test_a_learned_router(policy: str | None) -> None:
    model, router, schedule = llama(3), ftp_router(), [0.5, 0.9, 0.5]
    inputs = padded(LENGTHS, "left")
    decoder = Cached(model, {"layers.*": sparsecc.ftp(schedule, router, policy=policy)}, inputs, **EAGER)

    def keep(ids: Tensor) -> list[Tensor]:
        return Oracle(model, {"input_ids": ids}).ftp(router, schedule, strict=policy == "schedule")[1]

    for lengths, side in ((LENGTHS, "left"), ((5, 30, 61), "right")):
        check(decoder, model, padded(lengths, side), keep)


DEPTHS: list[tuple[str, dict[str, Any]]] = [
    ("threshold(0.5)", {}),  # compact positions
    ("ratio(0.5)", {"positions": "original", "scale": "block"}),
    ("threshold(2.0)", {"scale": "none"}),
    ("threshold(2.0)", {"span": (8, None)}),  # a row of which every token is protected
    ("threshold(0.5)", {"positions": "original", "keys": "all"}),
]


@SLOW
@pytest.mark.parametrize(("policy", "how"), DEPTHS)
def test_mixture_of_depths(policy: str, how: dict[str, Any]) -> None:
    model, weight = llama(3), depth_router()
    inputs = padded((21, 33, 7), "left")
    decoder = Cached(model, {"layers.[01]": sparsecc.mixture_of_depths(weight, policy, **how)}, inputs, **EAGER)
    routers = [weight, weight, None]
    compact, scale, keys = how.get("positions", "compact") == "compact", how.get("scale", "mlp"), how.get("keys", "kept")
    chosen = {"threshold(0.5)": lambda p: p > 0.5, "threshold(2.0)": lambda p: p > 2}.get(
        policy, lambda p: p >= p.sort(descending=True).values[-(-len(p) // 2) - 1])

    def keep(ids: Tensor) -> list[Tensor]:
        span = (8, ids.shape[1]) if "span" in how else None
        _, some = depths(Oracle(model, {"input_ids": ids}, keys), routers, chosen, compact=compact, scale=scale, span=span)
        return [*some, torch.ones_like(ids, dtype=torch.bool)]

    for lengths, side in (((21, 33, 7), "left"), ((1, 9, 40), "right")):
        check(decoder, model, padded(lengths, side), keep, keys, routers=routers, compact=compact, scale=scale)


@SLOW
def test_prompts_of_one_length_that_keep_different_numbers() -> None:
    model, weight, routers = llama(2), depth_router(), [depth_router(), None]
    inputs = padded((19, 19), "left")
    ids = inputs["input_ids"]
    rule = sparsecc.mixture_of_depths(weight, "threshold(0.5)")
    decoder = Cached(model, {"layers.0": rule}, {"input_ids": ids}, **EAGER)

    def keep(ids: Tensor) -> list[Tensor]:
        _, some = depths(Oracle(model, {"input_ids": ids}), routers, lambda p: p > 0.5)
        return [*some, torch.ones_like(ids, dtype=torch.bool)]

    assert len({int(keep(row)[0].sum()) for row in rows(inputs)}) == 2
    check(decoder, model, inputs, keep, routers=routers, compact=True, scale="mlp")


@SLOW
def test_the_dense_rest_by_inductor() -> None:
    model, inputs = llama(3), padded(LENGTHS, "left")
    decoder = Cached(model, {"layers.*": sparsecc.ftp(SCHEDULE)}, inputs, autotune="none", remainder="inductor")
    check(decoder, model, inputs, lambda ids: [static(ids.shape[1], s) for s in SCHEDULE])


@SLOW
def test_nothing_skipped_is_the_dense_model() -> None:
    model, inputs = llama(2), padded((9, 14, 1), "apart")
    check(Cached(model, None, inputs, **EAGER), model, inputs, lambda ids: [torch.ones_like(ids, dtype=torch.bool)] * 2)


def test_masks_that_cannot_be_are_refused_by_name() -> None:
    model, inputs = llama(1), padded((9, 4), "left")
    empty = inputs["attention_mask"].clone()
    empty[1] = 0
    for mask, error, text in ((empty, SelectionError, "no token of row 1"), (empty[:, 1:], SpecError, r"\[2, 8\], wanted \[2, 9\]")):
        with pytest.raises(error, match=text):
            Cached(model, None, inputs | {"attention_mask": mask}, "reference", **EAGER)
    with pytest.raises(SelectionError, match="padding would choose neurons"):
        Cached(model, {"*.mlp": griffin(0.5)}, inputs, "reference", **EAGER)
