"""Dynamo graphs with frozen weights: Llama with its cache, changed weights, buffers that are written to."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from sparsecc.dynamo import Frozen
from sparsecc.ir.program import Program
from sparsecc.ir.text import parse_program, print_program, tensors_of
from sparsecc.passes.canonicalize import Canonicalize
from sparsecc.passes.fuse import Fuse
from sparsecc.passes.manager import History, run_passes
from sparsecc.passes.propagate import Propagate


class Compiler:
    """Runs the graph passes, checks the text of every step, and executes what the last text says."""

    def __init__(self) -> None:
        self.histories: list[History] = []

    def __call__(self, program: Program, inputs: Sequence[Any]) -> Callable[..., Any]:
        history = run_passes(program, (Canonicalize(), Propagate(), Fuse(dense_siblings=True)), disable=())
        for step in history.steps:
            parsed = parse_program(step.text, tensors_of(step.program))
            assert print_program(parsed) == step.text
        self.histories.append(history)
        return parsed.run

    def backend(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Frozen:
        return Frozen(gm, self)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        max_position_embeddings=64, tie_word_embeddings=True,
    )).eval()


@torch.no_grad()
def test_llama_prefill_and_decode() -> None:
    model, compiler = llama(), Compiler()
    compiled = torch.compile(model, backend=compiler.backend, dynamic=True, fullgraph=True)
    ids = torch.randint(0, 100, (1, 12))
    ours, theirs = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for first, last in ((0, 7), (7, 8), (8, 9), (9, 10)):
        got = compiled(ids[:, first:last], past_key_values=ours, use_cache=True)
        want = model(ids[:, first:last], past_key_values=theirs, use_cache=True)
        torch.testing.assert_close(got.logits, want.logits)
    assert len(compiler.histories) == 2
    for history in compiler.histories:
        names = {region.name for region in history.program.regions.values()}
        assert {"model.layers.1.self_attn.{q_proj,k_proj,v_proj}", "model.layers.0.mlp.{gate_proj,up_proj}", "lm_head"} & names
        assert sum(1 for _ in history.program.linears()) == 9
        assert all(view.residual is not None for view in history.program.linears() if "down" in history.program.region(view.node).name)


@torch.no_grad()
def test_changed_weights_are_seen() -> None:
    model, compiler = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), Compiler()
    compiled = torch.compile(model, backend=compiler.backend)
    x = torch.randn(3, 4)
    torch.testing.assert_close(compiled(x), model(x))
    model[0].weight.mul_(2)
    torch.testing.assert_close(compiled(x), model(x))
    assert len(compiler.histories) == 2
    model[0].weight = nn.Parameter(torch.randn(4, 4))
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x)
    assert len(compiler.histories) == 3


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("outside", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return self.fc(x) + self.calls + self.outside


@torch.no_grad()
def test_written_buffers_stay_inputs() -> None:
    model, compiler = Counting().eval(), Compiler()
    compiled = torch.compile(model, backend=compiler.backend)
    x = torch.randn(3, 4)
    for i in range(4):
        model.outside.fill_(float(i))
        want = model.fc(x) + model.calls + 1 + model.outside
        torch.testing.assert_close(compiled(x), want)
    assert len(compiler.histories) == 2
    assert {"fc.weight", "fc.bias"} == set(compiler.histories[-1].program.origin.values())
