"""The contest: candidates against the dense code. A candidate is checked before it is timed, and the fastest wins."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from .measure import Timing, interleaved

Effort = Literal["none", "quick", "full"]

TOP: dict[Effort, int | None] = {"none": 1, "quick": 3, "full": None}
"""How many candidates enter, the best predictions first; None is all of them."""

SECONDS: dict[Effort, float] = {"none": 0.0, "quick": 0.05, "full": 0.25}
"""Timing per entrant. With `none` nothing is timed and the predictions decide."""

CROWDED = 4.0
"""The median of the dense code's samples over the shortest, from which on the machine was busy with something else."""

OUT_OF_TIME = "not tried: out of time"


@dataclass(frozen=True)
class Candidate:
    """`build()` compiles it and returns a call without arguments that computes the output; `predicted` is in seconds."""

    name: str
    predicted: float
    build: Callable[[], Callable[[], Tensor]]


Race = Callable[[Mapping[str, Callable[[], Tensor]], float, int], Mapping[str, Timing]]
"""race(calls, seconds, least rounds) -> the timing of each, as `measure.interleaved`."""

Entrant = tuple[Candidate, Callable[[], Tensor]]


@dataclass(frozen=True)
class Result:
    """`seconds` per call, None if it was not timed; `error` says why a candidate did not take part, None if it did."""

    name: str
    predicted: float
    seconds: float | None
    error: str | None


def contest(
    dense: Candidate,
    candidates: Sequence[Candidate],
    reference: Callable[[], Tensor],
    tolerance: float,
    effort: Effort,
    deadline: float,
    top: int | None = None,
    race: Race | None = None,
) -> list[Result]:
    """One result per candidate and one for `dense`, sorted best first; the first is the winner and has no error.

    The best `top` (by default TOP[effort]) predictions are built, each checked against `reference()` (float64, called at most once):
    largest error <= tolerance * largest finite |reference|. A wrong one is dropped with a warning; one that cannot be built or run
    gives its place to the next. The survivors are timed side by side with `dense`, which wins ties. After `deadline`
    (time.monotonic) nothing more is built. An exception of `dense` or `reference` is the caller's: there is no way to go on.
    """
    top = TOP[effort] if top is None else top
    ready, out = _admit(candidates, cache(reference), tolerance, deadline, len(candidates) if top is None else top)
    if effort == "none" or not ready:
        entrants = [Result(c.name, c.predicted, None, None) for c in (dense, *(c for c, _ in ready))]
        return sorted(entrants, key=lambda r: r.predicted) + out
    entrants = _race([(dense, dense.build()), *ready], SECONDS[effort], deadline, race or interleaved)
    return sorted(entrants, key=lambda r: r.seconds or 0.0) + out


def _race(ready: Sequence[Entrant], seconds: float, deadline: float, race: Race) -> list[Result]:
    """Time the entrants against the first, `seconds` each or what is left until the deadline."""
    left = deadline - time.monotonic()
    wanted = seconds * len(ready)
    calls = {str(i): call for i, (_, call) in enumerate(ready)}  # two candidates may share a name
    timings = race(calls, max(0.0, min(wanted, left)), 5 if wanted <= left else 3)
    # Ratios survive a noisy neighbour, medians of different functions do not: seconds are put on the scale of the first one's. Where
    # even the median sample was mostly waiting for a turn, all would seem equal, and only the shortest samples say anything.
    first = timings["0"]
    crowded = first.median > CROWDED * first.best
    seconds = {name: t.best if crowded else first.median * t.ratio for name, t in timings.items()}
    return [Result(c.name, c.predicted, took, None) for (c, _), took in zip(ready, seconds.values(), strict=True)]


def _admit(
    candidates: Iterable[Candidate], reference: Callable[[], Tensor], tolerance: float, deadline: float, top: int
) -> tuple[list[Entrant], list[Result]]:
    """Build and check by rank until `top` candidates are ready: those with their calls, and a result for each of the others."""
    ready: list[Entrant] = []
    out: list[Result] = []
    for candidate in sorted(candidates, key=lambda c: c.predicted):
        if len(ready) >= top:
            error = f"not tried: {top} better predictions were"
        elif time.monotonic() >= deadline:
            error = OUT_OF_TIME
        else:
            call, error = _build(candidate, reference, tolerance)
            if call:
                ready.append((candidate, call))
                continue
        out.append(Result(candidate.name, candidate.predicted, None, error))
    return ready, out


def _build(candidate: Candidate, reference: Callable[[], Tensor], tolerance: float) -> tuple[Callable[[], Tensor] | None, str]:
    """The candidate's call, or None and why not."""
    wanted = reference()
    try:
        call = candidate.build()
        wrong = mismatch(call(), wanted, tolerance)
    except Exception as error:  # out of memory, a compiler's failure, a bug in a kernel: the contest goes on without it
        return None, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if wrong is None:
        return call, ""
    warnings.warn(f"sparsecc: candidate {candidate.name} is wrong and was dropped: {wrong}", RuntimeWarning, stacklevel=4)
    return None, f"wrong: {wrong}"


def mismatch(out: Tensor, wanted: Tensor, tolerance: float) -> str | None:
    """In words how `out` differs from `wanted` (float64) by more than tolerance * its largest finite magnitude, or None.

    NaN and infinities have to stand at the same places.
    """
    if out.shape != wanted.shape:
        return f"shape {tuple(out.shape)}, expected {tuple(wanted.shape)}"
    if not out.numel():
        return None
    out = out.detach().to(wanted)
    same = (out == wanted) | (out.isnan() & wanted.isnan())
    error = (out - wanted).abs().masked_fill(same, 0).nan_to_num(nan=math.inf, posinf=math.inf).max()
    allowed = tolerance * torch.where(wanted.isfinite(), wanted, 0).abs().max()
    return None if error <= allowed else f"largest error {float(error):.3g}, allowed {float(allowed):.3g}"
