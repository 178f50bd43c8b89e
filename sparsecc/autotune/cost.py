"""Predicted time: a roofline over symbolic counts of work.

Work is a formula in M (tokens), so one formula serves every batch. The time is the larger of arithmetic and memory (Williams,
Waterman and Patterson, "Roofline", CACM 2009). A prediction only ranks candidates; the contest measures them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from statistics import linear_regression

import sympy
import torch

from sparsecc.formats import Dense, Format

M = sympy.Symbol("M", integer=True, positive=True)
"""Tokens: rows of the activation."""

OVERHEAD = 5e-6
"""Seconds that any call costs: dispatch, and waking the threads."""

EFFICIENCY: dict[tuple[str, int], float] = {
    ("dense", 1): 0.70,  # the vendor's kernel on a layer's shape, against the large square product that Machine.flops is
    ("csr", 1): 0.50,  # one load per FMA, and an index per weight
    ("sell", 1): 0.55,  # csr, with x in the first-level cache
    ("csr", 4): 0.95,  # one load feeds the 4 rows of a block, weights are broadcast for free
    ("csr", 8): 0.95,  # as 4 rows; more of them only save index bytes
    ("csr", 32): 0.80,  # more accumulators than registers: a block is walked in parts
    ("nm", 1): 0.40,  # csr, and the offset within the group is decoded
    ("nm", 4): 0.75,  # the same over 4 rows
    ("bitmap", 1): 0.30,  # the bits are expanded before the first FMA
    ("bitmap", 4): 0.60,  # the same over 4 rows
    ("dense amx", 1): 8.0,  # tiles of bf16
    ("shared amx", 1): 4.0,  # the same, and two columns of x are interleaved for every 16 rows
    ("shared dpbf16", 1): 1.0,  # half of it is interleaving; CPUs do one or two of these in the time of an FMA, or half of one
}
"""Fraction of `Machine.flops` reached where arithmetic decides, by (level, rows per block): the largest entry not above the format's."""


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


def efficiency(format: Format, dot: str = "fma") -> float:
    """The entry of EFFICIENCY for a format and what multiplies; that of csr for a level that the table lacks."""
    level = str(format.level).partition("(")[0] + (f" {dot}" if dot != "fma" else "")
    rows = {r: share for (kind, r), share in EFFICIENCY.items() if kind == level} or {1: EFFICIENCY["csr", 1]}
    return rows[max(r for r in rows if r <= format.block[0])]


def predict(work: Work, m: int, machine: Machine, efficiency: float) -> float:
    """Seconds for `m` tokens: max(arithmetic, memory) + OVERHEAD.

    Weights come from DRAM, since a model is larger than its caches; activations from cache, since the layer before has just
    written them.
    """
    weights, total = (float(work.bytes.subs(M, tokens)) for tokens in (0, m))
    arithmetic = float(work.flops.subs(M, m)) / (machine.flops * machine.threads * efficiency)
    return max(arithmetic, weights / machine.bandwidth + (total - weights) / machine.cache_bandwidth) + OVERHEAD


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
