"""Numerics of the kernels for pictures against float64, at odd sizes, strides, pads and batches, with memory poisoned."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.codegen.tvm.backend import TvmBackend
from sparsecc.codegen.tvm.direct import DirectSpec, direct_tile
from sparsecc.codegen.tvm.image import WindowSpec
from sparsecc.errors import TargetError
from sparsecc.ir import image_ops
from sparsecc.ir.ops import ACTIVATIONS, empty_output
from sparsecc.runtime.image import DepthwiseKernel, DirectKernel, PatchesKernel, PoolKernel

TOLERANCE = 1e-5
WINDOWS = [  # B, C, (H, W), window, pads
    (2, 9, (7, 7), (3, 3, 1, 1), (1, 1, 1, 1)),
    (1, 3, (15, 37), (3, 3, 2, 2), (1, 1, 1, 1)),
    (2, 5, (17, 33), (5, 5, 2, 2), (2, 2, 1, 1)),
    (1, 17, (33, 20), (3, 5, 1, 2), (0, 3, 1, 0)),
    (1, 4, (16, 16), (1, 1, 2, 2), (0, 0, 0, 0)),
    (1, 2, (9, 5), (4, 2, 3, 1), (2, 0, 0, 1)),
]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN: lanes behind the pixels must not matter."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["", "avx2", pytest.param("portable", marks=pytest.mark.slow)])
def backend(request: pytest.FixtureRequest) -> TvmBackend:
    try:
        return TvmBackend.of(request.param)
    except TargetError as error:
        pytest.skip(str(error))


def pixels(picture: Tensor) -> Tensor:
    return picture.flatten(2).transpose(1, 2)


def planes(picture: Tensor) -> Tensor:
    flat = pixels(picture)
    return empty_output(flat, flat.shape[-1], "token").copy_(flat)


def close(y: Tensor, want: Tensor) -> None:
    assert y.shape == want.shape
    assert float((y - want).abs().max()) <= TOLERANCE * float(want.abs().max())


def specs(kind: str, window: tuple[int, ...], epilogue: str = "") -> WindowSpec:
    return WindowSpec(kind, (window[0], window[1]), (window[2], window[3]), epilogue)


def test_depthwise(backend: TvmBackend) -> None:
    for (B, C, size, window, pads), epilogue in zip(WINDOWS, ("relu", "relu6", "hardswish", "silu", "", "relu6"), strict=True):
        x, weight, bias = 4 * torch.randn(B, C, *size), torch.randn(C, *window[:2]), torch.randn(C)
        kernel = DepthwiseKernel(backend, specs("depthwise", window, epilogue))
        padded = F.pad(x.double(), (pads[1], pads[3], pads[0], pads[2]))
        want = ACTIVATIONS[epilogue].fn(F.conv2d(padded, weight.double()[:, None], bias.double(), window[2:], groups=C))
        for given in (planes(x), pixels(x), pixels(x.contiguous(memory_format=torch.channels_last))):
            close(kernel(given, weight, bias, size, window, pads), pixels(want))
        none, zeros = (kernel(planes(x), weight, b, size, window, pads) for b in (None, torch.zeros(C)))
        assert torch.equal(none, zeros)


def test_direct(backend: TvmBackend) -> None:
    cases = zip(WINDOWS, (32, 7, 3, 1, 40, 5), ("relu", "relu6", "hardswish", "silu", "", "relu6"), strict=True)
    for (B, C, size, window, pads), N, epilogue in cases:
        x, weight, bias = 4 * torch.randn(B, C, *size), torch.randn(N, C, *window[:2]), torch.randn(N)
        tile = direct_tile(image_ops.out_size(size, window, pads)[1], backend.isa.lanes, backend.isa.registers)
        kernel = DirectKernel(backend, DirectSpec(specs("direct", window, epilogue), C, tile))
        padded = F.pad(x.double(), (pads[1], pads[3], pads[0], pads[2]))
        want = ACTIVATIONS[epilogue].fn(F.conv2d(padded, weight.double(), bias.double(), window[2:]))
        last = x.contiguous(memory_format=torch.channels_last)
        for given in (planes(x), pixels(x), pixels(last), pixels(torch.randn(B, C + 1, *size)[:, 1:].copy_(x))):
            y = kernel(given, weight, bias, size, window, pads)
            close(y, pixels(want))
            assert behind(y, backend.isa.lanes).isfinite().all()
        none, zeros = (kernel(planes(x), weight, b, size, window, pads) for b in (None, torch.zeros(N)))
        assert torch.equal(none, zeros)


def behind(y: Tensor, lanes: int) -> Tensor:
    """What vectors read behind the last pixel of token-minor values."""
    B, S, N = y.shape
    return y.as_strided((B, -(-S // lanes) * lanes, N), y.stride())[:, S:]


def test_a_row_of_direct_is_cut_in_equal_parts() -> None:
    assert direct_tile(112, 16, 24) == (3, 7) and direct_tile(150, 16, 24) == (3, 5) and direct_tile(5, 4, 12) == (3, 2)


def test_patches(backend: TvmBackend) -> None:
    for B, C, size, window, pads in WINDOWS:
        x = torch.randn(B, C, *size)
        want = F.unfold(F.pad(x, (pads[1], pads[3], pads[0], pads[2])), window[:2], stride=window[2:]).transpose(1, 2)
        kernel = PatchesKernel(backend, specs("patches", window))
        last = x.contiguous(memory_format=torch.channels_last)
        for given in (planes(x), pixels(x), pixels(last), pixels(torch.randn(B, C + 1, *size)[:, 1:].copy_(x))):
            assert torch.equal(kernel(given, size, window, pads), want)


def test_pool(backend: TvmBackend) -> None:
    for B, C, size in ((1, 3, (7, 7)), (3, 20, (4, 4)), (2, 9, (1, 5))):
        x = torch.randn(B, C, *size)
        close(PoolKernel(backend)(planes(x)), x.double().mean((2, 3)))


def test_infinities_outside_of_the_window_do_not_matter() -> None:
    x = torch.zeros(1, 2, 6, 20)
    x[:, 0], x[:, 1, :, 0], x[:, 1, :, -1] = float("inf"), float("nan"), float("nan")
    x[:, 1, 0] = 1.0
    y = DepthwiseKernel(TvmBackend.of(), specs("depthwise", (3, 3, 1, 1)))(
        planes(x), torch.ones(2, 3, 3), None, (6, 20), (3, 3, 1, 1), (1, 1, 1, 1)
    )
    want = F.conv2d(x, torch.ones(2, 1, 3, 3), padding=1, groups=2)
    assert torch.equal(y.isnan(), pixels(want).isnan()) and torch.equal(y.isinf(), pixels(want).isinf())


def test_dense_meanings_agree_with_torch() -> None:
    for B, C, size, window, pads in WINDOWS:
        x, weight, bias = torch.randn(B, C, *size), torch.randn(C, *window[:2]), torch.randn(C)
        padded = F.pad(x, (pads[1], pads[3], pads[0], pads[2]))
        y = torch.ops.sparsecc.depthwise(pixels(x), weight, bias, size, window, pads, "relu6", "")
        close(y, pixels(F.relu6(F.conv2d(padded, weight[:, None], bias, window[2:], groups=C))))
        full = torch.randn(3, C, *window[:2])
        all_channels = torch.ops.sparsecc.direct(pixels(x), full, None, size, window, pads, "relu6", "")
        close(all_channels, pixels(F.relu6(F.conv2d(padded, full, None, window[2:]))))
        assert image_ops.weighted_fake(pixels(x), full, None, size, window, pads, "", "").stride() == all_channels.stride()
        made = torch.ops.sparsecc.patches(pixels(x), size, window, pads, "")
        assert torch.equal(made, F.unfold(padded, window[:2], stride=window[2:]).transpose(1, 2))
        close(torch.ops.sparsecc.pool(pixels(x), ""), x.mean((2, 3)))
        assert image_ops.weighted_fake(pixels(x), weight, bias, size, window, pads, "", "").shape == y.shape
        assert image_ops.patches_fake(pixels(x), size, window, pads, "").stride() == made.stride()
