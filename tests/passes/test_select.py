"""select: which patterns land on which weights, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecc.errors import PatternViolation, SpecError
from sparsecc.formats.pattern import NM
from sparsecc.ir.program import Program
from sparsecc.ir.text import parse_program
from sparsecc.ir.verify import verify
from sparsecc.passes.context import Context
from sparsecc.passes.select import Select
from sparsecc.spec import SparsitySpec, options

TEXT = """\
# sparsecc program, stage: canonicalize
def program(x: "f32[s0, 64]"):
    w: "f32[32, 64]" = const("up.weight")
    v: "f32[64, 32]" = const("down.weight")
    h: "f32[s0, 32]" = sparsecc.linear(x, [w], None, None, terms="f32[32, 64]", epilogue="", layout="row", kernel="")
    y: "f32[s0, 64]" = sparsecc.linear(h, [v], None, None, terms="f32[64, 32]", epilogue="", layout="row", kernel="")
    return (y,)
"""


def two_of_four(*shape: int) -> Tensor:
    w = torch.rand(shape) + 0.1
    return w * NM(2, 4).topk_mask(w)


def blocks(*shape: int) -> Tensor:
    w = torch.rand(shape) + 0.1
    return w * (torch.rand(shape[0] // 4, shape[1]) < 0.3).repeat_interleave(4, 0)


def selected(sparsity: Any = None, text: str = TEXT, **weights: Tensor) -> Program:
    tensors = {"up.weight": torch.randn(32, 64), "down.weight": torch.randn(64, 32)}
    tensors |= {f"{name}.weight": w for name, w in weights.items()}
    program = parse_program(text, tensors)
    Select().run(program, Context(SparsitySpec.parse(sparsity)))
    return program


def patterns(program: Program) -> list[str]:
    return [str(view.terms[0].pattern) for view in program.linears()]


def reasons(program: Program) -> list[str]:
    return [program.region(view.node).reason for view in program.linears()]


def test_detect_finds_what_is_there() -> None:
    program = selected(up=blocks(32, 64), down=two_of_four(64, 32))
    assert patterns(program) == ["block(4, 1)", "nm(2, 4)"]
    verify(program, patterns=True)
    region = program.region(next(program.linears()).node)
    assert region.pattern == "block(4, 1)" and region.more["shape"] == (32, 64) and 0.5 < region.more["zeros"] < 0.9


def test_dense_weights_say_why() -> None:
    few = torch.rand(64, 32) + 0.1
    few.view(-1)[:20] = 0
    program = selected(down=few)
    assert patterns(program) == ["any", "any"]
    assert reasons(program) == ["no zeros", "only 1.0% zeros"]


def test_required_pattern_is_taken_as_named() -> None:
    program = selected({"up": "block(4, 1)", "down": options("2:4", codec="bf16")}, up=blocks(32, 64), down=two_of_four(64, 32))
    assert patterns(program) == ["block(4, 1)", "nm(2, 4)"]
    assert patterns(selected({"up": "unstructured"}, up=blocks(32, 64))) == ["unstructured", "any"]


def test_violations_name_the_weight_the_place_and_the_way_out() -> None:
    w = two_of_four(32, 64)
    w[3, 8:11] = 1.0
    w[3, 11] = 0.0
    with pytest.raises(PatternViolation) as refused:
        selected({"up": "2:4"}, up=w)
    message = str(refused.value)
    assert message.startswith("up.weight must be nm(2, 4), but row 3, columns 8-11 hold 3 nonzeros")
    assert "sparsecc.prune(model, {'up': 'nm(2, 4)'})" in message and 'sparsity="detect"' in message


def test_too_few_zeros_is_a_violation() -> None:
    with pytest.raises(PatternViolation, match=r"down\.weight must be unstructured\(0\.9\), but .*is 0.*% zero.*sparsecc\.prune"):
        selected({"down": "unstructured(0.9)"})


def test_one_pattern_is_required_of_every_weight() -> None:
    with pytest.raises(PatternViolation, match=r"down\.weight"):
        selected("2:4", up=two_of_four(32, 64))


def test_dense_rule_leaves_alone() -> None:
    program = selected({"up": "dense"}, up=two_of_four(32, 64), down=two_of_four(64, 32))
    assert patterns(program) == ["any", "nm(2, 4)"]
    assert reasons(program)[0] == "the spec leaves it dense"


def test_unknown_glob_is_refused_with_the_closest_names() -> None:
    with pytest.raises(SpecError, match=r"'uq\*' matches no linear weight; closest: up"):
        selected({"uq*": "2:4"})


def test_weight_of_another_dtype_is_left() -> None:
    text = TEXT.replace('w: "f32', 'w: "f64').replace('terms="f32[32, 64]"', 'terms="f64[32, 64]"')
    program = selected(text=text, up=two_of_four(32, 64).double())
    assert reasons(program)[0] == "weights of torch.float64 are not packed"


TIED = TEXT.replace("    return (y,)", '    e: "f32[s0, 64]" = aten.mm.default(h, w)\n    return (y, e)')


def test_tied_weight_needs_to_be_named() -> None:
    weights = {"up": torch.randn(32, 64), "down": two_of_four(64, 32)}
    program = selected("2:4", TIED, **weights)
    assert patterns(program) == ["any", "nm(2, 4)"]
    assert reasons(program)[0].startswith("tied to an embedding")
    with pytest.raises(PatternViolation, match=r"up\.weight"):
        selected({"*": "2:4", "up": "2:4"}, TIED, **weights)
    assert patterns(selected(None, TIED, up=two_of_four(32, 64)))[0] == "nm(2, 4)"


def test_nan_and_inf_are_no_zeros() -> None:
    w = two_of_four(32, 64)
    w[0, :4] = torch.tensor([1.0, 0.0, torch.inf, torch.nan])
    with pytest.raises(PatternViolation, match="row 0, columns 0-3"):
        selected({"up": "2:4"}, up=w)


def test_a_program_alone_is_on_detect() -> None:
    program = parse_program(TEXT, {"up.weight": blocks(32, 64), "down.weight": torch.randn(64, 32)})
    Select().run(program)
    assert patterns(program) == ["block(4, 1)", "any"]
