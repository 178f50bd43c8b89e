"""What this machine can do at most, measured: fp32 multiply-adds and reads per second, at each level of the memory, per thread count.

Kernels are judged against these figures (the roofline of Williams, Waterman and Patterson, CACM 2009) and not against a data sheet,
since the clock, the hypervisor and the neighbours decide. The loops go through the same TVM and LLVM that sparsecc's kernels do.

    python benchmarks/peaks.py [--threads 1,2] [--seconds 0.2] [--json FILE]
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tvm
from tvm.script import tirx as T
from tvm.target import codegen

REPEATS = 31  # short runs: on a shared machine some of them are undisturbed
L1_FLOATS = 2048  # 8 KiB of operands: inside every L1


@dataclass(frozen=True)
class Host:
    """The machine and the vectors that LLVM would use on it. `lanes` counts fp32 values; `isa` is for people."""

    machine: str
    mcpu: str
    isa: str
    lanes: int
    accumulators: int
    fused: bool
    cache_bytes: dict[str, int]


@dataclass(frozen=True)
class Rate:
    """GFLOP/s or GB/s over REPEATS runs. A far apart pair says that the machine was not ours alone: measure again."""

    median: float
    best: float


@dataclass(frozen=True)
class Peaks:
    """What `threads` pinned threads reach together, each on its own data.

    fma_gflops: "register" is the peak; "broadcast" reads one fp32 weight from L1 per FMA, as a block kernel does; "load" reads one
    full vector from L1 per FMA, as unstructured CSR does: the ceilings of those kernels. read_gbs: GB/s by buffer place, from
    memory that torch allocates (no huge pages asked for), as packed weights are.
    """

    threads: int
    fma_gflops: dict[str, Rate]
    read_gbs: dict[str, Rate]
    buffer_bytes: dict[str, int]


def host() -> Host:
    """Ask LLVM for the CPU and its vector width, Linux for its name and caches."""
    target = _target()
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
    if x86:  # by feature: the width that TVM reports is 512 even for the generic x86 CPU
        wide, avx = target_has("avx512f"), target_has("avx")
        lanes = 16 if wide else 8 if avx else 4
        isa = "AVX-512" if wide else "AVX2" if target_has("avx2") else "AVX" if avx else "SSE"
    else:
        with target:
            lanes = max(4, codegen.llvm_get_vector_width(target) // 32)
        isa = f"{32 * lanes}-bit {platform.machine()}"
    # Latency x ports is 8 FMAs in flight on x86 and 16 on some Arm cores; below AVX-512 x86 names only 16 registers.
    accumulators = 12 if x86 and lanes < 16 else 24
    return Host(_cpu_name(), str(target.attrs["mcpu"]), isa, lanes, accumulators, not x86 or target_has("fma"), _cache_bytes())


def target_has(feature: str) -> bool:
    """Whether LLVM's model of this CPU has a feature, by LLVM's name for it."""
    with _target():
        return bool(codegen.llvm_cpu_has_features(feature))


def measure_peaks(threads: int, seconds: float = 0.2, on: Host | None = None) -> Peaks:
    """Measure every figure at one thread count: seven of them, each about `seconds` of running and a little to set up.

    Raises ValueError if the process may use fewer CPUs than `threads`.
    """
    on = on or host()
    cpus = _cpus()
    if threads > len(cpus):
        raise ValueError(f"{threads} threads asked for, this process may use {len(cpus)} CPUs")
    fma = {kind: _fma_gflops(kind, threads, cpus, seconds, on) for kind in ("register", "broadcast", "load")}
    sizes = _buffer_bytes(threads, on)
    kernel = _compile(read_kernel(on.lanes))
    return Peaks(threads, fma, {place: _read_gbs(kernel, size, threads, cpus, seconds, on.lanes) for place, size in sizes.items()}, sizes)


def fma_kernel(kind: str, lanes: int, accumulators: int, fused: bool = True) -> Any:
    """f(rounds, operands f32[L1_FLOATS], out f32[accumulators * lanes]): rounds x accumulators vector FMAs.

    The accumulator is a factor, so that nothing is loop-invariant. Without a fused instruction (llvm.fma would call libm) it is
    a multiply and an add.
    """
    vector = f"float32x{lanes}"
    groups = 1 << (L1_FLOATS // (accumulators * lanes)).bit_length() - 1  # a power of two: the address costs one `and`

    def factor(w: Any, k: Any, i: Any) -> Any:
        """The second factor of FMA i in round k, as an expression."""
        if kind == "register":
            return w[T.ramp(lanes, 1, lanes)]
        if kind == "broadcast":
            return T.broadcast(w[lanes + k % 32 * accumulators + i], lanes)
        return w[T.ramp((k % groups * accumulators + i) * lanes, 1, lanes)]

    def step(acc: Any, by: Any, plus: Any) -> Any:
        return T.call_llvm_pure_intrin(vector, "llvm.fma", acc, by, plus) if fused else acc * by + plus

    @T.prim_func(s_tir=True)
    def fma(rounds: T.int32, w_h: T.handle, y_h: T.handle):
        T.func_attr({"tirx.noalias": True, "global_symbol": "f"})
        w = T.match_buffer(w_h, (L1_FLOATS,), "float32")
        y = T.match_buffer(y_h, (accumulators * lanes,), "float32")
        acc = T.alloc_buffer((accumulators * lanes,), "float32", scope="local")
        for i in T.unroll(accumulators):
            acc[T.ramp(i * lanes, 1, lanes)] = y[T.ramp(i * lanes, 1, lanes)]
        for k in range(rounds):
            for i in T.unroll(accumulators):
                acc[T.ramp(i * lanes, 1, lanes)] = step(acc[T.ramp(i * lanes, 1, lanes)], factor(w, k, i), w[T.ramp(0, 1, lanes)])
        for i in T.unroll(accumulators):
            y[T.ramp(i * lanes, 1, lanes)] = acc[T.ramp(i * lanes, 1, lanes)]

    return fma


def read_kernel(lanes: int) -> Any:
    """f(rounds, x f32[n], out f32[8 * lanes]): reads x `rounds` times into eight running sums. n is a multiple of 8 * lanes."""
    step = 8 * lanes

    @T.prim_func(s_tir=True)
    def read(rounds: T.int32, x_h: T.handle, y_h: T.handle):
        n = T.int32()
        T.func_attr({"tirx.noalias": True, "global_symbol": "f"})
        x = T.match_buffer(x_h, (n,), "float32")
        y = T.match_buffer(y_h, (step,), "float32")
        acc = T.alloc_buffer((step,), "float32", scope="local")
        for i in T.unroll(8):
            acc[T.ramp(i * lanes, 1, lanes)] = y[T.ramp(i * lanes, 1, lanes)]
        for _ in range(rounds):
            for j in range(n // step):
                for i in T.unroll(8):
                    acc[T.ramp(i * lanes, 1, lanes)] = acc[T.ramp(i * lanes, 1, lanes)] + x[T.ramp(j * step + i * lanes, 1, lanes)]
        for i in T.unroll(8):
            y[T.ramp(i * lanes, 1, lanes)] = acc[T.ramp(i * lanes, 1, lanes)]

    return read


def _fma_gflops(kind: str, threads: int, cpus: list[int], seconds: float, on: Host) -> Rate:
    kernel = _compile(fma_kernel(kind, on.lanes, on.accumulators, on.fused))
    data = [(torch.full((L1_FLOATS,), 0.5), torch.zeros(on.accumulators * on.lanes)) for _ in range(threads)]
    return _rate(kernel, data, 2e-9 * on.accumulators * on.lanes, cpus, seconds)


def _read_gbs(kernel: Any, size: int, threads: int, cpus: list[int], seconds: float, lanes: int) -> Rate:
    # ones, not zeros: pages that nobody wrote all map to one page of zeros, and no DRAM is read
    data = [(torch.ones(size // 4), torch.zeros(8 * lanes)) for _ in range(threads)]
    return _rate(kernel, data, 1e-9 * size, cpus, seconds)


def _rate(kernel: Any, data: list[tuple[torch.Tensor, torch.Tensor]], work: float, cpus: list[int], seconds: float) -> Rate:
    """Median and best over REPEATS of the threads' rates summed, where one round of one thread does `work`."""
    def call(slot: int, rounds: int) -> float:
        start = time.perf_counter()
        kernel(rounds, *data[slot])
        return time.perf_counter() - start

    rounds = 1
    while (took := call(0, rounds)) < seconds / 30:
        rounds *= 4
    rounds = max(1, min(2**31 - 1, int(rounds * seconds / REPEATS / took)))
    rates = [sum(work * rounds / took for took in _together(call, rounds, len(data), cpus)) for _ in range(REPEATS)]
    return Rate(statistics.median(rates), max(rates))


def _together(call: Callable[[int, int], float], rounds: int, threads: int, cpus: list[int]) -> list[float]:
    """Run `call` in pinned threads that start at once; TVM's calls drop the interpreter lock. Returns each thread's seconds."""
    gate, took = threading.Barrier(threads), [0.0] * threads

    def body(slot: int) -> None:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {cpus[slot]})  # 0 is the calling thread, not the process
        call(slot, rounds // 8)  # wakes the clock and the cache
        gate.wait()
        took[slot] = call(slot, rounds)

    workers = [threading.Thread(target=body, args=(slot,)) for slot in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return took


def _buffer_bytes(threads: int, on: Host) -> dict[str, int]:
    """Bytes that each thread reads: half of its own caches, a part of the shared one, four times all of it for DRAM (1 GiB at most)."""
    l1, l2, l3 = (on.cache_bytes[level] for level in ("L1", "L2", "L3"))
    sizes = {"L1": l1 // 2, "L2": l2 // 2}
    if 4 * l2 * threads <= l3:
        sizes["L3"] = 4 * l2
    sizes["DRAM"] = min(1 << 30, max(128 << 20, 4 * max(l2, l3))) // threads
    return {place: size // 4096 * 4096 for place, size in sizes.items()}


def _target() -> Any:
    return tvm.target.Target({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()})


def _compile(func: Any) -> Any:
    return tvm.compile(func, target=_target())["f"]


def _cpus() -> list[int]:
    """The CPUs that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _cache_bytes() -> dict[str, int]:
    """L1 (data), L2 and L3 bytes from sysfs; common sizes where it says nothing."""
    sizes = {"L1": 32 << 10, "L2": 512 << 10, "L3": 32 << 20}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction" and f"L{level}" in sizes and size.endswith("K"):
            sizes[f"L{level}"] = int(size[:-1]) << 10
    return sizes


def main() -> None:
    """Measure, print a table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", default=",".join(str(t) for t in (1, 2) if t <= len(_cpus())), help="thread counts, e.g. 1,2")
    parser.add_argument("--seconds", type=float, default=0.2, help="time spent on each figure, over all its repeats")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    on = host()
    caches = ", ".join(f"{level} {size >> 10} KiB" for level, size in on.cache_bytes.items())
    print(f"{on.machine}: LLVM says {on.mcpu}; {on.isa}, {on.lanes} fp32 lanes; {caches}")
    rows = [measure_peaks(int(count), args.seconds, on) for count in args.threads.split(",")]
    for row in rows:
        print(f"{row.threads} thread{'s' * (row.threads > 1)}")
        for kind, value in row.fma_gflops.items():
            print(f"  fp32 FMA, {kind:10s} {value.median:8.1f} GFLOP/s, best {value.best:.1f}")
        for place, value in row.read_gbs.items():
            print(f"  read {place:15s} {value.median:8.1f} GB/s, best {value.best:.1f}   ({row.buffer_bytes[place] >> 10} KiB a thread)")
    if args.json:
        args.json.write_text(json.dumps({"host": asdict(on), "peaks": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
