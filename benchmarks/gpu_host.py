"""Host time of one uncaptured call of a GPU kernel, without a GPU: on CPU tensors, with a C function that does nothing as CUDA's driver.

    python -m benchmarks.gpu_host

Everything else is what runs before a launch: finding the prepared call, the result's memory, checks, addresses, the C call itself. What is
missing is the driver's own work, and the difference between torch's two allocators; so the ratio to `torch.empty` stands beside the time.
Timed twice: through the driver, and through Triton's launcher object (up to its own C function), which serves where the driver cannot.
Writes benchmarks/results/gpu-host.json.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.peaks import host
from sparsecc.autotune.measure import interleaved
from sparsecc.codegen.triton.backend import TritonBackend
from sparsecc.codegen.triton.devices import device_of
from sparsecc.codegen.triton.driver import Driver, Loaded, Prepared, prepared
from sparsecc.codegen.triton.facts import spec_of
from sparsecc.formats import parse_format
from sparsecc.ir.ops import KERNELS, LINEAR
from sparsecc.runtime.gpu import GpuLinear

RESULTS = Path(__file__).parent / "results" / "gpu-host.json"
N, K = 256, 256
CALLS = 200
"""Per sample."""

DRIVER = Driver(ctypes.CDLL(None).pthread_equal, lambda at: 0, lambda: -1, lambda: False)
"""pthread_equal says 0 of two different addresses, which is what a driver says when all is well."""


class NoLaunch:
    """As `Launch`, without a device."""

    def __init__(self, by_driver: bool) -> None:
        self.by_driver = by_driver
        self._triton = _triton_launcher()

    def __call__(self, grid: tuple[int, int], tensors: Sequence[Tensor], numbers: Sequence[int]) -> None:
        self._triton(*grid, 1, 0, 0, (), None, None, None, *[t.data_ptr() for t in tensors], *numbers)

    def driver(self) -> Driver | None:
        return DRIVER if self.by_driver else None

    def prepared(self, at: int, grid: tuple[int, int], pointers: int, numbers: Sequence[int]) -> Prepared | None:
        return prepared(Loaded(1, 128, 0, 2), DRIVER.launch, grid, pointers, numbers) if self.by_driver else None


def _triton_launcher() -> Any:
    """Triton's, with its C function replaced."""
    from triton.backends.nvidia.driver import CudaLauncher

    triton.runtime.driver.set_active(object())  # or it looks for a GPU
    made = object.__new__(CudaLauncher)
    scratch = {f"{kind}_scratch_{what}": 0 for kind in ("global", "profile") for what in ("size", "align")}
    vars(made).update(scratch, num_ctas=1, launch_cooperative_grid=False, launch_pdl=False, gsan_enabled=False, arg_annotations=(),
                      kernel_signature=b"", launch=lambda *given: None)
    return made


@dataclass(frozen=True)
class Backend(TritonBackend):
    """Loads nothing."""

    by_driver: bool = True

    def load(self, source: str) -> Any:
        return NoLaunch(self.by_driver)


def row(tokens: int, by_driver: bool) -> dict[str, Any]:
    """Best microseconds of a call, of the op that programs contain, and of torch.empty for the same result."""
    fmt = parse_format("packed_nm(2, 4).bf16")
    params = list(fmt.pack(torch.randn(N, K) * torch.tensor([1, 0, 0, 1]).repeat(K // 4)).values())
    spec = spec_of((fmt,), "", False, (N, K), torch.bfloat16, tokens)
    backend = Backend(device_of("cuda:sm_90"), by_driver=by_driver)
    kernel = GpuLinear(backend, spec, backend.space(spec)[0], (N, K))
    x, bias = torch.randn(tokens, K).bfloat16(), torch.zeros(N).bfloat16()
    kernel(x, params, bias, None)
    KERNELS["host time"] = kernel  # type: ignore[assignment]
    terms = f"bf16[{N}, {K}] @ {fmt}"
    calls = {
        "empty": lambda: torch.empty((tokens, N), dtype=torch.bfloat16, device=x.device),
        "call": lambda: kernel(x, params, bias, None),
        "op": lambda: LINEAR(x, params, bias, None, terms, "", "row", "host time"),
    }
    many = {name: lambda call=call: [call() for _ in range(CALLS)] for name, call in calls.items()}
    with torch.no_grad():
        timed = interleaved(many, 2.0, 31)
    us = {name: 1e6 * timing.best / CALLS for name, timing in timed.items()}
    config = backend.space(spec)[0]
    return {"tokens": tokens, "split": config.split, "us": us, "ratio": {name: timing.ratio for name, timing in timed.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"machine": vars(host()), "torch": torch.__version__, "launchers": {}}
    for name, by_driver in (("triton", False), ("driver", True)):
        found["launchers"][name] = [row(tokens, by_driver) for tokens in (1, 16, 128)]
        for one in found["launchers"][name]:
            us, ratio = one["us"], one["ratio"]
            print(f"{name:7} M={one['tokens']:<4} split={one['split']} call {us['call']:.2f} us ({ratio['call']:.2f}x torch.empty), "
                  f"as an op {us['op']:.2f} us ({ratio['op']:.2f}x)")
    asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
