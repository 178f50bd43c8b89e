"""Every kernel of the default space compiled for GPUs that need not be here: registers, spills, shared memory, matrix instructions.

    python -m benchmarks.gpu_compile [--targets cuda:sm_80,cuda:sm_90,hip:gfx942] [--dtypes f32,tf32,f16,bf16] [--formats 'csr|bsr(4, 1)']
                                     [--jobs 2]

What was found is kept in SPARSECC_CACHE by source, target and version of Triton, so a run that was stopped goes on where it was. Writes
benchmarks/results/gpu-compile.json; exits with 1 if a kernel fails, spills, does not fit, or has no matrix instruction where it should.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import triton

from sparsecc.autotune.cache import TuneCache
from sparsecc.codegen.config import to_text
from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.triton.backend import TritonBackend
from sparsecc.codegen.triton.config import GpuConfig
from sparsecc.codegen.triton.devices import device_of
from sparsecc.codegen.triton.linear import CSR, families
from sparsecc.errors import TargetError
from sparsecc.formats import parse_format

FORMATS = (
    "bsr(128, 128)", "bsr(64, 64)", "bsr(32, 32)", "bsr(16, 16)", "packed_nm(2, 4)", "packed_nm(1, 4)", "packed_nm(4, 8)",
    "bitmap(64).panels(64)", "bitmap(16).block(4, 1).panels(32)", "csr", "bsr(4, 1)", "bsr(1, 16)", "packed_nm(2, 4) + csr",
)
RESULTS = Path(__file__).parent / "results" / "gpu-compile.json"
FAULTS = ("failed", "spill", "too_large", "without_matrix")

Task = tuple[str, KernelSpec, GpuConfig]


def specs(texts: Iterable[str], dtypes: Iterable[str]) -> Iterator[KernelSpec]:
    """Every format by every dtype and regime, with bias, GELU and residual: what takes most registers."""
    for dtype in dtypes:
        raw = parse_format("csr." + (dtype if dtype in ("f16", "bf16") else "f32")).codec
        for text in texts:
            terms = tuple(replace(parse_format(part), codec=raw) for part in text.split(" + "))
            for regime in ("many", "few", "one"):
                yield KernelSpec(terms, "gelu", True, regime=regime, dtype=dtype)  # type: ignore[arg-type]


def row(task: Task, compile: bool = True) -> dict[str, Any] | None:
    """What the compiler made of one kernel, now or in an earlier run; None if it has yet to be compiled and is not to be."""
    target, spec, config = task
    backend = TritonBackend(device_of(target))
    digest = hashlib.sha256(backend.source(spec, config).encode()).hexdigest()[:32]
    key = f"compiled for {target} by triton {triton.__version__}: {digest}"
    found = _cache().get(key)
    if (found is None or found["spills"]) and not compile:
        return None
    if found is None or found["spills"]:
        found = _compiled(backend, spec, config)
        if "error" not in found:
            _cache().put(key, found)
    return {"spec": str(spec), "config": to_text(config), **found}


@lru_cache
def _cache() -> TuneCache:
    return TuneCache()


def _compiled(backend: TritonBackend, spec: KernelSpec, config: GpuConfig) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        binary = backend.binary(spec, config)
    except TargetError as error:
        return {"error": str(error)}
    return {
        "registers": binary.registers, "spills": binary.spills, "shared": binary.shared, "occupancy": round(binary.occupancy, 3),
        "matrix": binary.matrix, "seconds": round(time.perf_counter() - started, 2),
    }


def fault(task: Task, found: dict[str, Any]) -> str | None:
    """One of FAULTS, or None."""
    target, spec, _ = task
    if "error" in found:
        return "failed"
    if found["spills"]:
        return "spill"
    if found["shared"] > device_of(target).shared:
        return "too_large"
    dots = spec.regime != "one" and spec.dtype != "f32" and any(one is not CSR for one in families(spec))
    return "without_matrix" if dots and not found["matrix"] else None


def sweep(targets: list[str], texts: list[str], dtypes: list[str], jobs: int) -> Iterator[tuple[Task, dict[str, Any] | None]]:
    """Every kernel and what was found of it, in a fixed order; without jobs nothing is compiled."""
    tasks = [(t, spec, config) for t in targets for spec in specs(texts, dtypes) for config in TritonBackend(device_of(t)).space(spec)]
    if jobs == 0:
        yield from ((task, row(task, compile=False)) for task in tasks)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from zip(tasks, pool.imap(row, tasks), strict=True)


def as_json(found: dict[str, Any]) -> str:
    """With a line for each kernel."""
    targets = []
    for target, of in found["targets"].items():
        rows = ",\n    ".join(map(json.dumps, of["rows"]))
        targets.append(f'  {json.dumps(target)}: {json.dumps(of["totals"])[:-1]}, "rows": [\n    {rows}]}}')
    return f'{{"triton": {json.dumps(found["triton"])}, "targets": {{\n' + ",\n".join(targets) + "}}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="cuda:sm_80,cuda:sm_90,hip:gfx942")
    parser.add_argument("--dtypes", default="f16,bf16,f32,tf32")
    parser.add_argument("--formats", default="|".join(FORMATS))
    parser.add_argument("--jobs", type=int, default=2, help="processes; 0 writes down what earlier runs found")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    found: dict[str, Any] = {"triton": triton.__version__, "targets": {}}
    for task, made in sweep(asked.targets.split(","), asked.formats.split("|"), asked.dtypes.split(","), asked.jobs):
        of = found["targets"].setdefault(task[0], {"totals": {"kernels": 0, **dict.fromkeys(FAULTS, 0), "not compiled": 0}, "rows": []})
        if made is None:
            of["totals"]["not compiled"] += 1
            continue
        of["totals"]["kernels"] += 1
        of["rows"].append(made)
        if (wrong := fault(task, made)) is not None:
            of["totals"][wrong] += 1
            print(f"{wrong}: {task[0]} {made}", flush=True)
    asked.out.write_text(as_json(found))
    for target, of in found["targets"].items():
        print(f"{target}: {', '.join(f'{count} {name}' for name, count in of['totals'].items())}")
    sys.exit(any(of["totals"][name] for of in found["targets"].values() for name in FAULTS))


if __name__ == "__main__":
    main()
