"""The contest, with candidates whose speed is known."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecc.autotune import Candidate, Effort, Result, contest, mismatch, search
from sparsecc.autotune.measure import Timing

WANTED = torch.tensor([[1.0, -2.0], [0.5, 4.0]], dtype=torch.float64)
SPEED = {"dense": 4.0, "fast": 1.0, "slow": 9.0, "tie": 4.0, "guess": 3.0}


class Call:
    """A built candidate: says its name, so that the fake timer knows its speed."""

    def __init__(self, name: str, out: Tensor) -> None:
        self.name, self.out = name, out

    def __call__(self) -> Tensor:
        return self.out


@pytest.fixture(autouse=True)
def known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the timer by SPEED, slowed 2x for every function but the first: only ratios are right."""

    def timer(fns: Mapping[str, Any], seconds: float, min_rounds: int = 5) -> dict[str, Timing]:
        speed = [SPEED[call.name] for call in fns.values()]
        return {name: Timing(2 * s if i else s, s, s / speed[0]) for i, (name, s) in enumerate(zip(fns, speed, strict=True))}

    monkeypatch.setattr(search, "interleaved", timer)


def candidate(name: str, predicted: float, out: Tensor = WANTED, built: list[str] | None = None) -> Candidate:
    def build() -> Callable[[], Tensor]:
        if built is not None:
            built.append(name)
        return Call(name, out.float())

    return Candidate(name, predicted, build)


def broken(name: str, predicted: float, error: Exception) -> Candidate:
    def build() -> Callable[[], Tensor]:
        raise error

    return Candidate(name, predicted, build)


def run(*candidates: Candidate, effort: Effort = "full", seconds: float = 1e6, top: int | None = None, dense: float = 4.0) -> list[Result]:
    return contest(candidate("dense", dense), candidates, lambda: WANTED, 1e-4, effort, time.monotonic() + seconds, top)


def test_fastest_wins_whatever_was_predicted() -> None:
    results = run(candidate("slow", 0.5), candidate("fast", 8.0))
    assert [(r.name, r.seconds, r.error) for r in results] == [("fast", 1.0, None), ("dense", 4.0, None), ("slow", 9.0, None)]


def test_dense_wins_ties() -> None:
    assert run(candidate("tie", 1.0))[0].name == "dense"
    assert run(candidate("fast", 4.0), effort="none")[0].name == "dense"
    assert run()[0] == Result("dense", 4.0, None, None)


def test_where_most_samples_waited_for_a_turn_the_shortest_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = {"0": Timing(8e-3, 4e-5, 1.0), "1": Timing(8e-3, 1e-5, 1.01)}
    monkeypatch.setattr(search, "interleaved", lambda fns, seconds, rounds: waited)
    assert [(r.name, r.seconds) for r in run(candidate("fast", 1.0))] == [("fast", 1e-5), ("dense", 4e-5)]


def test_effort_none_trusts_the_prediction_and_still_checks() -> None:
    built: list[str] = []
    results = run(candidate("slow", 2.0, built=built), candidate("fast", 1.0, built=built), effort="none")
    assert built == ["fast"]
    assert results[0] == Result("fast", 1.0, None, None)
    assert run(candidate("fast", 5.0), effort="none")[0].name == "dense"
    with pytest.warns(RuntimeWarning, match="fast is wrong"):
        assert run(candidate("fast", 1.0, WANTED + 1), effort="none")[0].name == "dense"


def test_quick_builds_the_best_three() -> None:
    built: list[str] = []
    results = run(*(candidate("guess", float(i), built=built) for i in range(5)), effort="quick")
    assert len(built) == 3
    assert [r.error for r in results[-2:]] == ["not tried: 3 better predictions were"] * 2
    assert run(candidate("slow", 1.0), candidate("fast", 2.0), effort="quick", top=1)[0].name == "dense"


def test_a_wrong_candidate_is_dropped() -> None:
    with pytest.warns(RuntimeWarning, match="candidate fast is wrong and was dropped"):
        results = run(candidate("fast", 1.0, WANTED + 1e-2), candidate("guess", 2.0))
    assert [r.name for r in results] == ["guess", "dense", "fast"]
    assert results[-1].seconds is None and (results[-1].error or "").startswith("wrong: largest error 0.01")


def test_failures_give_their_place_to_the_next() -> None:
    results = run(
        broken("a", 0.1, MemoryError("4 GiB")), broken("b", 0.2, RuntimeError("no registers\nat line 3")), candidate("fast", 1.0), top=1
    )
    assert [r.name for r in results] == ["fast", "dense", "a", "b"]
    assert [r.error for r in results[2:]] == ["MemoryError: 4 GiB", "RuntimeError: no registers"]


def test_nothing_is_built_after_the_deadline() -> None:
    built: list[str] = []
    results = run(candidate("fast", 1.0, built=built), seconds=-1.0)
    assert not built
    assert results == [Result("dense", 4.0, None, None), Result("fast", 1.0, None, search.OUT_OF_TIME)]


def test_reference_is_called_once_and_may_fail() -> None:
    calls: list[int] = []

    def reference() -> Tensor:
        calls.append(1)
        return WANTED

    dense, others = candidate("dense", 4.0), [candidate("fast", 1.0), candidate("slow", 2.0)]
    contest(dense, others, reference, 1e-4, "full", math.inf)
    assert len(calls) == 1
    with pytest.raises(ZeroDivisionError):
        contest(dense, others, lambda: WANTED / (1 // 0), 1e-4, "full", math.inf)


def test_mismatch_in_words() -> None:
    assert mismatch(WANTED.float() + 3e-5, WANTED, 1e-4) is None
    assert mismatch(WANTED[0], WANTED, 1.0) == "shape (2,), expected (2, 2)"
    assert mismatch(torch.empty(0, 3), torch.empty(0, 3, dtype=torch.float64), 0.0) is None
    odd = torch.tensor([math.nan, math.inf, -math.inf, 1.0], dtype=torch.float64)
    assert mismatch(odd.float(), odd, 1e-6) is None
    assert "inf" in (mismatch(torch.tensor([math.nan, math.inf, math.inf, 1.0]), odd, 1e-6) or "")
    assert mismatch(torch.tensor([1.0, math.nan]), torch.ones(2, dtype=torch.float64), 10.0) is not None
    assert mismatch(torch.ones(2), torch.tensor([1.0, math.nan], dtype=torch.float64), 10.0) is not None


def test_a_contest_on_the_real_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = run(candidate("fast", 1.0), effort="quick", seconds=0.01)
    assert {r.name for r in results} == {"dense", "fast"}
    assert all(r.seconds and r.error is None for r in results)
    assert results == sorted(results, key=lambda r: r.seconds or 0.0)
