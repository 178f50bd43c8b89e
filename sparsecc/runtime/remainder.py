"""The dense rest of a lowered program: Inductor fuses it around our ops; without a C++ compiler it runs eagerly."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch.fx._lazy_graph_module import _LazyGraphModule

from sparsecc.autotune.measure import Timing, interleaved
from sparsecc.ir.fusible import FUSIBLE
from sparsecc.ir.infer import value_of
from sparsecc.ir.program import Program
from sparsecc.runtime.chain import link
from sparsecc.runtime.conditional import conditional
from sparsecc.runtime.cores import shrinking

Remainder = Literal["auto", "inductor", "eager"]


@lru_cache(maxsize=1)
def _probe() -> threading.Thread:
    """Inductor compiles and loads a library for each kind of vectors before it first asks what the CPU has: 2 s a process, 17 s where
    nothing is cached. Those are child processes, so they may as well run while the model is captured and the first kernels are built."""

    def probe() -> None:
        with contextlib.suppress(Exception):  # found again, and said, where Inductor asks
            from torch._inductor.cpu_vec_isa import valid_vec_isa_list

            valid_vec_isa_list()

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    return thread


def begin(remainder: Remainder) -> None:
    """Let Inductor look at the CPU in the background, if it is going to be used. Timings wait for its end: see `settle`."""
    if _uses_inductor(remainder):
        _probe()


def settle() -> None:
    """Wait for what `begin` started."""
    if _probe.cache_info().currsize:
        _probe().join()


def undisturbed(calls: Mapping[str, Callable[[], Any]], seconds: float, rounds: int = 5) -> dict[str, Timing]:
    """`interleaved`, once nothing that `begin` started is running. All contests on the CPU are held so."""
    settle()
    return interleaved(calls, seconds, rounds)


def finish(program: Program, remainder: Remainder, chained: bool = True) -> Callable[..., Sequence[Any]]:
    """fn(*flat inputs) -> flat outputs. Under "auto" a program that Inductor cannot take runs eagerly, with a warning.

    `chained`: neighbouring kernels may be recorded and replayed as one call, which CPU kernels are made for."""
    apart = shrinking(program, lambda part: finish(part, remainder, chained))
    apart = apart or conditional(program, lambda part: finish(part, remainder, chained))
    if apart is not None:
        return apart
    program = program.clone()
    chains = link(program) if chained else []
    run = _finish(program, remainder)
    return lambda *inputs, keep=chains: run(*inputs)


def _finish(program: Program, remainder: Remainder) -> Callable[..., Sequence[Any]]:
    if not _uses_inductor(remainder):
        return _eager(program)
    settle()
    try:
        try:
            return _inductor(program)
        except TensorifyScalarRestartAnalysis:  # Inductor has now noted which floats of a Dynamo graph it takes as constants
            return _inductor(program)
    except Exception as error:
        if remainder == "inductor":
            raise
        first = str(error).strip().partition("\n")[0]
        reason = f"{type(error).__name__}: {first}"
        warnings.warn(f"sparsecc: Inductor cannot compile the dense remainder ({reason}); it runs eagerly", stacklevel=2)
        return _eager(program)


def _uses_inductor(remainder: Remainder) -> bool:
    return remainder == "inductor" or (remainder == "auto" and has_compiler())


@lru_cache
def has_compiler() -> bool:
    """Whether Inductor will find a C++ compiler."""
    from torch._inductor import config

    names = config.cpp.cxx if isinstance(config.cpp.cxx, tuple | list) else (config.cpp.cxx,)
    return any(shutil.which(name) for name in (*names, os.environ.get("CXX"), "g++", "clang++") if name)


def _eager(program: Program) -> Callable[..., Sequence[Any]]:
    _LazyGraphModule.force_recompile(program.gm)
    forward = program.gm.forward  # not the module's call, which torch.export replaces for all threads while one of them captures

    def run(*inputs: Any) -> Sequence[Any]:
        with torch.no_grad():
            return forward(*inputs)

    return run


def _inductor(program: Program) -> Callable[..., Sequence[Any]]:
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    copy = program.clone()
    fakes = [value_of(node) for node in copy.inputs]
    mode = detect_fake_mode([fake for fake in fakes if isinstance(fake, torch.Tensor)])
    with torch.no_grad(), tracing(TracingContext(mode)):
        select_decomp_table().update(FUSIBLE)  # its own table: given another one, Inductor would not find what it has cached
        compiled: Any = compile_fx(copy.gm, fakes)

    formats = [_format(fake) for fake in fakes]

    def run(*inputs: Any) -> Sequence[Any]:
        with torch.no_grad():
            return compiled(*(_as(t, wanted) for t, wanted in zip(inputs, formats, strict=True)))

    return run


def _format(fake: Any) -> torch.memory_format | None:
    """How the captured input lay; None where it is neither rows nor channels-last pictures."""
    if not isinstance(fake, torch.Tensor):
        return None
    known = (torch.contiguous_format, torch.channels_last)
    return next((f for f in known if (f != torch.channels_last or fake.ndim == 4) and fake.is_contiguous(memory_format=f)), None)


def _as(value: Any, wanted: torch.memory_format | None) -> Any:
    """The input as it was captured: Inductor's code has its strides."""
    return value if wanted is None or value.is_contiguous(memory_format=wanted) else value.contiguous(memory_format=wanted)
