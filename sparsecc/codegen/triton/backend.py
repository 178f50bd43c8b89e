"""The GPU backend: specs to Triton source, and that to binaries for any device."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.triton.compiler import Binary, binary
from sparsecc.codegen.triton.config import GpuConfig
from sparsecc.codegen.triton.devices import Device
from sparsecc.codegen.triton.launch import Launch
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
        """Most promising first; a pipeline too deep for this device's shared memory is cut."""
        return list(dict.fromkeys(_fitting(spec, config, self.device.shared) for config in _space(spec, self.device.warp)))

    def source(self, spec: KernelSpec, config: GpuConfig) -> str:
        """Triton source of the kernel `linear`."""
        return linear_source(spec, config)

    def load(self, source: str) -> Launch:
        """A function that launches the kernel."""
        return Launch(source, self.device)

    def binary(self, spec: KernelSpec, config: GpuConfig) -> Binary:
        """The kernel compiled for the device, which need not be there. Raises TargetError."""
        return binary(self.source(spec, config), self.device)


def _space(spec: KernelSpec, lanes: int) -> list[GpuConfig]:
    kinds = families(spec)
    if CSR in kinds:
        return _csr_space(spec)
    if spec.regime == "one":
        if BITMAP in kinds:
            return [GpuConfig(bm=16, split=split, warps=warps, stages=1) for warps in (4, 8) for split in (4, 1)]
        bk = 64 if BSR in kinds else 256
        tiles = ((16, 1, 1), (32, 4, 1), (16, 4, 3))
        return [GpuConfig(bm=16, bn=rows, bk=bk, split=split, stages=stages) for rows, split, stages in tiles]
    rows = tile_rows(spec, GpuConfig())
    if spec.dtype == "f32":  # ordinary multiply-adds, whose operands take registers
        few = spec.regime == "few"
        tokens, warps = ((16, 4), (16, 1)) if few else ((64, 1), (32, 1)), 4 if few and rows < 128 else 8
        return [GpuConfig(bm=bm, bn=64, bk=32, split=split, warps=warps, stages=2) for bm, split in tokens]
    if spec.regime == "few":
        steps = ((64, 4, 4), (64, 1, 4), (128, 8, 3), (64, 16, 3))
        return [GpuConfig(bm=16, bn=64, bk=bk, split=split, warps=8 if rows == 128 else 4, stages=stages) for bk, split, stages in steps]
    wide = ((128, 4), (64, 4), (256, 8)) if rows < 128 and spec.dtype != "tf32" else ((128, 8), (64, 4))
    if spec.dtype == "tf32" and lanes == 64 and rows <= 32:  # eight wavefronts on so small a tile spill
        wide = ((128, 4), (64, 4))
    return [GpuConfig(bm=bm, bn=64, bk=bk, warps=warps, stages=stages) for bk, stages in ((64, 3), (32, 4)) for bm, warps in wide]


def _csr_space(spec: KernelSpec) -> list[GpuConfig]:
    if spec.regime == "one":
        return [GpuConfig(bm=16, bn=rows, split=split, stages=1) for rows, split in ((16, 1), (16, 4), (32, 1), (8, 4))]
    # Products of every row and token with all columns of a block are held at once.
    many = any(fmt.block[1] > 4 for fmt in spec.formats) or (spec.dtype == "f32" and len(spec.formats) > 1)
    dots = spec.dtype != "f32" and any(one is not CSR for one in families(spec))
    tokens = (16,) if spec.regime == "few" else (32, 16) if many else (64, 32)
    rows = (8,) if many else (16,) if dots else (16, 8)  # a matrix instruction takes 16 rows
    return [GpuConfig(bm=bm, bn=bn, warps=4, stages=1) for bm in tokens for bn in rows]


def _fitting(spec: KernelSpec, config: GpuConfig, most: int) -> GpuConfig:
    """With fewer stages, then fewer columns where the format leaves a choice, then fewer tokens, until the pipeline fits."""
    while (shared := _shared(spec, config)) > most:
        narrow = replace(config, bk=config.bk // 2)
        if config.stages > 2:
            config = replace(config, stages=config.stages - 1)
        elif config.bk > 16 and _shared(spec, narrow) < shared:
            config = narrow
        elif config.bm > 16:
            config = replace(config, bm=config.bm // 2)
        else:
            break
    return config


def _shared(spec: KernelSpec, config: GpuConfig) -> int:
    """Bytes of shared memory that the pipeline of both operands will take, about."""
    kinds = families(spec)
    if spec.regime == "one" or CSR in kinds:
        return 0
    size = 4 if spec.dtype in ("f32", "tf32") else 2
    columns = max(one.columns(fmt, config.bk) for one, fmt in zip(kinds, spec.formats, strict=True))
    return config.stages * size * columns * (tile_rows(spec, config) + config.bm)


@lru_cache
def source_hash() -> str:
    """Changes whenever the code that writes kernels does: part of the tuning cache's key."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.*")):
        if path.suffix in (".py", ".json"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
