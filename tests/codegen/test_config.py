"""Configurations: their spaces and their text."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from sparsecc.autotune import from_text, space_of, to_text, tunable
from sparsecc.errors import TextError


@dataclass(frozen=True)
class Spmm:
    vectors: int = tunable(1, 2, 4, default=2)
    unroll: int = tunable(1, 2)

    def valid(self) -> bool:
        return self.vectors * self.unroll <= 4


@dataclass(frozen=True)
class BlockDotConfig:
    lanes: int
    order: str = tunable("row", "column")
    tile: tuple[int, int] = tunable((1, 2), (4, 4))


def test_space_is_every_valid_combination_defaults_first() -> None:
    space = space_of(Spmm)
    assert [(c.vectors, c.unroll) for c in space] == [(2, 1), (2, 2), (1, 1), (1, 2), (4, 1)]
    assert space[0] == Spmm()


def test_fixed_fields_leave_the_space() -> None:
    assert space_of(Spmm, vectors=4) == [Spmm(4, 1)]
    assert space_of(Spmm, vectors=3, unroll=1) == [Spmm(3, 1)]
    assert len(space_of(BlockDotConfig, lanes=16)) == 4
    with pytest.raises(TypeError):
        space_of(Spmm, colour="red")
    with pytest.raises(TypeError, match="dataclass"):
        space_of(int)


def test_text_is_read_by_people_and_by_from_text() -> None:
    assert to_text(Spmm(2, 2)) == "spmm(vectors=2, unroll=2)"
    assert to_text(BlockDotConfig(8)) == "block_dot(lanes=8, order='row', tile=(1, 2))"
    for config in (*space_of(Spmm), *space_of(BlockDotConfig, lanes=8)):
        assert from_text(to_text(config), BlockDotConfig, Spmm) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spmm(vectors=", "not a configuration"),
        ("spmm", "expected name"),
        ("a.spmm()", "expected name"),
        ("spmm(2)", "expected field=value"),
        ("spmv(vectors=2)", "unknown configuration 'spmv', known: spmm, block_dot"),
        ("spmm(width=2)", "its fields: vectors, unroll"),
        ("spmm(**{})", "no such field"),
        ("spmm(vectors=f())", "literal"),
        ("spmm(vectors=4, unroll=2)", "not valid"),
        ("block_dot(order='row')", "needs lanes"),
    ],
)
def test_bad_text_is_refused_with_a_caret(text: str, message: str) -> None:
    with pytest.raises(TextError, match=message) as refused:
        from_text(text, Spmm, BlockDotConfig)
    assert "^" in str(refused.value)


def test_bad_ranges_are_refused() -> None:
    for choices, default in (((), None), ((1, 1), None), ((1, 2), 3)):
        with pytest.raises(ValueError, match="distinct"):
            tunable(*choices, default=default)
