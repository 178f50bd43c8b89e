"""Calling kernels: threads, sizes of nothing, other dtypes, odd weights."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.tvm.backend import CpuConfig, TvmBackend
from sparsecc.formats import parse_format
from sparsecc.runtime.launch import LinearKernel

CSR = parse_format("csr")
N, K = 150, 96


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def sparse(rows: int = N, cols: int = K) -> Tensor:
    return torch.randn(rows, cols) * (torch.rand(rows, cols) < 0.2)


def kernel_of(layout: str = "row", residual: bool = False) -> LinearKernel:
    spec = KernelSpec((CSR,), "", residual, layout)  # type: ignore[arg-type]
    return LinearKernel(TvmBackend.of(), spec, CpuConfig(2, 2, 64), (N, K))


def packed(w: Tensor) -> list[Tensor]:
    return list(CSR.pack(w).values())


@pytest.mark.parametrize("layout", ["row", "token"])
def test_two_threads_share_a_kernel(layout: str) -> None:
    w, bias, kernel = sparse(), torch.randn(N), kernel_of(layout)
    params = packed(w)

    def calls(seed: int) -> float:
        """The largest error over calls whose scratch grows and shrinks; code is loaded by whoever comes first."""
        random = torch.Generator().manual_seed(seed)
        worst = 0.0
        for i in range(40):
            x = torch.randn((1, 7, 100, 33)[(seed + i) % 4], K, generator=random)
            worst = max(worst, float((kernel(x, params, bias, None) - F.linear(x, w, bias)).abs().max()))
        return worst

    with ThreadPoolExecutor(2) as pool:
        assert max(pool.map(calls, range(4))) < 1e-4


def test_one_kernel_serves_weights_of_equal_shape() -> None:
    kernel, weights, x = kernel_of(), [sparse(), sparse()], torch.randn(20, K)
    params = [packed(w) for w in weights]
    for i in (0, 1, 0, 1):
        torch.testing.assert_close(kernel(x, params[i], None, None), F.linear(x, weights[i]), rtol=1e-4, atol=1e-4)
    moved = [p.clone() for p in params[0]]
    torch.testing.assert_close(kernel(x, moved, None, None), kernel(x, params[0], None, None), rtol=0, atol=0)


def test_number_of_threads_may_change_between_calls() -> None:
    w, x, kernel = sparse(), torch.randn(200, K), kernel_of()
    params, results = packed(w), []
    for count in (2, 1, 2, 1):
        torch.set_num_threads(count)
        results += [kernel(x, params, None, None), kernel(x[:1], params, None, None).expand(200, N)]
        assert torch.get_num_threads() == count
    torch.testing.assert_close(results[0], F.linear(x, w), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(results[0], r) for r in results[2::2]), "tasks don't depend on the number of threads"
    assert all(torch.equal(results[1], r) for r in results[3::2])


@pytest.mark.parametrize("layout", ["row", "token"])
@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)])
def test_zero_tokens(layout: str, lead: tuple[int, ...]) -> None:
    y = kernel_of(layout)(torch.randn(*lead, K), packed(sparse()), torch.randn(N), None)
    assert (y.shape, y.dtype) == ((*lead, N), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["row", "token"])
def test_half_activations_are_computed_in_float32(dtype: torch.dtype, layout: str) -> None:
    w, kernel = sparse(), kernel_of(layout)
    for tokens in (1, 20):
        x, bias = torch.randn(tokens, K).to(dtype), torch.randn(N).to(dtype)
        y = kernel(x, packed(w), bias, None)
        want = F.linear(x.float(), w, bias.float()).to(dtype)
        assert (y.dtype, y.stride()) == (dtype, kernel(x.float(), packed(w), None, None).stride())
        torch.testing.assert_close(y, want, rtol=1e-2, atol=1e-2)
    assert kernel(x[:0], packed(w), bias, None).dtype == dtype


def test_bias_of_another_dtype_or_stride() -> None:
    w, x, kernel = sparse(), torch.randn(20, K), kernel_of()
    for bias in (torch.randn(N).bfloat16(), torch.randn(2 * N)[::2], torch.randn(1).expand(N), torch.randn(N + 1)[1:]):
        for rows in (x, x[:1]):
            torch.testing.assert_close(kernel(rows, packed(w), bias, None), F.linear(rows, w, bias.float()), rtol=1e-4, atol=1e-4)


def test_nan_and_inf_weights_are_kept() -> None:
    w = sparse()
    w[3], w[5, 7], w[6, 8], w[7, 9] = 0, torch.inf, -torch.inf, torch.nan
    kernel = kernel_of()
    for tokens in (1, 20):
        x = torch.rand(tokens, K) + 0.1
        torch.testing.assert_close(kernel(x, packed(w), None, None), F.linear(x, w), equal_nan=True, rtol=1e-4, atol=1e-4)


def test_prepare_compiles_ahead_and_source_says_what(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = kernel_of()
    assert kernel.source(1).split("def ")[1].startswith("spmv(")
    assert kernel.source(20).split("def ")[1].startswith("spmm(")
    assert kernel.prepare(1).prepare(20) is kernel
    monkeypatch.setattr(TvmBackend, "source", lambda *_: pytest.fail("it was prepared"))
    kernel(torch.randn(1, K), packed(sparse()), None, None)
    kernel(torch.randn(5, K), packed(sparse()), None, None)
