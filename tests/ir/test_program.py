"""Program: views, rewriting, cloning, dead code."""
from __future__ import annotations

import pytest
import torch
from torch import fx

from sparsecc.ir.program import Program
from sparsecc.ir.text import parse_program, print_program

aten = torch.ops.aten
TEXT = """\
# sparsecc program, stage: capture
def program(x: "f32[s0, 16]"):
    w: "f32[8, 16]" = const("fc.weight")
    y: "f32[s0, 8]" = sparsecc.linear(x, [w], None, None, terms="f32[8, 16]", epilogue="", layout="row", kernel="")
    z: "f32[s0, 8]" = aten.relu.default(y)
    u: "f32[s0, 8]" = aten.tanh.default(z)
    v: "f32[s0, 8]" = aten.neg.default(z)
    return (u,)
"""


def test_linear_view_replaces_fields_in_place() -> None:
    program = parse_program(TEXT)
    view = next(program.linears())
    assert (view.shape, view.epilogue, view.plain) == ((8, 16), "", True)
    view.replace(epilogue="relu", terms=(view.terms[0].with_(pattern=view.terms[0].pattern),))
    assert next(program.linears()).epilogue == "relu"
    with pytest.raises(TypeError, match="no field \\['kernal'\\]"):
        view.replace(kernal="k")


def test_rewrite_to_fixpoint_and_dead_code() -> None:
    program = parse_program(TEXT)

    def no_relu(program: Program, node: fx.Node) -> fx.Node:
        return node.args[0]  # type: ignore[return-value]

    def tanh_to_relu(program: Program, node: fx.Node) -> fx.Node:
        return program.graph.call_function(aten.relu.default, node.args)

    assert program.rewrite({aten.relu.default: no_relu, aten.tanh.default: tanh_to_relu}) == 3
    assert [n.op for n in program.graph.nodes] == ["placeholder", "get_attr", "call_function", "output"]


def test_mutations_are_not_dead() -> None:
    program = parse_program(TEXT.replace("aten.neg.default(z)", "z.neg_()").replace("return (u,)", "return (z,)"))
    program.finish()
    assert "neg_" in print_program(program)
    assert "tanh" not in print_program(program)


def test_clone_is_independent_and_shares_tensors() -> None:
    program = parse_program(TEXT)
    program.region(next(program.linears()).node).notes.append("first")
    before = print_program(program)
    clone = program.clone()
    assert print_program(clone) == before
    view = next(clone.linears())
    view.replace(epilogue="relu")
    clone.region(view.node).notes.append("second")
    clone.add_const("extra", torch.zeros(1))
    assert print_program(program) == before
    assert program.region(next(program.linears()).node).notes == ["first"]
    assert clone.const(view.params[0]) is program.const(next(program.linears()).params[0])


def test_constants() -> None:
    program = parse_program(TEXT)
    node = program.add_const("a.b+c", torch.ones(2), "a.b")
    again = program.add_const("a.b+c", torch.ones(3))
    assert (node.target, again.target) == ("a_b_c", "a_b_c_1")
    assert program.weight_name(node) == "a.b"
    program.finish()
    assert not hasattr(program.gm, "a_b_c")
