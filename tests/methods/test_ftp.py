"""The search for a token-skipping schedule."""

from __future__ import annotations

import pytest
import torch

import sparsecc
from examples.models import llama_stack
from sparsecc.errors import SpecError
from sparsecc.methods.ftp import cost_at, fitted, search
from sparsecc.methods.ftp_router import train, unmet

COSTS = {0.0: 1.0, 0.3: 0.7, 0.6: 0.4, 0.9: 0.1}


def test_costs_between_measured_ones_lie_on_a_line() -> None:
    assert cost_at(COSTS, 0.3) == 0.7 and abs(cost_at(COSTS, 0.45) - 0.55) < 1e-9


def test_schedules_are_made_to_fit_the_budget() -> None:
    price = lambda schedule: sum(cost_at(COSTS, s) for s in schedule) / len(schedule)  # noqa: E731
    found = fitted((0.0, 0.0, 0.0), price, 0.7, torch.Generator().manual_seed(0))
    assert price(found) <= 0.7 and max(found) <= 0.9


@pytest.mark.slow
def test_the_search_spares_the_block_that_matters() -> None:
    model = llama_stack(32, 64, 3, heads=4, kv_heads=2, vocab=64)
    for name in ("o_proj", "q_proj"):
        getattr(model.model.layers[1].self_attn, name).weight.mul_(30)
    data = [{"input_ids": torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0)), "use_cache": False}]
    found = search(model, data, 0.3, "layers.*", population=6, generations=3, costs=COSTS)
    assert found.cost <= 0.7 + 1e-5 and found.tokens.schedule[1] <= min(found.tokens.schedule[0], found.tokens.schedule[2])
    inputs = data[0]
    compiled = sparsecc.compile(model, "reference", {"layers.*": found.tokens}, dict(inputs), autotune="none", remainder="eager")
    assert torch.isfinite(compiled(**inputs).logits).all()


@pytest.mark.parametrize(("skipped", "glob"), [(1.0, "layers.*"), (0.3, "encoder.*")])
def test_impossible_searches_are_refused(skipped: float, glob: str) -> None:
    model = llama_stack(32, 64, 2, heads=4, kv_heads=2, vocab=64)
    with pytest.raises(SpecError):
        search(model, [{"input_ids": torch.zeros(1, 8, dtype=torch.long), "use_cache": False}], skipped, glob, costs=COSTS)


def test_the_constraint_is_one_sided() -> None:
    real = torch.ones(1, 10, dtype=torch.bool)
    for kept, punished in ((8, True), (3, False)):  # of 10, where half are to go
        y = torch.where(torch.arange(10) < kept, 1.0, -1.0)[None].requires_grad_()
        loss = unmet(y.sigmoid(), 0.5, real)
        loss.backward()
        assert (loss.item() > 0) == punished and bool((y.grad != 0).any()) == punished


@pytest.mark.slow
def test_a_trained_router_follows_its_schedule() -> None:
    model = llama_stack(32, 64, 3, heads=4, kv_heads=2, vocab=64)
    data = [{"input_ids": torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(i)), "use_cache": False} for i in range(2)]
    before = [p.clone() for p in model.parameters()]
    made = train(model, data, [0.0, 0.4, 0.6], "layers.*", steps=40)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    compiled = sparsecc.compile(model, "reference", {"layers.*": sparsecc.ftp(router=made)}, data[0], autotune="none", remainder="eager")
    compiled(**data[0])
    regions = [r for r in compiled.explain().to_dict()["regions"] if "learned" in r["reason"]]
    assert [round(1 - r["expected_kept"], 2) for r in regions] == [0.4, 0.6]
    assert all(0.05 < r["observed_kept"] < r["expected_kept"] + 0.15 for r in regions)
