"""One token, or a few, from the weight that many tokens use: 16-bit activations, uneven rows, ends of arrays, bound calls."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch
from torch import Tensor

from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.tvm.backend import CpuConfig, TvmBackend
from sparsecc.codegen.tvm.terms import serves_few
from sparsecc.formats import Format, parse_format
from sparsecc.formats.level import NM
from sparsecc.formats.pattern import NM as NMPattern
from sparsecc.runtime.few import FewTokens
from sparsecc.runtime.launch import LinearKernel

FORMATS = [
    "bitmap", "bitmap.bf16", "bitmap.f16", "bitmap.bf16.panels(32)", "bitmap.f16.panels(16)", "csr.bf16", "nm(2, 4).bf16", "nm(4, 8)",
    "bsr(16, 1).bf16", "bsr(1, 16).f16",
]  # fmt: skip
SHAPE = (45, 85)  # an odd number of 16-column words, rows that no number of streams divides


def weight(fmt: Format, shape: tuple[int, int], kept: float = 0.4) -> Tensor:
    """f32 that the format holds exactly."""
    w = torch.randn(shape).to(fmt.codec.dtypes()["val"]).float()
    if isinstance(fmt.level, NM):
        return w * NMPattern(fmt.level.n, fmt.level.m).topk_mask(w.abs())
    return w * (torch.rand(shape) < kept)


def kernel(
    text: str, shape: tuple[int, int] = SHAPE, epilogue: str = "", residual: bool = False, config: CpuConfig | None = None
) -> LinearKernel:
    spec = KernelSpec((parse_format(text),), epilogue, residual, ragged=True)
    return LinearKernel(TvmBackend.of(), spec, config or CpuConfig(1, 1, 64), shape)


def assert_close(y: Tensor, want: Tensor, tolerance: float) -> None:
    assert (y.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("text", FORMATS)
def test_every_number_of_tokens(text: str) -> None:
    run, w = kernel(text), weight(parse_format(text), SHAPE)
    params = list(parse_format(text).pack(w).values())
    for tokens in (1, 2, 3, 11):
        x = torch.randn(tokens, SHAPE[1])
        assert_close(run(x, params, None, None), x.double() @ w.double().t(), 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", ["bitmap.bf16", "bitmap", "csr.f16"])
def test_half_activations_are_rounded_once(text: str, dtype: torch.dtype) -> None:
    run, w = kernel(text, epilogue="silu", residual=True), weight(parse_format(text), SHAPE)
    params = list(parse_format(text).pack(w).values())
    for tokens in (1, 4):
        x, res, bias = torch.randn(tokens, SHAPE[1]).to(dtype), torch.randn(tokens, SHAPE[0]).to(dtype), torch.randn(SHAPE[0]).to(dtype)
        want = torch.nn.functional.silu(x.double() @ w.double().t() + bias.double()) + res.double()
        y = run(x, params, bias, res)
        assert y.dtype == dtype and y.shape == want.shape
        ulp = torch.finfo(dtype).eps * want.abs().clamp(min=1e-3)
        assert ((y.double() - want).abs() <= 0.51 * ulp + 2e-5 * want.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_of_few_tokens_lose_nothing(dtype: torch.dtype) -> None:
    """Where tiles of bf16 multiply, an activation of another dtype is a sum of several: as exact as float32, at any scale."""
    shape = (45, 85)
    run, w = kernel("bitmap.bf16", shape), weight(parse_format("bitmap.bf16"), shape)
    params, x = list(parse_format("bitmap.bf16").pack(w).values()), torch.randn(13, shape[1]).to(dtype)
    if dtype == torch.float32:
        x *= 10.0 ** torch.arange(-24, 28, 4)[:13, None]
    want = x.double() @ w.double().t()
    ulp = 0.51 * torch.finfo(dtype).eps * want.abs()
    assert ((run(x, params, None, None).double() - want).abs() <= ulp + 1e-6 * want.abs().amax(1, keepdim=True)).all()


def test_stores_keep_nan_and_infinities() -> None:
    run, w = kernel("csr.bf16", (4, 4)), torch.eye(4)
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 3.0]], dtype=torch.bfloat16)
    y = run(x, list(parse_format("csr.bf16").pack(w).values()), None, None)
    assert torch.equal(y.nan_to_num(7.0), x.nan_to_num(7.0))


@pytest.mark.parametrize("text", ["bitmap", "csr", "bsr(4, 1)"])
@pytest.mark.parametrize("row", [0, 700, 1022])
def test_rows_of_very_uneven_length(text: str, row: int) -> None:
    """All but a few nonzeros in one row of blocks: tasks are cut by bytes, and some are empty."""
    w = torch.zeros(1023, 260)
    w[row // 4 * 4 : row // 4 * 4 + 4] = torch.randn(w[row // 4 * 4 : row // 4 * 4 + 4].shape)
    w[::97, 5] = 1.0
    run, params = kernel(text, (1023, 260)), list(parse_format(text).pack(w).values())
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x, bias = torch.randn(1, 260), torch.randn(1023)
            assert_close(run(x, params, bias, None), x.double() @ w.double().t() + bias.double(), 2e-5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("text", ["bitmap", "bitmap.bf16", "csr", "csr.bf16", "nm(2, 4).bf16"])
def test_nothing_behind_the_arrays_is_read(text: str) -> None:
    """Every array ends where its memory does."""
    fmt = parse_format(text)
    w = weight(fmt, (19, 70))
    w[-1, -3:] = 0
    guarded = [_at_the_end(array) for array in fmt.pack(w).values()]
    run = kernel(text, (19, 70))
    for tokens in (1, 2):
        x = torch.randn(tokens, 70)
        assert_close(run(x, [array for array, _ in guarded], None, None), x.double() @ w.double().t(), 2e-5)


def _at_the_end(array: Tensor) -> tuple[Tensor, mmap.mmap]:
    """The array in memory whose next page may not be touched, and what keeps it."""
    page = mmap.PAGESIZE
    room = -(-max(array.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, room + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + room), ctypes.c_size_t(page), 0) == 0
    copy = torch.frombuffer(memory, dtype=array.dtype, count=array.numel(), offset=room - array.nbytes)
    return copy.view(array.shape).copy_(array), memory


def test_streams_and_scalar_nonzeros() -> None:
    w, x = weight(parse_format("csr"), SHAPE), torch.randn(1, SHAPE[1])
    params = list(parse_format("csr").pack(w).values())
    for streams in (1, 2, 8):
        for gather in (True, False):
            run = kernel("csr", config=CpuConfig(1, 1, 64, streams=streams, gather=gather))
            assert_close(run(x, params, None, None), x.double() @ w.double().t(), 2e-5)


def test_which_formats_serve_a_few_tokens() -> None:
    isa = TvmBackend.of("portable").isa
    assert not any(serves_few(parse_format(text), isa) for text in ("csr", "bitmap", "bsr(4, 1)", "sell(4, 64)"))
    assert serves_few(parse_format("bsr(1, 16)"), isa)


def test_calls_are_bound_per_weight_and_threads() -> None:
    fmt = parse_format("csr")
    few = FewTokens(TvmBackend.of(), KernelSpec((fmt,)), CpuConfig(1, 1, 64), SHAPE)
    weights = [weight(fmt, SHAPE) for _ in range(3)]
    packed = [list(fmt.pack(w).values()) for w in weights]
    x = torch.randn(1, SHAPE[1])
    for _ in range(2):
        for w, params in zip(weights, packed, strict=True):
            assert_close(few(x, params, None, None), x.double() @ w.double().t(), 2e-5)
    assert len(few._last) == 3
