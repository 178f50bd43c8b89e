"""The CPU that kernels are made for: LLVM's name for it, its features, and its vector width."""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sparsecc.errors import TargetError

ISAS = {"avx512": ("avx512f", 16, 24), "avx2": ("avx2", 8, 12), "portable": ("", 4, 12)}
"""name -> (LLVM feature, float32 lanes, registers that may hold accumulators)"""


AVX512 = ("avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_vbmi2", "avx512_vnni", "avx512_bf16", "f16c", "fma")
"""Linux's names of what kernels for AVX-512 may use; LLVM's lack the underscore."""
AMX = ("amx_tile", "amx_bf16")
"""The same for tiles; LLVM's have a hyphen."""


@dataclass(frozen=True)
class Isa:
    """Vectors of `lanes` float32; `registers` bounds a kernel's accumulators; `features` go to LLVM."""

    name: str
    lanes: int
    registers: int
    mcpu: str
    features: tuple[str, ...] = ()

    def has(self, feature: str) -> bool:
        """Whether kernels may use an instruction set, by LLVM's name for it."""
        return f"+{feature}" in self.features

    def target(self) -> Any:
        """The tvm Target. One core: threads are torch's, see `pool`."""
        import tvm

        config: dict[str, Any] = {"kind": "llvm", "mcpu": self.mcpu, "num-cores": 1}
        if self.features:
            config["mattr"] = list(self.features)
        return tvm.target.Target(config)


@lru_cache
def host_isa(wanted: str = "") -> Isa:
    """The widest vectors this machine runs, or the narrower `wanted` ones. Raises TargetError for a name it doesn't know or cannot run."""
    if wanted and wanted not in ISAS:
        raise TargetError(f'target "cpu:{wanted}": known are {", ".join("cpu:" + name for name in ISAS)}')
    flags = _cpu_flags()
    names = list(ISAS)
    best = next(name for name in names if not ISAS[name][0] or ISAS[name][0] in flags)
    name = wanted or best
    if names.index(name) < names.index(best):
        raise TargetError(f'target "cpu:{wanted}": this CPU has no {wanted}; its widest is "cpu:{best}"')
    _, lanes, registers = ISAS[name]
    return Isa(name, lanes, registers, *_llvm(name, flags))


def _llvm(name: str, flags: frozenset[str]) -> tuple[str, tuple[str, ...]]:
    """(mcpu, features). LLVM may know this CPU by an older one's name, so the features it runs are named too."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        from tvm.target import codegen

        return str(codegen.llvm_get_system_cpu()), ()
    if name == "avx512":
        # Sapphire Rapids' model prefers full-width vectors, which is what these kernels are written in.
        extra = [f"+{f.replace('512_', '512')}" for f in AVX512 if f in flags]
        if "avx512_bf16" in flags and flags.issuperset(AMX) and _tiles_allowed():
            extra += [f"+{f.replace('_', '-')}" for f in AMX]
        return "skylake-avx512", (*extra, "-prefer-256-bit")
    return ("haswell", ()) if name == "avx2" else ("x86-64", ())


def _tiles_allowed() -> bool:
    """Ask Linux for the registers of AMX, which a process may use only after that (arch_prctl's ARCH_REQ_XCOMP_PERM)."""
    if platform.system() != "Linux":
        return False
    syscall, request, tiles = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(syscall, request, tiles) == 0


def _cpu_flags() -> frozenset[str]:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.split(":", 1)[1].split())
    return frozenset()
