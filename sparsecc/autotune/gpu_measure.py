"""Timing several functions against each other on a GPU: by events, with a cold L2."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch

from sparsecc.autotune.measure import Timing, timings

FLUSH = 256 << 20
"""Bytes written before each call: more than any L2. Writing them also takes long enough to hide the host's part of the launch."""


def interleaved_on_gpu(fns: Mapping[str, Callable[[], Any]], seconds: float, min_rounds: int = 5) -> dict[str, Timing]:
    """As `measure.interleaved`: round-robin after a warm-up for about `seconds` in all; the first is the baseline."""
    for fn in fns.values():
        fn()
        fn()
    samples: dict[str, list[float]] = {name: [] for name in fns}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < max(1, min_rounds) or time.perf_counter() < end:
        events = {name: _timed(fn) for name, fn in fns.items()}
        torch.cuda.synchronize()
        for name, (start, stop) in events.items():
            samples[name].append(max(1e-3 * start.elapsed_time(stop), 1e-9))
        rounds += 1
    return timings(samples)


def _timed(fn: Callable[[], Any]) -> tuple[Any, Any]:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _flush(torch.cuda.current_device()).zero_()
    start.record()
    fn()
    stop.record()
    return start, stop


@lru_cache
def _flush(device: int) -> torch.Tensor:
    return torch.empty(FLUSH, dtype=torch.uint8, device=f"cuda:{device}")
