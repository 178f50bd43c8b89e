"""propagate: dropped features, exactness, and the groups that must not be touched."""
from __future__ import annotations

import pytest
import torch

from sparsecc.ir.program import Program
from sparsecc.ir.text import parse_program, tensors_of
from sparsecc.ir.verify import verify
from sparsecc.passes.canonicalize import Canonicalize
from sparsecc.passes.manager import run_passes
from sparsecc.passes.propagate import Propagate

CHAIN = """\
# sparsecc program, stage: canonicalize
def program(x: "f32[s0, 8]"):
    w1: "f32[16, 8]" = const("up.weight")
    b1: "f32[16]" = const("up.bias")
    wg: "f32[16, 8]" = const("gate.weight")
    w2: "f32[4, 16]" = const("down.weight")
    h: "f32[s0, 16]" = LINEAR(x, [w1], b1, None, terms="f32[16, 8]", epilogue="relu", layout="row", kernel="")
    y: "f32[s0, 4]" = LINEAR(h, [w2], None, None, terms="f32[4, 16]", epilogue="", layout="row", kernel="")
    return (y,)
""".replace("LINEAR", "sparsecc.linear")


def weights(rows: list[int], columns: list[int]) -> dict[str, torch.Tensor]:
    """Constants of the chain whose up weight has zero `rows` (and biases), whose down weight has zero `columns`."""
    tensors = tensors_of(parse_program(CHAIN))
    for row in rows:
        tensors["up.weight"][row] = 0
        tensors["up.bias"][row] = 0
    tensors["down.weight"][:, columns] = 0
    return tensors


def propagated(text: str, tensors: dict[str, torch.Tensor]) -> Program:
    """After the pass, checked to compute the same."""
    before = parse_program(text, tensors)
    after = run_passes(before, (Canonicalize(), Propagate()), disable=()).program
    x = torch.randn(5, 8)
    for got, want in zip(after.run(x), before.run(x), strict=True):
        torch.testing.assert_close(got, want)
    verify(after, patterns=True)
    return after


def shapes(program: Program) -> list[tuple[int, int]]:
    return [view.shape for view in program.linears()]


def test_zero_rows_and_unread_columns_go() -> None:
    program = propagated(CHAIN, weights([0, 5], [5, 9]))
    assert shapes(program) == [(13, 8), (4, 13)]
    up, down = program.linears()
    assert program.region(up.node).notes == ["3 of 16 output features dropped: always zero or never read"]
    assert program.region(down.node).notes == ["3 of 16 input features dropped: always zero or never read"]
    assert program.weight_name(up.params[0]) == "up.weight"
    assert str(program.type(up.node)) == "f32[s0, 13]"


def test_nothing_to_drop_changes_nothing() -> None:
    tensors = weights([], [])
    program = propagated(CHAIN, tensors)
    assert shapes(program) == [(16, 8), (4, 16)]
    assert tensors_of(program)["up.weight"] is tensors["up.weight"]


def test_a_biased_zero_row_flows_into_the_next_bias() -> None:
    tensors = weights([3], [])
    tensors["up.bias"][3] = 2
    program = propagated(CHAIN, tensors)
    assert shapes(program) == [(15, 8), (4, 15)]
    down = list(program.linears())[1]
    assert down.bias is not None
    torch.testing.assert_close(program.const(down.bias), 2 * tensors["down.weight"][:, 3])
    assert program.region(down.node).notes == ["1 of 16 input features dropped: always constant or never read"]


def test_nan_and_inf_are_not_zero() -> None:
    tensors = weights([3], [])
    tensors["up.weight"][3, 0] = float("nan")
    program = run_passes(parse_program(CHAIN, tensors), (Canonicalize(), Propagate()), disable=()).program
    assert shapes(program) == [(16, 8), (4, 16)]


def test_everything_dead_leaves_one_feature() -> None:
    assert shapes(propagated(CHAIN, weights([], list(range(16))))) == [(1, 8), (4, 1)]


def test_an_activation_between_that_fills_zeros() -> None:
    text = CHAIN.replace('epilogue="relu"', 'epilogue=""').replace("(h, ", "(s, ")
    text = text.replace("    y:", '    s: "f32[s0, 16]" = aten.sigmoid.default(h)\n    y:')
    for program in (propagated(text, weights([0, 1], [7])), propagated(text.replace("sigmoid", "tanh"), weights([0, 1], [7]))):
        assert shapes(program) == [(13, 8), (4, 13)]


GATED = CHAIN.replace("    y:", """\
    g0: "f32[s0, 16]" = sparsecc.linear(x, [wg], None, None, terms="f32[16, 8]", epilogue="", layout="row", kernel="")
    g: "f32[s0, 16]" = torch.nn.functional.silu(g0)
    m: "f32[s0, 16]" = operator.mul(g, h)
    y:""").replace("(h, ", "(m, ")


def test_a_gate_is_cut_with_its_up_projection() -> None:
    tensors = weights([0], [1])
    tensors["gate.weight"][2] = 0
    assert shapes(propagated(GATED, tensors)) == [(13, 8), (13, 8), (4, 13)]
    assert shapes(propagated(GATED.replace("operator.mul", "operator.add"), tensors)) == [(15, 8), (15, 8), (4, 15)]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return (y,)", "return (y, h)"),
        ("    y:", '    t: "f32[16, s0]" = aten.t.default(h)\n    k: "f32[s0, s0]" = aten.mm.default(h, t)\n    y:'),
        ("b1, None", "b1, x16"),
    ],
)
def test_values_that_others_see_are_left_alone(old: str, new: str) -> None:
    text = CHAIN.replace(old, new, 1)
    text = text.replace("    h:", '    x16: "f32[s0, 16]" = aten.repeat.default(x, [1, 2])\n    h:').replace(
        "return (y,)", "return (y, k)" if "k:" in text else "return (y,)")
    assert shapes(propagated(text, weights([0], [1]))) == [(16, 8), (4, 16)]


def test_blocks_stay_aligned() -> None:
    text = CHAIN.replace("f32[16, 8]", "f32[16, 8] % block(4, 1)").replace("f32[4, 16]", "f32[4, 16] % nm(2, 4)")
    tensors = tensors_of(parse_program(text))
    tensors["up.weight"][[0, 4, 5, 6, 7]] = 0
    tensors["up.bias"][[0, 4, 5, 6, 7]] = 0
    tensors["up.weight"][0] = 0
    program = parse_program(text, tensors)
    Propagate().run(program)
    assert [str(v.terms[0]) for v in program.linears()] == ["f32[12, 8] % block(4, 1)", "f32[4, 12] % nm(2, 4)"]


def test_sparsity_that_left_with_the_rows_is_not_claimed() -> None:
    text = CHAIN.replace("f32[16, 8]", "f32[16, 8] % unstructured(0.5)")
    tensors = weights(list(range(8)), [])
    tensors["gate.weight"][:8] = 0
    program = propagated(text, tensors)
    assert str(next(program.linears()).terms[0]) == "f32[8, 8] % unstructured"


def test_chains_of_three_collapse() -> None:
    """The columns that leave the last weight empty rows of the middle one: those leave too."""
    text = """\
# sparsecc program, stage: canonicalize
def program(x: "f32[s0, 8]"):
    a: "f32[6, 8]" = const("a")
    b: "f32[5, 6]" = const("b")
    c: "f32[4, 5]" = const("c")
    h: "f32[s0, 6]" = sparsecc.linear(x, [a], None, None, terms="f32[6, 8]", epilogue="relu", layout="row", kernel="")
    i: "f32[s0, 5]" = sparsecc.linear(h, [b], None, None, terms="f32[5, 6]", epilogue="relu", layout="row", kernel="")
    y: "f32[s0, 4]" = sparsecc.linear(i, [c], None, None, terms="f32[4, 5]", epilogue="", layout="row", kernel="")
    return (y,)
"""
    tensors = tensors_of(parse_program(text))
    tensors["c"][:, 0] = 0
    tensors["b"][1:, 2] = 0  # column 2 of b is only in the row that nobody reads
    assert shapes(propagated(text, tensors)) == [(5, 8), (4, 5), (4, 4)]


POOL = """\
# sparsecc program, stage: canonicalize
def program(x: "f32[1, 8, 6, 6]"):
    w: "f32[8, 8, 1, 1]" = const("conv.weight")
    b: "f32[8]" = const("conv.bias")
    wh: "f32[4, 8]" = const("head.weight")
    c: "f32[1, 8, 6, 6]" = aten.convolution.default(x, w, b, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    p: "f32[1, 8, 1, 1]" = aten.adaptive_avg_pool2d.default(c, [1, 1])
    u: "f32[1, 8, 2, 2]" = aten.upsample_nearest2d.vec(p, [2, 2], None)
    m: "f32[1, 8]" = aten.mean.dim(u, [2, 3])
    y: "f32[1, 4]" = LINEAR(m, [wh], None, None, terms="f32[4, 8]", epilogue="", layout="row", kernel="")
    return (y,)
""".replace("LINEAR", "sparsecc.linear")


def test_channels_pass_a_picture_of_one_pixel() -> None:
    tensors = tensors_of(parse_program(POOL))
    tensors["head.weight"][:, [1, 6]] = 0
    before = parse_program(POOL, tensors)
    after = run_passes(before, (Canonicalize(), Propagate()), disable=()).program
    x = torch.randn(1, 8, 6, 6)
    torch.testing.assert_close(after.run(x)[0], before.run(x)[0])
    assert shapes(after) == [(4, 6)]
    assert [str(after.type(node)) for node in after.graph.nodes if "convolution" in str(node.target)] == ["f32[1, 6, 6, 6]"]
