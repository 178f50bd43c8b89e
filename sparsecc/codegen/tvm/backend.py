"""The CPU backend: specs to TVMScript, TVMScript to functions on raw pointers."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparsecc.codegen.config import tunable
from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.tvm import native
from sparsecc.codegen.tvm.half import DOTS, TILE, dot_of, half_source
from sparsecc.codegen.tvm.host import Isa, host_isa
from sparsecc.codegen.tvm.rounding import round_source
from sparsecc.codegen.tvm.spmm import spmm_source
from sparsecc.codegen.tvm.spmv import spmv_source
from sparsecc.codegen.tvm.tiles import pack_rows_source, pack_tokens_source
from sparsecc.debug import cache_dir
from sparsecc.formats import Bitmap, Compressed, PackedNM, Sell, Shared

IDLE = [
    "s_tir.CompactBufferAllocation",
    "s_tir.HoistIfThenElse",
    "s_tir.InsertHoistIfThenElse",
    "s_tir.InjectPermutedLayout",
    "s_tir.InjectVirtualThread",
    "s_tir.RenormalizeSplitPattern",
    "tirx.RemoveNoOp",
]
"""Passes of TVM that take a tenth of a kernel's time and change nothing in one, see `tests/codegen/test_script.py`."""

_LOCK = threading.Lock()
_LOADED: dict[tuple[Isa, str], Callable[..., Any]] = {}


@dataclass(frozen=True)
class CpuConfig:
    """vectors: token vectors per tile; unroll: kept blocks per loop step; chunk: rows per task. Of one token, or a few: vectors is how many
    go together, streams how many rows are read at once, gather whether nonzeros are taken a vector at a time. dot: what multiplies; all
    but "fma" round activations to bf16, see `half`."""

    vectors: int = tunable(1, 2, 4, default=2)
    unroll: int = tunable(1, 2, 4, 8, default=2)
    chunk: int = tunable(64, 128, 256, default=128)
    streams: int = tunable(1, 2, 4, 8, default=4)
    gather: bool = tunable(True, False)
    dot: str = tunable("fma", "amx", "dpbf16")


@dataclass(frozen=True)
class TvmBackend:
    """Kernels for one instruction set."""

    isa: Isa
    name: str = "cpu"

    @staticmethod
    @lru_cache
    def of(isa: str = "") -> TvmBackend:
        """The backend for this machine, or for a narrower instruction set that it runs. Raises TargetError."""
        return TvmBackend(host_isa(isa))

    def refuses(self, spec: KernelSpec) -> str | None:
        """Why there is no kernel, or None."""
        if not spec.formats:
            return "low-rank terms run as two dense products"
        for fmt in spec.formats:
            if isinstance(fmt.level, PackedNM) or (isinstance(fmt.level, Bitmap) and fmt.level.every > 1):
                return f"{fmt.level} is a GPU's storage"
            if isinstance(fmt.level, Shared):
                dot = dot_of(fmt)
                if spec.regime != "many" or len(spec.formats) > 1 or not dot:
                    return f"{fmt} is for many tokens, alone, in bf16 pairs or tiles of {TILE[0]}x{TILE[1]}"
                if not self.isa.has(DOTS[dot]):
                    return f"this CPU, or target, has no {DOTS[dot]}"
            if fmt.block[0] > 64 or fmt.block[1] > 64:
                return f"blocks of {fmt.block[0]}x{fmt.block[1]} are larger than 64"
        return None

    def space(self, spec: KernelSpec) -> list[CpuConfig]:
        """Most promising first."""
        if spec.regime == "one":
            nonzeros = any(isinstance(fmt.level, Compressed) and fmt.block == (1, 1) for fmt in spec.formats)
            gathers = (True, False) if nonzeros and self.isa.has("avx512bw") else (True,)
            return [CpuConfig(1, 1, streams=streams, gather=gather) for gather in gathers for streams in (4, 8)]
        if spec.regime == "few":
            return [CpuConfig(streams=4), CpuConfig(streams=2)]
        rows = max(fmt.block[0] for fmt in spec.formats)
        dot = dot_of(spec.formats[0]) if len(spec.formats) == 1 else ""
        if dot and self.isa.has(DOTS[dot]):
            return [CpuConfig(4, 1, dot=dot)]
        if any(isinstance(fmt.level, Sell) for fmt in spec.formats):
            return [CpuConfig(4 if self.isa.registers > 16 else 2, 1), CpuConfig(1, 1)]
        if rows == 1:
            return [CpuConfig(4, 4), CpuConfig(4, 2), CpuConfig(2, 4)]
        return [CpuConfig(2, 2), CpuConfig(4, 1), CpuConfig(4, 2), CpuConfig(1, 4)]

    def source(self, spec: KernelSpec, config: CpuConfig) -> str:
        """TVMScript of the kernel named after its family, `spmm` or `spmv`."""
        if config.dot != "fma" and spec.regime == "many":
            return half_source(spec, config.dot, whole_chunk(spec, config))
        if spec.regime != "many":
            return spmv_source(spec, config.vectors, config.streams, config.gather, self.isa)
        return spmm_source(spec, config.vectors, config.unroll, whole_chunk(spec, config), self.isa.lanes, self.isa.registers)

    def load(self, source: str) -> Callable[..., Any]:
        """Compile (about a second) or look up; takes pointers as ctypes.c_void_p and sizes as int."""
        key = (self.isa, source)
        with _LOCK:
            if key not in _LOADED:
                _LOADED[key] = _load(source, self.isa)
            return _LOADED[key]

    def pack_rows(self) -> Callable[..., Any]:
        """Rows of features into tiles, see `tiles`."""
        return _mover(self, "rows")

    def pack_tokens(self) -> Callable[..., Any]:
        """Token-minor activations into tiles."""
        return _mover(self, "tokens")

    def round_tokens(self, pairs: bool) -> Callable[..., Any]:
        """Token-minor activations to bf16, see `rounding`."""
        return _rounder(self, pairs)


def whole_chunk(spec: KernelSpec, config: CpuConfig) -> int:
    """The config's rows per task, rounded up to whole windows of blocks."""
    rows = math.lcm(*(fmt.block[0] * fmt.level.window for fmt in spec.formats))
    return -(-config.chunk // rows) * rows


@lru_cache
def _mover(backend: TvmBackend, kind: str) -> Callable[..., Any]:
    """The transposing kernels, found without writing their text again: this is on every call's path."""
    source = pack_rows_source if kind == "rows" else pack_tokens_source
    return backend.load(source(backend.isa.lanes))


@lru_cache
def _rounder(backend: TvmBackend, pairs: bool) -> Callable[..., Any]:
    return backend.load(round_source(pairs))


def _load(source: str, isa: Isa) -> Callable[..., Any]:
    """From the cache, without TVM; else compiled, stored there, and loaded from there. Without a linker TVM's JIT runs it."""
    name, folder = _name(source), cache_dir()
    tag = hashlib.sha256(f"{version('apache-tvm')} {isa} {native.LAUNCHER.read_text()} {source}".encode()).hexdigest()[:24]
    stored = folder / "kernels" / f"{tag}.so" if folder else None
    found = native.find(stored, name) if stored else None
    if found is not None:
        return found
    import tvm

    from sparsecc.codegen.tvm.pool import install
    from sparsecc.codegen.tvm.script import read

    with tvm.transform.PassContext(disabled_pass=IDLE):
        built: Any = tvm.compile(read(source), target=isa.target())
    module = getattr(built, "mod", built)
    if stored:
        native.store(module, stored)
        found = native.find(stored, name)
    if found is not None:
        return found
    install()
    return module[name]


def _name(source: str) -> str:
    return source.split("def ", 1)[1].split("(", 1)[0]


@lru_cache
def source_hash() -> str:
    """Changes whenever the code that writes kernels does: part of the tuning cache's key."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.*")):
        if path.suffix in (".py", ".ll"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
