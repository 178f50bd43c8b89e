"""Laws of the patterns: text, order, sums and products of masks, and the best mask."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecc.errors import ShapeError, SpecError
from sparsecc.formats.pattern import ANY, NM, Block, Channels, Cols, Heads, Pattern, Rows, Unstructured, parse_pattern

LAW = settings(max_examples=150, deadline=None)

floors = st.sampled_from([None, 0.0, 0.3, 0.5, 0.75, 0.9])
sides = st.sampled_from([1, 2, 3, 4, 8])
concrete = st.one_of(
    st.sampled_from([NM(1, 2), NM(2, 4), NM(1, 4), NM(4, 8), NM(3, 6), NM(4, 4)]),
    st.builds(Block, sides, sides, floors.filter(bool)),
    floors.filter(bool).flatmap(lambda s: st.sampled_from([Unstructured(s), Rows(s), Cols(s), Channels(s), Heads(s, 4)])),
)
patterns = st.one_of(
    concrete,
    st.just(ANY),
    st.builds(Block, sides, sides),
    st.sampled_from([Unstructured(), Rows(), Cols(), Channels(), Heads(None, 3)]),
)
seeds = st.integers(0, 1 << 30)
SHAPE = (24, 24)


def nonzero(*shape: int, seed: int) -> torch.Tensor:
    """Scores without ties or zeros."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def sample(p: Pattern, seed: int) -> torch.Tensor:
    """A weight whose zeros are those that p makes; a pattern that fixes no sparsity gets one."""
    if p == ANY:
        return nonzero(*SHAPE, seed=seed)
    if isinstance(p, Heads):
        p = Heads(p.sparsity or 0.5, p.dim)
    p = p if p.density is not None else parse_pattern(str(p).replace(")", ", 0.5)") if "(" in str(p) else f"{p}(0.5)")
    w = nonzero(*SHAPE, seed=seed)
    return w * p.topk_mask(w)


@LAW
@given(patterns)
def test_text_round_trips(p: Pattern) -> None:
    assert parse_pattern(str(p)) == p


def test_ratio_text() -> None:
    assert parse_pattern("2:4") == parse_pattern(" 2 : 4 ") == NM(2, 4)


@LAW
@given(patterns, seeds)
def test_what_a_pattern_makes_satisfies_it(p: Pattern, seed: int) -> None:
    assert p.mask_violation(sample(p, seed)) is None
    assert p.mask_violation(torch.zeros(SHAPE)) is None


@LAW
@given(patterns, patterns, seeds)
def test_implies_is_sound(p: Pattern, q: Pattern, seed: int) -> None:
    if p.implies(q):
        assert q.mask_violation(sample(p, seed)) is None
        assert q.density is None or (p.density is not None and p.density <= q.density) or q.vacuous


@LAW
@given(patterns, patterns, patterns)
def test_implies_is_a_preorder(p: Pattern, q: Pattern, r: Pattern) -> None:
    assert p.implies(p)
    assert p.implies(ANY)
    if p.implies(q) and q.implies(r):
        assert p.implies(r)


@LAW
@given(patterns, patterns, seeds)
def test_join_holds_for_sums_and_meet_for_products(p: Pattern, q: Pattern, seed: int) -> None:
    x, y = sample(p, seed), sample(q, seed + 1)
    assert p.join(q).mask_violation(x + y) is None
    assert p.meet(q).mask_violation(x * y) is None or p.meet(q) in (p, q)


@LAW
@given(patterns, patterns)
def test_join_and_meet_commute_and_have_units(p: Pattern, q: Pattern) -> None:
    assert p.join(q) == q.join(p)
    assert p.join(ANY) == ANY
    assert p.meet(ANY) == p == ANY.meet(p) == p.meet(p)


@pytest.mark.parametrize(
    ("p", "q", "yes"),
    [
        ("nm(2, 4)", "nm(4, 8)", True),
        ("nm(4, 8)", "nm(2, 4)", False),
        ("nm(1, 4)", "nm(2, 4)", True),
        ("nm(2, 4)", "unstructured(0.5)", True),
        ("nm(2, 4)", "unstructured(0.6)", False),
        ("block(8, 1, 0.9)", "block(4, 1, 0.9)", True),
        ("block(4, 1, 0.9)", "block(8, 1)", False),
        ("block(4, 4, 0.9)", "unstructured(0.8)", True),
        ("rows(0.5)", "block(1, 16, 0.5)", True),
        ("rows", "cols", False),
        ("cols", "block(32, 1)", True),
        ("heads(0.25, 64)", "channels(0.25)", True),
        ("channels(0.3)", "rows(0.3)", True),
        ("channels(0.3)", "heads(0.3, 4)", False),
        ("heads(0.5, 64)", "heads(32)", True),
        ("unstructured(0.9)", "any", True),
        ("any", "rows", False),
    ],
)
def test_implies(p: str, q: str, yes: bool) -> None:
    assert parse_pattern(p).implies(parse_pattern(q)) is yes


@pytest.mark.parametrize(
    ("p", "q", "total"),
    [
        ("nm(1, 4)", "nm(1, 4)", "nm(2, 4)"),
        ("nm(2, 4)", "nm(2, 4)", "any"),
        ("block(8, 1, 0.9)", "block(4, 1, 0.8)", "block(4, 1, 0.7)"),
        ("rows", "rows", "rows"),
        ("heads(0.9, 6)", "heads(0.8, 4)", "heads(0.7, 2)"),
        ("heads(64)", "channels(0.5)", "rows"),
        ("rows(0.9)", "cols(0.9)", "unstructured(0.8)"),
        ("nm(1, 4)", "unstructured(0.5)", "unstructured(0.25)"),
    ],
)
def test_join(p: str, q: str, total: str) -> None:
    assert str(parse_pattern(p).join(parse_pattern(q))) == total


@settings(max_examples=60, deadline=None)
@given(concrete, st.integers(0, 13), st.integers(0, 13), st.booleans(), seeds)
def test_masks_of_odd_shapes_satisfy_their_pattern(p: Pattern, N: int, K: int, per_row: bool, seed: int) -> None:
    score = nonzero(N, K, seed=seed)
    mask = p.topk_mask(score, per_row)
    assert mask.shape == (N, K) and mask.dtype == torch.bool
    assert p.mask_violation(score * mask) is None


@pytest.mark.parametrize("p", [Block(2, 1, 0.5), Block(1, 2, 0.75), Unstructured(0.5), Rows(0.5), Cols(0.5), NM(1, 2)])
def test_topk_is_the_best_of_all_masks(p: Pattern) -> None:
    score = nonzero(2, 4, seed=3)
    best = max(
        float(score[mask].sum())
        for bits in itertools.product([False, True], repeat=8)
        if p.mask_violation((mask := torch.tensor(bits).view(2, 4)).float()) is None
        # Only whole blocks are candidates: a stray zero inside a kept block is allowed, but never better.
    )
    assert float(score[p.topk_mask(score)].sum()) == pytest.approx(best)


def test_ties_keep_the_lower_index_and_nan_ranks_highest() -> None:
    assert Unstructured(0.5).topk_mask(torch.ones(2, 4)).tolist() == [[True] * 4, [False] * 4]
    assert Unstructured(0.5).topk_mask(torch.ones(2, 4), per_row=True).tolist() == [[True, True, False, False]] * 2
    assert NM(1, 2).topk_mask(torch.ones(1, 3)).tolist() == [[True, False, True]]
    assert NM(1, 2).topk_mask(torch.tensor([[1.0, torch.nan]])).tolist() == [[False, True]]


def test_a_decimal_sparsity_means_the_decimal() -> None:
    assert int(Unstructured(0.9).topk_mask(torch.rand(1, 10)).sum()) == 1
    assert int(Unstructured(0.7).topk_mask(torch.rand(10, 10)).sum()) == 30


def test_violations_name_the_place() -> None:
    w = torch.zeros(8, 16)
    w[3, 8:11] = 1
    assert NM(2, 4).mask_violation(w) == "row 3, columns 8-11 hold 3 nonzeros, at most 2 allowed"
    assert Unstructured(0.99).mask_violation(w) == "is 97.7 % zero, the spec asks for 99 %"
    stray = "rows 0-3, column 8 hold 1 nonzeros of 4: the zeros do not come in whole 4x1 blocks"
    assert str(Block(4, 1).mask_violation(w)).startswith(stray)
    assert "whole rows" in str(Rows().mask_violation(w))
    dense = torch.ones(8, 16)
    assert Block(4, 1).mask_violation(dense) is None
    assert Block(4, 1, 0.9).mask_violation(dense) == "is 0.0 % zero in whole 4x1 blocks, the spec asks for 90 %"


def test_nan_and_inf_are_nonzero_and_minus_zero_is_zero() -> None:
    w = torch.tensor([[torch.nan, torch.inf, -0.0, 0.0]])
    assert NM(2, 4).mask_violation(w) is None
    assert NM(1, 4).mask_violation(w) is not None


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("blok(4, 1)", 0, "did you mean 'block'"),
        ("5:4", 0, "1 <= n <= m"),
        ("0:4", 0, "1 <= n <= m"),
        ("block(4)", 0, "takes 2 or 3 arguments, not 1"),
        ("block(4.5, 1)", 0, "positive integers"),
        ("block(4, 1, 1.5)", 0, "from 0 up to"),
        ("unstructured(x)", 13, "expected a number"),
        ("nm(2, 4).bf16", 9, "options(pattern, codec"),
        ("nm(2, 4", 7, "expected ')'"),
        ("?", 0, "expected a name"),
    ],
)
def test_bad_text_gets_a_caret(text: str, column: int, message: str) -> None:
    with pytest.raises(SpecError) as error:
        parse_pattern(text)
    assert message in str(error.value)
    assert str(error.value).endswith(f"    {text}\n    {' ' * column}^")


def test_a_mask_needs_a_sparsity_and_a_matrix() -> None:
    with pytest.raises(SpecError, match="fixes no sparsity"):
        Block(4, 1).topk_mask(torch.ones(4, 4))
    with pytest.raises(ShapeError):
        NM(2, 4).mask_violation(torch.ones(4))
