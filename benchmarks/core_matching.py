"""CoreMatching, measured: prompt and token of a LLaVA-style model with 576 image tokens, about a tenth of which stay behind block 2.

    python -m benchmarks.core_matching [--threads 1,2] [--remainder eager] [--seconds 20] [--out FILE]

The decoder has the proportions of Qwen2.5-VL-3B's at half its width: 1024/5504, 8 heads over 2 key/value heads, 10 blocks, float32, random
weights; which tokens matter is planted (`examples/core_matching.py`). Compared in turns: transformers' own code, the same two graphs
compiled densely, and CoreMatching. The picture's own encoder is small here, and is in all times.
selection: what choosing costs in a prompt, part by part, on activations of its shapes, against what it saves.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import sparsecc
from benchmarks.cached import Eager, speed_ups
from benchmarks.cpu import COMMA, ROOT, stamp
from examples.core_matching import llava, vlm_inputs
from sparsecc.autotune.measure import interleaved
from sparsecc.codegen.tvm.backend import TvmBackend
from sparsecc.ir.core_ops import core_scores, core_tokens
from sparsecc.ir.skip_ops import select
from sparsecc.methods.core_matching import CoreMatching
from sparsecc.runtime.cores import CoreCounts

SHAPE: dict[str, int] = {"hidden": 1024, "ffn": 5504, "layers": 10, "heads": 8, "kv_heads": 2, "grid": 24}
TEXT, LAYER = 40, 2


def build(model: Any, rule: sparsecc.Cores, inputs: dict[str, Any], remainder: str) -> dict[str, Any]:
    """What is compared; op by op ("eager") the dense graphs are transformers' code once more, so they are left out."""
    rules = {"core": rule} if remainder == "eager" else {"compiled": None, "core": rule}
    made = {name: CoreMatching(model, one, inputs, autotune="none", remainder=remainder) for name, one in rules.items()}
    return {"torch": Eager(model), **made}


def selection(tokens: int, later: int, layers: int) -> dict[str, float]:
    """Seconds of a whole prompt, by part: counting core neurons of every block, scoring and choosing tokens once."""
    width, random = SHAPE["ffn"], torch.Generator().manual_seed(0)
    a = {n: F.silu(torch.randn(n, width, generator=random)) * torch.randn(n, width, generator=random) for n in (tokens, later)}
    count, k = CoreCounts(TvmBackend.of()), int(0.4 * width)
    counts = count(a[tokens], "core(0.2)")
    assert counts is not None
    kept = select(counts, f"topk({k})")[0]
    scores, mask = core_scores(a[tokens], kept)[None], torch.ones(1, tokens, dtype=torch.bool)
    calls = {
        "count": lambda: count(a[tokens], "core(0.2)"), "count_later": lambda: count(a[later], "core(0.2)"),
        "choose": lambda: select(counts, f"topk({k})"), "score": lambda: core_scores(a[tokens], kept),
        "knee": lambda: core_tokens(scores, mask, "knee", ""),
    }  # fmt: skip
    times = {name: timing.median for name, timing in interleaved(calls, 3.0).items()}
    first = LAYER + 1
    whole = {"count": first * times["count"] + (layers - first) * times["count_later"], "choose": layers * times["choose"]}
    return {**whole, "score": times["score"], "knee": times["knee"]}


def measure(
    made: dict[str, Any], inputs: dict[str, Any], rule: sparsecc.Cores, threads: int, seconds: float, remainder: str
) -> list[dict[str, Any]]:
    """A row for the prompt, one for a token."""
    states = {name: one.prefill(**inputs) for name, one in made.items()}
    token = torch.zeros(1, 1, dtype=torch.long)
    prompt = interleaved({name: lambda one=one: one.prefill(**inputs) for name, one in made.items()}, seconds, 3)
    after = interleaved({name: lambda one=one, state=states[name]: one.step(token, state) for name, one in made.items()}, seconds / 2, 9)
    places = rule.seen.latest
    assert places is not None
    tokens, stay = inputs["input_ids"].shape[1], places.numel()
    image = SHAPE["grid"] ** 2
    parts = selection(tokens, stay, SHAPE["layers"])
    saved = prompt.get("compiled", prompt["torch"]).median - prompt["core"].median
    cost = sum(parts.values())
    same: dict[str, Any] = {"model": "llava 1024/5504 x 10", "threads": threads, "remainder": remainder, "tokens": tokens, "image": image}
    same["kept"] = (stay - tokens + image) / image
    rows = [
        {"part": "prompt", **same, **speed_ups(prompt, "core"), "selection": parts, "selection_of_saved": cost / (saved + cost)},
        {"part": "token", **same, **speed_ups(after, "core"), "keys": [k.shape[2] for k in states["core"].keys]},
    ]
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    """Measure, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=COMMA.split, default=["1", "2"])
    parser.add_argument("--remainder", choices=["inductor", "eager"], default="inductor")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/core-matching.json")
    args = parser.parse_args()
    model, rule = llava(**SHAPE), sparsecc.core_matching(rho=0.2, beta=0.4, layer=LAYER)
    inputs = vlm_inputs(model, TEXT)
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    for threads in map(int, args.threads):
        torch.set_num_threads(threads)
        rows = measure(build(model, rule, inputs, args.remainder), inputs, rule, threads, args.seconds, args.remainder)
        same = lambda row: (row["part"], row["threads"], row["model"], row["remainder"])  # noqa: E731
        fresh = {same(row) for row in rows}
        found["rows"] = [row for row in found["rows"] if same(row) not in fresh] + rows
        args.out.write_text(json.dumps({**stamp(False), "rows": found["rows"]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
