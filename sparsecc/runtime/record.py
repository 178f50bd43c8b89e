"""Kernel calls as data: the first run of a chain of kernels is recorded, later runs of the same shapes replay it.

What a call from Python costs is mostly deciding sizes, strides and buffers. A replay does none of that: the arguments are there, and only
the addresses of the chain's inputs and outputs are new.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from ctypes import c_void_p
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparsecc.codegen.tvm.native import Calls, Native


class _Local(threading.local):
    """The recorder of this thread, if any."""

    recorder: Recorder | None = None


RECORDERS = _Local()

aten = torch.ops.aten
HARMLESS = {
    aten.empty.memory_format, aten.new_empty.default, aten.as_strided.default, aten.view.default, aten._unsafe_view.default,
    aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.transpose.int, aten.t.default, aten.permute.default,
    aten.select.int, aten.expand.default, aten.squeeze.dim, aten.unsqueeze.default, aten.alias.default, aten.detach.default,
    aten._reshape_alias.default, aten.view.dtype,
}  # fmt: skip
"""What torch may do while a chain is recorded: nothing that computes, since a replay would leave it out."""


RESHAPES = {aten.reshape.default, aten.contiguous.default}
"""Harmless where they give a view."""


class Pool:
    """Buffers of one thread for values between kernels, for as long as the thread lives: recorded calls know their addresses. A buffer is
    free when only the pool holds its storage."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def empty(self, floats: int) -> Tensor:
        """f32[floats or a little more]: the tightest free buffer of at most twice the size, or a new one."""
        free = [b for b in self.buffers if floats <= b.numel() <= 2 * floats and _holders(b) == 1]
        if free:
            return min(free, key=Tensor.numel).view(-1)
        self.buffers.append(torch.empty(floats))
        return self.buffers[-1].view(-1)


def _holders(tensor: Tensor) -> int:
    """Tensors that share the storage."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) - 1


class NotAView(Exception):
    """torch would have read a value that lies in spans."""


@dataclass
class Recorder(TorchDispatchMode):
    """Collects the kernel calls of one run. `foreign` names what torch computed meanwhile, if anything.

    With `spanned`, token-minor results lie in spans (see codegen/tvm/tiles.py). No stride says so: such a tensor is only right about its
    first span, serves as address, sizes and other strides, and is known by its storage. `spans` has the distance of its spans.
    `length` is that of the chain's KV caches, where their length is to be new in every replay; `grown` has what holds such a cache, by its
    storage, and how much longer it is.
    While `result` is set, kernels write what the caller gets: memory of its own, and what its strides say. The next token-minor result
    is `into`, where that is given.
    """

    pool: Pool
    spanned: bool = False
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = field(default_factory=list)
    foreign: str = ""
    result: bool = False
    spans: dict[int, int] = field(default_factory=dict)
    into: Tensor | None = None
    length: int = 0
    grown: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        copied = func in RESHAPES and result.untyped_storage().data_ptr() != args[0].untyped_storage().data_ptr()
        if copied or func not in HARMLESS | RESHAPES:
            self.foreign = str(func)
            if self.spans and any(isinstance(a, Tensor) and a.untyped_storage().data_ptr() in self.spans for a in args):
                raise NotAView(self.foreign)
        return result

    def __enter__(self) -> Recorder:
        RECORDERS.recorder = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        RECORDERS.recorder = None
        super().__exit__(*error)


def call(code: Callable[..., Any], *args: Any) -> None:
    """Run a kernel on addresses (c_void_p) and integers."""
    recorder = RECORDERS.recorder
    if recorder is not None:
        recorder.calls.append((code, args))
    code(*args)


def recording() -> bool:
    """Whether calls are being recorded."""
    return RECORDERS.recorder is not None


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uninitialised memory for values between kernels."""
    recorder = RECORDERS.recorder
    if recorder is None:
        return torch.empty(shape, dtype=dtype)
    count = math.prod(shape)
    buffer = recorder.pool.empty(-(-count * dtype.itemsize // 4))
    recorder.spans.pop(buffer.data_ptr(), None)
    return (buffer if dtype == torch.float32 else buffer.view(dtype))[:count].view(shape)


def output(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same for what a kernel returns."""
    recorder = RECORDERS.recorder
    return torch.empty(shape, dtype=dtype) if recorder is not None and recorder.result else empty(*shape, dtype=dtype)


def given_output() -> Tensor | None:
    """Where the next token-minor result is to go, if that was said; once."""
    recorder = RECORDERS.recorder
    if recorder is None or recorder.into is None:
        return None
    into, recorder.into = recorder.into, None
    return into


def spanned() -> bool:
    """Whether token-minor results are to lie in spans."""
    recorder = RECORDERS.recorder
    return recorder is not None and recorder.spanned and not recorder.result


def span_of(tensor: Tensor) -> int | None:
    """Floats between a value's spans; None if it is what its strides say."""
    recorder = RECORDERS.recorder
    return None if recorder is None else recorder.spans.get(tensor.untyped_storage().data_ptr())


def set_span(tensor: Tensor, floats: int) -> None:
    """The tensor's storage holds spans at this distance."""
    assert RECORDERS.recorder is not None
    RECORDERS.recorder.spans[tensor.untyped_storage().data_ptr()] = floats


class Grown(int):
    """An argument that depends on the caches' length: per * length + plus."""

    per: int
    plus: int


def growing(tensor: Tensor) -> bool:
    """Whether it is a cache, or the like, whose length a replay may change."""
    recorder = RECORDERS.recorder
    return recorder is not None and tensor.untyped_storage().data_ptr() in recorder.grown and tensor.is_contiguous()


def set_growing(tensor: Tensor, plus: int) -> None:
    """It is longer than the caches by `plus`. Only a result can be: memory between kernels has its size."""
    recorder = RECORDERS.recorder
    assert recorder is not None
    recorder.grown[tensor.untyped_storage().data_ptr()] = plus
    if not recorder.result:
        recorder.foreign = "a cache that nobody keeps"


def grown(value: int, per: int) -> Grown:
    """An argument of this value now, `per` more for every token that the caches are longer."""
    assert RECORDERS.recorder is not None
    made = Grown(value)
    made.per, made.plus = per, value - per * RECORDERS.recorder.length
    return made


@dataclass(frozen=True)
class Made:
    """A result: elements of its storage, and how it lies there. A cache that is `plus` longer than those given gets a length of its own."""

    count: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    steps: tuple[int, ...]
    plus: int | None = None

    def empty(self, length: int) -> Tensor:
        """Memory for it."""
        if self.plus is None:
            return torch.empty(self.count, dtype=self.dtype).as_strided(self.shape, self.steps)
        *lead, _, D = self.shape
        return torch.empty((*lead, length + self.plus, D), dtype=self.dtype)


@dataclass(frozen=True)
class Replay:
    """The calls of a recorded run, and which of their arguments are other ones next time."""

    run: Callable[[], None]
    write: Callable[[np.ndarray, np.ndarray], None]
    """(positions of arguments, their new values)."""
    addresses: np.ndarray
    """int64 [3, n]: position, number of the input or output, distance from where it begins."""
    lengths: np.ndarray
    """int64 [3, n]: position, per and plus of what depends on the caches' length, see `Grown`."""
    made: list[Made]
    keep: Sequence[Any] = ()
    """Owners of memory that the calls know by its address alone."""

    @staticmethod
    def of(recorder: Recorder, inputs: Sequence[Tensor], outputs: Sequence[Tensor], keep: Sequence[Any] = ()) -> Replay | None:
        """None if the run was more than kernels, or an output is no kernel's own."""
        if recorder.foreign or not recorder.calls or any(t.storage_offset() for t in outputs):
            return None
        storages = [t.untyped_storage().data_ptr() for t in (*inputs, *outputs)]
        if len(set(storages[len(inputs) :])) < len(outputs) or set(storages[: len(inputs)]) & set(storages[len(inputs) :]):
            return None
        run, write, slots = _calls(recorder.calls)
        lengths = [(at, arg.per, arg.plus) for at, arg in slots if isinstance(arg, Grown)]
        if recorder.length and not lengths:
            return None
        addresses = [
            (at, i, (arg.value or 0) - t.data_ptr())
            for i, t in enumerate((*inputs, *outputs))
            for at, arg in slots
            if isinstance(arg, c_void_p) and _inside(arg.value or 0, t)
        ]
        longer = [recorder.grown.get(storage) for storage in storages[len(inputs) :]]
        facts = zip(outputs, longer, strict=True)
        made = [Made(t.untyped_storage().nbytes() // t.itemsize, t.dtype, tuple(t.shape), t.stride(), plus) for t, plus in facts]
        return Replay(run, write, _columns(addresses), _columns(lengths), made, keep)

    def __call__(self, inputs: Sequence[Tensor], into: Sequence[Tensor] = (), length: int = 0) -> list[Tensor]:
        """The outputs: new tensors, or those given, which must have the recorded sizes and strides. `length`: of the caches."""
        made = list(into) or [one.empty(length) for one in self.made]
        starts = np.array([t.data_ptr() for t in (*inputs, *made)], np.int64)
        at, number, distance = self.addresses
        self.write(at, starts[number] + distance)
        if self.lengths.size:
            at, per, plus = self.lengths
            self.write(at, per * length + plus)
        self.run()
        return made


def _columns(rows: list[tuple[int, int, int]]) -> np.ndarray:
    return np.array(rows, np.int64).reshape(-1, 3).T.copy()


def _calls(calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> tuple[Callable[[], None], Any, list[tuple[int, Any]]]:
    """What makes the calls, what renews their arguments, and the position of each that can be. Only native calls can have other lengths."""
    native = [(code, args) for code, args in calls if isinstance(code, Native)]
    if len(native) == len(calls):
        made = Calls(native)
        values = np.ctypeslib.as_array(made.values)
        return made, values.__setitem__, [(at, arg) for arg, at in Calls.slots(native)]
    cells = [arg for _, args in calls for arg in args if isinstance(arg, c_void_p)]

    def run() -> None:
        for code, args in calls:
            code(*args)

    def write(places: np.ndarray, values: np.ndarray) -> None:
        for at, value in zip(places.tolist(), values.tolist(), strict=True):
            cells[at].value = value

    return run, write, list(enumerate(cells))


def _inside(address: int, tensor: Tensor) -> bool:
    storage = tensor.untyped_storage()
    return storage.data_ptr() <= address < storage.data_ptr() + storage.nbytes()
