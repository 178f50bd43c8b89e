"""Programs print, parse back byte for byte, and run."""
from __future__ import annotations

import pytest
import torch

from sparsecc.errors import TextError
from sparsecc.formats import block, nm
from sparsecc.ir.infer import infer
from sparsecc.ir.text import parse_program, print_program, tensors_of
from sparsecc.ir.verify import verify

PROGRAM = """\
# sparsecc program, stage: fuse
def program(x: "f32[s0, s1, 16]", mask: "b1[s0, s1]"):
    w: "f32[8, 16] % block(4, 1, 0.5)" = const("up.weight")
    v: "f32[8, 8] % nm(2, 4)" = const("down_w", "down.weight")
    b: "f32[8]" = const("up.bias")
    n: "sym[s0]" = aten.sym_size.int(x, 0)
    y: "f32[s0, s1, 8]" = sparsecc.linear(x, [w], b, None, terms="f32[8, 16] % block(4, 1, 0.5)", epilogue="gelu", layout="row", kernel="")
    z: "f32[s0, s1, 8]" = sparsecc.linear(y, [v], None, y, terms="f32[8, 8] % nm(2, 4)", epilogue="", layout="row", kernel="")
    c: "f32[s0, s1, 8]" = aten.clamp.default(z, -1.5, float("inf"))
    d = aten.split.Tensor(c, 4, -1)
    e: "f32[s0, s1, 4]" = operator.getitem(d, 1)
    f: "f32[s0, s1, 4]" = torch.nn.functional.silu(e, inplace=False)
    g: "f32[s0, s1, 1]" = operator.getitem(f, (..., slice(None, 1, None)))
    h: "f32[s0, s1]" = g.squeeze(-1)
    i: "f32[s0, s1]" = aten.masked_fill.Scalar(h, mask, 0)
    j: "f64[s0, s1]" = i.to(dtype=torch.float64, device=device("cpu"))
    return (j, c, 3, None)
"""


def test_round_trip_and_run() -> None:
    program = parse_program(PROGRAM)
    assert print_program(program) == PROGRAM
    verify(program, patterns=True)
    outs = program.run(torch.randn(2, 3, 16), torch.ones(2, 3, dtype=torch.bool))
    assert outs[0].shape == (2, 3)
    assert (outs[0] == 0).all()
    assert outs[2:] == (3, None)


def test_invented_constants_have_their_zeros_and_are_always_the_same() -> None:
    one, two = tensors_of(parse_program(PROGRAM)), tensors_of(parse_program(PROGRAM))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert block(4, 1, 0.5).mask_violation(one["up.weight"]) is None
    assert nm(2, 4).mask_violation(one["down_w"]) is None


def test_given_tensors_are_shared() -> None:
    tensors = tensors_of(parse_program(PROGRAM))
    program = parse_program(PROGRAM, tensors)
    assert tensors_of(program)["up.bias"] is tensors["up.bias"]
    with pytest.raises(TextError, match=r"no tensor was given for the constant 'up\.bias'"):
        parse_program(PROGRAM, {"up.weight": tensors["up.weight"], "down_w": tensors["down_w"]})


def test_inference_agrees_with_the_text() -> None:
    program = parse_program(PROGRAM)
    for node in program.graph.nodes:
        if node.op not in ("placeholder", "get_attr"):
            node.meta.clear()
    infer(program)
    assert print_program(program) == PROGRAM


def test_formatted_and_low_rank_terms_run_from_text() -> None:
    program = parse_program(
        """\
def program(x: "f32[4, 8]"):
    idx: "u8[8]" = const("w.idx")
    val: "f32[16]" = const("w.val")
    a: "f32[8, 2]" = const("a")
    b: "f32[2, 8]" = const("b")
    y: "f32[4, 8]" = sparsecc.linear(x, [idx, val, a, b], None, None, terms="f32[8, 8] @ nm(2, 4) + f32[8, 8] % lowrank(2)", epilogue="", layout="row", kernel="")
    return (y,)
""")  # noqa: E501
    assert program.run(torch.randn(4, 8))[0].shape == (4, 8)
    verify(program, "pack")


@pytest.mark.parametrize(
    ("old", "new", "message", "line"),
    [
        ("aten.clamp.default", "aten.clmp.default", "unknown function 'aten.clmp.default': no 'clmp'", 9),
        ("(z, -1.5", "(zz, -1.5", "unknown value 'zz'", 9),
        ("def program", "def program program", "", 2),
        ('"f32[s0, s1, 8]" = aten.clamp', '"f99[s0, s1, 8]" = aten.clamp', "unknown dtype 'f99'", 9),
        ("aten.clamp.default(z,", 'submodule("true_graph_0")(z,', "submodule \"true_graph_0\", which text cannot hold", 9),
        ("torch.nn.functional.silu", "os.system", "unknown function 'os.system'", 12),
        ("float(\"inf\")", "opaque(\"<thing>\")", "text cannot hold this argument: <thing>", 9),
        (', kernel="")\n    c', ")\n    c", "sparsecc.linear lacks kernel", 8),
        ("(x, [w], b", "(x, [w, w], b", "take 1 tensors, got 2", 7),
        ("    d = ", "    c = ", "'c' is defined twice", 10),
    ],
)
def test_errors_name_line_and_place(old: str, new: str, message: str, line: int) -> None:
    assert old in PROGRAM
    with pytest.raises(TextError) as caught:
        parse_program(PROGRAM.replace(old, new))
    assert caught.value.line == line
    assert message in str(caught.value)
    assert "^" in str(caught.value)
