"""Tokens skipped with a KV cache: a prompt, then tokens, against the masked dense model that is run on all of them at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparsecc
from sparsecc.errors import SelectionError, SpecError
from sparsecc.methods.cached import Cached
from tests.passes.routed import Oracle, batch, depth_router, depths, ftp_router, llama

EAGER: dict[str, Any] = {"autotune": "none", "remainder": "eager"}
SCHEDULE = [0.5, 0.9, 0.5]
COUNT = 8
SLOW = pytest.mark.slow


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


@pytest.mark.parametrize("keys", ["kept", pytest.param("all", marks=SLOW)])
def test_a_schedule_with_a_batch(keys: str) -> None:
    model, schedule = llama(3), [0.5, 0.0, 0.9]
    spec = {"layers.*": sparsecc.ftp(schedule, keys=keys)}
    decoder = Cached(model, spec, {"input_ids": batch((33, 33))["input_ids"]}, **EAGER)
    for S in (41, 2):
        ids = batch((S, S))["input_ids"]
        check(decoder, model, ids, [static(S, s, 2) for s in schedule], keys)
    assert "tokens after a prompt go through every block" in str(decoder.token.explain())
    assert ("are keys" if keys == "all" else "are no keys") in str(decoder.prompt.explain())


@SLOW
@pytest.mark.parametrize("bias", [0.0, -1e3])
def test_a_learned_router(bias: float) -> None:
    """Also where it keeps the protected tokens alone."""
    model, router = llama(3), ftp_router(bias=bias)
    decoder = Cached(model, {"layers.*": sparsecc.ftp(SCHEDULE, router)}, {"input_ids": batch((97,))["input_ids"]}, **EAGER)
    for S in (61,) if bias else (97, 40):
        inputs = batch((S,))
        _, keeps = Oracle(model, inputs).ftp(router, SCHEDULE)
        assert len({int(k.sum()) for k in keeps}) > (not bias)
        check(decoder, model, inputs["input_ids"], keeps)


DEPTHS: list[tuple[str, dict[str, Any]]] = [
    ("threshold(0.5)", {}), ("ratio(0.5)", {"positions": "original", "scale": "block"}),
    ("threshold(2.0)", {"scale": "none"}),  # blocks that skip every token of a prompt
    ("threshold(0.5)", {"positions": "original", "keys": "all"}),
]


@pytest.mark.parametrize(("policy", "how"), [
    DEPTHS[0], *(pytest.param(*depths, marks=SLOW) for depths in DEPTHS[1:])])
def test_mixture_of_depths(policy: str, how: dict[str, Any]) -> None:
    """gamma-MoD's decode: every token in every block, the feed-forward branch scaled, the position that of the block's own keys."""
    model, weight = llama(3), depth_router()
    rule = sparsecc.mixture_of_depths(weight, policy, **how)
    decoder = Cached(model, {"layers.[01]": rule}, {"input_ids": batch((29,))["input_ids"]}, **EAGER)
    routers = [weight, weight, None]
    compact, scale, keys = how.get("positions", "compact") == "compact", how.get("scale", "mlp"), how.get("keys", "kept")
    for S in (37,) if policy == "threshold(2.0)" else (24, 37):
        inputs = batch((S,))
        oracle = Oracle(model, inputs, keys)
        chosen = {"threshold(0.5)": lambda p: p > 0.5, "threshold(2.0)": lambda p: p > 2}.get(
            policy, lambda p: p >= p.sort(descending=True).values[-(-len(p) // 2) - 1])
        _, some = depths(oracle, routers, chosen, compact=compact, scale=scale)
        every = torch.ones(1, S, dtype=torch.bool)
        assert all(0 <= int(keep.sum()) < S for keep in some)
        check(decoder, model, inputs["input_ids"], [*some, every], keys, routers=routers, compact=compact, scale=scale)


@SLOW
def test_the_dense_rest_by_inductor() -> None:
    """A block that skips every token, one whose skipped tokens stay keys, one that a learned router cuts."""
    model, router, ids = llama(4), ftp_router(), batch((31,))["input_ids"]
    none = sparsecc.mixture_of_depths(depth_router(), "threshold(2.0)", scale="none", positions="original")
    spec = {"layers.0": sparsecc.ftp(0.4, router), "layers.1": none, "layers.2": sparsecc.ftp(0.5, keys="all")}
    decoder = Cached(model, spec, {"input_ids": ids}, autotune="none", remainder="inductor")
    for S in (31, 44):
        inputs = batch((S,))
        _, keeps = Oracle(model, inputs).ftp(router, [0.4, 0.0, 0.0, 0.0])
        some = [keeps[0], torch.zeros(1, S, dtype=torch.bool), torch.ones(1, S, dtype=torch.bool), torch.ones(1, S, dtype=torch.bool)]
        state = decoder.prefill(input_ids=inputs["input_ids"])
        assert [k.shape[2] for k in state.keys] == [int(k.sum()) for k in some]
        after = torch.tensor([[3, 1, 4]])
        wanted = mixed(model, torch.cat([inputs["input_ids"], after], 1), some, static(S, 0.5))
        assert torch.allclose(state.logits[0, 0], wanted[0, S - 1], atol=2e-5)
        for t in range(3):
            state = decoder.step(after[:, t : t + 1], state)
            assert torch.allclose(state.logits[0, 0], wanted[0, S + t], atol=2e-5)


def mixed(model: Any, ids: Tensor, keeps: list[Tensor], queries: Tensor) -> Tensor:
    """As `dense`, but block 2 skips others than `queries` that stay keys."""
    kept, whole = Oracle(model, {"input_ids": ids}), Oracle(model, {"input_ids": ids}, "all")
    x = model.model.embed_tokens(ids)
    for i, (layer, keep) in enumerate(zip(model.model.layers, keeps, strict=True)):
        some = queries if i == 2 else keep
        some = torch.cat([some, torch.ones(1, ids.shape[1] - some.shape[1], dtype=torch.bool)], 1)
        x = (whole if i == 2 else kept).block(layer, x, some)
    return kept.finish(x)


@SLOW
def test_tokens_neurons_and_weights_compose() -> None:
    model = llama(2)
    sparsecc.prune(model, {"*.q_proj": "2:4"})
    spec = {"*.q_proj": "2:4", "layers.*": sparsecc.ftp(0.5), "*.mlp": sparsecc.neurons(top=0.25)}
    ids = batch((23,))["input_ids"]
    ours, wanted = (Cached(model, spec, {"input_ids": ids}, target, **EAGER) for target in ("cpu", "reference"))
    a, b = ours.prefill(input_ids=ids), wanted.prefill(input_ids=ids)
    for token in (3, 1, 4):
        assert torch.allclose(a.logits, b.logits, atol=2e-5) and [k.shape for k in a.keys] == [k.shape for k in b.keys]
        a, b = (one.step(torch.tensor([[token]]), state) for one, state in ((ours, a), (wanted, b)))


def test_what_cannot_be_is_refused_by_name() -> None:
    model, ids = llama(2), batch((9, 9))["input_ids"]
    rule = sparsecc.mixture_of_depths(depth_router(), "threshold(0.5)")
    with pytest.raises(SelectionError, match="one token"):
        Cached(model, {"layers.*": rule}, {"input_ids": ids[:, :1]}, "reference", **EAGER)
    with pytest.raises(SpecError, match="not position_ids"):
        Cached(model, {"layers.*": rule}, {"input_ids": ids, "position_ids": ids}, "reference", **EAGER)
    windowed = llama(2)
    windowed.config.sliding_window = 8
    with pytest.raises(SpecError, match="sliding window"):
        Cached(windowed, {"layers.*": rule}, {"input_ids": ids}, "reference", **EAGER)
    for make in (lambda: sparsecc.ftp(0.3, keys="some"), lambda: sparsecc.ftp(0.3, ftp_router(), keys="all"),
                 lambda: sparsecc.ftp(0.3, positions="compact", keys="all")):  # fmt: skip
        with pytest.raises(SpecError, match="keys"):
            make()
