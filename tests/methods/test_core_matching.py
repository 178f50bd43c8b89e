"""CoreMatching: selection against definitions written out, execution against a dense model with masks, in float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sparsecc
from examples.core_matching import llava, vlm_inputs
from examples.models import llama_stack
from sparsecc.cores import Cores
from sparsecc.errors import SelectionError, ShapeError, SpecError
from sparsecc.ir.text import parse_program, print_program
from sparsecc.methods.core_matching import CoreMatching

EAGER: dict[str, Any] = {"autotune": "none", "remainder": "eager"}
PREFIX, IMAGE, TEXT = 8, 48, 12
SPAN = (PREFIX, PREFIX + IMAGE)
PLANTED = (3, 7, 8, 15, 20, 21, 30, 36, 41, 47)


def llama() -> Any:
    """Tokens 0-19 are text, all close to one direction; 20-67 the image's, PLANTED like text and the others noise; 68 is NaN."""
    model = llama_stack(64, 256, 3, heads=4, kv_heads=2, vocab=80)
    random = torch.Generator().manual_seed(1)
    base = torch.randn(64, generator=random)
    table = torch.randn(80, 64, generator=random)
    table -= (table @ base)[:, None] * base / (base @ base)
    text = [*range(20), *(20 + i for i in PLANTED)]
    table[text] = base + 0.1 * table[text]
    table[68] = torch.nan
    model.model.embed_tokens.weight.copy_(table)
    return model


def ids(extra: int = 0) -> Tensor:
    text = torch.randint(0, 20, (1, PREFIX + TEXT + extra), generator=torch.Generator().manual_seed(extra))
    return torch.cat([text[:, :PREFIX], torch.arange(20, 20 + IMAGE)[None], text[:, PREFIX:]], 1)


def core_neurons(a: np.ndarray, rho: float, beta: float) -> list[int]:
    """The paper's definition, token by token; ties by lower index."""
    counts = np.zeros(a.shape[1], dtype=int)
    for row in a:
        positive = sorted(np.flatnonzero(row > 0), key=lambda n: (-row[n], n))
        counts[positive[: int(np.ceil(round(rho * len(positive), 9)))]] += 1
    return sorted(sorted(range(len(counts)), key=lambda n: (-counts[n], n))[: int(beta * len(counts))])


def knee_tokens(scores: np.ndarray) -> list[int]:
    """Places of the scores from the knee on, distances in whole numbers."""
    s = [int(v) for v in sorted(scores, reverse=True)]
    n = len(s)
    far = [abs((s[-1] - s[0]) * i - (n - 1) * (s[i] - s[0])) for i in range(n)]
    return [i for i, v in enumerate(scores) if v >= s[far.index(max(far))]]


class Oracle:
    """A dense decoder by its own modules, in float64: dropped tokens are hidden keys behind block l, generated tokens have A * mask_C."""

    def __init__(self, decoder: Any, head: Any, rule: Cores, prompt: int) -> None:
        self.decoder, self.head = copy.deepcopy(decoder).double(), copy.deepcopy(head).double()
        self.rule, self.prompt = rule, prompt
        self.a: list[Tensor] = []
        self.scores = torch.empty(0)

    def run(self, x: Tensor, keep: Tensor | None, compact: bool = False) -> Tensor:
        """Logits [S, V] of x [1, S, D], its first rows a prompt of which bool[M] `keep` stay."""
        x, S = x.double(), x.shape[1]
        causal, own = torch.ones(S, S, dtype=torch.bool).tril(), torch.eye(S, dtype=torch.bool)
        key = torch.ones(S, dtype=torch.bool)
        place = torch.arange(S)
        if keep is not None:
            key[: self.prompt] = keep
        late = key.cumsum(0) - 1 if compact else place
        self.a = []
        for i, block in enumerate(self.decoder.layers):
            behind = i > self.rule.layer
            seen = causal & key | own if behind else causal
            table = self.decoder.rotary_emb(x, (late if behind else place)[None])
            mask = torch.zeros(S, S, dtype=torch.float64).masked_fill(~seen, -torch.inf)[None, None]
            x = x + block.self_attn(block.input_layernorm(x), position_embeddings=table, attention_mask=mask)[0]
            h = block.post_attention_layernorm(x)
            a = torch.nn.functional.silu(block.mlp.gate_proj(h)) * block.mlp.up_proj(h)
            self.a.append(a[0, : self.prompt][key[: self.prompt]] if behind else a[0, : self.prompt])
            if self.prompt < S:
                core = next(v for name, v in self.rule.sets.items() if name.endswith(f"layers.{i}.mlp")).long()
                dead = torch.ones(a.shape[-1], dtype=torch.bool).scatter_(0, core, False)
                a[0, self.prompt :, dead] = 0
            x = x + block.mlp.down_proj(a)
        return self.head(self.decoder.norm(x))[0]


def check(core: CoreMatching, oracle: Oracle, x: Tensor, image: Tensor, embed: Any, inputs: dict[str, Tensor]) -> Tensor:
    """One request: what was selected, the prompt's logits, and those of three tokens after it. Returns which tokens stay."""
    rule, M = oracle.rule, x.shape[1]
    state = core.prefill(**inputs)
    oracle.run(x, None)
    own = [core_neurons(a.numpy(), rule.rho, rule.beta) for a in oracle.a[: rule.layer + 1]]
    found = [v.tolist() for _, v in sorted(rule.sets.items())]
    assert found[: rule.layer + 1] == own
    scores = (oracle.a[rule.layer].numpy()[:, own[rule.layer]] > 0).sum(1)
    places = np.flatnonzero(image.numpy())
    keep = ~image
    keep[places[knee_tokens(scores[places]) if rule.tokens == "knee" else slice(None)]] = True
    wanted = oracle.run(x, keep, rule.positions == "compact")
    for i in range(rule.layer + 1, len(found)):
        assert len(set(found[i]) & set(core_neurons(oracle.a[i].numpy(), rule.rho, rule.beta))) >= len(found[i]) - 2
    assert [k.shape[2] for k in state.keys] == [M if i <= rule.layer else int(keep.sum()) for i in range(len(found))]
    scale = float(wanted.abs().max())
    assert torch.allclose(state.logits[0, 0].double(), wanted[-1], rtol=0, atol=2e-6 * scale)
    tokens = torch.tensor([[3], [1], [4]])
    after = oracle.run(torch.cat([x, embed(tokens[:, 0])[None]], 1), keep)
    for t, token in enumerate(tokens):
        state = core.step(token[None], state)
        assert torch.allclose(state.logits[0, 0].double(), after[M + t], rtol=0, atol=2e-6 * scale)
    assert state.position == M + 3
    return keep


@pytest.mark.parametrize("target", [pytest.param("reference", marks=pytest.mark.slow), "cpu"])
def test_a_decoder_keeps_its_planted_tokens(target: str) -> None:
    model, rule = llama(), sparsecc.core_matching(layer=1, candidates=SPAN)
    core = CoreMatching(model, rule, {"input_ids": ids()}, target, **EAGER)
    embed = model.model.embed_tokens
    for extra in (1, 6) if target == "cpu" else (0,):
        prompt = ids(extra)
        image = torch.zeros(prompt.shape[1], dtype=torch.bool)
        image[SPAN[0] : SPAN[1]] = True
        keep = check(core, Oracle(model.model, model.lm_head, rule, prompt.shape[1]), embed(prompt), image, embed, {"input_ids": prompt})
        assert all(keep[PREFIX + i] for i in PLANTED) and int(keep[image].sum()) < IMAGE
    with pytest.raises(SelectionError, match="NaN"):
        core.prefill(input_ids=torch.cat([torch.full((1, 1), 68), prompt], 1))
    with pytest.raises(SelectionError, match="reaches past the prompt, which has 30 tokens"):
        core.prefill(input_ids=prompt[:, :30])
    with pytest.raises(SelectionError, match="one token"):
        core.prefill(input_ids=prompt[:, :1])
    with pytest.raises(SelectionError, match="batch of 2"):
        core.prefill(input_ids=prompt.expand(2, -1))
    with pytest.raises(SpecError, match="not position_ids"):
        core.prefill(input_ids=prompt, position_ids=torch.ones_like(prompt))
    assert torch.equal(core.generate(3, input_ids=prompt), core.generate(3, input_ids=prompt))


def test_a_vision_language_model_drops_image_tokens() -> None:
    model, rule = llava(), sparsecc.core_matching(layer=1)
    inputs = vlm_inputs(model, 12)
    core = CoreMatching(model, rule, inputs, "cpu", **EAGER)
    inner, prompt = model.model, vlm_inputs(model, 17, seed=1)
    image = prompt["input_ids"][0] == model.config.image_token_id
    embed = inner.get_input_embeddings()
    features = torch.cat(inner.get_image_features(pixel_values=prompt["pixel_values"], return_dict=True).pooler_output)
    x = embed(prompt["input_ids"]).masked_scatter(image[None, :, None], features)
    keep = check(core, Oracle(inner.language_model, model.lm_head, rule, x.shape[1]), x, image, embed, prompt)
    assert 0 < int(keep[image].sum()) < int(image.sum())
    regions = core.prompt.explain().to_dict()["regions"]
    tokens = next(r for r in regions if r["reason"].startswith("core tokens"))
    assert tokens["name"].endswith("language_model.layers.1.mlp") and "core_matching(rho=0.2, beta=0.4, layer=1)" in tokens["pattern"]
    assert tokens["observed_kept"] == rule.seen.kept and "kept in prompts so far" in str(core.prompt.explain())
    neurons = [r for r in core.token.explain().to_dict()["regions"] if r["reason"].startswith("core neurons")]
    assert len(neurons) == 4 and all(0.39 < r["expected_kept"] < 0.4 and r["observed_kept"] == r["expected_kept"] for r in neurons)
    assert rule.seen.latest is not None and torch.equal(rule.seen.latest, keep.nonzero().flatten())
    with pytest.raises(ShapeError, match="pixel_values"):
        core.prefill(input_ids=torch.randint(0, 99, (1, 61)))


@pytest.mark.slow
def test_the_dense_rest_by_inductor() -> None:
    """The parts before and behind the cut, and tokens, as one gets them without asking for anything else."""
    model, rule = llava(layers=3), sparsecc.core_matching(layer=1)
    inner, inputs = model.model, vlm_inputs(model, 12)
    core = CoreMatching(model, rule, inputs, "cpu", autotune="none", remainder="inductor")
    for prompt in (inputs, vlm_inputs(model, 17, seed=1)):
        image = prompt["input_ids"][0] == model.config.image_token_id
        embed = inner.get_input_embeddings()
        features = torch.cat(inner.get_image_features(pixel_values=prompt["pixel_values"], return_dict=True).pooler_output)
        x = embed(prompt["input_ids"]).masked_scatter(image[None, :, None], features)
        keep = check(core, Oracle(inner.language_model, model.lm_head, rule, x.shape[1]), x, image, embed, prompt)
        assert 0 < int(keep[image].sum()) < int(image.sum())


@pytest.mark.parametrize(("rule", "image"), [
    (sparsecc.core_matching(beta=1.0, layer=0, tokens="atleast(0.0)", candidates=SPAN), None),
    (sparsecc.core_matching(layer=2, candidates=30), [PREFIX + 10]),
    (sparsecc.core_matching(layer=1, candidates=SPAN, tokens="threshold(1000.0)"), list(range(*SPAN))),
    (sparsecc.core_matching(layer=0, candidates=SPAN, positions="compact"), None),
])
def test_prompts_without_a_cache(rule: Cores, image: list[int] | None) -> None:
    """Keeping all is the dense model; one candidate is kept; none may be kept; renumbered places are the oracle's."""
    model, prompt = llama(), {"input_ids": ids(), "use_cache": False}
    compiled = sparsecc.compile(model, "reference", rule, dict(prompt), **EAGER)
    got = compiled(**prompt).logits[0]
    oracle = Oracle(model.model, model.lm_head, rule, 68)
    x = model.model.embed_tokens(prompt["input_ids"])
    keep = torch.ones(68, dtype=torch.bool)
    if rule.tokens.startswith("threshold"):
        keep[image] = False
    elif rule.tokens == "knee" and image is None:
        oracle.run(x, None)
        core = core_neurons(oracle.a[0].numpy(), rule.rho, rule.beta)
        keep[SPAN[0] : SPAN[1]] = False
        keep[np.add(knee_tokens((oracle.a[0].numpy()[SPAN[0] : SPAN[1], core] > 0).sum(1)), SPAN[0])] = True
    wanted = oracle.run(x, keep, rule.positions == "compact")[keep]
    assert torch.allclose(got.double(), wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))
    if bool(keep.all()) and rule.beta == 1:
        assert torch.allclose(got, model(**prompt).logits[0], rtol=0, atol=1e-5)
    printed = compiled.ir("core")
    assert "sparsecc.shrink(" in printed and print_program(parse_program(printed)) == printed


def test_zeroed_keys_are_not_evicted_ones() -> None:
    """What the authors' release does with dropped tokens: a zero key still takes its part of the softmax."""
    q, k, v = (torch.randn(1, 1, n, 8, generator=torch.Generator().manual_seed(n)) for n in (1, 6, 7))
    v, keep = v[:, :, :6], torch.tensor([True, False, True, True, False, True])
    attention = torch.nn.functional.scaled_dot_product_attention
    evicted, hidden = attention(q, k[:, :, keep], v[:, :, keep]), attention(q, k, v, keep[None, None, None])
    assert torch.allclose(evicted, hidden, atol=1e-6)
    assert not torch.allclose(attention(q, k * keep[:, None], v * keep[:, None]), evicted, atol=1e-2)


def test_the_release_ranks_tokens_otherwise() -> None:
    """It counts neurons that a token shares with one late token, not with the sentence's core neurons."""
    from sparsecc.ir.core_ops import core_scores

    a = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    core = core_scores(a, torch.tensor(core_neurons(a.numpy(), 0.2, 0.4)))
    z = (a > 0).float()
    assert (z @ z.t())[-5].tolist() != core.tolist() and knee_tokens((z @ z.t())[-5].numpy()) != knee_tokens(core.numpy())


def released_tokens(a: np.ndarray, span: tuple[int, int]) -> np.ndarray:
    """bool[M] of activations [M, F], as the release's code has it: a row of the Gram matrix, a strict comparison with the knee's score."""
    z = (a > 0).astype(float)
    scores = (z @ z.T)[-5, span[0] : span[1]]
    s = np.sort(scores)[::-1]
    n = len(s)
    far = [abs((s[-1] - s[0]) * i - (n - 1) * (s[i] - s[0])) for i in range(n)]
    keep = np.ones(len(a), dtype=bool)
    keep[span[0] : span[1]] = scores > s[int(np.argmax(far))]
    return keep


@pytest.mark.slow
def test_the_release_zeroes_keys_and_skips_nothing() -> None:
    """And so it differs from the paper's definition: in what stays, in the lengths of the caches, in the tokens after the prompt."""
    from transformers import DynamicCache

    model, prompt = llama(), ids(3)
    rule = sparsecc.core_matching(compat="release", layers=(1, 2), candidates=SPAN)
    core = CoreMatching(model, rule, {"input_ids": ids()}, "cpu", **EAGER)
    state = core.prefill(input_ids=prompt)
    plain, active, cache = llama(), [], DynamicCache()
    for layer in plain.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, x: active.append(x[0][0].numpy()))
    dense = plain(input_ids=prompt, past_key_values=cache, use_cache=True).logits[:, -1:]
    assert torch.allclose(state.logits, dense, atol=1e-5)
    kept = [torch.ones(prompt.shape[1], dtype=torch.bool), *(torch.from_numpy(released_tokens(active[i], SPAN)) for i in (1, 2))]
    assert all(0 < int((~keep).sum()) < IMAGE for keep in kept[1:])
    for i, layer in enumerate(cache.layers):
        layer.keys, layer.values = (t * kept[i][:, None] for t in (layer.keys, layer.values))
        assert torch.allclose(state.keys[i], layer.keys, atol=1e-5) and torch.allclose(state.values[i], layer.values, atol=1e-5)
        assert int((state.keys[i] == 0).all(-1)[0, 0].sum()) == int((~kept[i]).sum())
    paper = CoreMatching(model, sparsecc.core_matching(layer=1, candidates=SPAN), {"input_ids": ids()}, "reference", **EAGER)
    other = paper.prefill(input_ids=prompt)
    assert paper.rule is not None and paper.rule.seen.latest is not None
    assert paper.rule.seen.latest.tolist() != kept[1].nonzero().flatten().tolist() and other.keys[2].shape != state.keys[2].shape
    for token in torch.tensor([[3], [1], [4]]):
        wanted = plain(input_ids=token[None], past_key_values=cache, use_cache=True).logits
        state, other = core.step(token[None], state), paper.step(token[None], other)
        assert torch.allclose(state.logits, wanted, atol=1e-5) and not torch.allclose(other.logits, wanted, atol=1e-3)
    assert "authors' release" in str(core.prompt.explain())
    with pytest.raises(SelectionError, match="NaN"):
        core.prefill(input_ids=torch.cat([prompt, torch.full((1, 1), 68)], 1))


def test_the_release_has_places_of_its_own() -> None:
    assert sparsecc.core_matching(compat="release").candidates == (5, 581)
    with pytest.raises(SpecError, match=r"layers=\(5, 18\)\): the decoder has 3 blocks, 0 to 2"):
        CoreMatching(llama(), sparsecc.core_matching(compat="release"), {"input_ids": ids()}, "reference", **EAGER)
    inputs = {"input_ids": ids(), "use_cache": False}
    with pytest.raises(SpecError, match="nothing but a KV cache"):
        sparsecc.compile(llama(), "reference", sparsecc.core_matching(compat="release", layers=(0, 1)), inputs, **EAGER)


@pytest.mark.parametrize("make", [
    lambda: sparsecc.core_matching(compat="paper"), lambda: sparsecc.core_matching(compat="release", tokens="all"),
    lambda: sparsecc.core_matching(layers=(3, 2)), lambda: sparsecc.core_matching(rho=0), lambda: sparsecc.core_matching(rho=1.1),
    lambda: sparsecc.core_matching(beta=0.0),
    lambda: sparsecc.core_matching(beta=float("nan")), lambda: sparsecc.core_matching(layer=-1), lambda: sparsecc.core_matching(layer=1.5),
    lambda: sparsecc.core_matching(candidates=(5, 5)), lambda: sparsecc.core_matching(candidates="image"),
    lambda: sparsecc.core_matching(tokens="best"), lambda: sparsecc.core_matching(tokens="nonzero"),
    lambda: sparsecc.core_matching(positions="new"), lambda: sparsecc.core_matching(True),
])
def test_bad_arguments_are_refused(make: Any) -> None:
    with pytest.raises(SpecError):
        make()


def test_what_a_model_lacks_is_refused_by_name() -> None:
    exported = torch.export.export(llama(), (), {"input_ids": ids(), "use_cache": False}, dynamic_shapes={
        "input_ids": {1: torch.export.Dim.AUTO}, "use_cache": None}, strict=False)  # fmt: skip
    for spec, message in (
        (sparsecc.core_matching(layer=4, candidates=SPAN), r"layer=4\): the decoder under '\*' has 3 blocks, 0 to 2"),
        (sparsecc.core_matching(), "0 masked_scatter put image features.*candidates="),
        ({"encoder.*": sparsecc.core_matching()}, "names no feed-forward block of a decoder.*model.layers.0.mlp"),
        ({"a.*": sparsecc.core_matching(), "*": sparsecc.core_matching()}, "stands twice"),
    ):
        with pytest.raises(SpecError, match=message):
            sparsecc.compile(exported, "reference", spec, **EAGER)


def test_more_that_is_refused() -> None:
    inputs = {"input_ids": ids(), "use_cache": False}
    with pytest.raises(SpecError, match="captured as exactly 68 tokens"):
        sparsecc.compile(llama(), "reference", sparsecc.core_matching(candidates=SPAN), inputs, dynamic_shapes=None, **EAGER)
    with pytest.raises(SpecError, match="compact"):
        CoreMatching(llama(), sparsecc.core_matching(candidates=SPAN, positions="compact"), {"input_ids": ids()}, "reference", **EAGER)
    windowed = llama()
    windowed.config.sliding_window = 8
    with pytest.raises(SpecError, match="sliding window"):
        CoreMatching(windowed, sparsecc.core_matching(candidates=SPAN), {"input_ids": ids()}, "reference", **EAGER)
