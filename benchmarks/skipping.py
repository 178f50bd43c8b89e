"""Skipping at run time, measured: neurons of feed-forward blocks in decode, tokens in prefill.

    python -m benchmarks.skipping [--parts neurons,selection,ftp,cached,router,merge] [--sizes 2048/8192] [--threads 1,2] [--out FILE]

neurons: one token through a ReLU block with random weights, whose gate is shifted so that a given fraction of activations is zero;
  sparsecc's kernel with and without a sketch of the gate, torch's dense linears, and the machine's read limit, all in turns.
selection: what choosing costs: the list of nonzeros, a top-k, a statistical top-k, against the region that they spare.
ftp: SmolLM2-135M on real text, dense and with 30 % of the tokens skipped, both compiled.
cached: prompts and tokens with a KV cache, end to end, see `benchmarks/cached.py`.
router, merge: learned routers and merged tokens, see `benchmarks/routing.py`.
Times are medians over rounds in seconds; `best` are the fastest rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sparsecc
from benchmarks import cached, routing
from benchmarks.cpu import COMMA, ROOT, stamp
from benchmarks.limits import ReadLimit, footprint
from examples import models
from sparsecc.autotune.measure import Timing, interleaved
from sparsecc.codegen.tvm.backend import TvmBackend
from sparsecc.runtime.neurons import NeuronKernel, bundle, sketch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ZEROS = (0.25, 0.9)
FOOTPRINT = 160 << 20
"""At least so many bytes of copies, so that a token never finds its weights in a cache."""
SECONDS = 2.5
PREFILL = 1024
SHOWN = ("size", "dtype", "gated", "threads", "zeros", "speed_up", "speed_up_best", "of_limit", "with")


class Block:
    """A feed-forward block [D, F] and a token for which about `zeros` of its activations are zero."""

    def __init__(self, D: int, width: int, dtype: torch.dtype, gated: bool, zeros: float) -> None:
        random = torch.Generator().manual_seed(0)
        self.x = torch.randn(1, D, generator=random).to(dtype)
        shift = NormalDist().inv_cdf(1 - zeros) if zeros > 0 else 6.0
        gate = torch.randn(width, D, generator=random).add_(self.x.float() / self.x.float().norm() * shift).div_(D**0.5).to(dtype)
        up = torch.randn(width, D, generator=random).div_(D**0.5).to(dtype) if gated else None
        down = torch.randn(D, width, generator=random).div_(width**0.5).to(dtype)
        self.dense_bytes = gate.nbytes * (3 if gated else 2)
        self.active = int((F.linear(self.x, gate) > 0).sum())
        self.kept_bytes = gate.nbytes + self.active * D * dtype.itemsize * (2 if gated else 1)
        self.biases: list[Tensor | None] = [None] * (3 if gated else 2)
        count = max(1, footprint(FOOTPRINT) // self.dense_bytes)
        self.turn = itertools.cycle(range(count))  # one for all calls: none finds what another has just read
        self.plain = [_copied(gate, up, down) for _ in range(count)]
        self.stored = [[g, bundle(u, d)] for g, u, d in self.plain]
        quick = [list(sketch(gate)) for _ in range(1)]
        self.sketched = [[*s, *(t.clone() for t in quick[0])] for s in self.stored]

    def dense(self) -> Callable[[], Tensor]:
        """torch's linears."""
        x = self.x

        def run() -> Tensor:
            gate, up, down = self.plain[next(self.turn)]
            a = F.relu(F.linear(x, gate))
            return F.linear(a if up is None else a * F.linear(x, up), down)

        return run

    def ours(self, policy: str = "nonzero", sketched: bool = False, limit: float = 1.0) -> Callable[[], Tensor]:
        """sparsecc's kernel."""
        kernel = NeuronKernel(TvmBackend.of(), "relu", policy, limit)
        stored, x, biases = self.sketched if sketched else self.stored, self.x, self.biases

        def run() -> Tensor:
            kernel._plain = 0  # the sketch is used whatever was found: this measures it
            return kernel(x, stored[next(self.turn)], biases, None)

        return run


def _copied(gate: Tensor, up: Tensor | None, down: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    return gate.clone(), None if up is None else up.clone(), down.clone()


def neurons(size: str, dtype: str, gated: bool, threads: int, seconds: float) -> list[dict[str, Any]]:
    """A row per fraction of zeros."""
    D, width = map(int, size.split("/"))
    rows = []
    limit = ReadLimit(threads, 32 << 20, 4, 4)
    for zeros in ZEROS:
        block = Block(D, width, DTYPES[dtype], gated, zeros)
        wanted = block.dense()().double()
        calls: dict[str, Callable[[], Any]] = {"dense": block.dense(), "ours": block.ours(), "sketch": block.ours(sketched=True)}
        off = {name: float((f().double() - wanted).abs().max() / wanted.abs().max()) for name, f in calls.items()}
        reads: list[float] = []
        calls["limit"] = lambda reads=reads: reads.append(limit.rate(1e-3))
        times = interleaved(calls, seconds, 9)
        best, bandwidth = min(("ours", "sketch"), key=lambda n: times[n].median), sorted(reads)[len(reads) // 2]
        rows.append({
            "part": "neurons", "size": size, "dtype": dtype, "gated": gated, "threads": threads, "zeros": 1 - block.active / width,
            **_times(times, "dense", "ours", "sketch"), "error": off, "read_limit": bandwidth,
            "kept_bytes": block.kept_bytes, "of_limit": block.kept_bytes / bandwidth / times["ours"].median,
            "speed_up": times["dense"].median / times[best].median, "speed_up_best": times["dense"].best / times[best].best, "with": best,
        })  # fmt: skip
        print(json.dumps({k: rows[-1][k] for k in SHOWN}), flush=True)
    return rows


def selection(size: str, threads: int, seconds: float) -> list[dict[str, Any]]:
    """What choosing costs: the same block with a kernel that reads nothing after the choice, by policy; the region that is spared is what a
    full kernel reads after it."""
    D, width = map(int, size.split("/"))
    block = Block(D, width, torch.float32, True, 0.9)
    calls: dict[str, Callable[[], Any]] = {"all": block.ours("all"), "none": _undone(block, "all")}
    calls |= {policy: _undone(block, policy) for policy in ("nonzero", "ratio(0.1)", "stat(0.1)")}
    times = interleaved(calls, seconds, 9)
    region = 0.9 * (times["all"].median - times["none"].median)
    rows = [{"part": "selection", "size": size, "threads": threads, "policy": policy, "spared": region,
             "cost": times[policy].median - times["none"].median, "of_spared": (times[policy].median - times["none"].median) / region}
            for policy in ("nonzero", "ratio(0.1)", "stat(0.1)")]  # fmt: skip
    print(json.dumps(rows), flush=True)
    return rows


def _undone(block: Block, policy: str) -> Callable[[], Any]:
    """The kernel up to its list."""
    kernel = NeuronKernel(TvmBackend.of(), "relu", policy, -1.0)
    kernel.dense = lambda x, *rest: x  # type: ignore[method-assign]
    return lambda: kernel(block.x, block.stored[next(block.turn)], block.biases, None)


def prefill(threads: int, seconds: float, skipped: float = 0.3) -> list[dict[str, Any]]:
    """SmolLM2's logits after PREFILL tokens."""
    model = models.smollm2()
    ids = models.smollm2_tokenizer()(" ".join(models.sentences(400)), return_tensors="pt")["input_ids"][:, :PREFILL]
    inputs = {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}
    made = {
        name: sparsecc.compile(model, sparsity=spec, example_inputs=inputs, autotune="none")
        for name, spec in {"dense": None, "skipped": {"model.layers.*": sparsecc.ftp(skipped)}}.items()
    }
    times = interleaved({"dense": lambda: made["dense"](**inputs), "skipped": lambda: made["skipped"](**inputs)}, seconds, 5)
    gain = times["dense"].median / times["skipped"].median
    ideal = _flops(model.config, PREFILL) / _flops(model.config, -(-PREFILL * round(100 * (1 - skipped)) // 100))
    row = {
        "part": "ftp", "model": "SmolLM2-135M", "tokens": PREFILL, "skipped": skipped, "threads": threads,
        **_times(times, "dense", "skipped"), "speed_up": gain, "speed_up_best": times["dense"].best / times["skipped"].best,
        "ideal": ideal, "of_ideal": gain / ideal,
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return [row]


def _flops(config: Any, tokens: int) -> float:
    """Of a Llama's blocks on so many tokens, attention causal."""
    h, kv = config.hidden_size, config.hidden_size * config.num_key_value_heads // config.num_attention_heads
    linears = 2 * tokens * (2 * h * h + 2 * h * kv + 3 * h * config.intermediate_size)
    return config.num_hidden_layers * (linears + 2 * tokens * tokens * h)


def _times(times: dict[str, Timing], *names: str) -> dict[str, Any]:
    return {"seconds": {n: times[n].median for n in names}, "best": {n: times[n].best for n in names}}


def main() -> None:
    """Measure, and add to the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=COMMA.split, default=["neurons", "selection", "ftp", "cached", "router", "merge"])
    parser.add_argument("--sizes", type=COMMA.split, default=["2048/8192", "4096/11008"])
    parser.add_argument("--dtypes", type=COMMA.split, default=list(DTYPES))
    parser.add_argument("--gated", type=COMMA.split, default=["yes", "no"])
    parser.add_argument("--threads", type=COMMA.split, default=["1", "2"])
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/skipping.json")
    args = parser.parse_args()
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    for threads in map(int, args.threads):
        torch.set_num_threads(threads)
        rows: list[dict[str, Any]] = []
        for size in args.sizes:
            if "neurons" in args.parts:
                for dtype, gated in itertools.product(args.dtypes, args.gated):
                    rows += neurons(size, dtype, gated == "yes", threads, args.seconds)
            if "selection" in args.parts:
                rows += selection(size, threads, args.seconds)
        if "ftp" in args.parts:
            rows += prefill(threads, 10 * args.seconds)
        if "cached" in args.parts:
            rows += cached.measure(*cached.build(), threads, 10 * args.seconds)
        if "router" in args.parts:
            rows += routing.learned(threads, 10 * args.seconds)
        if "merge" in args.parts:
            rows += routing.merging(threads, 5 * args.seconds)
        same = lambda row: tuple(row.get(k) for k in ("part", "size", "dtype", "gated", "threads", "policy", "model", "images"))  # noqa: E731
        fresh = {same(row) for row in rows}
        found["rows"] = [row for row in found["rows"] if same(row) not in fresh] + rows
        args.out.write_text(json.dumps({**stamp(False), "rows": found["rows"]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
