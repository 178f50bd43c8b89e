"""The CPU that kernels are made for: LLVM's name for it, its features, and its vector width."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sparsecc.errors import TargetError

ISAS = {"avx512": ("avx512f", 16, 24), "avx2": ("avx2", 8, 12), "portable": ("", 4, 12)}
"""name -> (LLVM feature, float32 lanes, registers that may hold accumulators)"""


AVX512 = ("avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_vbmi2", "f16c", "fma")
"""Linux's names of what kernels for AVX-512 may use; LLVM's lack the underscore."""


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
        extra = tuple(f"+{f.replace('512_', '512')}" for f in AVX512 if f in flags)
        return "skylake-avx512", (*extra, "-prefer-256-bit")
    return ("haswell", ()) if name == "avx2" else ("x86-64", ())


def _cpu_flags() -> frozenset[str]:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.split(":", 1)[1].split())
    return frozenset()
