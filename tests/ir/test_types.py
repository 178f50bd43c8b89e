"""Types print and parse back; what does not parse says where."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsecc.errors import TextError
from sparsecc.formats import ANY, block, nm, parse_format, unstructured
from sparsecc.ir.types import DTYPES, LowRank, TensorType, parse_type, symbol, type_of

_s0, _s1 = symbol("s0"), symbol("s1")
_DIMS = st.one_of(st.integers(0, 10_000), st.sampled_from([_s0, _s1, _s0 * _s1, 16 * _s0 + 1, _s0 - _s1]))
_PATTERNS = st.sampled_from([ANY, nm(2, 4), block(4, 1), block(4, 1, 0.9), unstructured(0.5), LowRank(8)])
_FORMATS = st.sampled_from([None, *map(parse_format, ("csr", "bsr(4, 1).bf16", "nm(2, 4)", "bitmap.block(4, 1)"))])
_TYPES = st.builds(TensorType, st.sampled_from(list(DTYPES.values())), st.lists(_DIMS, max_size=4).map(tuple), _PATTERNS, _FORMATS)


@given(_TYPES)
def test_text_round_trip(t: TensorType) -> None:
    assert parse_type(str(t)) == t


@pytest.mark.parametrize(
    "text", ["f32[]", "f32[s0, 384] % block(4, 1)", "f16[4096, 4096] % nm(2, 4) @ nm(2, 4).bf16", "b1[((s0 + 15)//16)]"]
)
def test_print_is_the_inverse(text: str) -> None:
    assert str(parse_type(text)) == text


@pytest.mark.parametrize(
    ("text", "message", "column"),
    [
        ("f33[2]", "unknown dtype 'f33'", 0),
        ("f32[2", "never closed", 3),
        ("f32[2] block(4, 1)", "expected % pattern", 6),
        ("f32[2, a b]", "not a dimension: 'a b'", 6),
        ("f32[2, 2] % blok(4, 1)", "did you mean 'block'", 12),
        ("f32[2, 2] @ cst", "csr", 12),
        ("hello", "a type looks like", 0),
    ],
)
def test_errors_point_at_the_place(text: str, message: str, column: int) -> None:
    with pytest.raises(TextError, match=message) as caught:
        parse_type(text)
    assert caught.value.col == column
    assert str(caught.value).splitlines()[-1].index("^") == column + 4


def test_type_of_tensor() -> None:
    assert str(type_of(torch.zeros(3, 4, dtype=torch.bfloat16))) == "bf16[3, 4]"


def test_low_rank_says_nothing_about_zeros() -> None:
    t = parse_type("f32[8, 4] % lowrank(2)")
    assert t.rank == 2
    assert t.zeros == ANY
