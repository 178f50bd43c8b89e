"""CoreMatching's ops: counting core neurons, with and without the kernel, and choosing tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsecc.codegen.tvm.backend import TvmBackend
from sparsecc.errors import SelectionError
from sparsecc.ir.core_ops import core_scores, core_tokens, span
from sparsecc.ir.skip_ops import request_scores
from sparsecc.runtime.cores import CoreCounts


def by_hand(a: np.ndarray, rho: float, together: bool = False) -> list[int]:
    """How many rows have each column among the largest rho of their positive values; `together`: CoreInfer's one number for all rows."""
    counts = [0] * a.shape[1]
    mean = int(0.2 * (a > 0).sum() / len(a))
    for row in a:
        own = int(np.ceil(round(rho * (row > 0).sum(), 9)))
        for n in sorted(range(len(row)), key=lambda n: (-row[n], n))[: mean if together else own]:
            counts[n] += 1
    return counts


def sample(M: int, F: int, dtype: torch.dtype) -> torch.Tensor:
    """With ties, zeros of both signs, infinities, a row without positive values and one with a single one."""
    a = torch.randn(M, F, generator=torch.Generator().manual_seed(F))
    a[::3] = (a[::3] * 2).round() / 2
    a[0, : F // 2], a[-1] = -0.0, -a[-1].abs()
    if M > 2:
        a[1] = a[1].abs().neg()
        a[1, F // 3] = 1e-30 if dtype != torch.float16 else 1e-4
        a[2, 1:3] = torch.inf
    return a.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("M", "F"), [(1, 1), (5, 37), (13, 96), (34, 257)])
def test_core_neurons_are_counted_exactly(M: int, F: int, dtype: torch.dtype) -> None:
    a, kernel = sample(M, F, dtype), CoreCounts(TvmBackend.of())
    for rho in (0.2, 0.07, 1.0):
        wanted = by_hand(a.double().numpy(), rho)
        assert request_scores(a, f"core({rho})").tolist() == wanted
        for threads in (1, 2):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            counts = kernel(a, f"core({rho})")
            torch.set_num_threads(before)
            assert counts is not None and counts.tolist() == wanted
    assert request_scores(a, "core").tolist() == by_hand(a.double().numpy(), 0.2, together=True)
    assert kernel(a, "griffin") is None
    if M > 2:  # rows that begin anywhere
        assert kernel(a.flatten()[1 : 1 + (M - 1) * F].view(M - 1, F), "core(0.2)").tolist() == by_hand(  # type: ignore[union-attr]
            a.flatten()[1 : 1 + (M - 1) * F].view(M - 1, F).double().numpy(), 0.2)


@pytest.mark.parametrize("at", [(0, 0), (6, 40), (3, 17)])
def test_nan_activations_choose_nothing(at: tuple[int, int]) -> None:
    for sign in (1, -1):
        a = torch.randn(7, 41)
        a[at] = sign * torch.nan
        with pytest.raises(SelectionError, match="NaN"):
            CoreCounts(TvmBackend.of())(a, "core(0.2)")
        for score in ("core(0.2)", "core", "griffin"):
            with pytest.raises(SelectionError, match="NaN"):
                request_scores(a, score)


def test_scores_count_positive_core_neurons() -> None:
    a = torch.tensor([[1.0, -1.0, 0.0, 2.0], [-1.0, 3.0, 1e-30, -0.0]])
    assert core_scores(a, torch.tensor([0, 1, 2])).tolist() == [1, 2]


def kept(scores: list[int], free: list[int], policy: str = "knee") -> list[int]:
    mask = torch.zeros(1, len(scores), dtype=torch.bool)
    mask[0, free] = True
    idx, count = core_tokens(torch.tensor([scores], dtype=torch.int32), mask, policy, "")
    assert idx.shape == (1, len(scores)) and bool((idx[0, int(count) :] == -1).all())
    return idx[0, : int(count)].tolist()


@pytest.mark.parametrize(("scores", "free", "policy", "wanted"), [
    ([9, 8, 2, 1, 1, 0, 5], [0, 1, 2, 3, 4, 5], "knee", [0, 1, 2, 6]),
    ([4, 4, 4, 4, 0], [1, 2], "knee", [0, 1, 2, 3, 4]),  # equal scores stay together
    ([4, 7, 0], [1], "knee", [0, 1, 2]),
    ([0, 5, 9, 1, 0], [0, 1, 2, 3, 4], "knee", [1, 2, 3, 4]),  # the last token is no candidate
    ([3, 2, 1, 0], [0, 1, 2], "all", [0, 1, 2, 3]),
    ([3, 2, 1, 0], [0, 1, 2], "atleast(0.0)", [0, 1, 2, 3]),
    ([3, 2, 1, 0], [0, 1, 2], "threshold(9.0)", [3]),
    ([3, 5, 5, 5, 0], [0, 1, 2, 3], "topk(2)", [1, 2, 4]),
])
def test_which_tokens_stay(scores: list[int], free: list[int], policy: str, wanted: list[int]) -> None:
    assert kept(scores, free, policy) == wanted


def test_prompts_that_nothing_can_be_chosen_for() -> None:
    free, scores = torch.ones(2, 4, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.int32)
    one = (scores[:1, :1], free[:1, :1], "one token")
    for s, f, message in ((scores, free, "batch of 2"), (scores[:1], ~free[:1], "no image tokens"), one):
        with pytest.raises(SelectionError, match=message):
            core_tokens(s, f, "knee", "")
    assert span(torch.zeros(1, 5, 3), 1, 4).tolist() == [[False, True, True, True, False]]
    with pytest.raises(SelectionError, match="has 5 tokens"):
        span(torch.zeros(1, 5, 3), 1, 6)
