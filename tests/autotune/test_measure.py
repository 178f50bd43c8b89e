"""Interleaved timing, on a clock that the functions themselves move."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import pytest

from sparsecc.autotune import interleaved
from sparsecc.autotune.measure import SHORTEST


class Clock:
    """Seconds that pass only when a function says so; `slowdown` is a neighbour."""

    def __init__(self) -> None:
        self.now, self.slowdown = 0.0, 1.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def takes(self, name: str, seconds: float) -> Callable[[], None]:
        def f() -> None:
            self.calls.append(name)
            self.now += seconds * self.slowdown

        return f


def test_times_and_ratios() -> None:
    clock = Clock()
    timings = interleaved({"dense": clock.takes("dense", 4e-3), "csr": clock.takes("csr", 1e-3)}, 0.1, clock=clock)
    assert list(timings) == ["dense", "csr"]
    assert timings["dense"].median == pytest.approx(4e-3)
    assert timings["csr"].best == pytest.approx(1e-3)
    assert timings["dense"].ratio == 1.0
    assert timings["csr"].ratio == pytest.approx(0.25)
    assert clock.now == pytest.approx(0.1, abs=0.02)


def test_functions_take_turns() -> None:
    clock = Clock()
    interleaved({name: clock.takes(name, 1e-3) for name in "abc"}, 0.0, min_rounds=40, clock=clock)
    calls = "".join(clock.calls)
    rounds = [calls[i : i + 3] for i in range(6, len(calls), 3)]
    assert calls[:6] == "aabbcc" and len(rounds) == 40  # two to warm up, then the rounds
    assert {"".join(sorted(one)) for one in rounds} == {"abc"} and len(set(rounds)) == 6  # each before and after each other


def test_ratio_survives_a_neighbour() -> None:
    """From some round on everything takes twice as long: the ratio does not notice."""
    clock = Clock()
    slow_from = 0.0105

    def noisy(name: str, seconds: float) -> Callable[[], None]:
        f = clock.takes(name, seconds)

        def call() -> None:
            clock.slowdown = 2.0 if clock.now > slow_from else 1.0
            f()

        return call

    timings = interleaved({"a": noisy("a", 1e-3), "b": noisy("b", 5e-4)}, 0.0, min_rounds=20, clock=clock)
    assert timings["a"].best == pytest.approx(1e-3) and timings["a"].median == pytest.approx(2e-3)
    assert timings["b"].ratio == pytest.approx(0.5)


def test_short_calls_are_batched() -> None:
    clock = Clock()
    timings = interleaved({"tiny": clock.takes("tiny", 1e-7)}, 0.0, min_rounds=5, clock=clock)
    assert timings["tiny"].median == pytest.approx(1e-7)
    assert len(clock.calls) >= 5 * SHORTEST / 1e-7


def test_real_clock_and_nothing_to_time() -> None:
    assert interleaved({}, 1.0) == {}
    timings = interleaved({"a": lambda: median(range(100))}, 0.0)
    assert 0 < timings["a"].best <= timings["a"].median
