"""Targets: what `target=` may say, and the tuner that speaks for the machine behind it.

    "cpu"            this machine's processor; "cpu:avx512" | "cpu:avx2" | "cpu:portable" no wider than that
    "cuda"           this machine's GPU, NVIDIA or AMD
    "cuda:sm_90"     a GPU that need not be here, "hip:gfx942" likewise: kernels are compiled and can be looked at, not run
    "reference"      no kernels: the dense meaning of every op
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sparsecc.autotune.cache import TuneCache
from sparsecc.autotune.search import Effort
from sparsecc.errors import TargetError
from sparsecc.ir.program import Program

GPUS = ("cuda", "hip")


def check_target(target: str) -> None:
    """Raises TargetError for a text that names no target; whether the machine has it shows when the tuner is made."""
    kind, _, rest = target.partition(":")
    if kind in ("cpu", "reference") or target == "cuda":
        return
    if kind in GPUS and rest:
        from sparsecc.codegen.triton.devices import device_of

        device_of(target)
        return
    raise TargetError(
        f"target {target!r} is not known: use 'cpu', 'cpu:avx512', 'cpu:avx2', 'cpu:portable', 'cuda', 'reference', or a GPU to compile "
        f"for without having it, such as 'cuda:sm_90' or 'hip:gfx942'"
    )


def is_elsewhere(target: str) -> bool:
    """Whether kernels are compiled for a machine that isn't this one."""
    return target.partition(":")[0] in GPUS and ":" in target


def tuner_of(target: str, effort: Effort, seconds: float, on_choice: Callable[[str], None]) -> Any:
    """The target's tuner, None for the reference target. Imports the code generator. Raises TargetError."""
    if target == "reference":
        return None
    if target.partition(":")[0] in GPUS:
        return _gpu_tuner(target, effort, seconds, on_choice)
    from sparsecc.codegen.tvm.backend import TvmBackend
    from sparsecc.runtime.tuner import CpuTuner

    return CpuTuner(TvmBackend.of(target.partition(":")[2]), effort, seconds, TuneCache(), on_choice)


def _gpu_tuner(target: str, effort: Effort, seconds: float, on_choice: Callable[[str], None]) -> Any:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise TargetError(f"target {target!r} needs Triton, which is not installed ({error}): pip install triton, on Linux") from error
    from sparsecc.codegen.triton.backend import TritonBackend
    from sparsecc.codegen.triton.compiler import interpreting
    from sparsecc.codegen.triton.devices import device_of, own_device
    from sparsecc.runtime.gpu_tuner import GpuTuner

    if is_elsewhere(target):
        device, mode = device_of(target), "elsewhere"
    elif interpreting():
        device, mode = device_of("cuda:sm_90"), "interpreter"
    else:
        device, mode = own_device(), "device"
    return GpuTuner(TritonBackend(device), mode, effort, seconds, TuneCache(), on_choice)


def require_device(program: Program, target: str) -> None:
    """Raises TargetError for a weight that is where the target cannot use it."""
    if target == "reference" or is_elsewhere(target):
        return
    wanted = home(target)
    for node in program.graph.nodes:
        if node.op == "get_attr" and isinstance(tensor := program.const(node), torch.Tensor) and tensor.device.type != wanted:
            name, what = program.weight_name(node), "the CPU" if wanted == "cpu" else "the GPU"
            raise TargetError(f"{name} is on {tensor.device}, which target {target!r} cannot serve: move the model to {what} first")


def home(target: str) -> str:
    """Where the weights of a model have to be: "cuda", or "cpu" for all targets but this machine's GPU."""
    return "cuda" if target == "cuda" and not _interpreting() else "cpu"


def _interpreting() -> bool:
    from sparsecc.codegen.triton.compiler import interpreting

    return interpreting()
