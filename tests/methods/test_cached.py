"""Tokens skipped with a KV cache: a prompt, then tokens, against the masked dense model that is run on all of them at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparsecc
from sparsecc.methods.cached import Cached
from tests.passes.routed import Oracle, batch, ftp_router, llama

EAGER: dict[str, Any] = {"autotune": "none", "remainder": "eager"}
SCHEDULE = [0.0, 0.5, 0.5, 0.9, 0.5, 0.0]
COUNT = 8


def static(S: int, fraction: float, B: int = 1) -> Tensor:
    """bool[B, S]: the first token and the latest."""
    count = -(-S * round((1 - fraction) * 1000) // 1000)
    order = [0, *reversed(range(1, S))]
    return torch.tensor([[i in order[:count] for i in range(S)]]).expand(B, -1)


def dense(model: Any, ids: Tensor, keeps: list[Tensor], keys: str = "kept", routers: Any = None, **how: Any) -> Tensor:
    """Logits [B, S, V] of a prompt, of which each block skips some, and tokens after it, which go through all."""
    oracle = Oracle(model, {"input_ids": ids}, keys)
    x = model.model.embed_tokens(ids)
    for i, (layer, keep) in enumerate(zip(model.model.layers, keeps, strict=True)):
        kept = torch.cat([keep, torch.ones(ids.shape[0], ids.shape[1] - keep.shape[1], dtype=torch.bool)], 1)
        p = None
        if routers is not None and routers[i] is not None:
            p = (layer.input_layernorm(x) @ routers[i].T).softmax(-1)[..., 1]
        x = oracle.block(layer, x, kept, how.get("compact", False), how.get("scale", "none") if p is not None else "none", p)
    return oracle.finish(x)


def check(decoder: Cached, model: Any, ids: Tensor, keeps: list[Tensor], keys: str = "kept", **how: Any) -> None:
    """The prompt's logits, the lengths of the caches, and every token after it: its logits, and that it is the same one."""
    state, S = decoder.prefill(input_ids=ids), ids.shape[1]
    lengths = [S if keys == "all" else int(keep[0].sum()) for keep in keeps]
    all_ids = ids
    for t in range(COUNT + 1):
        assert [k.shape[2] for k in state.keys] == [v.shape[2] for v in state.values] == [n + t for n in lengths]
        wanted = dense(model, all_ids, keeps, keys, **how)[:, -1]
        assert torch.allclose(state.logits[:, 0], wanted, atol=2e-5)
        token = state.logits.argmax(-1)
        assert torch.equal(token, wanted.argmax(-1, keepdim=True))
        all_ids = torch.cat([all_ids, token], 1)
        if t < COUNT:
            state = decoder.step(token, state)
    assert state.position == S + COUNT
    assert torch.equal(decoder.generate(COUNT, input_ids=ids), all_ids[:, S : S + COUNT])


@pytest.mark.parametrize("keys", ["kept", "all"])
def test_a_schedule_with_a_batch(keys: str) -> None:
    model, schedule = llama(4), [0.0, 0.5, 0.9, 0.3]
    spec = {"layers.*": sparsecc.ftp(schedule, keys=keys)}
    decoder = Cached(model, spec, {"input_ids": batch((33, 33))["input_ids"]}, **EAGER)
    for S in (41, 2):
        ids = batch((S, S))["input_ids"]
        check(decoder, model, ids, [static(S, s, 2) for s in schedule], keys)
    assert "tokens after a prompt go through every block" in str(decoder.token.explain())
    assert ("are keys" if keys == "all" else "are no keys") in str(decoder.prompt.explain())


@pytest.mark.parametrize("bias", [0.0, pytest.param(-1e3, marks=pytest.mark.slow)])
def test_a_learned_router(bias: float) -> None:
    """Also where it keeps the protected tokens alone."""
    model, router = llama(), ftp_router(bias=bias)
    decoder = Cached(model, {"layers.*": sparsecc.ftp(SCHEDULE, router)}, {"input_ids": batch((97,))["input_ids"]}, **EAGER)
    for S in (61,) if bias else (97, 40):
        inputs = batch((S,))
        _, keeps = Oracle(model, inputs).ftp(router, SCHEDULE)
        assert len({int(k.sum()) for k in keeps}) > 1
        check(decoder, model, inputs["input_ids"], keeps)
