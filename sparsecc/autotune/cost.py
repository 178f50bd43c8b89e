"""Predicted time: what a call computes and moves, each at the machine's limit, times what a kernel was measured to take of it.

Work is a formula in M (tokens), so one formula serves every batch. Its three limits are those of the roofline (Williams, Waterman and
Patterson, "Roofline", CACM 2009), but kernels do not overlap them fully, so they add up, with factors per kind of storage, kernel and
configuration that `benchmarks/ranking.py` fits to measured times (`costs.json`). A prediction only ranks candidates; the contest
measures them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import linear_regression, median

import sympy
import torch

from sparsecc.codegen.kernel import FEW
from sparsecc.formats import Dense, Format

M = sympy.Symbol("M", integer=True, positive=True)
"""Tokens: rows of the activation."""

OVERHEAD = 1e-5
"""Seconds that any call costs: dispatch, and waking the threads."""

Costs = tuple[float, float, float]
"""Seconds taken per second of arithmetic, of reading the weight and of moving activations at the machine's limit."""

HALF: dict[str, Costs] = {
    "dense amx": (0.13, 1.0, 1.0),
    "shared amx": (0.25, 1.0, 1.0),  # tiles too, but two columns of x are interleaved for every 16 rows
    "shared dpbf16": (1.0, 1.0, 1.0),  # half of it is interleaving; CPUs do one or two of these in the time of an FMA, or half of one
}
"""Of products in bf16, by level and what multiplies: guesses, since the benchmark that fits the others does not ask for them."""


@dataclass(frozen=True)
class Machine:
    """What the machine reaches: `flops` fp32 FLOP/s per thread, `bandwidth` (DRAM) and `cache_bandwidth` (L2) bytes/s of all threads."""

    flops: float
    bandwidth: float
    threads: int
    cache_bandwidth: float

    @classmethod
    def measured(cls, threads: int) -> Machine:
        """Measured with torch once per process and thread count, in about 100 ms. A busy machine measures low, in all parts alike."""
        return _measured(threads)


@dataclass(frozen=True)
class Work:
    """`flops` and `bytes` as expressions in M. The bytes at M = 0 are the weight's, the rest the activations'."""

    flops: sympy.Expr
    bytes: sympy.Expr


def work(format: Format, N: int, K: int, nnz_blocks: int) -> Work:
    """Of y[M, N] = x[M, K] W^T, W [N, K] stored in `format` with `nnz_blocks` kept blocks, activations in fp32. Padding slots count."""
    kept = format.level.slots(*format.grid(N, K), nnz_blocks) * format.block[0] * format.block[1]
    return Work(sympy.sympify(2 * kept * M), sympy.sympify(format.nbytes(N, K, nnz_blocks) + 4 * M * (N + K)))


def dense_work(N: int, K: int) -> Work:
    """The same with every weight stored, in fp32."""
    return work(Format(Dense()), N, K, N * K)


def kind_of(format: Format) -> str:
    """`bsr(4, 1).bf16` -> `csr 4`: the level and the rows of a block, which decide how a kernel's loop looks."""
    return f"{str(format.level).partition('(')[0]} {format.block[0]}"


@lru_cache
def measured_costs() -> dict[str, dict[str, dict[str, Costs]]]:
    """By regime, kind of format and configuration, from `costs.json`."""
    found = json.loads(Path(__file__).with_name("costs.json").read_text())
    return {r: {kind: {c: (x[0], x[1], x[2]) for c, x in of.items()} for kind, of in kinds.items()} for r, kinds in found.items()}


def costs(format: Format, regime: str, config: str, dot: str = "fma") -> Costs:
    """As measured, or guessed for products (`dot`) in bf16; for a kind of format that was not, of the one with the most rows of a block
    not above its own (of csr where the level is unknown), and for a configuration that was not, in the middle of those that were."""
    table, kind = measured_costs()[regime], kind_of(format)
    level, rows = kind.split()
    if dot != "fma":
        return HALF[f"{level} {dot}"]
    if kind not in table:
        near = [int(one.split()[1]) for one in table if one.split()[0] == level]
        kind = f"{level} {max([r for r in near if r <= int(rows)] or near)}" if near else "csr 1"
    return table[kind].get(config) or middle(table[kind].values())


def middle(some: Iterable[Costs]) -> Costs:
    """Of each factor the median."""
    a, b, c = (median(column) for column in zip(*some, strict=True))
    return a, b, c


def limits(work: Work, m: int, machine: Machine) -> tuple[float, float, float]:
    """Seconds for `m` tokens at the machine's limits: of arithmetic, of reading the weight from DRAM (a model is larger than its caches)
    and of moving activations, which are in cache, since the layer before has just written them."""
    weights, total = (float(work.bytes.subs(M, tokens)) for tokens in (0, m))
    arithmetic = float(work.flops.subs(M, m)) / (machine.flops * machine.threads)
    return arithmetic, weights / machine.bandwidth, (total - weights) / machine.cache_bandwidth


def predict(work: Work, m: int, machine: Machine, costs: Costs) -> float:
    """Seconds for `m` tokens."""
    return OVERHEAD + sum(cost * limit for cost, limit in zip(costs, limits(work, m, machine), strict=True))


def predict_dense(N: int, K: int, m: int, machine: Machine) -> float:
    """Seconds of the vendor's product y[m, N] = x[m, K] W^T."""
    regime = "one" if m == 1 else "few" if m <= FEW else "many"
    return predict(dense_work(N, K), m, machine, costs(Format(Dense()), regime, ""))


def break_even(times: Mapping[float, float], dense: float) -> float | None:
    """The sparsity at which the sparse code would take `dense` seconds, given its seconds at one or more sparsities.

    Assumes that time is linear in the kept entries: through the origin for one point (no cost at 100 % zeros, so the true break-even
    lies a little higher), the least-squares line for several. 0.0 if it wins even without zeros, None if no sparsity suffices or
    the times do not say.
    """
    points = {1 - sparsity: seconds for sparsity, seconds in times.items() if sparsity < 1}
    if not points or dense <= 0:
        return None
    if len(points) == 1:
        (kept, seconds), intercept = next(iter(points.items())), 0.0
        slope = seconds / kept
    else:
        slope, intercept = linear_regression(list(points), list(points.values()))
    if slope <= 0 or dense < intercept:
        return None
    return max(0.0, 1 - (dense - intercept) / slope)


@lru_cache
def _measured(threads: int) -> Machine:
    side, large, small = 512, 16 << 20, threads << 16  # 64 MiB do not stay in most L3s; 256 KiB a thread stay in L2
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b, out = torch.ones(3, side, side).unbind()
        buffer = torch.ones(large)  # written: untouched zeros would all be one page
        flops = 2 * side**3 / _best(lambda: torch.mm(a, b, out=out), 5)
        cache_bandwidth = 4 * small / _best(lambda: buffer[:small].sum(), 20)
        bandwidth = 4 * large / _best(lambda: buffer.sum(), 2)
    finally:
        torch.set_num_threads(before)
    return Machine(flops / threads, bandwidth, threads, max(bandwidth, cache_bandwidth))


def _best(f: Callable[[], object], times: int) -> float:
    """Least seconds of a call, after one to warm up: what the machine can do when nobody disturbs it."""
    samples = []
    for _ in range(times + 1):
        start = time.perf_counter()
        f()
        samples.append(time.perf_counter() - start)
    return min(samples[1:])
