"""Recognition of blocks in models of the transformers library, and what skipping makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsecc
from examples.models import bert_base, llama_stack
from sparsecc.capture import capture
from sparsecc.errors import SpecError
from sparsecc.ir.text import parse_program, print_program
from sparsecc.passes.blocks import find_blocks
from sparsecc.passes.canonicalize import Canonicalize
from sparsecc.passes.context import NeuronChoice
from sparsecc.passes.ffn import find_ffns
from sparsecc.passes.manager import run_passes
from sparsecc.runtime.neuron_tuner import CpuNeurons

EAGER: dict[str, Any] = {"autotune": "none", "remainder": "eager"}


def llama() -> Any:
    return llama_stack(64, 160, 3, heads=4, kv_heads=2, vocab=128)


def opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128, max_position_embeddings=64,
                       word_embed_proj_dim=64)  # fmt: skip
    config._attn_implementation = "sdpa"
    return OPTForCausalLM(config).eval().requires_grad_(False)


def vit() -> Any:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
    config._attn_implementation = "sdpa"
    return ViTModel(config, add_pooling_layer=False).eval().requires_grad_(False)


def text(batch: int = 2, tokens: int = 24, pad: int = 7) -> dict[str, Any]:
    ids = torch.randint(0, 128, (batch, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[-1, tokens - pad :] = 0
    return {"input_ids": ids, "attention_mask": mask}


SMALL: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 128,
}  # fmt: skip
CAUSAL = {**text(), "use_cache": False}
MODELS: dict[str, tuple[Any, dict[str, Any], int, str]] = {
    "llama": (llama, CAUSAL, 3, "silu"),
    "opt": (opt, CAUSAL, 2, "relu"),
    "bert": (lambda: bert_base(**SMALL), text(), 2, "gelu"),
    "vit": (vit, {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}, 2, "gelu"),
}


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_found_by_dataflow(name: str) -> None:
    make, inputs, layers, activation = MODELS[name]
    program = run_passes(capture(make(), (), inputs).program, (Canonicalize(),), disable=(), stop_after=None).program
    ffns, missed = find_ffns(program)
    assert len(ffns) == layers and not missed
    assert {ffn.activation for ffn in ffns} == {activation} and all((ffn.up is not None) == (name == "llama") for ffn in ffns)
    blocks, loose = find_blocks(program, ffns)
    if name == "vit":  # an image has a fixed number of patches
        assert not blocks and "dynamic_shapes" in loose[0]
        return
    assert len(blocks) == layers and not loose
    assert [block.names[0].rpartition(".")[2] for block in blocks] == [str(i) for i in range(layers)]


@pytest.mark.parametrize(("name", "target"), [("llama", "cpu"), ("opt", "cpu"), ("bert", "reference"), ("vit", "reference")])
def test_keeping_every_neuron_is_the_dense_model(name: str, target: str) -> None:
    make, inputs, layers, _ = MODELS[name]
    model = make()
    compiled = sparsecc.compile(model, target, {"*": sparsecc.neurons(top=1.0)}, dict(inputs), **EAGER)
    y, wanted = compiled(**inputs)[0], model(**inputs)[0]
    real = inputs.get("attention_mask", torch.ones(wanted.shape[:2])).bool()
    assert torch.allclose(y[real], wanted[real], atol=2e-5)
    assert sum("neurons" in region["pattern"] for region in compiled.explain().to_dict()["regions"]) == layers


def masked(model: Any, inputs: dict[str, Any], keep: list[Tensor], keys: str = "kept") -> Tensor:
    """A Llama in which block b's skipped tokens pass unchanged and are no keys unless all are, by the model's own dense modules."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    S = ids.shape[1]
    x = model.model.embed_tokens(ids)
    position = model.model.rotary_emb(x, torch.arange(S)[None])
    causal = torch.ones(S, S, dtype=torch.bool).tril()[None, None] & mask[:, None, None]
    for layer, kept in zip(model.model.layers, keep, strict=True):
        seen = causal & (kept[:, None, None] | torch.tensor(keys == "all")) | torch.eye(S, dtype=torch.bool)
        out = layer(x, attention_mask=torch.zeros(seen.shape).masked_fill(~seen, -torch.inf), position_embeddings=position)
        x = torch.where(kept[..., None], out[0] if isinstance(out, tuple) else out, x)
    return model.lm_head(model.model.norm(x))


def static(inputs: dict[str, Any], fraction: float) -> Tensor:
    """The tokens that the static router keeps: the first, then the latest, padding last."""
    rows = []
    for mask in inputs["attention_mask"].bool().tolist():
        S, real = len(mask), [i for i, m in enumerate(mask) if m]
        order = [real[0], *reversed(real[1:]), *reversed([i for i, m in enumerate(mask) if not m])]
        count = -(-S * round((1 - fraction) * 1000) // 1000)
        rows.append([i in order[:count] for i in range(S)])
    return torch.tensor(rows)


@pytest.mark.parametrize(("schedule", "keys"), [([0.3, 0.3, 0.5], "kept"), ([0.9, 0.0, 0.95], "kept"), ([0.3, 0.9, 0.3], "all")])
def test_skipped_tokens_are_those_of_the_masked_dense_model(schedule: list[float], keys: str) -> None:
    model = llama()
    compiled = sparsecc.compile(model, "cpu", {"layers.*": sparsecc.ftp(schedule, keys=keys)}, dict(CAUSAL), **EAGER)
    for inputs in (CAUSAL, {**text(3, 37, 30), "use_cache": False}):  # another batch, an odd length, mostly padding
        keep = [static(inputs, s) for s in schedule]
        real = inputs["attention_mask"].bool()
        assert torch.allclose(compiled(**inputs).logits[real], masked(model, inputs, keep, keys)[real], atol=2e-5)


@pytest.mark.parametrize(("schedule", "keys"), [([0.3, 0.3, 0.5], "kept"), ([0.3, 0.9, 0.3], "all")])
def test_prompts_without_padding_are_causal(schedule: list[float], keys: str) -> None:
    model, (B, S) = llama(), (2, 23)
    compiled = None
    for tokens in (S, 41):
        inputs = {"input_ids": torch.randint(0, model.config.vocab_size, (B, tokens)), "use_cache": False}
        compiled = compiled or sparsecc.compile(model, "cpu", {"layers.*": sparsecc.ftp(schedule, keys=keys)}, dict(inputs), **EAGER)
        shown = {**inputs, "attention_mask": torch.ones(B, tokens, dtype=torch.long)}
        wanted = masked(model, shown, [static(shown, s) for s in schedule], keys)
        assert torch.allclose(compiled(**inputs).logits, wanted, atol=2e-5)
    skipping = {r.name for r in compiled.explain().regions if "tokens" in r.pattern}
    assert skipping == {f"model.layers.{i}" for i in range(3)}  # two of them share what they gather


def test_skipping_tokens_neurons_and_weights_compose() -> None:
    model = llama()
    sparsecc.prune(model, {"*.q_proj": "2:4"})
    spec = {"*.q_proj": "2:4", "layers.*": sparsecc.ftp([0.3, 0.5, 0.5]), "layers.1.mlp": sparsecc.neurons(top=0.25)}
    ours = sparsecc.compile(model, "cpu", spec, dict(CAUSAL), **EAGER)
    wanted = sparsecc.compile(model, "reference", spec, dict(CAUSAL), **EAGER)
    assert torch.allclose(ours(**CAUSAL).logits, wanted(**CAUSAL).logits, atol=2e-5)
    for stage in ("skip", "bundle"):
        printed = ours.ir(stage)
        assert print_program(parse_program(printed)) == printed


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_keeps_the_latest_real_tokens_of_each_row(side: str) -> None:
    """OPT, which works on [B * S, D] and counts positions by the mask: each row against the model on its kept tokens alone."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 64}
    model = OPTForCausalLM(OPTConfig(ffn_dim=96, word_embed_proj_dim=32, **sizes)).eval().requires_grad_(False)
    S, lengths = 24, (24, 17, 5)
    mask = torch.tensor([[int(n > (at if side == "right" else S - 1 - at)) for at in range(S)] for n in lengths])
    inputs = {"input_ids": torch.randint(2, 64, (3, S)), "attention_mask": mask, "use_cache": False}
    for target in ("cpu", "reference"):
        found = sparsecc.compile(model, target, {"model.decoder.layers.*": sparsecc.ftp(0.3)}, dict(inputs), **EAGER)(**inputs).logits
        for b, n in enumerate(lengths):
            real, count = mask[b].nonzero()[:, 0], min(n, 17)  # 70 % of the 24 columns, padding only where nothing else is left
            kept = torch.cat([real[:1], real[n - count + 1 :]])
            places = (mask[b].cumsum(0) - 1)[kept][None]
            alone = {"input_ids": inputs["input_ids"][b : b + 1, kept], "attention_mask": torch.ones(1, count), "position_ids": places}
            wanted = model(**alone, use_cache=False).logits[0, -1]
            assert torch.allclose(found[b, real[-1]], wanted, atol=2e-5)


def test_compact_positions_renumber_the_kept_tokens() -> None:
    model = llama()
    inputs = {"input_ids": CAUSAL["input_ids"], "use_cache": False}
    original, compact = (
        sparsecc.compile(model, "cpu", {"layers.*": sparsecc.ftp([0.0, 0.5, 0.0], positions=p)}, dict(inputs), **EAGER)(**inputs).logits
        for p in ("original", "compact")
    )
    assert not torch.allclose(original, compact, atol=1e-4)


class Shared(nn.Module):
    """A feed-forward block whose hidden values are returned too."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(8, 16), nn.Linear(16, 8), act

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.act(self.fc1(x))
        return self.fc2(h), h


@pytest.mark.parametrize(("spec", "message"), [
    ({"layers.*": sparsecc.ftp([0.1, 0.2])}, "2 entries, but 3 blocks"),
    ({"encoder.*": sparsecc.ftp(0.1)}, "names no block.*model.layers.0"),
    ({"*.attention": sparsecc.neurons()}, "names no feed-forward block.*model.layers.0.mlp"),
])
def test_what_is_not_there_is_refused_by_name(spec: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        sparsecc.compile(llama(), "reference", spec, dict(CAUSAL), **EAGER)


@pytest.mark.parametrize(("act", "message"), [(torch.relu, "used elsewhere"), (torch.tanh, "aten.tanh.default between its linears")])
def test_what_only_looks_like_a_block_is_reported(act: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        sparsecc.compile(Shared(act).eval(), "reference", {"*": sparsecc.neurons()}, torch.randn(3, 8), **EAGER)


@pytest.mark.parametrize("make", [
    lambda: sparsecc.ftp([0.2, 1.0]), lambda: sparsecc.ftp([]), lambda: sparsecc.ftp(-0.1), lambda: sparsecc.ftp(0.1, positions="new"),
    lambda: sparsecc.ftp(0.1, router="best"), lambda: sparsecc.neurons(top=0), lambda: sparsecc.neurons(top=1.5),
    lambda: sparsecc.neurons(top=0.5, stat=0.1), lambda: sparsecc.neurons(threshold=-1.0), lambda: sparsecc.neurons(policy="knee"),
    lambda: sparsecc.neurons(threshold=float("nan")), lambda: sparsecc.neurons(per_request="griffin"),
])
def test_bad_arguments_are_refused(make: Any) -> None:
    with pytest.raises(SpecError):
        make()


def test_one_token_stays_dense() -> None:
    model, inputs = llama(), {"input_ids": torch.tensor([[3]]), "use_cache": False}
    compiled = sparsecc.compile(model, "reference", {"layers.*": sparsecc.ftp(0.5)}, dict(inputs), **EAGER)
    assert torch.allclose(compiled(**inputs).logits, model(**inputs).logits, atol=1e-6)
    assert "sequences of one token are run in full" in str(compiled.explain())


def test_where_dense_is_faster_a_block_keeps_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuNeurons, "choose", lambda *args: NeuronChoice(0.0, "dense is faster"))
    model = llama()
    compiled = sparsecc.compile(model, "cpu", {"*.mlp": sparsecc.neurons(top=0.5)}, dict(CAUSAL), **EAGER)
    wanted = sparsecc.compile(model, "reference", {"*.mlp": sparsecc.neurons(top=0.5)}, dict(CAUSAL), **EAGER)
    torch.testing.assert_close(compiled(**CAUSAL).logits, wanted(**CAUSAL).logits, rtol=0, atol=1e-5)
    assert "bundle" not in compiled.ir("lower") and "dense neurons silu ratio(0.5)" in compiled.ir("lower")
    assert not any(region["sparse"] for region in compiled.explain().to_dict()["regions"])
