"""What `compute="bf16"` gains: kernels on BERT's shapes, and MiniLM with the option and without, in one interleaved run each.

    python -m benchmarks.cpu_half [--threads 1] [--patterns "block(4, 1, 0.9),unstructured(0.5)"] [--models minilm] [--json FILE]

A kernel's time is that of a call on token-minor activations, as between a model's layers, rounding them included.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparsecc
from benchmarks.cpu import ROOT, stamp
from examples import models
from sparsecc.autotune.measure import Timing, interleaved
from sparsecc.codegen.config import to_text
from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.tvm.backend import TvmBackend
from sparsecc.codegen.tvm.half import dot_of
from sparsecc.formats import parse_pattern
from sparsecc.ir.ops import empty_output
from sparsecc.passes.pack import formats_for
from sparsecc.runtime.launch import LinearKernel

PATTERNS = ("block(4, 1, 0.8)", "block(4, 1, 0.9)", "block(8, 1, 0.9)", "block(16, 1, 0.9)", "unstructured(0.5)", "unstructured(0.9)")
SHAPES = ((3072, 768), (768, 3072), (768, 768))
TOKENS = 128
ROUNDS = 9


def kernels(pattern: str, N: int, K: int, seconds: float) -> dict[str, Any]:
    """Every format's best configuration: microseconds, and times the speed of the best one in float32."""
    backend, random = TvmBackend.of(), torch.Generator().manual_seed(0)
    zeros = parse_pattern(pattern)
    w = torch.randn(N, K, generator=random).bfloat16().float()
    w *= zeros.topk_mask(w.abs())
    x, bias = torch.randn(1, TOKENS, K, generator=random), torch.randn(N, generator=random)
    x = empty_output(x, K, "token").copy_(x)
    wanted = x.double() @ w.double().t() + bias.double()
    calls: dict[str, Callable[[], Tensor]] = {}
    for fmt in formats_for(zeros, w, None, TOKENS, "bf16"):
        spec = KernelSpec((fmt,), layout="token")
        for config in [] if backend.refuses(spec) else backend.space(spec):
            kernel, params = LinearKernel(backend, spec, config, (N, K)), list(fmt.pack(w).values())
            call = lambda kernel=kernel, params=params: kernel(x, params, bias, None)  # noqa: E731
            error = float((call() - wanted).abs().max() / wanted.abs().max())
            assert error < (1e-2 if dot_of(fmt) else 2e-5), f"{fmt} is wrong by {error:.2g}"
            calls[f"{fmt} {to_text(config)}"] = call
    times = interleaved(calls, seconds * len(calls), ROUNDS)
    best: dict[str, tuple[str, Timing]] = {}
    for name, timing in times.items():
        text = name.partition(" cpu(")[0]
        if text not in best or timing.median < best[text][1].median:
            best[text] = name, timing
    base = min(t.median for text, (_, t) in best.items() if ".bf16" not in text)
    row = lambda name, t: {"config": name, "us": 1e6 * t.median, "best_us": 1e6 * t.best, "speedup": base / t.median}  # noqa: E731
    rows = {text: row(*found) for text, found in best.items()}
    return {"pattern": pattern, "shape": f"{N}x{K}", "tokens": TOKENS, "formats": rows}


def model(pattern: str, seconds: float) -> dict[str, Any]:
    """MiniLM, one row of 128 tokens: milliseconds, largest error as a fraction of the largest output, what the layers run."""
    dense: Any = models.minilm()
    sparsecc.prune(dense, pattern)
    inputs = models.minilm_inputs(1, TOKENS)
    specs = {"float32": pattern, "bf16": sparsecc.options(pattern, compute="bf16")}
    compiled = {name: sparsecc.compile(dense, sparsity=spec, tune_seconds=600.0) for name, spec in specs.items()}
    calls = {name: lambda module=module: module(**inputs).last_hidden_state for name, module in compiled.items()}
    wanted = dense(**inputs).last_hidden_state
    errors = {name: float((call() - wanted).abs().max() / wanted.abs().max()) for name, call in calls.items()}
    layers = sorted({str(region.format) for region in compiled["bf16"].explain().regions})
    times = interleaved(calls, seconds * len(calls), ROUNDS)
    row = {name: {"ms": 1e3 * t.median, "best_ms": 1e3 * t.best, "error": errors[name]} for name, t in times.items()}
    return {"model": "minilm", "pattern": pattern, "tokens": f"1 x {TOKENS}", "formats": layers, **row, "speedup": 1 / times["bf16"].ratio}


def main() -> None:
    """Print a row at a time and keep the file up to date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--patterns", default=";".join(PATTERNS), help="separated by semicolons")
    parser.add_argument("--what", choices=("kernels", "models", "all"), default="all")
    parser.add_argument("--shapes", default=",".join(f"{N}x{K}" for N, K in SHAPES))
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing, per contestant")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "cpu-half.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {**stamp(False), "threads": args.threads, "kernels": [], "models": []}
    jobs: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    for pattern in args.patterns.split(";"):
        if args.what != "models":
            shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
            jobs += [("kernels", lambda p=pattern, s=shape: kernels(p, *s, args.seconds)) for shape in shapes]
        if args.what != "kernels":
            jobs.append(("models", lambda p=pattern: model(p, 8 * args.seconds)))
    with torch.no_grad():
        for part, job in jobs:
            result[part].append(job())
            print(json.dumps(result[part][-1]), flush=True)
            args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
