"""Timing several functions against each other on a noisy machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from statistics import median
from typing import Any

SHORTEST = 20e-6
"""Seconds: a shorter sample says more about the clock than about the call, so such calls are batched."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call, `median` and `best`; `ratio` is the median over rounds of this function's time to the first one's.

    Compare by `ratio`: neighbours slow a machine by 2x for seconds, and what is timed side by side is slowed alike.
    """

    median: float
    best: float
    ratio: float


def interleaved(
    fns: Mapping[str, Callable[[], Any]],
    seconds: float,
    min_rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time `fns` in turns, after a warm-up, for about `seconds` in all and at least `min_rounds` rounds; the first is the baseline.

    Each round has an order of its own: what follows a function that reads much finds the caches empty, and that must not always be
    the same one.
    """
    if not fns:
        return {}
    repeats = {name: _repeats(f, clock) for name, f in fns.items()}
    samples: dict[str, list[float]] = {name: [] for name in fns}
    end, rounds, order, random = clock() + seconds, 0, list(fns), Random(0)
    while rounds < max(1, min_rounds) or clock() < end:
        for name in order:
            samples[name].append(_sample(fns[name], repeats[name], clock) / repeats[name])
        random.shuffle(order)
        rounds += 1
    return timings(samples)


def timings(samples: Mapping[str, Sequence[float]]) -> dict[str, Timing]:
    """Of seconds per call by round; the first is the baseline."""
    baseline = next(iter(samples.values()))
    return {
        name: Timing(median(times), min(times), median(a / b for a, b in zip(times, baseline, strict=True)))
        for name, times in samples.items()
    }


def _repeats(f: Callable[[], Any], clock: Callable[[], float]) -> int:
    """Warm up, and find how many calls make a sample of SHORTEST. The first call may compile, so it does not count."""
    f()
    repeats = 1
    while (elapsed := _sample(f, repeats, clock)) < SHORTEST:
        # The clock may not even have ticked: at least double, at most tenfold.
        repeats = min(10 * repeats, max(2 * repeats, math.ceil(repeats * SHORTEST / max(elapsed, 1e-9))))
    return repeats


def _sample(f: Callable[[], Any], repeats: int, clock: Callable[[], float]) -> float:
    """Seconds for `repeats` calls; at least a nanosecond, so that ratios exist."""
    start = clock()
    for _ in range(repeats):
        f()
    return max(clock() - start, 1e-9)
