"""prune: the weights satisfy the spec afterwards, nothing else changes, and what cannot be is refused before anything does."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from sparsecc.errors import SpecError
from sparsecc.formats.pattern import parse_pattern
from sparsecc.prune import prune

PATTERNS = ["2:4", "nm(1, 4)", "block(4, 1, 0.75)", "block(4, 4, 0.5)", "unstructured(0.8)", "rows(0.25)", "cols(0.5)"]


class Tiny(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.lm_head = nn.Linear(16, 20, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.down(torch.relu(self.up(self.embed(ids)))))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_the_weights_satisfy_the_pattern(text: str, criterion: str) -> None:
    torch.manual_seed(0)
    model = Tiny().train()
    before = weights(model)
    batches = [torch.randint(20, (2, 5)), (torch.randint(20, (1, 3)),), {"ids": torch.randint(20, (1, 1))}]
    report = prune(model, text, criterion, batches)  # pyright: ignore[reportArgumentType]
    pattern = parse_pattern(text)
    assert [row.name for row in report.rows] == ["up", "down"] and report.skipped == {"lm_head": "excluded"}
    for row in report.rows:
        weight = model.get_submodule(row.name).weight
        assert isinstance(weight, Tensor)
        assert pattern.mask_violation(weight) is None
        assert row.before == 1.0 and row.after == pytest.approx(pattern.density or 0, abs=0.05)
        kept = weight != 0
        assert torch.equal(weight[kept], before[f"{row.name}.weight"][kept])
    assert torch.equal(model.lm_head.weight, before["lm_head.weight"])
    assert model.training and model.up.training and not model.up._forward_pre_hooks


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(2, 12), st.sampled_from([0.3, 0.5, 0.75]), st.integers(0, 1 << 30))
def test_wanda_is_its_definition(N: int, K: int, sparsity: float, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Linear(K, N)
    x = torch.randn(3, 7, K)
    w = model.weight.detach().clone()
    score = w.abs() * x.view(-1, K).norm(dim=0)
    keep = math.floor(K * (1 - Fraction(str(sparsity))))
    expected = torch.zeros_like(w).scatter(1, score.topk(keep, dim=1).indices, 1).bool()
    prune(nn.Sequential(model), f"unstructured({sparsity})", "wanda", [x[:1], x[1:]])
    assert torch.equal(model.weight.ne(0), expected)


def test_globs_mix_patterns() -> None:
    model = Tiny()
    report = prune(model, {"*": "unstructured(0.5)", "down": "dense", "lm_head": "2:4"}, exclude=())
    assert {row.name: row.pattern for row in report.rows} == {"up": "unstructured(0.5)", "lm_head": "nm(2, 4)"}
    assert report.skipped == {"down": "dense in the spec"}
    assert report.to_dict()["rows"][0] == {
        "name": "up", "names": ("up",), "pattern": "unstructured(0.5)", "before": 1.0, "after": 0.5,
    }  # fmt: skip
    assert "lm_head" in str(report) and "50.0 %" in str(report)


def test_a_head_tied_to_an_embedding_is_left_alone_unless_named() -> None:
    model = Tiny(tied=True)
    assert prune(model, "2:4", exclude=()).skipped == {"lm_head": "tied to an embedding"}
    assert bool((model.embed.weight != 0).all())
    prune(model, {"lm_head": "2:4"}, exclude=())
    assert parse_pattern("2:4").mask_violation(model.embed.weight) is None


def test_tied_weights_are_pruned_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    report = prune(model, "unstructured(0.5)", "wanda", [torch.randn(4, 8)])
    assert [(row.names, row.after) for row in report.rows] == [(("0", "2"), 0.5)]
    with pytest.raises(SpecError, match="0 and 2 share one weight"):
        prune(model, {"0": "2:4", "2": "unstructured(0.5)"})


def test_nan_weights_are_kept() -> None:
    linear = nn.Linear(4, 1)
    with torch.no_grad():
        linear.weight[0, 2] = torch.nan
    prune(nn.Sequential(linear), "nm(1, 4)")
    assert linear.weight.isnan().tolist() == [[False, False, True, False]]
    assert int(linear.weight.count_nonzero()) == 1


def test_an_optimizer_and_a_version_guard_see_the_change() -> None:
    model = Tiny()
    weight, version = model.up.weight, model.up.weight._version
    prune(model, "2:4")
    assert model.up.weight is weight and weight._version > version and weight.requires_grad


def broken(model: Tiny, how: str) -> Tiny:
    if how == "mask":
        torch_prune.l1_unstructured(model.down, "weight", 0.5)
    elif how == "parametrized":
        nn.utils.parametrizations.weight_norm(model.down)
    elif how == "meta":
        model.down = nn.Linear(32, 16, device="meta")
    return model


@pytest.mark.parametrize(
    ("how", "spec", "criterion", "calibration", "message"),
    [
        ("", "block(4, 1)", "magnitude", None, "up: block.* fixes no sparsity"),
        ("", {"dwn": "2:4"}, "magnitude", None, "closest: down"),
        ("", None, "magnitude", None, "nothing to prune"),
        ("", "2:4", "wanda", None, "needs calibration"),
        ("", "2:4", "wanda", [], "up was never called"),
        ("", "2:4", "hessian", None, "unknown criterion"),
        ("mask", "2:4", "magnitude", None, "down already carries a torch.nn.utils.prune mask"),
        ("parametrized", "2:4", "magnitude", None, "down.weight is not a plain floating parameter"),
        ("meta", "2:4", "magnitude", None, "down.weight holds no strided values"),
    ],
)
def test_refusals_come_before_any_change(how: str, spec: object, criterion: str, calibration: object, message: str) -> None:
    model = broken(Tiny(), how)
    before = model.up.weight.clone()
    with pytest.raises(SpecError, match=message):
        prune(model, spec, criterion, calibration)  # pyright: ignore[reportArgumentType]
    assert torch.equal(model.up.weight, before)


def test_bad_calibration_is_refused_and_leaves_no_hooks() -> None:
    linear = nn.Linear(4, 4)
    model, before = nn.Sequential(linear), linear.weight.clone()
    with pytest.raises(SpecError, match="0 saw NaN"):
        prune(model, "2:4", "wanda", [torch.full((1, 4), torch.nan)])
    with pytest.raises(RuntimeError):
        prune(model, "2:4", "wanda", [torch.zeros(1, 5)])
    assert torch.equal(linear.weight, before) and not linear._forward_pre_hooks
