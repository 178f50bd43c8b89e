"""The devices that kernels can be compiled for, from the table in `devices.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sparsecc.errors import TargetError


@dataclass(frozen=True)
class Device:
    """A GPU as data sheets state it.

    target: "cuda:sm_90"; name: of the card; backend, arch, warp: as Triton names it; multiprocessors; shared: bytes that one program
    may use; registers and warps per multiprocessor; bandwidth: bytes/s from memory; flops: FLOP/s by dtype, dense, on
    the matrix units ("f32": on the ordinary ones).
    """

    target: str
    name: str
    backend: str
    arch: Any
    warp: int
    multiprocessors: int
    shared: int
    shared_total: int
    registers: int
    warps: int
    bandwidth: float
    flops: dict[str, float]

    def __hash__(self) -> int:
        return hash(self.target)

    def occupancy(self, warps: int, registers: int, shared: int) -> float:
        """Warps resident of those possible, for programs of so many warps, registers per thread and bytes of shared memory."""
        per_warp = -(-max(registers, 1) * self.warp // 256) * 256
        fits = [self.warps // warps, self.registers // (per_warp * warps), 32]
        if shared:
            fits.append(self.shared_total // (shared + 1024))
        return min(fits) * warps / self.warps


@lru_cache
def devices() -> dict[str, Device]:
    """By target."""
    table = json.loads(Path(__file__).with_name("devices.json").read_text())
    return {target: Device(target, **row) for target, row in table.items()}


def device_of(target: str) -> Device:
    """The device of a target such as "cuda:sm_90" or "hip:gfx942". Raises TargetError, naming those that are known."""
    if target not in devices():
        raise TargetError(f"target {target!r} is not in the table of devices: use {', '.join(map(repr, devices()))}")
    return devices()[target]


def own_device() -> Device:
    """The device of this machine, with its own numbers where torch tells them. Raises TargetError where there is none."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda is not None or torch.version.hip is not None
        why = "torch finds no device or driver" if built else "this torch was built without CUDA"
        known = ", ".join(map(repr, devices()))
        raise TargetError(
            f"target 'cuda' needs a GPU, and {why}. To see what would run on one, compile for {known}; TRITON_INTERPRET=1 runs "
            f"kernels on the CPU, slowly, to check numbers"
        )
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip is not None:
        target = f"hip:{properties.gcnArchName.partition(':')[0]}"
    else:
        target = f"cuda:sm_{properties.major}{properties.minor}"
    alike = devices().get(target) or devices()["hip:gfx942" if target.startswith("hip") else _older(properties.major)]
    arch = alike.arch if alike.target == target else target.partition(":")[2].removeprefix("sm_")
    return Device(**{
        **vars(alike), "target": target, "name": properties.name, "arch": int(arch) if str(arch).isdigit() else arch,
        "multiprocessors": properties.multi_processor_count,
    })


def _older(major: int) -> str:
    """The newest known architecture that isn't newer: its limits hold on a sibling, except shared memory, which a compile checks."""
    return "cuda:sm_100" if major >= 10 else "cuda:sm_90" if major == 9 else "cuda:sm_86"
