"""The verifier names the node and the stage."""
from __future__ import annotations

import pytest

from sparsecc.errors import VerifyError
from sparsecc.ir.program import Program
from sparsecc.ir.text import parse_program
from sparsecc.ir.verify import verify

TEXT = """\
# sparsecc program, stage: fuse
def program(x: "f32[s0, 16]"):
    w: "f32[8, 16]" = const("fc.weight")
    b: "f32[8]" = const("fc.bias")
    y: "f32[s0, 8]" = sparsecc.linear(x, [w], b, None, terms="f32[8, 16]", epilogue="gelu", layout="row", kernel="")
    return (y,)
"""


def _program(old: str = "", new: str = "") -> Program:
    return parse_program(TEXT.replace(old, new) if old else TEXT)


def test_a_good_program_passes() -> None:
    for stage in ("canonicalize", "fuse", "layout", "pack"):
        verify(_program(), stage)


@pytest.mark.parametrize(
    ("old", "new", "stage", "message"),
    [
        ("", "", "capture", "after capture: y: no sparsecc.linear is allowed yet"),
        ("", "", "lower", "after lower: y: has no kernel"),
        ('kernel=""', 'kernel="k"', "pack", "has a kernel (k) before lower"),
        ('layout="row"', 'layout="token"', "fuse", "layout 'token' is not one of row"),
        ('epilogue="gelu"', 'epilogue="gulu"', "fuse", "unknown epilogue 'gulu'"),
        ('terms="f32[8, 16]"', 'terms="f32[8, 15]"', "fuse", "weight w is f32[8, 16], its term says f32[8, 15]"),
        ('x: "f32[s0, 16]"', 'x: "f32[s0, 17]"', "fuse", "x is f32[s0, 17], but the weight has K = 16"),
        ('b: "f32[8]"', 'b: "f32[9]"', "fuse", "bias is f32[9], not [8]"),
        ("b, None, terms", "b, x, terms", "fuse", "residual is f32[s0, 16], the result f32[s0, 8]"),
    ],
)
def test_refusals(old: str, new: str, stage: str, message: str) -> None:
    with pytest.raises(VerifyError) as caught:
        verify(_program(old, new), stage)
    assert message in str(caught.value)


def test_params_must_fit_the_terms() -> None:
    program = _program()
    next(program.linears()).replace(terms="f32[8, 16] + f32[8, 16]")
    with pytest.raises(VerifyError, match="take 2 tensors, got 1"):
        verify(program)


def test_patterns_are_checked_on_demand() -> None:
    program = _program()
    next(program.linears()).replace(terms="f32[8, 16] % nm(2, 4)")
    verify(program)
    with pytest.raises(VerifyError, match="weight w is not nm"):
        verify(program, patterns=True)
