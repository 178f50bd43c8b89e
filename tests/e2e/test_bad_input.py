"""Bad and odd input: a clear typed error, or exact results; nothing in between."""
from __future__ import annotations

import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import sparsecc

N, K = 256, 256


def linear(pattern: str | None = "unstructured(0.9)", n: int = N, k: int = K) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(k, n)).eval().requires_grad_(False)
    if pattern:
        sparsecc.prune(model, pattern)
    return model


def compiled(model: Any, sparsity: Any = None, **options: Any) -> sparsecc.CompiledModule:
    return sparsecc.compile(model, sparsity=sparsity, **{"autotune": "none", "remainder": "eager", **options})


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5, equal_nan=True)


def formats(module: sparsecc.CompiledModule) -> list[str]:
    return [region.format or "dense" for region in module.explain().regions]


# ---- the spec


def test_broken_pattern_names_the_place_and_the_way_out() -> None:
    model, x = linear("nm(2, 4)"), torch.randn(4, K)
    model[0].weight[3, 8:12] = 1.0
    with pytest.raises(sparsecc.PatternViolation, match=r"0\.weight must be nm\(2, 4\), but row 3, columns 8-11 hold 4 .*sparsecc\.prune"):
        compiled(model, "2:4")(x)
    with pytest.raises(sparsecc.PatternViolation, match=r"block\(4, 1, 0\.9\).*the spec asks for 90 %"):
        compiled(linear("block(4, 1, 0.5)"), "block(4, 1, 0.9)", example_inputs=x)
    with pytest.raises(sparsecc.PatternViolation, match=r"0\.weight"):
        compiled(linear(None).double(), "2:4")(x.double())  # a dtype that is not packed has to hold its pattern too


def test_unknown_globs_and_patterns() -> None:
    model = nn.Sequential(OrderedDict(query=nn.Linear(8, 8), dense=nn.Linear(8, 8))).eval()
    with pytest.raises(sparsecc.SpecError, match="'quary' matches no linear weight; closest: query"):
        compiled(model, {"quary": "2:4"})(torch.randn(2, 8))
    with pytest.raises(sparsecc.SpecError, match=r"(?s)did you mean 'block'.*\n    blokc\(4, 1\)\n    \^"):
        compiled(model, "blokc(4, 1)")
    with pytest.raises(sparsecc.SpecError, match=r"(?s)sparsity\['query'\].*\n    nm\(2 4\)\n       \^"):
        compiled(model, {"query": "nm(2 4)"})


@pytest.mark.parametrize(("options", "error", "says"), [
    ({"autotune": "fast"}, sparsecc.SpecError, "use 'none', 'quick', 'full'"),
    ({"remainder": "fast"}, sparsecc.SpecError, "use 'auto', 'inductor' or 'eager'"),
    ({"target": "vulkan"}, sparsecc.TargetError, "is not known: use 'cpu'"),
    ({"target": "cpu:sse9"}, sparsecc.TargetError, "known are .*cpu:avx2"),
    ({"dynamic_shapes": "some", "example_inputs": (torch.zeros(2, K),)}, sparsecc.CaptureError, "use 'auto'"),
])
def test_options(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        compiled(linear(), **options)


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"takes an nn\.Module or an ExportedProgram, not function"):
        compiled(lambda x: x)


# ---- the model


def test_train_mode() -> None:
    with pytest.raises(sparsecc.CaptureError, match=r"Sequential is in train mode: call model\.eval\(\)"):
        compiled(linear().train())(torch.randn(2, K))
    mixed = nn.Sequential(*linear(), nn.Dropout()).eval()
    mixed[1].train()
    with pytest.raises(sparsecc.CaptureError, match="1 is in train mode"):
        compiled(mixed)(torch.randn(2, K))


class Branching(nn.Module):
    def __init__(this) -> None:  # names must not depend on what the model calls itself
        super().__init__()
        this.up, this.down = nn.Linear(K, N), nn.Linear(N, K)

    def forward(this, x: torch.Tensor) -> torch.Tensor:
        y = this.up(x)
        return this.down(y + 1 if y.sum() > 0 else y - 1)


def test_graph_breaks_run_exactly(capfd: pytest.CaptureFixture[str]) -> None:
    model, x = Branching().eval().requires_grad_(False), torch.randn(8, K)
    sparsecc.prune(model, "unstructured(0.9)")
    module = compiled(model, {"down": "unstructured(0.9)"})
    close(module(x), model(x))
    close(module(-x), model(-x))
    named = {region.name: region.pattern for graph in range(len(module.graphs)) for region in module.explain(graph).regions}
    assert named["down"] == "unstructured(0.9)"
    assert set(named) == {"up", "down"}
    assert not capfd.readouterr().err  # torch.export prints the graph it gave up on
    with pytest.raises(sparsecc.SpecError, match="'dawn' matches no linear weight; closest: down"):
        compiled(model, {"dawn": "2:4"})(x)


def test_dtypes_and_devices() -> None:
    x = torch.randn(8, K)
    for dtype, tolerance in ((torch.float64, 0.0), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        model = linear().to(dtype)
        module = compiled(model)
        torch.testing.assert_close(module(x.to(dtype)), model(x.to(dtype)), rtol=tolerance, atol=tolerance)
        assert module(x.to(dtype)).dtype == dtype
    model = linear()
    module = compiled(model)
    close(module(x), model(x))
    with pytest.raises(sparsecc.TargetError, match="input is on meta, the module was compiled for cpu"):
        module(x.to("meta"))
    with pytest.raises(sparsecc.TargetError, match=r"0\.\w+ is on meta, which target 'cpu' cannot serve: move the model to the CPU"):
        compiled(linear().to("meta"))(x.to("meta"))


def test_calls_that_the_model_refuses_raise_its_own_error() -> None:
    model, x = linear(), torch.randn(8, K)
    module = compiled(model)
    close(module(x), model(x))
    for call in (lambda m: m(x.double()), lambda m: m(x[:, 1:]), lambda m: m(3)):
        with pytest.raises((RuntimeError, TypeError)) as ours:
            call(module)
        with pytest.raises(type(ours.value)):
            call(model)
    with pytest.raises(TypeError, match="missing"):
        module()
    close(module(x), model(x))


# ---- weights


@pytest.mark.parametrize("pattern", ["unstructured(0.9)", "block(4, 1, 0.9)", "nm(2, 4)"])
def test_nan_and_infinite_weights_are_kept(pattern: str) -> None:
    """A skipped zero contributes nothing, also against an infinite activation; a kept NaN or infinity acts as in dense code."""
    model, x = linear(pattern), torch.randn(24, K)
    kept = model[0].weight.nonzero()
    for at, value in zip((0, len(kept) // 2, -1), (float("nan"), float("inf"), -float("inf")), strict=True):
        model[0].weight[tuple(kept[at])] = value
    module = compiled(model, pattern)
    close(module(x), model(x))
    assert formats(module) != ["dense"]
    x[3, 5] = float("inf")
    feature_5 = model[0].weight[:, 5] != 0
    got, want = module(x), model(x)
    close(got[:, feature_5], want[:, feature_5])
    assert got[3, ~feature_5 & model[0].weight.isfinite().all(1)].isfinite().all()


@pytest.mark.parametrize("sparsity", [None, "unstructured(0.9)", "block(4, 1, 0.9)", "2:4", "rows", "cols"])
def test_all_zero_weight(sparsity: str | None) -> None:
    model, x = linear(None), torch.randn(8, K)
    model[0].weight.zero_()
    close(compiled(model, sparsity)(x), model(x))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 300), (300, 1), (7, 13), (0, 8), (8, 0)])
def test_tiny_and_empty_weights(n: int, k: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch on initializing a tensor of no elements
        model = linear("unstructured(0.5)" if n * k else None, n, k)
    module = compiled(model)
    for rows in (5, 1):
        close(module(torch.ones(rows, k)), model(torch.ones(rows, k)))


def test_empty_and_one_row_inputs() -> None:
    model = linear()
    for first in (0, 1, 9):
        module = compiled(model)
        for rows in (first, 0, 1, 2, 17):
            x = torch.randn(rows, K)
            close(module(x), model(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(N, K), nn.Linear(K, K), nn.Linear(K, N, bias=False)
        self.again = nn.Linear(K, K)
        self.again.weight = self.fc.weight
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(self.fc(self.embed(ids))))


def test_tied_weights() -> None:
    model, ids = Tied().eval().requires_grad_(False), torch.randint(0, N, (3, 5))
    sparsecc.prune(model, {"fc": "unstructured(0.9)", "head": "unstructured(0.9)"}, exclude=())
    module = compiled(model, "unstructured(0.9)")
    torch.testing.assert_close(module(ids), model(ids), rtol=1e-5, atol=1e-4)
    reasons = {region.name: region.reason for region in module.explain().regions}
    assert set(reasons) == {"fc", "head"}
    assert reasons["head"] == "tied to an embedding: name it in the spec to include it"
    for name in ("fc", "again"):  # either name of the shared weight
        module = compiled(model, {name: "dense", "head": "unstructured(0.9)"})
        torch.testing.assert_close(module(ids), model(ids), rtol=1e-5, atol=1e-4)
        assert [region.pattern for region in module.explain().regions] == ["", "", "unstructured(0.9)"]
    with pytest.raises(sparsecc.SpecError, match=r"share one weight, but .* fc -> dense, again -> detect"):
        compiled(model, {"fc": "dense", "again": "detect"})(ids)


def test_the_ecosystems_sparse_weights() -> None:
    x = torch.randn(8, K)
    model = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K)).eval().requires_grad_(False)
    for layer in (model[0], model[2]):
        torch_prune.l1_unstructured(layer, "weight", 0.9)
    module = compiled(model, {"0": "unstructured(0.9)"})
    close(module(x), model(x))
    assert len(formats(module)) == 2 and "dense" not in formats(module)
    want = model(x)
    for layer in (model[0], model[2]):
        torch_prune.remove(layer, "weight")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its sparse CSR tensors a prototype
        model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse_csr(), requires_grad=False)
    module = compiled(model, "unstructured(0.9)")
    close(module(x), want)
    assert len(formats(module)) == 2 and "dense" not in formats(module)
    assert model[0].weight.layout == torch.sparse_csr


# ---- the surroundings


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("SPARSECC_CACHE", str(tmp_path / "file" / "cache"))
    model, x = linear("block(4, 1, 0.9)"), torch.randn(16, K)
    with pytest.warns(RuntimeWarning, match="tuning cache"):
        module = compiled(model, autotune="quick", tune_seconds=30.0, example_inputs=x)
    close(module(x), model(x))
