"""The short way to a GPU kernel, with a function in the place of CUDA's driver that reads what it is given: no GPU is needed."""

from __future__ import annotations

import ctypes
import gc
import struct
import threading
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.triton.backend import TritonBackend
from sparsecc.codegen.triton.compiler import compiled
from sparsecc.codegen.triton.devices import device_of
from sparsecc.codegen.triton.driver import CONFIG, Driver, Loaded, Prepared, extra_pointers, loaded, prepared
from sparsecc.codegen.triton.facts import spec_of
from sparsecc.codegen.triton.launch import Launch
from sparsecc.codegen.triton.linear import pointers, sizes
from sparsecc.errors import ShapeError, TargetError
from sparsecc.formats import parse_format
from sparsecc.runtime.gpu import GpuLinear
from sparsecc.runtime.scratch import Scratch

N, K = 128, 64
KERNEL = Loaded(0x1234, 128, 4096, 2)


@dataclass
class Machine:
    """In the place of a GPU: remembers launches, of Triton's launcher as (grid, addresses, integers), of the driver as it reads them."""

    stream: int = 7
    device: int = -1
    capturing: bool = False
    refuses: int = 0
    by_triton: list[Any] = field(default_factory=list)
    by_driver: list[Any] = field(default_factory=list)
    arguments: int = 0

    def driver(self) -> Driver:
        take = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)(self._take)
        return Driver(take, lambda at: self.stream, lambda: self.device, lambda: self.capturing)

    def _take(self, config: int, function: int, table: int, extra: int | None) -> int:
        x, y, z, threads, one, also_one, shared, stream, attributes, count = CONFIG.unpack(ctypes.string_at(config, CONFIG.size))
        assert (z, threads, one, also_one, shared, attributes, count) == (1, 128, 1, 1, 4096, 0, 0) and function == 0x1234 and not extra
        places = struct.unpack(f"<{self.arguments}Q", ctypes.string_at(table, 8 * self.arguments))
        values = [struct.unpack("<q", ctypes.string_at(place, 8))[0] for place in places]
        assert values[-2:] == [0, 0]
        self.by_driver.append((stream, (x, y), values[:-2]))
        return self.refuses


class FakeLaunch:
    """As `Launch`, on a `Machine`."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self._driver = machine, machine.driver()

    def __call__(self, grid: tuple[int, int], tensors: Sequence[Tensor], numbers: Sequence[int]) -> None:
        self.machine.by_triton.append((grid, [t.data_ptr() for t in tensors], list(numbers)))

    def driver(self) -> Driver:
        return self._driver

    def prepared(self, at: int, grid: tuple[int, int], pointers: int, numbers: Sequence[int]) -> Prepared:
        self.machine.arguments = pointers + len(numbers) + 2
        return prepared(KERNEL, self._driver.launch, grid, pointers, numbers)


@dataclass(frozen=True)
class FakeBackend(TritonBackend):
    machine: Any = None

    def load(self, source: str) -> Any:
        return FakeLaunch(self.machine)


def made(tokens: int, residual: bool = False, split: bool = False) -> tuple[GpuLinear, Machine, list[Tensor]]:
    machine, fmt = Machine(), parse_format("packed_nm(2, 4).f16")
    backend = FakeBackend(device_of("cuda:sm_90"), machine=machine)
    spec = spec_of((fmt,), "", residual, (N, K), torch.float16, tokens)
    config = next(config for config in backend.space(spec) if (config.split > 1) == split)
    params = list(fmt.pack((torch.randn(N, K) * torch.tensor([1, 0, 0, 1]).repeat(K // 4)).half()).values())
    return GpuLinear(backend, spec, config, (N, K)), machine, params


def half(*shape: int) -> Tensor:
    return torch.randn(*shape).half()


@pytest.mark.parametrize(("lead", "split"), [((1,), False), ((1,), True), ((5,), False), ((5,), True), ((2, 3), True), ((40,), False)])
@pytest.mark.parametrize("residual", [False, True])
def test_the_driver_gets_what_tritons_launcher_got(lead: tuple[int, ...], residual: bool, split: bool) -> None:
    tokens = torch.Size(lead).numel()
    kernel, machine, params = made(tokens, residual, split)
    x, bias, res = half(*lead, K), half(N), half(*lead, N) if residual else None
    kernel(x, params, bias, res)
    y = kernel(x, params, bias, res)
    ((grid, addresses, numbers),), ((stream, same_grid, values),) = machine.by_triton, machine.by_driver
    order = list(pointers(kernel.spec, split)) + list(sizes(kernel.spec))
    slow, fast = (dict(zip(order, some, strict=True)) for some in (addresses + numbers, values))
    mine = {"y", "partial", "done"}
    assert (stream, same_grid) == (7, grid) and y.shape == (*lead, N) and fast["y"] == y.data_ptr()
    assert {name: value for name, value in fast.items() if name not in mine} == {n: v for n, v in slow.items() if n not in mine}
    assert fast["M"] == tokens and fast["x_step"] == K


def test_another_weight_of_the_shape_takes_the_short_way_too() -> None:
    kernel, machine, params = made(3)
    kernel(half(3, K), params, None, None)
    other = [param.clone() for param in params]
    kernel(half(3, K), other, half(N), None)
    assert len(machine.by_triton) == 1 and machine.by_driver[0][2][3 : 3 + len(other)] == [param.data_ptr() for param in other]


def test_what_cannot_be_read_in_place_takes_the_long_way() -> None:
    kernel, machine, params = made(3, residual=True)
    x, bias, res = half(3, K), half(N), half(3, N)
    kernel(x, params, bias, res)
    odd = half(3 * K + 1)[1:].view(3, K)
    for call in (
        (half(K, 3).T, params, bias, res), (odd, params, bias, res), (x, params, half(N + 1)[1:], res), (x, params, bias, half(N, 3).T),
        (x, params, bias, half(1, N).expand(3, N)), (half(1, K).expand(3, K), params, bias, res), (x, params, bias, half(3, N + 2)[:, :N]),
    ):
        kernel(*call)
    assert len(machine.by_triton) == 8 and not machine.by_driver
    machine.device = 1  # torch's current device is another one
    kernel(x, params, bias, res)
    assert len(machine.by_triton) == 9 and not machine.by_driver


def test_streams_have_scratch_of_their_own_and_a_capture_its_own_memory() -> None:
    kernel, machine, params = made(1, split=True)
    x = half(1, K)
    kernel(x, params, None, None)
    for machine.stream in (7, 8, 7):
        kernel(x, params, None, None)
    at = list(pointers(kernel.spec, True)).index("partial")
    scratch = [values[at : at + 2] for _, _, values in machine.by_driver]
    assert [stream for stream, _, _ in machine.by_driver] == [7, 8, 7]
    assert scratch[0] == scratch[2] != scratch[1]
    machine.capturing = True
    kernel(x, params, None, None)
    assert len(machine.by_driver) == 3 and len(machine.by_triton) == 2


def test_threads_do_not_write_into_each_others_arguments() -> None:
    kernel, machine, params = made(3)
    x = half(3, K)
    callers = [threading.Thread(target=lambda: [kernel(x, params, None, None) for _ in range(2)]) for _ in range(2)]
    for caller in callers:
        caller.start()
        caller.join()
    assert len(machine.by_triton) == 2 and len(machine.by_driver) == 2  # each thread prepared its own


def test_a_refused_launch_is_an_error() -> None:
    kernel, machine, params = made(3)
    kernel(half(3, K), params, None, None)
    machine.refuses = 700
    with pytest.raises(TargetError, match="CUDA error 700"):
        kernel(half(3, K), params, None, None)


def test_scratch_grows_and_what_was_handed_out_stays() -> None:
    scratch, cpu = Scratch(), torch.device("cpu")
    first = scratch.on(cpu, 0, 100, 4)
    assert scratch.on(cpu, 0, 50, 4)[0] is first[0] and scratch.on(cpu, 1, 50, 4)[0] is not first[0]
    larger = scratch.on(cpu, 0, 101, 4)
    assert larger[0].numel() >= 200 and larger[1].count_nonzero() == 0 and scratch._pairs[cpu, 0][0] == first


@pytest.mark.parametrize("shape", [(3, K), (1, K)])
def test_wrong_dtypes_devices_and_sizes_are_named(shape: tuple[int, ...]) -> None:
    kernel, machine, params = made(shape[0], residual=True)
    x, bias, res = half(*shape), half(N), half(shape[0], N)
    meta = torch.device("meta")
    for way in ("long", "short"):
        for call, error, said in (
            ((x.float(), params, bias, res), TargetError, "the input is torch.float32, the kernel takes torch.float16"),
            ((x, params, bias.double(), res), TargetError, "the bias is torch.float64"),
            ((x, params, bias, res.bfloat16()), TargetError, "the residual is torch.bfloat16"),
            ((x.to(meta), params, bias, res), TargetError, "weight is on cpu, the input on meta"),
            ((x, params, bias.to(meta), res), TargetError, "the bias is on meta"),
            ((x, params, bias, res.to(meta)), TargetError, "the residual is on meta"),
            ((x[:, :32], params, bias, res), ShapeError, "takes inputs of 64 features"),
            ((x, params, bias[:7], res), ShapeError, "128 biases"),
            ((x, params, bias, None), ShapeError, "residual"),
        ):
            if way == "long" or "meta" not in said:  # a device has a number, which neither of these has
                with pytest.raises(error, match=said):
                    kernel(*call)
        kernel(x, params, bias, res)
    assert len(machine.by_driver) == 1


def test_arguments_of_a_compiled_kernel_are_counted() -> None:
    backend = TritonBackend(device_of("cuda:sm_80"))
    spec = KernelSpec((parse_format("csr.f16"),), "", True, regime="one", dtype="f16")
    config = backend.space(spec)[0]
    kernel = compiled(backend.source(spec, config), backend.device).kernel
    count = len(pointers(spec, config.split > 1)), len(sizes(spec))
    extra = extra_pointers(kernel.asm["ptx"], *count)
    assert extra is not None and 0 <= extra <= 4
    assert extra_pointers(kernel.asm["ptx"], count[0] - 1, count[1] + 1) is None and extra_pointers("", *count) is None


def test_kernels_that_need_more_of_a_launch_are_left_to_triton() -> None:
    class Special:
        class metadata:
            num_ctas, launch_pdl = 2, False

    assert loaded(Special, 1, 1) is None



def test_a_loaded_kernel_is_held_and_one_that_spills_is_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton unloads a kernel when it is collected; on the device it knows how many bytes were spilled."""

    class Kernel:
        run, packed_metadata, function, asm = None, (), 5, {}
        metadata = SimpleNamespace(num_warps=4, shared=0)

        def __init__(self, spills: int) -> None:
            self.n_spills = spills

    asked: list[Any] = []

    def fake(source: str, device: Any, registers: int | None = None) -> Any:
        asked.append(registers)
        return SimpleNamespace(kernel=Kernel(8 if registers is None else 0))

    monkeypatch.setattr("sparsecc.codegen.triton.launch.compiled", fake)
    monkeypatch.setattr(torch.cuda, "device", lambda at: nullcontext())
    kernel, _, _ = made(1)
    launch = Launch(kernel.source(1), device_of("cuda:sm_80"))
    launch._bind(0)
    assert asked == [None, 255]
    held = [weakref.ref(one) for one in gc.get_objects() if type(one) is Kernel and one.n_spills == 0]
    gc.collect()
    assert len(held) == 1 and held[0]() is not None
