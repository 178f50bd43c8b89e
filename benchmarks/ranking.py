"""Does the CPU's cost model put the best candidates first? Every candidate measured, then ranked by a model that never saw its shape.

    python -m benchmarks.ranking prepare                       compiles every candidate, so that nothing but timing is left
    python -m benchmarks.ranking measure [--seconds 100]       what is already in the results is not measured again
    python -m benchmarks.ranking fit                           ranks and regrets, and the costs that the model goes by

Candidates are the tuner's own and, for a model to have something to choose from, more of the space. Each shape is ranked by costs that
were fitted to the other shapes: with rows of a grid left out at random, neighbours would tell the answer. Regret is the time of the best
among the model's first k over the time of the best of all, minus one. Writes benchmarks/results/cpu-ranking.json; `fit` also writes
sparsecc/autotune/costs.json, from all shapes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import sparsecc
from benchmarks.peaks import host
from sparsecc.autotune.cache import TuneCache
from sparsecc.autotune.cost import OVERHEAD, Costs, Machine, dense_work, kind_of, limits, work
from sparsecc.autotune.fit import fit
from sparsecc.autotune.measure import interleaved
from sparsecc.autotune.search import Candidate, contest
from sparsecc.codegen.config import space_of, to_text
from sparsecc.codegen.tvm.backend import CpuConfig, TvmBackend
from sparsecc.formats import Sell, parse_format, parse_pattern
from sparsecc.formats.grid import kept_blocks
from sparsecc.passes.context import Problem
from sparsecc.runtime.calls import Call
from sparsecc.runtime.tuner import TOLERANCE, CpuTuner, regime_of

RESULTS = Path(__file__).parent / "results" / "cpu-ranking.json"
COSTS = Path(sparsecc.__file__).parent / "autotune" / "costs.json"
SHAPES = ((384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072), (2048, 2048))
PATTERNS = ("block(4, 1, 0.9)", "block(16, 1, 0.8)", "2:4", "unstructured(0.5)", "unstructured(0.9)")
TOKENS = (1, 16, 128)
FIRST = (1, 3, 5)


def problems() -> Iterator[tuple[tuple[int, int], str, int]]:
    for shape in SHAPES:
        for pattern in PATTERNS:
            for tokens in TOKENS:
                yield shape, pattern, tokens


def problem_of(tuner: CpuTuner, shape: tuple[int, int], pattern: str, tokens: int) -> Problem:
    """A layer with the pattern's zeros."""
    layer = nn.Linear(shape[1], shape[0], bias=False)
    sparsecc.prune(layer, pattern)
    weight = layer.weight.detach()
    formats = tuner.formats(parse_pattern(pattern), weight, None, tokens, None)
    return Problem("layer", weight, tuple(fmt for fmt in formats if fmt.refuses(weight) is None), tokens, "", False)


def wider(tuner: CpuTuner, problem: Problem) -> dict[str, tuple[Any, CpuConfig]]:
    """The tuner's candidates, and every other setting that changes their code."""
    own = tuner.candidates(problem)
    found = dict(own)
    for fmt in problem.formats:
        mine = [config for one, config in own.values() if one == fmt]
        vary: dict[str, Sequence[Any]] = {}
        match tuner.regime(fmt, problem.tokens):
            case "one":
                vary = {"streams": (1, 2, 4, 8), "gather": tuple(dict.fromkeys(config.gather for config in mine))}
            case "few":
                vary = {"streams": (1, 2, 4, 8)}
            case "many":
                vary = {"vectors": (1, 2, 4), "unroll": (1,) if isinstance(fmt.level, Sell) else (1, 4)}
        pinned = {name: getattr(mine[0], name) for name in vars(mine[0]) if name not in vary}
        configs = [config for config in space_of(CpuConfig, **pinned) if all(getattr(config, name) in some for name, some in vary.items())]
        found |= {f"{fmt} {to_text(config)}": (fmt, config) for config in configs}
    return found


def measured(tuner: CpuTuner, shape: tuple[int, int], pattern: str, tokens: int, seconds: float) -> dict[str, Any]:
    """Seconds of every candidate of one problem and of dense, timed side by side, each checked before."""
    problem = problem_of(tuner, shape, pattern, tokens)
    own, every, call = tuner.candidates(problem), wider(tuner, problem), Call(problem)
    build = lambda fmt, config: lambda: call.candidate(tuner, fmt, config)  # noqa: E731
    entrants = [Candidate(name, 0.0, build(fmt, config)) for name, (fmt, config) in every.items()]
    race = lambda calls, wanted, rounds: interleaved(calls, seconds * len(calls), rounds)  # noqa: E731
    deadline = time.monotonic() + 60
    results = contest(Candidate("dense", 0.0, call.dense), entrants, call.reference, TOLERANCE, "quick", deadline, len(entrants), race)
    times = {r.name: r.seconds for r in results}
    rows = [
        {"format": str(fmt), "config": to_text(config), "own": name in own, "seconds": times[name]}
        for name, (fmt, config) in every.items() if times[name] is not None
    ]
    return {
        "shape": shape, "pattern": pattern, "tokens": tokens, "machine": vars(Machine.measured(torch.get_num_threads())),
        "blocks": {str(fmt): kept_blocks(problem.weight, fmt.block) for fmt in problem.formats}, "dense": times["dense"],
        "candidates": rows,
    }


def prepare(tuner: CpuTuner) -> None:
    """Compile every candidate: code doesn't depend on the shape."""
    for pattern in PATTERNS:
        for tokens in TOKENS:
            problem = problem_of(tuner, SHAPES[0], pattern, tokens)
            call = Call(problem)
            for fmt, config in wider(tuner, problem).values():
                call.candidate(tuner, fmt, config)


def save(found: dict[str, Any], out: Path) -> None:
    """As JSON with a line for each problem."""
    rows = ",\n ".join(map(json.dumps, found["rows"]))
    rest = json.dumps({name: value for name, value in found.items() if name != "rows"})
    out.write_text(f'{rest[:-1]}, "rows": [\n {rows}]}}\n')


def measure(threads: int, seconds: float, out: Path) -> None:
    """Add problems to the results until all are there or the time is over."""
    torch.set_num_threads(threads)
    found = json.loads(out.read_text()) if out.exists() else {"machine": vars(host()), "threads": threads, "rows": []}
    there = {(tuple(row["shape"]), row["pattern"], row["tokens"]) for row in found["rows"]}
    end = time.monotonic() + seconds
    for asked in problems():
        if asked not in there and time.monotonic() < end:
            tuner = CpuTuner(TvmBackend.of(), "full", 3600.0, TuneCache())  # a new one: kernels remember the weights that they ran on
            found["rows"].append(measured(tuner, *asked, 0.02))
            save(found, out)
    print(f"{len(found['rows'])} of {len(list(problems()))} problems")


@dataclass(frozen=True)
class Point:
    """One candidate of one problem as the model sees it, and its time. `kind`: regime, kind of format, configuration."""

    problem: int
    kind: tuple[str, str, str]
    name: str
    own: bool
    limits: tuple[float, float, float]
    seconds: float


def points(rows: Sequence[dict[str, Any]]) -> list[Point]:
    """Of all problems; dense is fitted too, but not ranked."""
    found = []
    tuner = CpuTuner(TvmBackend.of(), "none", 1.0, TuneCache())
    for number, row in enumerate(rows):
        (N, K), tokens, machine = row["shape"], row["tokens"], Machine(**row["machine"])
        dense = limits(dense_work(N, K), tokens, machine)
        found.append(Point(number, (regime_of(tokens), "dense 1", ""), "dense", False, dense, row["dense"]))
        known: dict[str, tuple[float, float, float]] = {}
        for one in row["candidates"]:
            text = one["format"]
            fmt = parse_format(text)
            if text not in known:
                known[text] = limits(work(fmt, N, K, row["blocks"][text]), tokens, machine)
            kind = (tuner.regime(fmt, tokens), kind_of(fmt), one["config"])
            found.append(Point(number, kind, f"{text} {one['config']}", one["own"], known[text], one["seconds"]))
    return found


def fitted(some: Sequence[Point]) -> dict[tuple[str, str, str], Costs]:
    """Costs of every kind."""
    groups: dict[tuple[str, str, str], list[Point]] = {}
    for point in some:
        groups.setdefault(point.kind, []).append(point)
    return {kind: fit([(point.limits, point.seconds) for point in group]) for kind, group in groups.items()}


def left_out(rows: Sequence[dict[str, Any]], every: Sequence[Point]) -> dict[int, dict[str, float]]:
    """Per problem, the predictions for its candidates by a model that never saw its shape."""
    found: dict[int, dict[str, float]] = {}
    for shape in {tuple(row["shape"]) for row in rows}:
        theirs = {number for number, row in enumerate(rows) if tuple(row["shape"]) == shape}
        model = fitted([point for point in every if point.problem not in theirs])
        for point in every:
            if point.problem in theirs and point.kind in model:
                seconds = OVERHEAD + sum(cost * limit for cost, limit in zip(model[point.kind], point.limits, strict=True))
                found.setdefault(point.problem, {})[point.name] = seconds
    return found


def summary(predicted: dict[int, dict[str, float]], every: Sequence[Point], own: bool) -> dict[str, Any]:
    """How the tuner's own candidates, or all of them, were ranked."""
    ranks, regrets, counts = [], [], []
    for number, seconds in predicted.items():
        mine = [point for point in every if point.problem == number and point.name != "dense" and (point.own or not own)]
        ranked = sorted(mine, key=lambda point: seconds[point.name])
        best = min(mine, key=lambda point: point.seconds)
        ranks.append(ranked.index(best) + 1)
        counts.append(len(mine))
        regrets.append({k: min(point.seconds for point in ranked[:k]) / best.seconds - 1 for k in FIRST})
    many = [rank for rank, count in zip(ranks, counts, strict=True) if count > 5]
    return {
        "problems": len(ranks), "candidates": median(counts), "best within the first 5": mean(rank <= 5 for rank in ranks),
        "problems with more than 5": len(many), "of these within the first 5": mean(rank <= 5 for rank in many),
        "regret": {k: {"median": median(r[k] for r in regrets), "mean": mean(r[k] for r in regrets), "largest": max(r[k] for r in regrets)}
                   for k in FIRST},
    }


def write_costs(every: Sequence[Point], out: Path) -> None:
    """The tuner's own candidates and dense, a line for each."""
    table: dict[str, dict[str, dict[str, Costs]]] = {}
    named = {point.kind for point in every if point.own or point.name == "dense"}
    for (regime, kind, config), found in sorted(fitted([point for point in every if point.kind in named]).items()):
        table.setdefault(regime, {}).setdefault(kind, {})[config] = (round(found[0], 3), round(found[1], 3), round(found[2], 3))
    out.write_text(json.dumps(table, indent=1).replace("[\n    ", "[").replace(",\n    ", ", ").replace("\n   ]", "]") + "\n")


def fit_and_rank(out: Path) -> None:
    """Leave one shape out, say how well that ranks, and keep the costs of all."""
    found = json.loads(out.read_text())
    every = points(found["rows"])
    predicted = left_out(found["rows"], every)
    found["ranking"] = {name: summary(predicted, every, own) for name, own in (("tuner's candidates", True), ("more of the space", False))}
    save(found, out)
    write_costs(every, COSTS)
    table = Table("candidates", "problems", "best in first 5", "first k", "median regret", "mean", "largest")
    for name, one in found["ranking"].items():
        for k, regret in one["regret"].items():
            numbers = (f"{100 * regret[how]:.1f} %" for how in ("median", "mean", "largest"))
            table.add_row(name, str(one["problems"]), f"{100 * one['best within the first 5']:.0f} %", str(k), *numbers)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "measure", "fit"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if asked.what == "prepare":
        prepare(CpuTuner(TvmBackend.of(), "full", 3600.0, TuneCache()))
    elif asked.what == "measure":
        measure(asked.threads, asked.seconds, asked.out)
    else:
        fit_and_rank(asked.out)


if __name__ == "__main__":
    main()
