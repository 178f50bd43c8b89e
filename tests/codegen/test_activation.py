"""Activations as kernels compute them: error against float64 over the whole range, and what becomes of NaN and infinities."""

from __future__ import annotations

from ctypes import c_void_p
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.tvm.activation import write_exp
from sparsecc.codegen.tvm.backend import CpuConfig, TvmBackend
from sparsecc.codegen.tvm.writer import Writer, vec
from sparsecc.formats import parse_format
from sparsecc.ir.ops import ACTIVATIONS
from sparsecc.runtime.launch import LinearKernel

DENSE = parse_format("dense")
ONE = list(DENSE.pack(torch.ones(1, 1)).values())
NAMES = ["relu", "gelu", "gelu_tanh", "silu"]
REGIMES = ["many", "one"]


@lru_cache
def _kernel(name: str, features: int) -> LinearKernel:
    return LinearKernel(TvmBackend.of(), KernelSpec((DENSE,), name, layout="token"), CpuConfig(1, 1), (features, 1))


def apply(name: str, v: Tensor, regime: str) -> Tensor:
    """activation(v) elementwise: as tokens times the weight [1, 1], or as the column weight [n, 1] of one token."""
    if regime == "many":
        return _kernel(name, 1)(v.view(-1, 1), ONE, None, None)[:, 0]
    params = list(DENSE.pack(v.view(-1, 1)).values())
    return _kernel(name, len(v))(torch.ones(1, 1), params, None, None)[0]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("name", NAMES)
def test_error_against_float64(name: str, regime: str) -> None:
    small, wide = torch.linspace(-12, 12, 20001), torch.cat([torch.linspace(-100, 100, 4001), torch.logspace(-30, 4, 500)])
    for v in (small, wide, -wide):
        error = (apply(name, v, regime) - ACTIVATIONS[name].fn(v.double())).abs()
        bound = 4e-7 * (1 + v.abs()) if name != "relu" else torch.zeros(())
        assert (error <= bound).all(), f"{name}({v[error.argmax()]:.6g}) is off by {error.max():.3g}"


@pytest.mark.parametrize("regime", REGIMES)
def test_relative_error_where_exp_decides(regime: str) -> None:
    """silu(v) -> v exp(v) on the far left: the polynomial's relative error, with no cancellation to hide it."""
    v = torch.linspace(-86, -20, 3001)
    want = ACTIVATIONS["silu"].fn(v.double())
    assert ((apply("silu", v, regime) - want) / want).abs().max() < 1e-6


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("name", NAMES)
def test_large_magnitudes(name: str, regime: str) -> None:
    v = torch.tensor([1e4, 1e10, 1e20, 1e30, 1e38])
    assert torch.equal(apply(name, v, regime), v)
    assert apply(name, -v, regime).abs().max() <= 1e-30, "goes to zero on the left, however large"


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("name", NAMES)
def test_nan_and_infinities_as_in_torch(name: str, regime: str) -> None:
    v = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, torch.nan] * 7)
    got, want = apply(name, v, regime), ACTIVATIONS[name].fn(v.double())  # in float32 torch's gelu(inf) depends on the CPU
    torch.testing.assert_close(got.double(), want, equal_nan=True, rtol=1e-6, atol=1e-6)


def test_tiny_values_keep_their_sign() -> None:
    v = torch.tensor([1e-30, -1e-30, 1e-38, -1e-38])
    for name in NAMES[1:]:
        torch.testing.assert_close(apply(name, v, "many"), v / 2)


def test_exp_under_a_softmax_keeps_its_bound() -> None:
    """Against float64, as documented in `activation`: with fused multiply-add, which every AVX2 host has."""
    backend = TvmBackend.of()
    lanes, w = backend.isa.lanes, Writer()
    with w.function("exps", {"x": "float32", "y": "float32"}, ("N",)):
        with w.block(f"for i in range(N // {lanes}):"):
            w(f"{vec('y', f'i * {lanes}', lanes)} = {write_exp(w, [vec('x', f'i * {lanes}', lanes)], lanes)[0]}")
    v = torch.linspace(-87, 0, 64 * 1000)
    y = torch.empty_like(v)
    backend.load(w.text)(c_void_p(v.data_ptr()), c_void_p(y.data_ptr()), len(v))
    error = (y / v.double().exp() - 1).abs()
    assert (error <= 2e-7 + (2e-8 if lanes > 4 else 6e-8) * v.abs()).all(), f"{error.max():.3g}"
    hidden = torch.tensor([-torch.inf, -87.5, -1e30, 0.0] * lanes)
    got = torch.empty_like(hidden)
    backend.load(w.text)(c_void_p(hidden.data_ptr()), c_void_p(got.data_ptr()), len(hidden))
    assert torch.equal(got, torch.tensor([0.0, 0.0, 0.0, 1.0] * lanes))
