"""Merging tokens (PiToMe) against the explicit merge matrix, and what encoders make of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparsecc
from examples.models import bert_base, llama_stack
from sparsecc.errors import SpecError
from sparsecc.ir.merge_ops import merge_tokens
from sparsecc.ir.text import parse_program, print_program

EAGER: dict[str, Any] = {"autotune": "none", "remainder": "eager"}


def matrix(keys: Tensor, r: int, margin: float, variant: str, leading: int) -> Tensor:
    """f64[T - r, T] of 0 and 1: which tokens each result is made of, by the definition, one sequence's keys [H, T, E] at a time."""
    metric = keys.double().mean(0)
    metric = metric / metric.norm(dim=-1, keepdim=True)
    T = len(metric)
    near = metric @ metric.T
    may = list(range(leading, T))

    def force(x: float) -> float:
        if variant == "text":
            return math.exp(-0.5 * ((1 - x) / (1 - margin)) ** 2)
        return x - margin if x > margin else math.exp(x - margin) - 1

    energy = {i: sum(force(float(near[i, j])) for j in may) / len(may) for i in may}
    order = sorted(may, key=lambda i: (-energy[i], i))
    if variant == "text":
        a, b, stay = order[:r], order[r : 2 * r], order[2 * r :]
    elif variant == "pitome":
        a, b, stay = order[: 2 * r : 2], order[1 : 2 * r : 2], order[2 * r :]
    else:
        a, b = order[::2], order[1::2]
        edge = {i: max(float(near[i, j]) for j in b) for i in a}
        ranked = sorted(a, key=lambda i: -edge[i])
        a, stay = ranked[:r], ranked[r:]
    groups = {j: [j] for j in b}
    for i in a:
        groups[max(b, key=lambda j: float(near[i, j]))].append(i)
    M = torch.zeros(T - r, T, dtype=torch.float64)
    for row, members in enumerate([[i] for i in (*range(leading), *stay)] + [groups[j] for j in b]):
        M[row, members] = 1
    return M


def merged(x: Tensor, keys: Tensor, size: Tensor, r: int, margin: float, variant: str, leading: int) -> tuple[Tensor, Tensor]:
    """M x, rows of M normalised by size, for a batch."""
    rows, sizes = [], []
    for b in range(len(x)):
        weighed = matrix(keys[b], r, margin, variant, leading) * size[b].double()
        sizes.append(weighed.sum(-1))
        rows.append((weighed / sizes[-1][:, None]) @ x[b].double())
    return torch.stack(rows), torch.stack(sizes)


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("variant", ["pitome", "bsm", "text"])
@pytest.mark.parametrize(("T", "r", "leading"), [(33, 8, 1), (20, 10, 0), (9, 1, 2), (5, 2, 1)])
def test_the_op_is_its_matrix(variant: str, T: int, r: int, leading: int) -> None:
    x, keys = draw(3, T, 12), draw(3, 4, T, 8, seed=1)
    size = torch.randint(1, 5, (3, T), generator=torch.Generator().manual_seed(2)).double()
    y, left = merge_tokens(x, keys, size, r, 0.3, variant, leading)
    wanted, sizes = merged(x, keys, size, r, 0.3, variant, leading)
    assert torch.allclose(y, wanted, atol=1e-12) and torch.equal(left, sizes)
    assert torch.equal(left.sum(-1), size.sum(-1))  # nothing is lost, and the sum of everything stays
    assert torch.allclose((left[..., None] * y).sum(1), (size[..., None] * x).sum(1), atol=1e-10)


def clusters() -> tuple[Tensor, Tensor]:
    """CLS, 16 tokens in two tight clusters, 16 random ones; keys of one head."""
    centres = F.normalize(draw(2, 32), dim=-1)
    tight = centres.repeat_interleave(8, 0) + 0.01 * draw(16, 32, seed=1)
    keys = torch.cat([draw(1, 32, seed=2), tight, F.normalize(draw(16, 32, seed=3), dim=-1)])
    return draw(33, 6, seed=4), keys


def test_only_clusters_merge() -> None:
    x, keys = clusters()
    y, size = merge_tokens(x[None], keys[None, None], None, 8, 0.5, "pitome", 1)
    whole = {tuple(row.tolist()) for row in y[0]}
    assert all(tuple(x[i].tolist()) in whole for i in (0, *range(17, 33))) and int((size > 1).sum()) > 0


@pytest.mark.parametrize("variant", ["pitome", "bsm", "text"])
def test_equal_tokens_merge_in_their_order(variant: str) -> None:
    x, keys = draw(1, 16, 4), draw(1, 2, 4, 8).repeat_interleave(4, 2)
    first = merge_tokens(x, keys, None, 4, 0.2, variant, 1)
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, merge_tokens(x, keys, None, 4, 0.2, variant, 1), strict=True))
    wide = merge_tokens(x.expand(3, -1, -1), keys.expand(3, -1, -1, -1), None, 4, 0.2, variant, 1)
    assert all(torch.equal(row, first[0][0]) for row in wide[0])


def test_many_tokens_go_through_in_parts() -> None:
    x, keys = draw(1, 1500, 2), draw(1, 1, 1500, 4, seed=1)
    y, size = merge_tokens(x, keys, None, 300, 0.4, "pitome", 1)
    assert torch.allclose((size[..., None] * y).sum(1), x.sum(1), atol=1e-9)
    metric = F.normalize(keys[0, 0, 1:], dim=-1)
    energy = F.elu(metric @ metric.T - 0.4).mean(-1)
    assert torch.equal(y[0, 1], x[0, 1 + energy.sort(descending=True, stable=True).indices[600]])


# ---- models


def vit(pool: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, image_size=40, patch_size=8)
    config._attn_implementation = "sdpa"
    model = ViTForImageClassification(config) if pool else ViTModel(config, add_pooling_layer=False)
    return model.eval().requires_grad_(False).to(dtype)


def oracle(model: Any, pixels: Tensor, rule: Any) -> tuple[Tensor, list[int]]:
    """The encoder's modules, and M between attention and feed-forward part; attention counts sizes where the rule says so."""
    x = model.embeddings(pixels)
    size, lengths = torch.ones(x.shape[:2], dtype=torch.float64), []
    layers = model.layers
    for i, layer in enumerate(layers):
        h, attn = layer.layernorm_before(x), layer.attention
        q, k, v = (f(h).view(*h.shape[:2], 4, 16).transpose(1, 2) for f in (attn.q_proj, attn.k_proj, attn.v_proj))
        bias = size.log()[:, None, None].to(x.dtype) if rule.proportional else None
        mixed = F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)
        h = x + attn.o_proj(mixed)
        r = rule.merged(h.shape[1], i, len(layers))
        if r:
            y, size = merged(h, k, size, r, rule.margin_of(i, len(layers)), rule.variant_of(i, len(layers)), rule.leading)
            h = y.to(x.dtype)
        lengths.append(h.shape[1])
        x = h + layer.mlp(layer.layernorm_after(h))
    return model.layernorm(x), lengths


@pytest.mark.parametrize(("target", "rule"), [
    ("cpu", sparsecc.merge(0.8)), ("reference", sparsecc.merge([1.0, 0.7, 0.9, 0.5], variant="pitome", proportional=True)),
])
def test_an_encoder_is_the_oracle(target: str, rule: Any) -> None:
    model, pixels = vit(), draw(2, 3, 40, 40, dtype=torch.float32)
    compiled = sparsecc.compile(model, target, {"layers.*": rule}, pixels, **EAGER)
    for given in (pixels, draw(3, 3, 40, 40, dtype=torch.float32, seed=5)):
        wanted, lengths = oracle(model, given, rule)
        y = compiled(given)[0]
        assert y.shape == wanted.shape and torch.allclose(y, wanted, atol=3e-5)
    regions = [r for r in compiled.explain().to_dict()["regions"] if "merges" in r["pattern"]]
    kept = [n for n, before in zip(lengths, [26, *lengths], strict=False) if n < before]
    assert [r["m"] * r["expected_kept"] for r in regions] == pytest.approx(kept)
    printed = compiled.ir("skip")
    assert print_program(parse_program(printed)) == printed


def test_a_head_on_cls_and_sparse_weights_compose() -> None:
    model, pixels = vit(pool=True), draw(2, 3, 40, 40, dtype=torch.float32)
    sparsecc.prune(model, {"*.fc1": "2:4"})
    spec = {"*.fc1": "2:4", "layers.*": sparsecc.merge(0.75)}
    y = sparsecc.compile(model, "cpu", spec, pixels, **EAGER)(pixels).logits
    wanted = model.classifier(oracle(model.vit, pixels, spec["layers.*"])[0][:, 0])
    assert torch.allclose(y, wanted, atol=3e-5)


def test_keeping_everything_is_the_dense_model() -> None:
    model, pixels = vit(), draw(2, 3, 40, 40, dtype=torch.float32)
    compiled = sparsecc.compile(model, "reference", {"layers.*": sparsecc.merge(1.0)}, pixels, **EAGER)
    assert torch.allclose(compiled(pixels)[0], model(pixels)[0], atol=1e-5) and "merge_tokens" not in compiled.ir("skip")


SMALL: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 128,
}  # fmt: skip


def test_text_encoders_need_a_fixed_length_and_no_mask() -> None:
    model, ids = bert_base(**SMALL), torch.randint(0, 128, (2, 21), generator=torch.Generator().manual_seed(0))
    spec = {"layer.*": sparsecc.merge(0.7, variant="text", margin=0.3)}
    with pytest.raises(SpecError, match=r"layer\.0: its sequences vary in length: capture with dynamic_shapes=None"):
        sparsecc.compile(model, "reference", spec, {"input_ids": ids}, **EAGER)
    y = sparsecc.compile(model, "reference", spec, {"input_ids": ids}, dynamic_shapes=None, **EAGER)(ids)[0]
    assert y.shape[1] == 15 - 4  # of 20 tokens behind CLS 6 merge, of 14 then 4
    padded = {"input_ids": ids, "attention_mask": (torch.arange(21) < torch.tensor([[21], [9]])).long()}
    with pytest.raises(SpecError, match=r"layer\.0: its attention has a mask"):
        sparsecc.compile(model, "reference", spec, padded, dynamic_shapes=None, **EAGER)


@pytest.mark.parametrize("make", [
    lambda: sparsecc.merge(0.4), lambda: sparsecc.merge(1.1), lambda: sparsecc.merge([]), lambda: sparsecc.merge(0.9, margin=1.0),
    lambda: sparsecc.merge(0.9, variant="tome"), lambda: sparsecc.merge(0.9, leading=-1), lambda: sparsecc.merge(float("nan")),
])
def test_bad_arguments_are_refused(make: Any) -> None:
    with pytest.raises(SpecError):
        make()


def test_what_cannot_merge_is_refused_by_name() -> None:
    pixels = draw(2, 3, 40, 40, dtype=torch.float32)
    with pytest.raises(SpecError, match="3 entries, but 4 blocks"):
        sparsecc.compile(vit(), "reference", {"layers.*": sparsecc.merge([0.9, 0.9, 0.9])}, pixels, **EAGER)
    with pytest.raises(SpecError, match="a model does one or the other"):
        sparsecc.compile(llama_stack(64, 96, 2, heads=4, kv_heads=2, vocab=128), "reference",
                         {"*": sparsecc.merge(0.9), "layers.*": sparsecc.ftp(0.3)},
                         {"input_ids": torch.ones(2, 9, dtype=torch.long), "use_cache": False}, **EAGER)  # fmt: skip
