"""Selection policies, and the ops that skip neurons and tokens: meaning, ties, NaN, text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsecc.errors import SelectionError, SpecError
from sparsecc.ir.cache_ops import earlier, numbered, shown_keys, trim_keys
from sparsecc.ir.policy import Policy, kept_of, knee, parse_policy
from sparsecc.ir.route_ops import eligible, kept, token_gate
from sparsecc.ir.skip_ops import active, gather_tokens, neurons, recency, scatter_tokens, select
from sparsecc.ir.text import parse_program, print_program

TEXTS = ("topk(3)", "ratio(0.25)", "threshold(0.1)", "atleast(0.1)", "nonzero", "knee", "mass(0.9)", "stat(0.08)", "all")


@pytest.mark.parametrize("text", TEXTS)
def test_policies_print_as_they_parse(text: str) -> None:
    assert str(parse_policy(text)) == text


BAD = ("topk(0)", "topk(1.5)", "topk", "ratio(0)", "ratio(1.01)", "ratio(nan)", "stat(1)", "mass(-1)", "knee(2)", "best", "topk(x)")


@pytest.mark.parametrize("text", BAD)
def test_bad_policies_are_refused(text: str) -> None:
    with pytest.raises(SpecError):
        parse_policy(text)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("n", [1, 7, 33])
def test_select_gives_what_numpy_gives(text: str, n: int) -> None:
    scores = torch.rand(3, n, generator=torch.Generator().manual_seed(n)) * 0.5
    idx, count = select(scores, text)
    for row, found, number in zip(scores.numpy(), idx.tolist(), count.tolist(), strict=True):
        kept = [i for i in found if i >= 0]
        assert kept == sorted(set(kept)) and len(kept) == number and all(i == -1 for i in found[number:])
        assert kept == _by_numpy(parse_policy(text), row)


def _by_numpy(policy: Policy, row: np.ndarray) -> list[int]:
    order, value = np.argsort(-row, kind="stable"), float(policy.value or 0)
    match policy.name:
        case "topk":
            chosen = order[: int(value)]
        case "ratio":
            chosen = order[: int(np.ceil(round(value * len(row), 9)))]
        case "threshold":
            chosen = np.flatnonzero(row > value)
        case "atleast":
            chosen = np.flatnonzero(row >= np.float32(value))
        case "nonzero":
            chosen = np.flatnonzero(row)
        case "mass":
            chosen = order[: int((np.cumsum(row[order].astype(np.float64)) - row[order] < value * row.astype(np.float64).sum()).sum())]
        case "knee":
            s, at = row[order].astype(np.float64), np.arange(len(row))
            tau = s[np.argmax(np.abs((s[-1] - s[0]) * at - (len(row) - 1) * (s - s[0])))]
            chosen = np.flatnonzero(row.astype(np.float64) >= tau)
        case "stat":
            from statistics import NormalDist

            chosen = np.flatnonzero(row > np.float32(row.mean() + row.std() * NormalDist().inv_cdf(1 - value)))
        case _:
            chosen = np.arange(len(row))
    return sorted(int(i) for i in chosen)


def test_of_equal_scores_the_lower_index_wins() -> None:
    idx, count = select(torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]), "topk(2)")
    assert idx.tolist() == [1, 2] and int(count) == 2


def test_the_knee_of_integers_is_exact_and_keeps_ties_together() -> None:
    scores = torch.tensor([100, 99, 98, 3, 3, 3, 2, 1])
    assert int(knee(scores)) == 3
    assert select(scores, "knee")[0][:6].tolist() == [0, 1, 2, 3, 4, 5]
    huge = torch.tensor([2**55 + 2, 2**55 + 1, 3, 2, 1])  # float64 could not tell the first ones apart
    assert int(knee(huge)) == 3


def test_equal_scores_have_their_knee_at_the_first() -> None:
    assert int(select(torch.full((5,), 7), "knee")[1]) == 5


def test_nan_never_selects() -> None:
    with pytest.raises(SelectionError, match=r"\[1, 2\] is NaN"):
        select(torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, torch.nan]]), "topk(2)")


@pytest.mark.parametrize("policy", ["nonzero", "topk(1)", "threshold(5)", "stat(0.1)"])
def test_nan_activations_show_in_the_result(policy: str) -> None:
    assert active(torch.tensor([1.0, torch.nan, -2.0]), "relu", policy, None).isnan().any()


def test_a_fraction_is_taken_exactly() -> None:
    assert [kept_of(10, 0.7), kept_of(1000, 0.001), kept_of(3, 1 / 3), kept_of(1, 0.01)] == [7, 1, 1, 1]


def test_statistical_top_k_of_a_gaussian_row_keeps_about_its_fraction_and_of_a_constant_one_nothing() -> None:
    row = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert abs(int((active(row, "relu", "stat(0.08)", None) != 0).sum()) / 200_000 - 0.08) < 0.004
    assert int((active(torch.full((64,), 2.0), "relu", "stat(0.08)", None) != 0).sum()) == 0
    half = active(row, "relu", "stat(0.5)", None)
    assert torch.allclose(half, torch.relu(row - row.mean()), atol=1e-6)


@pytest.mark.parametrize("up", [True, False])
def test_neurons_are_the_masked_dense_block(up: bool) -> None:
    g = torch.Generator().manual_seed(1)
    x, gate, second, down = (torch.randn(*s, generator=g) for s in ((2, 3, 8), (12, 8), (12, 8), (8, 12)))
    weights, biases = ([gate, second, down], [None] * 3) if up else ([gate, down], [torch.ones(12), torch.ones(8)])
    y = neurons(x, weights, biases, None, "rows", "silu", "topk(5)", "")
    a = torch.nn.functional.silu(x @ gate.t() + (0 if up else 1))
    mask = torch.zeros_like(a).scatter_(-1, a.abs().topk(5).indices, 1.0)
    wanted = (a * mask * (x @ second.t() if up else 1)) @ down.t() + (0 if up else 1)
    assert torch.allclose(y, wanted, atol=1e-5)


def test_tokens_come_back_where_they_were() -> None:
    x = torch.randn(2, 5, 3)
    idx = torch.tensor([[0, 3], [1, 4]], dtype=torch.int32)
    rows = gather_tokens(x, idx, [1])
    assert torch.equal(rows[1], x[1, [1, 4]])
    assert torch.equal(scatter_tokens(x, idx, rows), x)
    changed = scatter_tokens(x, idx, rows + 1)
    assert torch.equal(changed[0, [0, 3]], x[0, [0, 3]] + 1) and torch.equal(changed[0, [1, 2, 4]], x[0, [1, 2, 4]])
    mask = torch.randn(1, 1, 5, 5)
    assert torch.equal(gather_tokens(mask, idx, [2, 3])[1, 0], mask[0, 0][[1, 4]][:, [1, 4]])


def test_the_static_router_keeps_the_first_then_the_latest_and_padding_last() -> None:
    real = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]], dtype=torch.bool)
    mask = (real[:, None, None, :] & torch.ones(6, 6, dtype=torch.bool).tril())
    scores = recency(torch.zeros(2, 6, 4), mask)
    assert scores.argsort(descending=True).tolist() == [[0, 3, 2, 1, 5, 4], [2, 5, 4, 3, 1, 0]]


PROGRAM = '''# sparsecc program, stage: skip
def program(x: "f32[2, s0, 8]", gate: "f32[12, 8]", down: "f32[8, 12]"):
    recency: "i64[2, s0]" = sparsecc.recency(x, None)
    select = sparsecc.select(recency, "ratio(0.7)")
    idx = operator.getitem(select, 0)
    rows = sparsecc.gather_tokens(x, idx, [1])
    neurons = sparsecc.neurons(rows, [gate, down], [None, None], None, "rows", "relu", "nonzero", "")
    y: "f32[2, s0, 8]" = sparsecc.scatter_tokens(x, idx, neurons)
    return (y,)
'''


def test_programs_print_as_they_parse_and_run() -> None:
    program = parse_program(PROGRAM)
    assert print_program(program) == PROGRAM
    x, gate, down = torch.randn(2, 9, 8), torch.randn(12, 8), torch.randn(8, 12)
    (y,) = program.run(x, gate, down)
    kept = [0, 3, 4, 5, 6, 7, 8]
    assert torch.allclose(y[:, kept], torch.relu(x[:, kept] @ gate.t()) @ down.t(), atol=1e-5)
    assert torch.equal(y[:, 1:3], x[:, 1:3])


def test_keys_of_all_tokens_and_of_kept_ones() -> None:
    idx = torch.tensor([[1, 3, -1]])
    assert earlier(idx, torch.empty(1, 5, 2))[0, 0].sum(-1).tolist() == [2, 4, 1]
    keys = torch.randn(1, 2, 3, 4)
    assert torch.equal(trim_keys(keys, idx), keys[:, :, :2]) and trim_keys(keys, torch.full((1, 3), -1)).shape == (1, 2, 0, 4)
    assert token_gate(torch.randn(1, 3, 4), torch.randn(2, 4), keys[0, :1]).is_contiguous()
    both, fewer = keys.expand(2, -1, -1, -1), torch.tensor([[1, 3, -1], [2, -1, -1]])
    assert torch.equal(trim_keys(both, fewer), both[:, :, :2])
    assert shown_keys(both[:, :, :2], fewer).tolist() == [[True, True], [True, False]]
    assert shown_keys(both, fewer == 3).tolist() == (fewer == 3).tolist()


def test_rows_with_padding_count_their_own_tokens() -> None:
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 0, 0]]).bool()
    mask = real[:, None, None] & real[:, None, :, None]
    assert numbered(torch.zeros(2, 3, dtype=torch.int32), mask).tolist() == [[2, 3, 4], [0, 2, 1]]
    p, inf = torch.full((2, 5), 0.5), torch.inf
    assert eligible(p, mask, 1, None).tolist() == [[-inf, -inf, inf, 0.5, 0.5], [inf, -inf, 0.5, -inf, -inf]]
    assert eligible(p, mask, None, -1).tolist() == [[-inf, -inf, 0.5, 0.5, inf], [0.5, -inf, inf, -inf, -inf]]


@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 12), st.sampled_from(["topk(3)", "topk(40)", "ratio(0.4)", "all"]))
def test_a_number_of_tokens_is_of_those_that_compete(seed: int, B: int, S: int, policy: str) -> None:
    """+inf is kept besides, -inf never; of equal scores the first."""
    g, rule = torch.Generator().manual_seed(seed), parse_policy(policy)
    scores = torch.tensor([-torch.inf, 0.0, 0.25, 0.5, torch.inf])[torch.randint(0, 5, (B, S), generator=g)]
    for row, found in zip(scores, kept(scores, rule), strict=True):
        some = row.isfinite()
        best = sorted(some.nonzero()[:, 0].tolist(), key=lambda at: -float(row[at]))[: rule.size(int(some.sum()))]
        wanted = torch.zeros(S, dtype=torch.bool)
        wanted[best] = True
        assert torch.equal(found, wanted | (row == torch.inf))
