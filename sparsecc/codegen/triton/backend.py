"""The GPU backend: specs to Triton source, and that to binaries for any device."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.triton.compiler import Binary, binary
from sparsecc.codegen.triton.config import GpuConfig
from sparsecc.codegen.triton.devices import Device
from sparsecc.codegen.triton.linear import BITMAP, BSR, CSR, families, linear_source, refuses_linear, tile_rows


@dataclass(frozen=True)
class TritonBackend:
    """Kernels for one device."""

    device: Device
    name: str = "cuda"

    def refuses(self, spec: KernelSpec) -> str | None:
        """Why there is no kernel, or None."""
        return refuses_linear(spec)

    def space(self, spec: KernelSpec) -> list[GpuConfig]:
        """Most promising first: all that fits this device's shared memory."""
        return [config for config in _space(spec) if _shared(spec, config) <= self.device.shared]

    def source(self, spec: KernelSpec, config: GpuConfig) -> str:
        """Triton source of the kernel `linear`."""
        return linear_source(spec, config)

    def load(self, source: str) -> Callable[..., Any]:
        """A function that launches the kernel on the current device, see `runtime.gpu`."""
        from sparsecc.runtime.gpu import Launch

        return Launch(source, self.device)

    def binary(self, spec: KernelSpec, config: GpuConfig) -> Binary:
        """The kernel compiled for the device, which need not be there. Raises TargetError."""
        return binary(self.source(spec, config), self.device)


def _space(spec: KernelSpec) -> list[GpuConfig]:
    kinds = families(spec)
    if spec.regime == "one":
        if CSR in kinds:
            return [GpuConfig(bm=16, bn=rows, split=split, stages=1) for rows in (16, 32, 8) for split in (1, 4)]
        if BITMAP in kinds:
            return [GpuConfig(bm=16, split=split, warps=warps, stages=1) for warps in (4, 8) for split in (4, 1, 8)]
        bk = 64 if BSR in kinds else 256
        tiles = ((16, 1), (32, 4), (16, 4))
        return [GpuConfig(bm=16, bn=rows, bk=bk, split=split, stages=stages) for rows, split in tiles for stages in (1, 3)]
    if CSR in kinds:
        tokens = (16,) if spec.regime == "few" else (64, 128)
        return [GpuConfig(bm=bm, bn=rows, split=1, warps=warps, stages=1) for bm in tokens for rows, warps in ((16, 4), (32, 8), (8, 4))]
    return _matrix_space(spec, tile_rows(spec, GpuConfig()))


def _matrix_space(spec: KernelSpec, rows: int) -> list[GpuConfig]:
    """Of kernels that use matrix instructions, for tiles of so many features."""
    if spec.regime == "few":
        return [GpuConfig(bm=16, bn=64, bk=bk, split=split, stages=stages) for bk, stages in ((64, 4), (128, 3)) for split in (4, 1, 8, 16)]
    if spec.dtype == "f32":  # ordinary multiply-adds, whose operands take registers
        return [GpuConfig(bm=bm, bn=64, bk=32, warps=warps, stages=2) for bm, warps in ((64, 4), (32, 4), (64, 8))]
    wide = [(128, 4), (64, 4), (256, 8)] if rows < 128 else [(128, 8), (64, 4)]
    return [GpuConfig(bm=bm, bn=64, bk=bk, warps=warps, stages=stages) for bk, stages in ((64, 3), (32, 4), (64, 2)) for bm, warps in wide]


def _shared(spec: KernelSpec, config: GpuConfig) -> int:
    """Bytes of shared memory that the pipeline of both operands will take, about."""
    if spec.regime == "one" or CSR in families(spec):
        return 0
    size = 4 if spec.dtype in ("f32", "tf32") else 2
    return config.stages * size * config.bk * (tile_rows(spec, config) + config.bm)


@lru_cache
def source_hash() -> str:
    """Changes whenever the code that writes kernels does: part of the tuning cache's key."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.*")):
        if path.suffix in (".py", ".json"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
