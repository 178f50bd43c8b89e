"""Whole models on target="cuda" in Triton's interpreter, on CPU tensors, against the masked dense model."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

import sparsecc
from sparsecc.ir.ops import KERNELS
from sparsecc.runtime.gpu_neurons import GpuNeurons

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start of the process")


class Block(nn.Module):
    """Three linears of one input, a gated product, a residual: what the passes fuse and batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.softmax(self.query(x) @ self.key(x).transpose(-1, -2), -1) @ self.value(x)
        return mixed + self.down(nn.functional.gelu(self.up(x)))


F32, F16 = torch.float32, torch.float16


@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [("2:4", F16), ("1:5", F32), ("block(16, 16, 0.5)", F16), ("block(4, 1, 0.8)", F32), ("block(1, 16, 0.7)", F32),
     ("unstructured(0.6)", F16)],
)
def test_equals_the_masked_dense_model(pattern: str, dtype: torch.dtype) -> None:
    model = Block(32).eval()
    sparsecc.prune(model, pattern)
    model = model.to(dtype)
    compiled = sparsecc.compile(model, target="cuda", sparsity=pattern, remainder="eager")
    for shape in ((2, 3, 32), (1, 1, 32), *([(2, 3, 32)] if pattern == "2:4" else [])):  # a graph that comes again is no pattern's matter
        x = torch.randn(shape).to(dtype)
        wanted = model.float()(x.float())
        model.to(dtype)
        error = (compiled(x).float() - wanted).abs().max() / wanted.abs().max()
        assert error <= (1e-4 if dtype == torch.float32 else 5e-3)
    regions = compiled.explain().to_dict()["regions"]
    assert all(region["sparse"] for region in regions) and len(regions) == 2  # what shares an input is one


def test_weights_elsewhere_are_refused_by_name() -> None:
    with pytest.raises(sparsecc.TargetError, match=r"0\.weight is on meta"):
        sparsecc.compile(nn.Sequential(nn.Linear(8, 8)).eval().to("meta"), target="cuda")(torch.randn(2, 8, device="meta"))


class Gated(nn.Module):
    """down(act(gate x) * up x), or without the gate's factor."""

    def __init__(self, act: str, gated: bool) -> None:
        super().__init__()
        self.gate_proj, self.down_proj = nn.Linear(48, 128, bias=not gated), nn.Linear(128, 48, bias=not gated)
        self.up_proj = nn.Linear(48, 128, bias=False) if gated else None
        self.act = getattr(nn.functional, act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.act(self.gate_proj(x))
        return x + self.down_proj(a if self.up_proj is None else a * self.up_proj(x))


@pytest.mark.parametrize(
    ("act", "gated", "rule"),
    [("relu", True, sparsecc.neurons()), ("relu", False, sparsecc.neurons()), ("silu", True, sparsecc.neurons(top=0.25)),
     ("silu", True, sparsecc.neurons(threshold=0.05)), ("relu", True, sparsecc.neurons(stat=0.2))],
)
def test_neurons_are_skipped_as_the_masked_block_says(act: str, gated: bool, rule: sparsecc.Neurons) -> None:
    model = Gated(act, gated).eval().requires_grad_(False)
    x = torch.randn(1, 1, 48)
    spec = {"*": rule}
    compiled = sparsecc.compile(model, target="cuda", sparsity=spec, remainder="eager", example_inputs=x, dynamic_shapes=None)
    kernels = [node.args[-1] for node in compiled.graphs[0].history.program.graph.nodes if "neurons" in str(node.target)]
    assert len(kernels) == 1 and kernels[0].startswith("cuda:sm_90 neurons ")
    ran = KERNELS[kernels[0]]
    assert isinstance(ran, GpuNeurons)
    wanted = sparsecc.compile(model, target="reference", sparsity=spec, remainder="eager", example_inputs=x, dynamic_shapes=None)
    for scale in (1.0, 0.0):
        torch.testing.assert_close(compiled(x * scale), wanted(x * scale), rtol=0, atol=2e-5)
    assert ran._launches, "the kernels were launched"
    several = torch.randn(2, 3, 48)
    anew = sparsecc.compile(model, target="cuda", sparsity=spec, remainder="eager", example_inputs=several)
    torch.testing.assert_close(anew(several), sparsecc.compile(model, target="reference", sparsity=spec, remainder="eager")(several))
    assert "to check its numbers" in " ".join(str(compiled.explain()).split())


def test_inputs_of_a_linear_are_skipped() -> None:
    model, x = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 40)).eval().requires_grad_(False), torch.randn(1, 1, 48)
    spec = {"*": sparsecc.inputs(policy="ratio(0.25)")}
    made = {target: sparsecc.compile(model, target, spec, x, remainder="eager", dynamic_shapes=None) for target in ("cuda", "reference")}
    kernels = [node.args[-1] for node in made["cuda"].graphs[0].history.program.graph.nodes if "neurons" in str(node.target)]
    assert len(kernels) == 2 and all(isinstance(KERNELS[key], GpuNeurons) and KERNELS[key]._launches == {} for key in kernels)
    torch.testing.assert_close(made["cuda"](x), made["reference"](x), rtol=0, atol=2e-5)
    assert any(KERNELS[key]._launches for key in kernels)


def test_a_prompts_neurons_are_gathered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = Gated("silu", True).eval().requires_grad_(False), torch.randn(2, 1, 9, 48)
    spec = {"*": sparsecc.neurons(top=0.25, per_request="griffin")}
    gathers: list[int] = []
    plain = torch.Tensor.index_select
    monkeypatch.setattr(torch.Tensor, "index_select", lambda t, *args: gathers.append(1) or plain(t, *args))
    made = {target: sparsecc.compile(model, target, spec, remainder="eager") for target in ("cuda", "reference")}
    for prompt in prompts:
        for target in made:
            torch.testing.assert_close(made[target](prompt), model(prompt), rtol=0, atol=2e-5)
        gathers.clear()
        for x in torch.randn(3, 2, 1, 48):  # two sequences, one token each
            torch.testing.assert_close(made["cuda"](x), made["reference"](x), rtol=0, atol=2e-5)
            assert (made["cuda"](x) - model(x)).abs().max() > 1e-3
        assert len(gathers) == 2  # the gate and the bundle, once


@pytest.mark.parametrize(
    "rule", [sparsecc.ftp([0.3, 0.5]), sparsecc.ftp(0.3, keys="all"), sparsecc.mixture_of_depths(torch.randn(1, 32), "threshold(0.5)")]
)
def test_tokens_are_skipped_by_torchs_gathers(rule: sparsecc.Tokens) -> None:
    from examples.models import llama_stack

    model = llama_stack(32, 96, 2, heads=4, kv_heads=2, vocab=64)
    inputs = {"input_ids": torch.randint(0, 64, (1, 37)), "use_cache": False}
    targets = ("cuda", "reference")
    made = {target: sparsecc.compile(model, target, {"layers.*": rule}, dict(inputs), remainder="eager") for target in targets}
    assert "gather" in made["cuda"].ir("lower")
    torch.testing.assert_close(made["cuda"](**inputs).logits, made["reference"](**inputs).logits, rtol=0, atol=1e-5)
