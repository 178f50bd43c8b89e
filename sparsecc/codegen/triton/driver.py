"""Launching through CUDA's driver: a call writes the stream and the addresses into memory that holds everything else, and makes one C call.

Triton's own launcher takes a Python call and a parsed signature per launch, and another form in every release; the driver's function
takes the same four addresses for every kernel.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

CONFIG = struct.Struct("<7I4xQQI4x")
"""CUlaunchConfig: grid, block, bytes of shared memory, stream, attributes and their number."""

STREAM_AT = 32
"""Bytes of CUlaunchConfig before the stream; after it come 16 bytes of attributes, of which there are none."""


@dataclass(frozen=True)
class Driver:
    """What a launch needs of a machine. `launch`: cuLaunchKernelEx; `stream(device)`: the handle of torch's current one;
    `device()`: the current one; `capturing()`: whether its stream is being recorded into a graph."""

    launch: Callable[..., int]
    stream: Callable[[int], int]
    device: Callable[[], int]
    capturing: Callable[[], bool]


@dataclass(frozen=True)
class Loaded:
    """A kernel in a device's memory: its handle, threads and bytes of shared memory per program, and the pointers that Triton added
    behind the kernel's own arguments, which are null."""

    function: int
    threads: int
    shared: int
    extra: int


@lru_cache
def cuda_driver() -> Driver | None:
    """This machine's; None where there is none, or it is older than CUDA 11.8."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    try:
        launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    except (OSError, AttributeError):
        return None
    torch.cuda.init()
    return Driver(launch, torch._C._cuda_getCurrentRawStream, torch._C._cuda_getDevice, torch._C._cuda_isCurrentStreamCapturing)


def loaded(kernel: Any, pointers: int, integers: int) -> Loaded | None:
    """Triton's kernel with so many arguments of each kind; None if it needs more of a launch than a grid and arguments."""
    of = kernel.metadata
    special = ("global_scratch_size", "profile_scratch_size", "launch_pdl", "launch_cooperative_grid")
    if any(getattr(of, name, 0) for name in special) or getattr(of, "num_ctas", 1) != 1:
        return None
    extra = extra_pointers(kernel.asm.get("ptx", ""), pointers, integers)
    return None if extra is None else Loaded(kernel.function, 32 * of.num_warps, of.shared, extra)


def extra_pointers(ptx: str, pointers: int, integers: int) -> int | None:
    """How many pointers follow the kernel's own arguments in its PTX; None if those are not what they should be."""
    entry = re.search(r"\.entry \w+\((.*?)\)", ptx, re.DOTALL)
    kinds = re.findall(r"\.param \.([bu]\d+)", entry[1]) if entry else []
    wide = ["64" in kind for kind in kinds]
    own = [True] * pointers + [False] * integers
    return len(wide) - len(own) if wide[: len(own)] == own and all(wide[len(own) :]) else None


@dataclass(frozen=True)
class Prepared:
    """A launch with a fixed grid and fixed integers, in memory: `write(memory, STREAM_AT, stream, *addresses)`, then `launch(*given)`,
    which returns CUDA's error or 0. Not safe from several threads: each needs its own."""

    memory: Any
    write: Callable[..., None]
    launch: Callable[..., int]
    given: tuple[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]


def prepared(kernel: Loaded, launch: Callable[..., int], grid: tuple[int, int], pointers: int, integers: Sequence[int]) -> Prepared:
    """The configuration, then the arguments, 8 bytes each, then their places, as the driver wants them."""
    arguments = pointers + len(integers) + kernel.extra
    arguments_at = CONFIG.size
    table_at = arguments_at + 8 * arguments
    memory = ctypes.create_string_buffer(table_at + 8 * arguments)
    here = ctypes.addressof(memory)
    CONFIG.pack_into(memory, 0, *grid, 1, kernel.threads, 1, 1, kernel.shared, 0, 0, 0)
    struct.pack_into(f"<{len(integers)}q", memory, arguments_at + 8 * pointers, *integers)
    struct.pack_into(f"<{arguments}Q", memory, table_at, *(here + arguments_at + 8 * i for i in range(arguments)))
    at = ctypes.c_void_p
    given = (at(here), at(kernel.function), at(here + table_at), at(None))
    return Prepared(memory, struct.Struct(f"<Q16x{pointers}Q").pack_into, launch, given)
