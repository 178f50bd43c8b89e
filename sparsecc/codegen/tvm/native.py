"""Kernels as shared objects in the cache, called through ctypes.

A process that finds its kernels there starts without TVM, and many calls in a row are one (`Calls`). Where nothing can be linked or
loaded from the cache, TVM's own JIT serves (see `backend`).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

LAUNCHER = Path(__file__).with_name("omp_launch.ll")
_NONE, _INT, _POINTER = 0, 1, 4
"""TVM's numbers for what an argument is: a pair (number, value), 64 bits each."""
_SERVICES = {
    "__TVMBackendParallelLaunch": "launch",
    "__TVMBackendAllocWorkspace": "allocate",
    "__TVMBackendFreeWorkspace": "release",
}
"""Variables in which a kernel looks for what TVM's runtime would give it, and the launcher's functions."""
RESULT = ctypes.create_string_buffer(16)
"""Where kernels write that they return nothing; nobody reads it."""
REFUSED = "sparsecc: kernel call {} of {} refused its arguments"


class Native:
    """f(*arguments): addresses (c_void_p) and integers."""

    def __init__(self, path: Path, name: str) -> None:
        self.library = ctypes.CDLL(str(path))
        self.kernel = self.library[f"__tvm_ffi_{name}"]
        self.run = self.library.run
        for variable, function in _SERVICES.items():
            with contextlib.suppress(ValueError):  # this kernel doesn't need it
                c_void_p.in_dll(self.library, variable).value = _address(self.library[function])

    def __call__(self, *args: Any) -> None:
        values = struct.pack(f"{2 * len(args)}q", *_pairs(args))
        if self.kernel(None, values, len(args), RESULT):
            raise RuntimeError(REFUSED.format(1, 1))

    @staticmethod
    def tail(last: Sequence[Any]) -> bytes:
        """The last arguments of `kernel(None, arguments, how many, RESULT)`, which returns 0 unless it refuses them."""
        return struct.pack(f"{2 * len(last)}q", *_pairs(last))


class Calls:
    """Kernel calls with their arguments, made one after the other without Python in between."""

    def __init__(self, calls: Sequence[tuple[Native, Sequence[Any]]]) -> None:
        pairs = [number for _, args in calls for number in _pairs(args)]
        self.values = (c_int64 * len(pairs))(*pairs)
        table, at = [], ctypes.addressof(self.values)
        for kernel, args in calls:
            table += (_address(kernel.kernel), at, len(args))
            at += 16 * len(args)
        self._table, self._count, self._run = (c_int64 * len(table))(*table), len(calls), calls[0][0].run
        self._kernels = [kernel for kernel, _ in calls]

    def __call__(self) -> None:
        failed = self._run(self._table, c_int64(self._count))
        if failed:
            raise RuntimeError(REFUSED.format(failed, self._count))

    @staticmethod
    def slots(calls: Sequence[tuple[Native, Sequence[Any]]]) -> list[tuple[Any, int]]:
        """Every argument, and its index in `values`."""
        every = [arg for _, args in calls for arg in args]
        return [(arg, 2 * i + 1) for i, arg in enumerate(every)]


def _pairs(args: Sequence[Any]) -> list[int]:
    """As TVM wants them: what each argument is, and its value."""
    pairs: list[int] = []
    for arg in args:
        if isinstance(arg, int):
            pairs += (_INT, arg)
        else:
            pairs += (_POINTER, arg.value) if arg.value else (_NONE, 0)
    return pairs


def find(path: Path, name: str) -> Native | None:
    """The kernel stored there, if it is whole and can be loaded; a damaged file is removed."""
    try:
        text = path.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(text[:-32]).digest() != text[-32:]:
        path.unlink(missing_ok=True)
        return None
    if not openmp():
        return None
    try:
        return Native(path, name)
    except OSError:  # a folder that nothing may be executed from
        return None


def store(module: Any, path: Path) -> None:
    """Link a compiled TVM module with the launcher; nothing is stored where that fails."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if compiler is None or not openmp():
        return
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(OSError, subprocess.SubprocessError):
        kernel, launcher, library = (Path(folder) / name for name in ("kernel.o", "launcher.o", "kernel.so"))
        module.write_to_file(str(kernel), "o")
        launcher.write_bytes(_launcher())
        # Start-up files and libraries would take most of the time: kernels need what every process has loaded, and OpenMP.
        subprocess.run([compiler, "-shared", "-nostdlib", "-o", library, kernel, launcher], check=True, capture_output=True)
        text = library.read_bytes()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        partial.write_bytes(text + hashlib.sha256(text).digest())
        partial.chmod(0o700)
        partial.replace(path)


@lru_cache(maxsize=1)
def _launcher() -> bytes:
    """omp_launch.ll as an object file."""
    import tvm

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "launcher.o"
        tvm.runtime.load_module(str(LAUNCHER)).write_to_file(str(path), "o")
        return path.read_bytes()


@lru_cache(maxsize=1)
def openmp() -> bool:
    """Make torch's OpenMP visible to libraries that are loaded from here on; False if it runs no libgomp."""
    gomp = mapped("libgomp")
    if gomp is not None:
        ctypes.CDLL(gomp, ctypes.RTLD_GLOBAL)
    return gomp is not None


def mapped(library: str) -> str | None:
    """The path under which this process has mapped a library."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    return next((line.split()[-1] for line in maps.read_text().splitlines() if library in line), None)


def _address(function: Any) -> int:
    return ctypes.cast(function, c_void_p).value or 0
