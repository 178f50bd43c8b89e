"""Llama decoders with a KV cache: prefill, then one token at a time, against the same masked weights run densely."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

import sparsecc
from examples.models import llama_stack, smollm2, smollm2_tokenizer
from sparsecc.runtime.record import Replay


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def greedy(model: Callable[..., Any], config: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
    """The next `count` tokens [B, count], each the most likely one."""
    cache, tokens = DynamicCache(config=config), [ids]
    for _ in range(count):
        out = model(input_ids=tokens[-1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        tokens.append(out.logits[:, -1:].argmax(-1))
    return torch.cat(tokens[1:], 1)


def test_small_llama_decodes_the_same_tokens() -> None:
    model = llama_stack(64, 160, 2, heads=4, kv_heads=2, vocab=128)
    sparsecc.prune(model, "unstructured(0.8)")
    spec = {"*": "unstructured(0.8)", "lm_head": "dense"}
    compiled = sparsecc.compile(model, sparsity=spec, autotune="none", remainder="eager")
    ids = torch.randint(0, 128, (2, 9))
    assert torch.equal(greedy(compiled, model.config, ids, 16), greedy(model, model.config, ids, 16))
    assert len(compiled.graphs) == 2  # prefill and decode
    for graph in range(2):
        regions = {region.name: region for region in compiled.explain(graph).regions}
        assert regions["lm_head"].reason == "the spec leaves it dense"
        assert regions["model.layers.1.mlp.down_proj"].pattern == "unstructured(0.8)"
    longer = torch.randint(0, 128, (2, 23))
    assert torch.equal(greedy(compiled, model.config, longer, 4), greedy(model, model.config, longer, 4))
    got = compiled(ids)
    assert type(got) is CausalLMOutputWithPast
    torch.testing.assert_close(got.logits, model(ids).logits, rtol=0, atol=1e-4 * float(model(ids).logits.abs().max()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_a_prompt_that_fills_a_cache_is_one_chain(dtype: torch.dtype, tolerance: float) -> None:
    """Keys and values leave it as rows in memory of their own, in the model's dtype."""
    model = llama_stack(64, 160, 2, heads=4, kv_heads=2, vocab=128).to(dtype)
    sparsecc.prune(model, {"model.layers.*": "block(4, 1, 0.9)"})
    compiled = sparsecc.compile(model, autotune="none", remainder="eager")
    ids, caches = torch.randint(0, 128, (2, 70)), [DynamicCache(config=model.config) for _ in range(2)]
    with torch.no_grad():
        got, want = (run(ids, past_key_values=cache, use_cache=True) for run, cache in zip((compiled, model), caches, strict=True))
    torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=tolerance * float(want.logits.abs().max()))
    for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
        for one, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert one.dtype == dtype and one.stride() == other.stride()
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.abs().max()))
    lowered = compiled.ir("lower")
    assert lowered.count("sparsecc.attention") == 2 and "aten.cat.default([detach" not in lowered and "scaled_dot" not in lowered


def test_a_sparse_head_tied_to_the_embedding() -> None:
    model = llama_stack(64, 160, 2, heads=4, kv_heads=2, vocab=128)
    model.lm_head.weight = model.model.embed_tokens.weight
    spec = {"*": "unstructured(0.5)", "lm_head": "unstructured(0.5)"}
    sparsecc.prune(model, spec, exclude=())
    compiled = sparsecc.compile(model, sparsity=spec, autotune="none", remainder="eager")
    ids = torch.randint(0, 128, (1, 9))
    assert torch.equal(greedy(compiled, model.config, ids, 8), greedy(model, model.config, ids, 8))
    assert {region.name: region for region in compiled.explain(1).regions}["lm_head"].pattern == "unstructured(0.5)"


@torch.no_grad()
@pytest.mark.parametrize(("batch", "dtype"), [pytest.param(3, torch.float32, marks=pytest.mark.slow), (1, torch.bfloat16)])
def test_one_recording_serves_steps_of_all_lengths(batch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with padding, a cache that was cut, and those whose tensors lie otherwise than kernels leave them, or in one memory."""
    model = llama_stack(64, 160, 1, heads=4, kv_heads=2, vocab=128)
    spec = {"*": "unstructured(0.5)", "lm_head": "unstructured(0.5)"}
    sparsecc.prune(model, spec, exclude=())
    model = model.to(dtype)
    recorded: list[int] = []
    of = Replay.of
    monkeypatch.setattr(Replay, "of", staticmethod(lambda *args: (recorded.append(args[0].length), of(*args))[1]))
    compiled = sparsecc.compile(model, sparsity=spec, autotune="none", remainder="eager")
    ids = torch.randint(0, 128, (batch, 20))
    mask = torch.ones(batch, 20, dtype=torch.long)
    mask[1:, :5] = 0
    ours, theirs = DynamicCache(config=model.config), DynamicCache(config=model.config)

    def step(first: int, last: int) -> None:
        results = []
        for run, cache in ((compiled, ours), (model, theirs)):
            masked = mask[:, :last] if batch > 1 else None
            out = run(input_ids=ids[:, first:last], attention_mask=masked, past_key_values=cache, use_cache=True)
            results.append(out.logits[:, -1].float())
        got, want = results
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance * float(want.abs().max()))
        for a, b in zip(ours.layers, theirs.layers, strict=True):
            torch.testing.assert_close(a.keys, b.keys, rtol=0.02, atol=0.02)
            assert a.values.shape == b.values.shape

    def place(together: bool) -> None:
        """Keys and values become parts of one tensor, or of one each; neither begins it."""
        for layer in (*ours.layers, *theirs.layers):
            keys, values, other = layer.keys, layer.values, torch.full_like(layer.keys, 100.0)
            _, layer.keys, layer.values = torch.stack([other, keys, values])
            if not together:
                layer.keys, layer.values = torch.stack([other, keys])[1], torch.stack([other, other, values])[2]

    step(0, 9)
    step(9, 10)  # makes things that are not kernels' own; the next is recorded
    for at, together in ((10, True), (11, False), (12, True)):
        place(together)
        step(at, at + 1)
    recorded.clear()
    for at in range(13, 18):
        step(at, at + 1)
    text = compiled.ir("rows", graph=1)
    assert [text.count(f"sparsecc.{name}(") for name in ("norm", "rotary", "append", "attention", "gate")] == [3, 2, 2, 1, 1]
    assert len(recorded) <= 1
    for layer in (*ours.layers, *theirs.layers):
        layer.keys, layer.values = (t[:, :, :12].clone() for t in (layer.keys, layer.values))
    step(12, 13)
    assert len(recorded) <= 1
    for layer in ours.layers:
        layer.keys = layer.keys.transpose(1, 2).contiguous().transpose(1, 2)
    step(13, 14)
    step(14, 15)
    for at, together in ((15, True), (16, False)):
        place(together)
        step(at, at + 1)
    torch.set_num_threads(1)
    step(17, 18)


def test_without_a_cache_it_is_exported() -> None:
    model = llama_stack(64, 160, 2, heads=4, kv_heads=2, vocab=128)
    sparsecc.prune(model, "unstructured(0.8)")
    compiled = sparsecc.compile(model, autotune="none", remainder="eager")
    for shape in ((2, 9), (3, 14)):
        ids = torch.randint(0, 128, shape)
        got, want = compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))
    assert len(compiled.graphs) == 1


def padded(batch: int, tokens: int, side: str) -> torch.Tensor:
    """Attention masks i64 [batch, tokens] of rows of any length, the first full."""
    at = torch.arange(tokens) if side == "right" else torch.arange(tokens - 1, -1, -1)
    return (at < torch.linspace(tokens, 1, batch).long()[:, None]).long()


@pytest.mark.parametrize("pattern", ["block(4, 1, 0.9)", pytest.param("unstructured(0.9)", marks=pytest.mark.slow)])
def test_prefill_is_one_chain(pattern: str) -> None:
    """Grouped heads of 24 features, which fill no vector; every mask, and shapes that come again."""
    model = llama_stack(96, 160, 2, heads=4, kv_heads=2, vocab=128, head_dim=24)
    spec = {"*": pattern, "lm_head": "dense"}
    sparsecc.prune(model, spec)
    compiled = sparsecc.compile(model, sparsity=spec, autotune="none", remainder="eager")
    for batch, tokens in ((1, 20), (3, 20), (1, 130), (3, 70), (3, 20), (1, 17)):
        ids = torch.randint(0, 128, (batch, tokens))
        for mask in (None, padded(batch, tokens, "left"), padded(batch, tokens, "right")):
            got, want = (m(ids, attention_mask=mask, use_cache=False).logits for m in (compiled, model))
            assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())
    for graph in range(len(compiled.graphs)):
        text = compiled.ir("lower", graph)
        assert text.count("sparsecc.attention(") == 2 and text.count("sparsecc.norm(") == 5
        assert text.count("sparsecc.rotary(") == 4 and text.count("sparsecc.gate(") == 2
        assert text.count("sparsecc.mask_tiles(") == ("attention_mask:" in text)  # without one it is causal
        assert not any(name in text for name in ("scaled_dot_product", "rsqrt", "silu.default", "cat_1"))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_the_model_without_a_head(attn: str) -> None:
    model = llama_stack(64, 160, 2, heads=4, kv_heads=1, vocab=128, attn=attn).model
    sparsecc.prune(model, "block(4, 1, 0.8)")
    compiled = sparsecc.compile(model, sparsity="block(4, 1, 0.8)", autotune="none", remainder="eager")
    ids = torch.randint(0, 128, (3, 40))
    for mask in (None, padded(3, 40, "left")):
        got, want = (m(ids, attention_mask=mask, use_cache=False).last_hidden_state for m in (compiled, model))
        assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())
    assert ("sparsecc.attention(" in compiled.ir("lower")) == (attn == "sdpa") and "sparsecc.gate(" in compiled.ir("lower")


@pytest.mark.slow
def test_smollm2_decodes_the_same_64_tokens() -> None:
    """Real weights. Traces and packs 2 x 211 linears: one to two minutes."""
    model, tokenizer = smollm2(), smollm2_tokenizer()
    sparsecc.prune(model, "unstructured(0.5)")
    chat = [{"role": "user", "content": "Name three rivers."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    compiled = sparsecc.compile(model, sparsity="unstructured(0.5)", autotune="none", remainder="eager")
    assert torch.equal(greedy(compiled, model.config, ids, 64), greedy(model, model.config, ids, 64))
    assert len(compiled.graphs) == 2
    assert compiled.explain().to_dict()["totals"]["sparse"] > 0
