"""BERT encoders, unmodified: padded batches of sentences, compared with the same masked weights run densely."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

import sparsecc
from examples.models import minilm, minilm_inputs

PATTERNS = ("block(4, 1, 0.9)", "unstructured(0.9)")
TOLERANCE = 1e-4
"""Largest error as a fraction of the largest output."""


def small_bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=200, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256)
    return BertModel(config).eval().requires_grad_(False)


def padded(batch: int, longest: int) -> dict[str, torch.Tensor]:
    """Token ids of lengths from 3 to `longest`, padded, with their mask."""
    lengths = torch.linspace(3, longest, batch).long() if batch > 1 else torch.tensor([longest])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {"input_ids": torch.randint(1, 200, (batch, longest)) * mask, "attention_mask": mask}


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def test_small_bert() -> None:
    model, pattern = small_bert(), PATTERNS[0]
    sparsecc.prune(model, pattern)
    compiled = sparsecc.compile(model, sparsity=pattern, autotune="none", remainder="eager")
    for batch, longest in ((16, 20), (3, 33), (1, 12)):
        inputs: dict[str, Any] = padded(batch, longest)
        got, want = compiled(**inputs), model(**inputs)
        assert type(got) is BaseModelOutputWithPoolingAndCrossAttentions
        assert list(got.keys()) == list(want.keys())
        assert error(got.last_hidden_state, want.last_hidden_state) <= TOLERANCE
        assert error(got.pooler_output, want.pooler_output) <= TOLERANCE
    assert len(compiled.graphs) == 2  # batch 1 is a form of its own
    assert compiled.explain().to_dict()["totals"]["sparse"] >= 8
    ids = padded(4, 9)["input_ids"]
    assert error(compiled(ids)[0], model(ids)[0]) <= TOLERANCE  # positional, no mask
    assert type(compiled(ids, return_dict=False)) is tuple
    assert compiled.config is model.config


def test_a_dense_layer_between_chains_that_share_a_mask() -> None:
    """What one chain prepares of the mask, another reads: Inductor checks its strides on the way."""
    model, spec = small_bert(), {"*": PATTERNS[0], "encoder.layer.0.output.dense": "dense"}
    sparsecc.prune(model, spec)
    inputs = padded(1, 128)
    inputs["attention_mask"][:, 100:] = 0
    compiled = sparsecc.compile(model, sparsity=spec, autotune="none", remainder="inductor")
    assert error(compiled(**inputs)[0], model(**inputs)[0]) <= TOLERANCE


def test_names_and_globs_are_the_models() -> None:
    """BERT has a module called `self`."""
    model = small_bert()
    spec = {"encoder.layer.*.attention.self.query": "block(8, 1, 0.8)", "encoder.layer.1.output.dense": "nm(1, 4)"}
    sparsecc.prune(model, spec)
    inputs = padded(4, 16)
    exported = sparsecc.compile(model, sparsity=spec, example_inputs=inputs, autotune="none", remainder="eager")
    assert error(exported(**inputs)[0], model(**inputs)[0]) <= TOLERANCE
    torch._dynamo.reset()
    through_dynamo = torch.compile(model, backend="sparsecc", options={"sparsity": spec, "target": "reference", "remainder": "eager"})
    with torch.no_grad():
        assert error(through_dynamo(**inputs)[0], model(**inputs)[0]) <= TOLERANCE


@pytest.mark.parametrize("pattern", [PATTERNS[0], pytest.param(PATTERNS[1], marks=pytest.mark.slow)])
def test_minilm_on_real_sentences(pattern: str) -> None:
    model = minilm()
    sparsecc.prune(model, pattern)
    compiled = sparsecc.compile(model, sparsity=pattern, autotune="none", remainder="eager")
    for batch in (16, 1):
        inputs = minilm_inputs(batch)
        assert (batch == 1) == bool(inputs["attention_mask"].all())
        got, want = compiled(**inputs), model(**inputs)
        assert type(got) is type(want)
        assert error(got.last_hidden_state, want.last_hidden_state) <= TOLERANCE
    assert len(compiled.graphs) == 2
    assert compiled.explain().to_dict()["totals"]["dense"] == 0
