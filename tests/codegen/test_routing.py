"""Kernels that choose a block's tokens, against the dense meaning of their ops."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecc.codegen.tvm.backend import TvmBackend
from sparsecc.ir.route_ops import keep, listed, received, route
from sparsecc.runtime.routing import KeepKernel, ReceivedKernel, RouteKernel

BACKEND = TvmBackend.of()


def weights(outputs: int) -> list[Tensor]:
    return [torch.randn(64, 4), torch.randn(64), torch.randn(outputs, 64), torch.randn(outputs)]


@pytest.mark.parametrize("layout", ["rows", "token", "odd"])
@pytest.mark.parametrize(("B", "H", "G", "S", "D"), [(1, 9, 3, 300, 64), (2, 4, 4, 1, 16), (3, 2, 1, 128, 20), (1, 1, 1, 517, 7)])
def test_received(layout: str, B: int, H: int, G: int, S: int, D: int) -> None:
    made = {
        "rows": lambda heads: torch.randn(B, S, heads, D).transpose(1, 2),
        "token": lambda heads: torch.randn(B, heads, D, S + 3)[..., :S].transpose(2, 3),
        "odd": lambda heads: torch.randn(B, heads, S, 2 * D)[..., ::2],
    }[layout]
    count = torch.randint(1, S + 1, (B,), dtype=torch.int32)
    for args in ((None, None, None), (None, count, None), (None, count, 1.5)):
        agree(made(H), made(G), *args, rtol=2e-4, atol=1e-7)


def agree(q: Tensor, k: Tensor, *args: Any, rtol: float, atol: float) -> None:
    torch.testing.assert_close(ReceivedKernel(BACKEND)(q, k, *args), received(q, k, *args), rtol=rtol, atol=atol)


def test_received_of_other_dtypes_of_nothing_and_of_nan() -> None:
    q, k = torch.randn(2, 4, 70, 16), torch.randn(2, 2, 70, 16)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        agree(q.to(dtype), k.to(dtype), None, None, None, rtol=1e-4, atol=1e-6)
    none = ReceivedKernel(BACKEND)(q, k, None, torch.tensor([0, 70], dtype=torch.int32), None)
    assert not none[0].any() and none[1].sum().item() == pytest.approx(1, abs=1e-5)
    q[0, 1, -1, 3] = torch.nan
    assert ReceivedKernel(BACKEND)(q, k, None, None, None)[0].isnan().all()


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize(("B", "S"), [(1, 1), (1, 64), (2, 333), (1, 2500)])
def test_route(outputs: int, B: int, S: int) -> None:
    """Ranks are exact, ties and all: an error of one would show."""
    some = weights(outputs)
    signed = torch.zeros(B, S) * torch.randn(B, S).sign()  # -0.0 ties with 0.0
    for importance in (torch.rand(B, S), torch.randint(0, 5, (B, S)) / 7 - 0.3, signed):
        for mask in (None, (torch.arange(S) < torch.randint(1, S + 1, (B, 1)))[:, None, None], torch.zeros(B, 1, 1, S).bool()):
            got, want = RouteKernel(BACKEND)(importance, mask, 0.3, some), route(importance, mask, 0.3, some)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_ranks_alone() -> None:
    """A router that reads nothing but ranks: what it says falls with every place."""
    fc1, fc2 = torch.zeros(64, 4), torch.zeros(1, 64)
    fc1[0, 2], fc2[0, 0] = -1.0, 1.0
    importance = torch.randn(1, 1000)
    scores = RouteKernel(BACKEND)(importance, None, 0.5, [fc1, torch.tensor([1.0] + 63 * [0.0]), fc2, torch.zeros(1)])[0]
    ends = torch.tensor([0, 999])
    assert scores[ends].isposinf().all()
    inner = torch.arange(1, 999)
    order = importance[0, inner].argsort(descending=True)
    assert (scores[inner][order].diff() < 0).all()


def test_a_router_passes_nan_on() -> None:
    importance = torch.rand(1, 40)
    importance[0, 7] = torch.nan
    scores = RouteKernel(BACKEND)(importance, None, 0.3, weights(2))
    assert scores[0, 7].isnan()
    *_, bad = KeepKernel(BACKEND, "threshold(0.5)")(scores, "threshold(0.5)")
    assert bad == [0, 7]


@pytest.mark.parametrize("policy", ["threshold(0.5)", "atleast(0.5)", "threshold(2.0)", "threshold(-1.0)"])
def test_keep(policy: str) -> None:
    for B, S in ((1, 1), (1, 100), (3, 61)):
        scores = torch.randint(0, 5, (B, S)) / 4
        scores[:, 0], scores[:, S - S // 4 :] = torch.inf, -torch.inf
        got, want = KeepKernel(BACKEND, policy)(scores, policy), listed(scores, policy)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and got[2:] == want[2:]


def test_keep_rounds_up_to_vectors() -> None:
    scores = torch.linspace(0, 1, 100)[None]
    idx, count = keep(scores, "threshold(0.5)", "")
    assert idx.shape == (1, 64) and count.tolist() == [50] and idx[0, :50].tolist() == list(range(50, 100)) and (idx[0, 50:] == -1).all()
