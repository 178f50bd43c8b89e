"""Tokens after a prompt that go past blocks, by their routers, against the masked dense model; and what is then not run."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsecc
from sparsecc.errors import SelectionError, SpecError
from sparsecc.ir.ops import KERNELS
from sparsecc.methods.cached import Cached
from sparsecc.runtime import chain
from tests.methods.test_cached import EAGER, SLOW
from tests.methods.test_cached_batches import padded, rows
from tests.passes.routed import Oracle, batch, depth_router, ftp_router, llama

COUNT = 6


class Routed(Oracle):
    """All tokens at once: those of a prompt by its decisions, those after it by their own scores."""

    def __init__(self, model: Any, ids: Tensor, prompt: int, keys: str = "kept") -> None:
        super().__init__(model, {"input_ids": ids}, keys)
        self.prompt = prompt

    def depths(self, routers: list[Any], level: float, compact: bool, scale: str) -> tuple[Tensor, list[Tensor]]:
        """(logits, what each block keeps)"""
        x, keeps = self.model.model.embed_tokens(self.ids), []
        for layer, router in zip(self.model.model.layers, routers, strict=True):
            p = torch.ones(1, self.S) if router is None else (layer.input_layernorm(x) @ router.T).softmax(-1)[..., 1]
            keeps.append(p > level if router is not None else torch.ones(1, self.S, dtype=torch.bool))
            x = self.block(layer, x, keeps[-1], compact, "none" if router is None else scale, p)
        return self.finish(x), keeps

    def learned(self, router: dict[str, Tensor], schedule: list[float]) -> tuple[Tensor, list[Tensor]]:
        before = Oracle(self.model, {"input_ids": self.ids[:, : self.prompt]})
        _, keeps = before.ftp(router, schedule)
        x = self.model.model.embed_tokens(self.ids)
        own = torch.tensor([[1.0, 0.0]]).repeat(self.S - self.prompt, 1)
        for i, (layer, skipped) in enumerate(zip(self.model.model.layers, schedule, strict=True)):
            at = torch.arange(self.prompt, self.S)
            seen = torch.stack([at / (at + 1), own[:, 0], own[:, 1] / (at + 1), torch.full_like(own[:, 0], skipped)], -1)
            hidden = torch.relu(seen @ router["router.fc1.weight"].T + router["router.fc1.bias"])
            p = (hidden @ router["router.fc2.weight"].T + router["router.fc2.bias"]).sigmoid()[:, 0]
            goes = p > 0.5 if skipped else torch.ones_like(p, dtype=torch.bool)
            keeps[i] = torch.cat([keeps[i], goes[None]], 1)
            paid = self.attention(layer, x, keeps[i])[0]
            for n, t in enumerate(at.tolist()):
                if goes[n]:
                    others = paid[t, :t][keeps[i][0, :t]]
                    own[n] = torch.tensor([paid[t, t], (others >= paid[t, t]).sum()])
            x = self.block(layer, x, keeps[i])
        return self.finish(x), keeps

    def row(self, scores: Tensor, kept: Tensor) -> Tensor:
        """Of every token, not the last one alone: [B, S, S]."""
        return scores.masked_fill(~self.seen(kept), -torch.inf).softmax(-1).mean(1)


def check(decoder: Cached, inputs: dict[str, Tensor], oracle: Any, keys: str = "kept") -> set[bool]:
    """Every row against oracle(ids, length of the prompt) of the row alone; what blocks decided for tokens after the prompts."""
    state, decided = decoder.prefill(**inputs), set[bool]()
    alone = rows({"attention_mask": torch.ones_like(inputs["input_ids"])} | inputs)
    first = [ids.shape[1] for ids in alone]
    for _ in range(COUNT):
        token = state.logits.argmax(-1)
        for b, ids in enumerate(alone):
            logits, keeps = oracle(ids, first[b])
            assert torch.allclose(state.logits[b, 0], logits[0, -1], atol=2e-5)
            assert [int(n[b]) for n in state.lengths] == [ids.shape[1] if keys == "all" else int(keep.sum()) for keep in keeps]
            decided |= {bool(d) for keep in keeps for d in keep[0, first[b] :]}
            alone[b] = torch.cat([ids, token[b][None]], 1)
        state = decoder.step(token, state)
    wanted = torch.cat([ids[:, n:] for ids, n in zip(alone, first, strict=True)])
    assert torch.equal(decoder.generate(COUNT, **inputs), wanted)
    return decided


HOWS: list[dict[str, Any]] = [
    {}, {"positions": "original", "scale": "block"}, {"positions": "original", "keys": "all"}, {"positions": "original", "scale": "none"}]


@pytest.mark.parametrize(("how", "lengths"), [
    (HOWS[0], (25, 14)), *(pytest.param(how, lengths, marks=SLOW) for how in HOWS for lengths in ((25,), (25, 14), (9, 1, 20))
                           if (how, lengths) != (HOWS[0], (25, 14)))])  # fmt: skip
def test_mixture_of_depths(how: dict[str, Any], lengths: tuple[int, ...]) -> None:
    model, weight = llama(3), depth_router()
    rule = sparsecc.mixture_of_depths(weight, "threshold(0.5)", decode="routed", **how)
    inputs = padded(lengths, "left", 3)
    decoder = Cached(model, {"layers.[01]": rule}, inputs, **EAGER)
    keys, compact, scale = how.get("keys", "kept"), how.get("positions", "compact") == "compact", how.get("scale", "mlp")

    def oracle(ids: Tensor, prompt: int) -> Any:
        return Routed(model, ids, prompt, keys).depths([weight, weight, None], 0.5, compact, scale)

    assert check(decoder, inputs, oracle, keys) == {True, False}
    assert "tokens after a prompt go past some blocks" in str(decoder.token.explain())


@SLOW
@pytest.mark.parametrize(("schedule", "lengths"), [([0.5, 0.9, 0.5, 0.7], (31,)), ([0.5, 0.0, 0.9, 0.5], (20, 31))])
def test_a_learned_router(schedule: list[float], lengths: tuple[int, ...]) -> None:
    model, router = llama(4), ftp_router()
    inputs = padded(lengths, "right", 5)
    decoder = Cached(model, {"layers.*": sparsecc.ftp(schedule, router, decode="routed")}, inputs, **EAGER)
    decided = check(decoder, inputs, lambda ids, prompt: Routed(model, ids, prompt).learned(router, schedule))
    assert decided == {True, False}


@SLOW
@pytest.mark.parametrize("keys", ["kept", "all"])
def test_the_dense_rest_by_inductor(keys: str) -> None:
    model, weight = llama(2), depth_router()
    rule = sparsecc.mixture_of_depths(weight, "threshold(0.5)", positions="original", keys=keys, decode="routed")
    inputs = padded((12, 17), "left", 3)
    decoder = Cached(model, {"layers.0": rule}, inputs, autotune="none", remainder="inductor")
    check(decoder, inputs, lambda ids, n: Routed(model, ids, n, keys).depths([weight, None], 0.5, False, "mlp"), keys)


@SLOW
@pytest.mark.parametrize("keys", ["kept", "all"])
def test_a_block_that_no_row_goes_through_is_not_run(keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel of it is called: of its packed weights, those of keys and values alone where skipped tokens are keys."""
    model = llama(2)
    sparsecc.prune(model, {"*layers.0.*": "2:4"})
    weight = torch.zeros(2, 64)  # p = 0.5 for every token
    rule = sparsecc.mixture_of_depths(weight, "atleast(0.5)", positions="original", scale="none", keys=keys, decode="routed")
    ids = batch((9,))["input_ids"]
    spec = {"*layers.0.*": "2:4", "layers.0": rule}
    decoder = Cached(model, spec, {"input_ids": ids}, **EAGER)
    router = next(t for t in decoder.token.graphs[0].history.program.gm.buffers() if t.shape == weight.shape)
    token = torch.tensor([[3]])
    state, before, found = decoder.prefill(input_ids=ids), dict(KERNELS), []
    called: list[str] = []
    monkeypatch.setattr(chain, "_plans", lambda chain: {})  # nothing recorded is replayed
    for key, kernel in before.items():
        monkeypatch.setitem(KERNELS, key, partial(_counted, key, kernel, called))
    always = model.model.layers[0].input_layernorm(model.model.embed_tokens(token))[0]  # what the router sees of the token
    for goes in (True, False):
        called.clear()
        router.copy_(torch.zeros(2, 64) if goes else always * torch.tensor([[1.0], [-1.0]]))
        after = decoder.step(token, state)
        assert [k.shape[2] for k in after.keys] == [9 + (goes or keys == "all"), 10]
        found.append(sum("nm(2, 4)" in key for key in called))
    assert found == [4, 1 if keys == "all" else 0]  # q with k and v; o; gate with up; down
    assert keys == "all" or not called


def _counted(key: str, kernel: Any, called: list[str], *args: Any) -> Any:
    called.append(key)
    return kernel(*args)


def test_what_cannot_be_is_refused_by_name() -> None:
    weight = depth_router()
    makes: list[tuple[Any, str]] = [
        (lambda: sparsecc.ftp(0.3, decode="routed"), "static router keeps the latest token"),
        (lambda: sparsecc.ftp(0.3, ftp_router(), policy="schedule", decode="routed"), "its score alone decides"),
        (lambda: sparsecc.mixture_of_depths(weight, "topk(3)", decode="routed"), "its score alone decides"),
        (lambda: sparsecc.mixture_of_depths(weight, decode="routed", span=(3, None)), "outside of span"),
        (lambda: sparsecc.mixture_of_depths(weight, decode="some"), "'all' or 'routed'"),
    ]
    for make, text in makes:
        with pytest.raises(SpecError, match=text):
            make()
    from sparsecc.ir.conditional_ops import goes

    with pytest.raises(SelectionError, match="row 1 is NaN"):
        goes(torch.tensor([[0.1], [torch.nan]]), "threshold(0.5)")
