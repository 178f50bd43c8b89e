"""Predicted time of a GPU kernel: the roofline of what it really loads and multiplies, and how evenly programs fill the device.

A kernel that expands weights multiplies all of them, zeros too, and spends integer instructions on each; one that multiplies single
entries does without matrix units. The prediction ranks candidates, and is all there is for a device that isn't at hand. The shares and
instruction counts below are assumptions from published kernels and from reading ours, not measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.triton.config import GpuConfig
from sparsecc.codegen.triton.devices import Device
from sparsecc.codegen.triton.linear import families, tile_rows
from sparsecc.formats import Format

LAUNCH = 3e-6
"""Seconds between two kernels of one stream."""

BANDWIDTH_SHARE = 0.85
"""Of the memory bandwidth on the data sheet, what a streaming kernel sees."""

DENSE_SHARE = 0.70
"""Of the matrix units' peak, what the vendor's dense product reaches on a layer's shape."""

MATRIX_SHARE = {"bsr": 0.60, "nm": 0.50, "bitmap": 0.50, "dense": 0.60}
"""The same for ours, per family, with full tiles: 64 features or more."""

EXPANSION = {"nm": 4.0, "bitmap": 6.0, "csr": 4.0, "bsr": 0.0, "dense": 0.0}
"""Integer instructions per weight of a tile, each time the tile is expanded; per stored entry for csr."""


@dataclass(frozen=True)
class Estimate:
    """Seconds, of which memory, arithmetic and integer work alone would take the others; `fraction` of the roofline reached."""

    seconds: float
    memory: float
    arithmetic: float
    integer: float

    @property
    def fraction(self) -> float:
        """The larger of memory and arithmetic time over the predicted time."""
        return max(self.memory, self.arithmetic) / self.seconds


def dense_estimate(N: int, K: int, tokens: int, dtype: str, device: Device) -> Estimate:
    """The vendor's dense product y[M, N] = x[M, K] W^T."""
    size = 4 if dtype in ("f32", "tf32") else 2
    memory = size * (N * K + tokens * (N + K)) / device.bandwidth
    arithmetic = 2 * tokens * N * K / device.flops[dtype]
    return Estimate(max(memory / BANDWIDTH_SHARE, arithmetic / DENSE_SHARE) + LAUNCH, memory, arithmetic, 0.0)


def estimate(spec: KernelSpec, config: GpuConfig, shape: tuple[int, int], kept: dict[Format, int], tokens: int, device: Device) -> Estimate:
    """One of our kernels; `kept`: blocks that are not zero, per format."""
    (N, K), size = shape, 4 if spec.dtype in ("f32", "tf32") else 2
    one = spec.regime == "one"
    width = 1 if one else config.bm
    columns = -(-tokens // width)
    rows = tile_rows(spec, config)
    programs = -(-N // rows) * columns * config.split
    # What is beyond the last token is computed all the same, and the last wave of programs may be small.
    waves = programs / device.multiprocessors
    filled = waves / -(-programs // device.multiprocessors) if waves < 4 else 1.0
    if one or spec.regime == "few":
        filled = min(1.0, waves)  # bound by bytes in flight, which a few programs per multiprocessor provide
    memory = arithmetic = slow = integer = 0.0
    lanes = device.flops["f32"] / 2  # multiply-adds a second, outside the matrix units; integers go at half of that
    for fmt, one_family in zip(spec.formats, families(spec), strict=True):
        entries = fmt.level.slots(*fmt.grid(N, K), kept[fmt]) * fmt.block[0] * fmt.block[1]
        memory += fmt.nbytes(N, K, kept[fmt]) / device.bandwidth
        expanded = N * K if one_family.name in ("nm", "bitmap", "dense") else entries
        integer += EXPANSION[one_family.name] * expanded * columns / (lanes / 2)
        if one:
            slow += expanded / lanes
        elif one_family.name == "csr":
            slow += entries * tokens / lanes / 0.15  # every product loads its own activation
        else:
            flops = 2 * expanded * columns * width
            arithmetic += flops / device.flops[spec.dtype]
            share = MATRIX_SHARE[one_family.name] * min(1.0, rows / 64) ** 0.5
            slow += flops / device.flops[spec.dtype] / share
    memory += size * tokens * (N + K) / device.bandwidth
    seconds = max(memory / BANDWIDTH_SHARE, slow, integer / 0.7) / max(filled, 1e-3) + LAUNCH
    return Estimate(seconds, memory, arithmetic, integer)
