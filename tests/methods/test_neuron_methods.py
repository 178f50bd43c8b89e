"""Methods that choose neurons: calibrated thresholds, sets per request, profiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import sparsecc
from examples.models import llama_stack
from sparsecc.errors import SpecError
from sparsecc.ir.skip_ops import request_scores
from sparsecc.methods.cats import calibrate, thresholds
from sparsecc.methods.griffin import core_infer, griffin
from sparsecc.methods.profile import profile
from sparsecc.methods.relu import relu_skipping
from sparsecc.methods.spark import statistical_top_k
from sparsecc.methods.top_k import top_k

EAGER: dict[str, Any] = {"autotune": "none", "remainder": "eager"}


def model(activation: str = "silu") -> Any:
    return llama_stack(32, 96, 2, heads=4, kv_heads=2, vocab=64, hidden_act=activation)


def ids(tokens: int) -> torch.Tensor:
    return torch.randint(0, 64, (1, tokens), generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("per", ["block", "neuron"])
def test_calibrated_thresholds_skip_the_fraction_that_was_asked_for(per: Any) -> None:
    found = calibrate(model(), [ids(40), ids(33)], 0.6, per)
    assert set(found.levels) == {"model.layers.0.mlp", "model.layers.1.mlp"}
    assert all(level.numel() == (1 if per == "block" else 96) for level in found.levels.values())
    inputs = {"input_ids": ids(40), "use_cache": False}
    compiled = sparsecc.compile(model(), "reference", {"*.mlp": found}, dict(inputs), **EAGER)
    dense = model()(**inputs).logits
    assert torch.isfinite(compiled(**inputs).logits).all() and not torch.allclose(compiled(**inputs).logits, dense, atol=1e-4)


def test_chess_thresholds_are_numpys() -> None:
    sizes, energy = torch.rand(50, 8) + 0.1, torch.rand(8) + 0.5
    level = thresholds(sizes, energy, 0.5)
    importance = (sizes**2 * energy).numpy()
    tau = np.sort(importance.ravel())[round(0.5 * importance.size) - 1]
    assert np.allclose(level.numpy(), np.sqrt(tau / energy.numpy()))
    assert abs(float((sizes <= level).float().mean()) - 0.5) < 0.01
    assert float(thresholds(sizes, torch.zeros(8), 0.5)[0]) == float("inf")


def test_calibrating_for_nothing_skipped_is_the_dense_model() -> None:
    inputs = {"input_ids": ids(24), "use_cache": False}
    compiled = sparsecc.compile(model(), "reference", {"*": calibrate(model(), [ids(24)], 0.0)}, dict(inputs), **EAGER)
    assert torch.allclose(compiled(**inputs).logits, model()(**inputs).logits, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: calibrate(model(), [], 0.5), lambda: calibrate(model(), [ids(8)], 1.0),
                                  lambda: calibrate(torch.nn.Linear(4, 4).eval(), [torch.randn(2, 4)], 0.5)])  # fmt: skip
def test_bad_calibrations_are_refused(make: Any) -> None:
    with pytest.raises(SpecError):
        make()


def test_methods_are_their_policies() -> None:
    assert [str(m.policy) for m in (relu_skipping(), relu_skipping(0.01), top_k(64), top_k(0.25), statistical_top_k(0.08))] == [
        "nonzero", "atleast(0.01)", "topk(64)", "ratio(0.25)", "stat(0.08)"]


def test_scores_of_a_request() -> None:
    a = torch.tensor([[3.0, 0.0, -4.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    assert torch.allclose(request_scores(a, "griffin"), torch.tensor([0.6, 1.0, 0.8, 0.0]))
    many = torch.arange(10.0).repeat(3, 1)  # nine positive ones: the largest one counts
    assert request_scores(many, "core").tolist() == [0.0] * 9 + [3.0]


@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize("method", [griffin, core_infer])
def test_the_prompt_chooses_the_neurons_of_the_tokens_after_it(method: Any, target: str) -> None:
    dense, rule = model(), method(0.5)
    compiled = sparsecc.compile(dense, target, {"*.mlp": rule}, **EAGER)
    prompt, token = {"input_ids": ids(20), "use_cache": False}, {"input_ids": ids(1), "use_cache": False}
    assert torch.allclose(compiled(**token).logits, dense(**token).logits, atol=1e-5)  # before any prompt: all neurons
    assert torch.allclose(compiled(**prompt).logits, dense(**prompt).logits, atol=1e-5)
    masked = model()
    for i, layer in enumerate(masked.model.layers):
        kept = rule.sets[f"model.layers.{i}.mlp"].long()
        assert kept.numel() == 48 and bool((kept[1:] > kept[:-1]).all())
        gone = torch.ones(96, dtype=torch.bool).scatter_(0, kept, False)
        layer.mlp.down_proj.weight[:, gone] = 0
    assert torch.allclose(compiled(**token).logits, masked(**token).logits, atol=1e-5)


def test_a_profile_counts_active_neurons() -> None:
    found = profile(model("relu"), [ids(32)])["model.layers.0.mlp"]
    assert 0.3 < found["active"] < 0.7 and found["union"][1] <= found["union"][4] <= found["union"][16] <= 1
