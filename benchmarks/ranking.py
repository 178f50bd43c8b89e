"""Does the CPU's cost model put the best candidates first? Every candidate measured, ranked against its prediction.

    python -m benchmarks.ranking [--threads 1] [--quick]

The model has no parameter that a shape could have been fitted to: each problem counts as left out. Regret is the time of the best among
the model's first k over the time of the best of all, minus one. Writes benchmarks/results/cpu-ranking.json.
"""

from __future__ import annotations

import argparse
import json
import time
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
from sparsecc.codegen.tvm.backend import TvmBackend
from sparsecc.formats import parse_pattern
from sparsecc.passes.context import Problem
from sparsecc.runtime.tuner import CpuTuner

RESULTS = Path(__file__).parent / "results" / "cpu-ranking.json"
SHAPES = ((384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072), (2048, 2048))
PATTERNS = ("block(4, 1, 0.9)", "block(16, 1, 0.8)", "2:4", "unstructured(0.5)", "unstructured(0.9)")
TOKENS = (1, 16, 128)
FIRST = (1, 3, 5)


def measured(tuner: CpuTuner, shape: tuple[int, int], pattern: str, tokens: int) -> dict[str, Any]:
    """Predictions and times of all candidates of one problem."""
    layer = nn.Linear(shape[1], shape[0], bias=False)
    sparsecc.prune(layer, pattern)
    weight = layer.weight.detach()
    formats = tuner.formats(parse_pattern(pattern), weight, None, tokens, None)
    problem = Problem("layer", weight, tuple(fmt for fmt in formats if fmt.refuses(weight) is None), tokens, "", False)
    found = tuner.candidates(problem)
    results = [r for r in tuner.contest(problem, found) if r.name in found and r.seconds is not None]
    ranked = sorted(results, key=lambda r: r.predicted)
    best = min(results, key=lambda r: r.seconds or 0.0)
    regret = {k: min(r.seconds or 0.0 for r in ranked[:k]) / (best.seconds or 1.0) - 1 for k in FIRST}
    return {
        "shape": shape, "pattern": pattern, "tokens": tokens, "candidates": len(results), "best": best.name, "rank": ranked.index(best) + 1,
        "regret": regret, "seconds": {r.name: r.seconds for r in results}, "predicted": {r.name: r.predicted for r in results},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two shapes only")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    tuner = CpuTuner(TvmBackend.of(), "full", 3600.0, TuneCache())
    started, rows = time.perf_counter(), []
    for shape in SHAPES[: 2 if asked.quick else None]:
        for pattern in PATTERNS:
            rows += [measured(tuner, shape, pattern, tokens) for tokens in TOKENS]
    summary = {
        "problems": len(rows), "rank within 5": mean(row["rank"] <= 5 for row in rows),
        "regret": {k: {"median": median(r["regret"][k] for r in rows), "mean": mean(r["regret"][k] for r in rows)} for k in FIRST},
    }
    found = {"machine": vars(host()), "threads": asked.threads, "seconds": time.perf_counter() - started, "summary": summary, "rows": rows}
    asked.out.write_text(json.dumps(found, indent=1, default=str) + "\n")
    table = Table("first k of the model", "median regret", "mean regret")
    for k in FIRST:
        table.add_row(str(k), *(f"{100 * summary['regret'][k][how]:.1f} %" for how in ("median", "mean")))
    Console().print(table)
    print(f"{len(rows)} problems, the best within the first five in {100 * summary['rank within 5']:.0f} %")


if __name__ == "__main__":
    main()
