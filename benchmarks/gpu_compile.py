"""Every kernel of the default space compiled for GPUs that need not be here: registers, spills, shared memory, matrix instructions.

    python -m benchmarks.gpu_compile [--targets cuda:sm_80,cuda:sm_90,hip:gfx942] [--dtypes f32,tf32,f16,bf16] [--formats 'csr|bsr(4, 1)']

Writes benchmarks/results/gpu-compile.json after each target; what Triton has in its cache is not compiled again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import triton

from sparsecc.codegen.config import to_text
from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.triton.backend import TritonBackend
from sparsecc.codegen.triton.config import GpuConfig
from sparsecc.codegen.triton.devices import device_of
from sparsecc.errors import TargetError
from sparsecc.formats import parse_format

FORMATS = (
    "bsr(128, 128)", "bsr(64, 64)", "bsr(32, 32)", "bsr(16, 16)", "packed_nm(2, 4)", "packed_nm(1, 4)", "packed_nm(4, 8)",
    "bitmap(64).panels(64)", "bitmap(16).block(4, 1).panels(32)", "csr", "bsr(4, 1)", "bsr(1, 16)", "packed_nm(2, 4) + csr",
)
RESULTS = Path(__file__).parent / "results" / "gpu-compile.json"


def specs(texts: list[str], dtypes: list[str]) -> Iterator[KernelSpec]:
    """Every format by every dtype and regime, with bias, GELU and residual: what takes most registers."""
    for dtype in dtypes:
        raw = parse_format("csr." + (dtype if dtype in ("f16", "bf16") else "f32")).codec
        for text in texts:
            terms = tuple(replace(parse_format(part), codec=raw) for part in text.split(" + "))
            for regime in ("many", "few", "one"):
                yield KernelSpec(terms, "gelu", True, regime=regime, dtype=dtype)  # type: ignore[arg-type]


def row(backend: TritonBackend, spec: KernelSpec, config: GpuConfig) -> dict[str, Any]:
    """What the compiler made of one kernel."""
    started = time.perf_counter()
    found: dict[str, Any] = {"spec": str(spec), "config": to_text(config)}
    try:
        binary = backend.binary(spec, config)
    except TargetError as error:
        return found | {"error": str(error)}
    return found | {
        "registers": binary.registers, "spills": binary.spills, "shared": binary.shared, "fits": binary.shared <= backend.device.shared,
        "occupancy": round(binary.occupancy, 3), "matrix": binary.matrix, "seconds": round(time.perf_counter() - started, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="cuda:sm_90,cuda:sm_80,hip:gfx942")
    parser.add_argument("--dtypes", default="bf16,f16,tf32,f32")
    parser.add_argument("--formats", default="|".join(FORMATS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    found: dict[str, Any] = {"triton": triton.__version__, "targets": {}}
    for target in asked.targets.split(","):
        backend = TritonBackend(device_of(target))
        rows = []
        for spec in specs(asked.formats.split("|"), asked.dtypes.split(",")):
            for config in backend.space(spec):
                rows.append(row(backend, spec, config))
                bad = "error" in rows[-1] or rows[-1]["spills"] or not rows[-1]["fits"]
                if bad:
                    print(f"{target} {rows[-1]}", flush=True)
        errors, spills = sum("error" in r for r in rows), sum(r.get("spills", 0) > 0 for r in rows)
        large = sum(not r.get("fits", True) for r in rows)
        print(f"{target}: {len(rows)} kernels, {errors} failed, {spills} spill, {large} do not fit", flush=True)
        found["targets"][target] = {"kernels": len(rows), "failed": errors, "spill": spills, "too_large": large, "rows": rows}
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
