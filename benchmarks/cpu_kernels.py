"""Linear kernels alone, as fractions of what the machine reaches in the same milliseconds: the worker of `benchmarks/cpu.py kernels`.

    python -m benchmarks.cpu_kernels '{"threads": 1, "shapes": ["768x768"], "tokens": [64], "sparsities": [0.9]}' OUT.jsonl

A shared machine slows by half for seconds, so every sample of a kernel stands between two samples of a limit and only their ratio
counts. The limit is fp32 multiply-adds on registers (`peaks`: "register") for many tokens, and for one token, or a few, reads of as many
bytes as the packed weight has, from memory of the same footprint, larger than the last cache, in the fastest of several ways.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from benchmarks.limits import FmaLimit, Limit, ReadLimit, clock_of, footprint
from sparsecc.codegen.config import to_text
from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.tvm.backend import CpuConfig, TvmBackend
from sparsecc.codegen.tvm.native import Calls, Native
from sparsecc.codegen.tvm.spmv import GROUP
from sparsecc.codegen.tvm.terms import serves_few
from sparsecc.codegen.tvm.tiles import SPAN
from sparsecc.formats import Format, parse_format
from sparsecc.formats.level import NM
from sparsecc.ir.ops import empty_output
from sparsecc.runtime.launch import LinearKernel
from sparsecc.runtime.record import Pool, Recorder

FORMATS = ("bsr(4, 1)", "bsr(8, 1)", "bsr(16, 1)", "sell(4, 64).panels(192)", "csr", "nm(2, 4)", "bitmap", "bsr(16, 16)")
SAMPLE = 400e-6
"""Seconds of a sample: long against a call from Python, short against a neighbour's burst."""
LONGEST = 0.1
"""Seconds of a sample of the limit at most: half as long as a long kernel, or a scheduler's slice hits the one and spares the other."""
FOOTPRINT = 320 << 20
"""At least so many bytes of copies that calls with one token or a few take in turn, as a model's layers do; fewer where that needs more
than COPIES."""
COPIES = 256
STREAMS = (1, 4, 8)
"""Places that a thread of the read limit may follow at once."""
TOLERANCE = 2e-5
IN_ONE = 8
"""Kernel calls in a row: an encoder's layer has about as many."""


@dataclass(frozen=True)
class Job:
    """What a worker does: every shape "NxK" x format x sparsity x number of tokens. seconds: per row, rounds: at least so many."""

    threads: int
    shapes: list[str]
    tokens: list[int]
    sparsities: list[float]
    formats: list[str] = field(default_factory=lambda: list(FORMATS))
    seconds: float = 0.6
    rounds: int = 9


@dataclass(frozen=True)
class Timed:
    """Something to time, and how many calls of a kernel it makes."""

    run: Callable[[], Any]
    calls: int = 1


def record(calls: Sequence[Callable[[], Tensor]]) -> Timed:
    """The last kernel of each call (the product, after packing), one after the other without Python in between, as a chain of a
    compiled model runs them; as often as it takes to make Python's part small."""
    kept, kernels = [], []
    for call in calls:
        with Recorder(Pool()) as recorder:
            kept.append((recorder.pool, call()))
        kernels.append(recorder.calls[-1])
    kernels *= -(-IN_ONE // len(kernels))
    if not all(isinstance(code, Native) for code, _ in kernels):  # no linker here: TVM's JIT runs them
        return Timed(lambda keep=kept: [code(*args) for code, args in kernels], len(kernels))
    together = Calls(kernels)
    return Timed(lambda keep=kept: together(), len(kernels))


def paired(
    fns: dict[str, Timed], work: float, limit: Limit, seconds: float, rounds: int, clock: Callable[[], float]
) -> dict[str, dict[str, float]]:
    """Time `fns` in turn, each sample between two of the limit. Per function: seconds of one call (median), fraction (median) of the
    limit's rate at which it does `work` a call, top (the upper quartile of that, the rounds that nobody disturbed)."""
    once = {name: _seconds(f.run, clock) for name, f in fns.items()}
    least = {name: -(-IN_ONE // f.calls) for name, f in fns.items()}  # after the limit the first call finds Python's own data gone
    repeats = {name: max(least[name], min(1000, math.ceil(SAMPLE / each))) for name, each in once.items()}
    span = min(LONGEST, max(SAMPLE, max(once.values()) / 2))
    took: dict[str, list[float]] = {name: [] for name in fns}
    fractions: dict[str, list[float]] = {name: [] for name in fns}
    end = time.perf_counter() + seconds
    limit.rate(span)
    before = limit.rate(span)
    while len(took[next(iter(fns))]) < rounds or time.perf_counter() < end:
        for name, f in fns.items():
            start = clock()
            for _ in range(repeats[name]):
                f.run()
            took[name].append(max(1e-9, clock() - start) / (repeats[name] * f.calls))
            after = limit.rate(span)
            fractions[name].append(work / took[name][-1] / ((before + after) / 2))
            before = after
    top = {name: quantiles(f, n=4)[2] for name, f in fractions.items()}
    return {name: {"seconds": median(took[name]), "fraction": median(fractions[name]), "top": top[name]} for name in fns}


def _seconds(f: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Of one call; another before it warms up."""
    f()
    start = clock()
    f()
    return max(1e-7, clock() - start)


def weight_of(fmt: Format, sparsity: float, N: int, K: int) -> Tensor:
    """f32 [N, K]; each block kept by chance, or any n of every m."""
    random = torch.Generator().manual_seed(0)
    br, bc = fmt.block
    if isinstance(fmt.level, NM):
        groups = torch.rand(N, K // fmt.level.m, fmt.level.m, generator=random)
        kept = (groups.argsort(-1).argsort(-1) < fmt.level.n).view(N, K)
    else:
        kept = torch.rand(-(-N // br), -(-K // bc), generator=random) >= sparsity
        kept = kept.repeat_interleave(br, 0)[:N].repeat_interleave(bc, 1)[:, :K]
    return torch.randn(N, K, generator=random).to(fmt.codec.dtypes()["val"]).float().mul_(kept)


def rows(job: Job, backend: TvmBackend) -> Iterator[dict[str, Any]]:
    """One per weight and number of tokens."""
    fma = FmaLimit(job.threads)
    for shape, text in itertools.product(job.shapes, job.formats):
        fmt = parse_format(text)
        N, K = map(int, shape.split("x"))
        fixed = re.fullmatch(r"nm\((\d+), (\d+)\).*", text)
        for sparsity in [1 - int(fixed[1]) / int(fixed[2])] if fixed else job.sparsities:
            weight = weight_of(fmt, sparsity, N, K)
            arrays = list(fmt.pack(weight).values())
            for tokens in job.tokens:
                row = {"threads": job.threads, "shape": shape, "format": text, "sparsity": sparsity, "tokens": tokens}
                try:
                    yield row | measure(job, backend, fmt, weight, arrays, tokens, fma)
                except Exception as problem:  # the other rows still count
                    yield row | {"failed": f"{type(problem).__name__}: {problem}"[:300]}


def measure(job: Job, backend: TvmBackend, fmt: Format, weight: Tensor, arrays: list[Tensor], tokens: int, fma: FmaLimit) -> dict[str, Any]:
    """The best configuration of the backend's space, checked: "step" (the kernel in a model's chain: no Python, and many tokens
    token-minor in and out), "call" (the whole call from Python, row-major in and out)."""
    N, K = weight.shape
    ragged, wide = N % (fmt.block[0] * fmt.level.window) > 0, fmt.grid(N, K)[1] > 65536
    x, nbytes = torch.randn(tokens, K, generator=torch.Generator().manual_seed(1)), sum(a.nbytes for a in arrays)
    spans = x.view(-1, min(SPAN, tokens), K)  # between a chain's kernels, spans lie like sequences
    spread = empty_output(spans, K, "token").copy_(spans)
    sets = [arrays]
    limit: Limit = fma
    cold = tokens < GROUP
    if cold:
        sets += [[a.clone() for a in arrays] for _ in range(min(COPIES, -(-footprint(FOOTPRINT) // nbytes)) - 1)]
        limit = max((ReadLimit(job.threads, nbytes, len(sets), streams) for streams in STREAMS), key=lambda read: read.rate(0.05))
    work = nbytes if cold else 2 * int(weight.count_nonzero()) * tokens
    clock = clock_of(job.threads)

    def kernel(spec: KernelSpec, config: CpuConfig) -> list[Callable[[], Tensor]]:
        made = LinearKernel(backend, spec, config, (N, K)).prepare(tokens)
        return calls_of(made, spread if spec.layout == "token" else x, sets, weight)

    many = KernelSpec((fmt,), regime="many", ragged=ragged, wide=wide)
    specs = [] if cold else [replace(many, layout="token")]
    if tokens == 1 or (tokens <= GROUP and serves_few(fmt, backend.isa)):
        specs.append(replace(many, regime="one" if tokens == 1 else "few"))
    contest: list[tuple[float, KernelSpec, CpuConfig]] = []
    candidates = [(way, config) for way in specs or [many] for config in backend.space(way)]
    for way, config in candidates:
        step = record(kernel(way, config))
        contest.append((paired({"step": step}, work, limit, job.seconds / 6, 3, clock)["step"]["fraction"], way, config))
    _, spec, best = max(contest, key=lambda entry: entry[0])
    fns = {"step": record(kernel(spec, best)), "call": Timed(_in_turn(kernel(replace(spec, layout="row"), best)))}
    result: dict[str, Any] = {"config": to_text(best), "bytes": nbytes, "limit": limit.rate(50 * SAMPLE), "copies": len(sets)}
    if isinstance(limit, ReadLimit):
        result["streams"] = limit.streams
    return result | paired(fns, work, limit, job.seconds, job.rounds, clock)


def calls_of(kernel: LinearKernel, x: Tensor, sets: list[list[Tensor]], weight: Tensor) -> list[Callable[[], Tensor]]:
    """A call of a kernel per copy of the weight. Raises ValueError if some outputs are wrong."""
    calls = [lambda arrays=arrays: kernel(x, arrays, None, None) for arrays in sets]
    some = torch.randperm(len(weight), generator=torch.Generator().manual_seed(2))[:256]
    wanted = x.double() @ weight[some].double().t()
    wrong = float((calls[0]()[..., some] - wanted).abs().max() / wanted.abs().max())
    if not wrong < TOLERANCE:
        raise ValueError(f"{kernel.spec} {kernel.config} is wrong by {wrong:.2g} of the largest output")
    return calls


def _in_turn(fns: list[Callable[[], Any]]) -> Callable[[], Any]:
    for fn in fns:
        fn()  # the first call of a weight binds its arguments, which takes a hundred times as long as a call
    if len(fns) == 1:
        return fns[0]
    turn = itertools.cycle(fns)
    return lambda: next(turn)()


def describe(row: dict[str, Any]) -> str:
    """A line of progress."""
    head = f"{row['shape']:>11} {row['format']:11} {row['sparsity']:.0%} M={row['tokens']:<4}"
    if "failed" in row:
        return f"{head} {row['failed']}"
    return f"{head} " + "  ".join(f"{kind} {row[kind]['fraction']:.2f}" for kind in ("step", "call"))


def main() -> None:
    """Run the job of the command line and append a row at a time to the file."""
    job = Job(**json.loads(sys.argv[1]))
    torch.set_num_threads(job.threads)
    with torch.no_grad(), Path(sys.argv[2]).open("a") as file:
        for row in rows(job, TvmBackend.of()):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"  {job.threads} threads {describe(row)}", flush=True)


if __name__ == "__main__":
    main()
