"""Models in bf16 and fp16: chains of kernels compute in float32, and what comes out is as close to the model in float32 as its own code."""
from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import sparsecc
from examples.models import llama_stack
from sparsecc.runtime.tuner import CpuTuner

PATTERN = "block(4, 1, 0.9)"


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192)
    shown = torch.ones(2, 70, dtype=torch.long)
    shown[1, 31:] = 0
    inputs = {"input_ids": torch.randint(0, 100, (2, 70)), "attention_mask": shown}
    return BertModel(config, add_pooling_layer=False).eval().requires_grad_(False), inputs


def llama() -> tuple[nn.Module, dict[str, Any]]:
    model = llama_stack(64, 160, 2, heads=4, kv_heads=2, vocab=128)
    return model, {"input_ids": torch.randint(0, 128, (2, 70)), "use_cache": False}


def result(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found = model(**inputs)[0]
    return found[inputs["attention_mask"].bool()] if "attention_mask" in inputs else found


def compiled(model: nn.Module, inputs: dict[str, Any], **options: Any) -> sparsecc.CompiledModule:
    options = {"autotune": "none", "remainder": "eager", **options}
    return sparsecc.compile(model, example_inputs=inputs, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [bert, llama])
def test_as_close_to_float32_as_the_model_itself(make: Any, dtype: torch.dtype) -> None:
    model, inputs = make()
    sparsecc.prune(model, PATTERN)
    half = copy.deepcopy(model).to(dtype)
    module = compiled(half, inputs)
    wanted, own, ours = (result(one, inputs) for one in (model, half, module))
    assert ours.dtype == dtype
    off = [float((one.float() - wanted).abs().max() / wanted.abs().max()) for one in (ours, own)]
    assert off[0] <= 1.2 * off[1] + 1e-4
    lowered = module.ir("lower")
    assert "sparsecc.attention" in lowered and "aten.layer_norm" not in lowered.partition("sparsecc.norm")[2]


def test_attention_that_is_slower_alone_is_decided_by_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuTuner, "attention_times", lambda *_: (1.5e-3, 1e-3))
    model, inputs = llama()
    sparsecc.prune(model, PATTERN)
    for won in ("kernels", "torch's"):
        asked: list[int] = []
        race = lambda runs, _, won=won, asked=asked: asked.append(1) or {n: 1e-3 if n == won else 2e-3 for n in runs}  # noqa: E731
        monkeypatch.setattr(sys.modules["sparsecc.compile"], "_race", race)
        module = compiled(model, inputs)
        text = str(module.explain())
        assert asked and f"{won} 1.00 ms" in text
        assert ("scaled_dot_product" in module.ir("lower")) == (won == "torch's")
        torch.testing.assert_close(result(module, inputs), result(model, inputs), rtol=0, atol=1e-4)


def test_the_whole_is_really_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuTuner, "attention_times", lambda *_: (1.5e-3, 1e-3))
    model, inputs = llama()
    sparsecc.prune(model, PATTERN)
    assert "timed both ways: " in str(compiled(model, inputs).explain())
