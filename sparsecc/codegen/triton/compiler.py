"""Kernel text to functions and binaries, for the device at hand or one that isn't.

Triton reads a function's source through `inspect`, which finds it in `linecache`: no file is written.
"""

from __future__ import annotations

import hashlib
import linecache
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sparsecc.codegen.config import from_text
from sparsecc.codegen.triton.config import GpuConfig
from sparsecc.codegen.triton.devices import Device
from sparsecc.errors import TargetError

# Keeps fused multiply-add as it has always been; Triton 3.9 warns where nobody says.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


@dataclass(frozen=True)
class Binary:
    """A kernel compiled for a device: what it takes there, and the texts on the way (`ttgir`, `ptx`, `amdgcn`, ...).

    registers per thread; spills: bytes (CUDA) or registers (HIP) that did not fit; shared: bytes per program; warps per program.
    """

    device: Device
    registers: int
    spills: int
    shared: int
    warps: int
    asm: dict[str, str]

    def __str__(self) -> str:
        """`96 registers, no spills, 48 kB shared, occupancy 25 %, wgmma.mma_async.m64n128k16`"""
        spills = f"{self.spills} bytes spilled" if self.spills else "no spills"
        matrix = f", {self.matrix.replace('.sync.aligned', '').partition('.f32')[0]}" if self.matrix else ""
        shared = f"{self.shared / 1024:.0f} kB shared"
        return f"{self.registers} registers, {spills}, {shared}, occupancy {100 * self.occupancy:.0f} %{matrix}"

    @property
    def occupancy(self) -> float:
        """Warps that a multiprocessor holds of those that it can."""
        return self.device.occupancy(self.warps, self.registers, self.shared)

    @property
    def matrix(self) -> str:
        """The matrix instruction, "" if there is none."""
        text = self.asm.get("ptx") or self.asm.get("amdgcn") or ""
        found = re.search(r"wgmma\.mma_async[\w.:]*|tcgen05\.mma[\w.:]*|mma\.sync[\w.:]*|v_mfma_\w+", text)
        return found.group(0) if found else ""


@dataclass(frozen=True)
class Compiled:
    """Triton's own kernel and the Python function that it came from."""

    kernel: Any
    function: Any


@lru_cache
def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors (TRITON_INTERPRET=1, read when Triton is first imported)."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def function(source: str) -> Any:
    """The `@triton.jit` function of a kernel's text."""
    import triton
    import triton.language as tl

    if interpreting():
        _mend_interpreter()
    name = f"<sparsecc {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    space: dict[str, Any] = {"triton": triton, "tl": tl, "core": tl.core, "__name__": "sparsecc.kernels"}
    exec(compile(source, name, "exec"), space)
    return space[re.findall(r"^def (\w+)", source, re.MULTILINE)[-1]]


@lru_cache
def _mend_interpreter() -> None:
    """Triton's interpreter keeps bfloat16 as its bits, and multiplies those as integers: widen them first. And at each call of a function
    of the language (`tl.cdiv`, `tl.sum`) it patches the language again, which takes longer than the call: the launch has done so, for
    the modules that the kernel sees, `tl` and `core`."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    plain: Any = InterpreterBuilder.create_dot

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16 or handle.data.dtype != np.uint16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, wide(a), wide(b), *rest)

    InterpreterBuilder.create_dot = create_dot  # type: ignore[method-assign]
    InterpretedFunction.__call__ = lambda self, *given, **named: self.rewrite()(*given, **named)  # type: ignore[method-assign]


MOST_REGISTERS = 255
"""Of a CUDA thread. ptxas would rather spill a few than lose a program per multiprocessor, unless it is told how many it may take."""


def compiled(source: str, device: Device, registers: int | None = None) -> Compiled:
    """Compile for a device, there or not; `registers`: how many a CUDA thread may take, else ptxas decides. Raises TargetError where this
    Triton cannot."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    made = function(source)
    config, arguments = header(source)
    types = {name: kind.partition(" ")[0] for name, kind in arguments.items()}
    known = [["tt.divisibility", 16]]
    attrs = {(i,): known for i, kind in enumerate(arguments.values()) if kind.startswith("*") or kind.endswith("% 16")}
    target = GPUTarget(device.backend, device.arch, device.warp)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    if registers is not None and device.backend == "cuda":
        options["maxnreg"] = registers
    try:
        kernel = triton.compile(
            ASTSource(made, signature=types, constexprs={}, attrs=attrs),
            target=target,
            options=options,
        )
    except (ImportError, KeyError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise TargetError(f"Triton {triton.__version__} cannot compile this kernel for {device.name}: {first}") from error
    return Compiled(kernel, made)


def binary(source: str, device: Device) -> Binary:
    """Compile, and look at what came out; once more with all registers if some were spilled. Raises TargetError."""
    found = _look(compiled(source, device).kernel, device)
    return _look(compiled(source, device, MOST_REGISTERS).kernel, device) if found.spills and device.backend == "cuda" else found


def _look(kernel: Any, device: Device) -> Binary:
    asm = {name: text for name, text in kernel.asm.items() if isinstance(text, str)}
    registers, spills = _hip(asm["amdgcn"]) if device.backend == "hip" else _cuda(kernel.asm["cubin"], asm["ptx"], device)
    return Binary(device, registers, spills, int(kernel.metadata.shared), int(kernel.metadata.num_warps), asm)


def header(source: str) -> tuple[GpuConfig, dict[str, str]]:
    """The configuration and the arguments, from the comments above a kernel."""
    _, config, arguments = (line.removeprefix("# ") for line in source.splitlines()[:3])
    pairs = (pair.split(": ") for pair in arguments.split(", "))
    return from_text(config, GpuConfig), {name: kind for name, kind in pairs}


def _hip(text: str) -> tuple[int, int]:
    """Vector registers and those spilled to memory, from the metadata of the assembly. Scalar ones spill into lanes of vector ones."""
    value = lambda name: int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1])  # noqa: E731
    return value("vgpr_count"), value("vgpr_spill_count")


def _cuda(cubin: bytes, ptx: str, device: Device) -> tuple[int, int]:
    """Registers from the binary itself, and bytes spilled: where there is a stack frame, which need not hold registers, ptxas is asked."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([_cuobjdump(), "-res-usage", file.name], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    if found is None:
        raise TargetError(f"cuobjdump cannot read this kernel, so registers and spills are unknown: {said.stderr.strip() or said.stdout}")
    return int(found[1]), _spilled(ptx, device) if int(found[2]) else 0


def _spilled(ptx: str, device: Device) -> int:
    """Bytes of registers stored to memory, as ptxas counts them."""
    from triton.backends.nvidia.compiler import get_ptxas

    gpu = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)[0]
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(int(device.arch)).path, "-v", f"--gpu-name={gpu}", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True).stderr
    return max(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said)), default=0)


@lru_cache
def _cuobjdump() -> str:
    """The tool that comes with Triton."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not path.exists():
        raise TargetError("this Triton comes without cuobjdump, so registers and spills cannot be counted")
    return str(path)
