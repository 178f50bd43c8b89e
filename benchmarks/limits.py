"""What torch's thread pool reaches at this moment: multiply-adds on registers, or reads, on all of its threads at once.

The loops of `peaks`, inside one parallel region of the very pool that the kernels run on: threads of our own would fight with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import torch
import tvm
from tvm.script import tirx as T

from benchmarks.peaks import Host, host
from sparsecc.codegen.tvm.backend import TvmBackend
from sparsecc.codegen.tvm.pool import install


def clock_of(threads: int) -> Callable[[], float]:
    """Seconds. One thread is timed by the time that it had its core: what the scheduler gave to others meanwhile says nothing of it."""
    return time.thread_time if threads == 1 else time.perf_counter


def footprint(least: int) -> int:
    """Bytes that do not fit in the last cache, at least `least`."""
    return max(least, _host().cache_bytes["L3"] * 3 // 2)


class Limit(Protocol):
    """A rate (per second) that no kernel can beat, measured anew at each call for about `seconds`."""

    def rate(self, seconds: float) -> float: ...


class FmaLimit:
    """fp32 FLOP/s of `threads` threads, with accumulators and factors in registers."""

    def __init__(self, threads: int) -> None:
        on = _host()
        self._clock = clock_of(threads)
        self._flops = 2.0 * threads * on.accumulators * on.lanes
        self._kernel = _compiled(parallel_fma(threads, on.lanes, on.accumulators, on.fused))
        self._data = torch.full((threads * on.lanes,), 0.5), torch.zeros(threads * on.accumulators * on.lanes)
        self._per_second = 1e6
        for _ in range(4):  # until a run lasts as long as it is asked to
            self.rate(1e-3)

    def rate(self, seconds: float) -> float:
        """One run of about that long."""
        rounds = max(64, int(self._per_second * seconds))
        start = self._clock()
        self.run(self._flops * rounds)
        took = max(1e-9, self._clock() - start)
        self._per_second = rounds / took
        return self._flops * rounds / took

    def run(self, flops: float) -> None:
        """That much work, to the nearest round."""
        self._kernel(round(flops / self._flops), *self._data)


class ReadLimit:
    """Bytes/s of `threads` threads that together read `nbytes` from each of `copies` buffers in turn, each thread its part from `streams`
    places at once: a core that follows several keeps more cache lines under way."""

    def __init__(self, threads: int, nbytes: int, copies: int, streams: int = 1) -> None:
        self._clock = clock_of(threads)
        self.streams, unit = streams, 8 * _host().lanes
        self._each = -(-nbytes // (4 * unit * threads)) * unit  # floats of one thread, of one copy
        self._floats, self._copies = self._each * threads, copies
        self._kernel = _compiled(parallel_read(threads, _host().lanes, streams))
        # ones, not zeros: pages that nobody wrote all map to one page of zeros
        self._data, self._out = torch.ones(self._floats * copies), torch.zeros(threads * unit)
        self._at, self._per_second = 0, 1e9
        for _ in range(4):
            self.rate(1e-3)

    def rate(self, seconds: float) -> float:
        """One run of at least a copy, going on where the last one stopped."""
        count = max(1, int(self._per_second * seconds / (4 * self._floats)))
        start = self._clock()
        self._kernel(self._at, count, self._copies, self._each, self._data, self._out)
        took = max(1e-9, self._clock() - start)
        self._at = (self._at + count) % self._copies
        self._per_second = 4 * self._floats * count / took
        return self._per_second


def parallel_fma(threads: int, lanes: int, accumulators: int, fused: bool) -> Any:
    """f(rounds, factors f32[threads * lanes], out f32[threads * accumulators * lanes]): `peaks.fma_kernel`'s "register", per thread."""
    vector = f"float32x{lanes}"

    def step(acc: Any, by: Any) -> Any:
        return T.call_llvm_pure_intrin(vector, "llvm.fma", acc, by, by) if fused else acc * by + by

    @T.prim_func(s_tir=True)
    def fma(rounds: T.int32, w_h: T.handle, y_h: T.handle):
        T.func_attr({"tirx.noalias": True, "global_symbol": "f"})
        w = T.match_buffer(w_h, (threads * lanes,), "float32")
        y = T.match_buffer(y_h, (threads * accumulators * lanes,), "float32")
        for t in T.parallel(threads):
            acc = T.alloc_buffer((accumulators * lanes,), "float32", scope="local")
            for i in T.unroll(accumulators):
                acc[T.ramp(i * lanes, 1, lanes)] = y[T.ramp((t * accumulators + i) * lanes, 1, lanes)]
            for _ in range(rounds):
                for i in T.unroll(accumulators):
                    acc[T.ramp(i * lanes, 1, lanes)] = step(acc[T.ramp(i * lanes, 1, lanes)], w[T.ramp(t * lanes, 1, lanes)])
            for i in T.unroll(accumulators):
                y[T.ramp((t * accumulators + i) * lanes, 1, lanes)] = acc[T.ramp(i * lanes, 1, lanes)]

    return fma


def parallel_read(threads: int, lanes: int, streams: int) -> Any:
    """f(first, count, copies, each, x f32[copies * threads * each], out f32[threads * 8 * lanes]): reads copies first, first + 1, ...
    (around the end), thread t the t-th part of each. Between copies the threads wait for each other, as between kernels."""
    step = 8 * lanes
    run = step // streams

    @T.prim_func(s_tir=True)
    def read(first: T.int64, count: T.int64, copies: T.int64, each: T.int64, x_h: T.handle, y_h: T.handle):
        n = T.int64()
        T.func_attr({"tirx.noalias": True, "global_symbol": "f"})
        x = T.match_buffer(x_h, (n,), "float32")
        y = T.match_buffer(y_h, (threads * step,), "float32")
        for c in range(count):
            for t in T.parallel(threads):
                acc = T.alloc_buffer((step,), "float32", scope="local")
                for i in T.unroll(8):
                    acc[T.ramp(i * lanes, 1, lanes)] = y[T.ramp(t * step + i * lanes, 1, lanes)]
                for j in range(each // step):
                    for i in T.unroll(8):
                        acc[T.ramp(i * lanes, 1, lanes)] = (
                            acc[T.ramp(i * lanes, 1, lanes)]
                            + x[
                                T.ramp(
                                    ((first + c) % copies * threads + t) * each
                                    + i % streams * (each // step * run) + j * run + i // streams * lanes,
                                    1,
                                    lanes,
                                )
                            ]
                        )
                for i in T.unroll(8):
                    y[T.ramp(t * step + i * lanes, 1, lanes)] = acc[T.ramp(i * lanes, 1, lanes)]

    return read


@lru_cache
def _host() -> Host:
    return host()


def _compiled(func: Any) -> Any:
    install()  # the pool, before any code that uses it is loaded
    return tvm.compile(func, target=TvmBackend.of().isa.target())["f"]
