"""The tuning space of GPU kernels."""

from __future__ import annotations

from dataclasses import dataclass

from sparsecc.codegen.config import tunable


@dataclass(frozen=True)
class GpuConfig:
    """bm: tokens per program; bn: features per program, where the format doesn't say; bk: columns per step; split: programs that share
    a row of tiles and add up in order; warps; stages: depth of the software pipeline."""

    bm: int = tunable(16, 32, 64, 128, 256, default=128)
    bn: int = tunable(8, 16, 32, 64, 128, default=64)
    bk: int = tunable(16, 32, 64, 128, 256, default=64)
    split: int = tunable(1, 2, 4, 8, 16)
    warps: int = tunable(1, 2, 4, 8, default=4)
    stages: int = tunable(1, 2, 3, 4, 5, default=3)
