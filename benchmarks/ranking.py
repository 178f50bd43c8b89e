"""Does the CPU's cost model put the best candidates first? Every candidate measured, then ranked by a model that never saw its shape.

    python -m benchmarks.ranking measure [--threads 1] [--seconds 100]     what is already in the results is not measured again
    python -m benchmarks.ranking fit                                       ranks, regrets, and the shares that the model goes by

Candidates are the tuner's own and, for a model to have something to choose from, the rest of the space. The shares of `autotune/cost.py`
are fitted to these times; each shape is ranked by shares that were fitted to the other shapes (leave one shape out: neighbours in a
grid would tell the answer, Ada-GEMM's trap). Regret is the time of the best among the model's first k over the time of the best of all,
minus one. Writes benchmarks/results/cpu-ranking.json and, with --write, sparsecc/autotune/shares.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparsecc
from benchmarks.peaks import host
from sparsecc.autotune.cache import TuneCache
from sparsecc.autotune.cost import Machine
from sparsecc.autotune.measure import interleaved
from sparsecc.autotune.search import Candidate, contest
from sparsecc.codegen.config import space_of, to_text
from sparsecc.codegen.tvm.backend import CpuConfig, TvmBackend
from sparsecc.formats import Sell, parse_pattern
from sparsecc.formats.grid import kept_blocks
from sparsecc.passes.context import Problem
from sparsecc.runtime.calls import Call
from sparsecc.runtime.tuner import TOLERANCE, CpuTuner

RESULTS = Path(__file__).parent / "results" / "cpu-ranking.json"
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
    formats = tuner.formats(parse_pattern(pattern), weight, None, tokens)
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


def measure(threads: int, seconds: float, out: Path) -> None:
    """Add problems to the results until all are there or the time is over."""
    torch.set_num_threads(threads)
    tuner = CpuTuner(TvmBackend.of(), "full", 3600.0, TuneCache())
    prepare(tuner)
    found = json.loads(out.read_text()) if out.exists() else {"machine": vars(host()), "threads": threads, "rows": []}
    there = {(tuple(row["shape"]), row["pattern"], row["tokens"]) for row in found["rows"]}
    end = time.monotonic() + seconds
    for asked in problems():
        if asked not in there and time.monotonic() < end:
            found["rows"].append(measured(tuner, *asked, 0.03))
    out.write_text(json.dumps(found) + "\n")
    print(f"{len(found['rows'])} of {len(list(problems()))} problems")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "measure", "fit"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if asked.what == "prepare":
        prepare(CpuTuner(TvmBackend.of(), "full", 3600.0, TuneCache()))
    elif asked.what == "measure":
        measure(asked.threads, asked.seconds, asked.out)


if __name__ == "__main__":
    main()
