"""fuse: what moves into a linear, what must not, and that the values are the same."""
from __future__ import annotations

import pytest
import torch

from sparsecc.ir.program import Program
from sparsecc.ir.text import parse_program, print_program
from sparsecc.ir.verify import verify
from sparsecc.passes.fuse import Fuse, joint_name

HEAD = """\
# sparsecc program, stage: canonicalize
def program(x: "f32[s0, 16]", r: "f32[s0, 8]"):
    w: "f32[8, 16] % block(4, 1, 0.5)" = const("a.query.weight")
    v: "f32[8, 16] % block(4, 1, 0.75)" = const("a.key.weight")
    u: "f32[6, 16] % nm(2, 4)" = const("a.gate.weight")
    b: "f32[8]" = const("a.query.bias")
"""
QUERY = 'sparsecc.linear(x, [w], b, None, terms="f32[8, 16] % block(4, 1, 0.5)", epilogue="", layout="row", kernel="")'
KEY = 'sparsecc.linear(x, [v], None, None, terms="f32[8, 16] % block(4, 1, 0.75)", epilogue="", layout="row", kernel="")'
GATE = 'sparsecc.linear(x, [u], None, None, terms="f32[6, 16] % nm(2, 4)", epilogue="", layout="row", kernel="")'


def fused(body: str, fuse: Fuse | None = None) -> Program:
    """The program after the pass, checked to compute the same as before."""
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    before = parse_program(HEAD + lines)
    verify(before, patterns=True)
    after = before.clone()
    (fuse or Fuse()).run(after)
    after.stage = "fuse"
    verify(after, patterns=True)
    x, r = torch.randn(5, 16), torch.randn(5, 8)
    for got, want in zip(after.run(x.clone(), r.clone()), before.run(x.clone(), r.clone()), strict=True):
        torch.testing.assert_close(got, want)
    return after


@pytest.mark.parametrize(
    ("call", "epilogue"),
    [
        ("aten.relu.default(y)", "relu"),
        ("aten.gelu.default(y)", "gelu"),
        ('aten.gelu.default(y, approximate="tanh")', "gelu_tanh"),
        ("torch.nn.functional.silu(y)", "silu"),
        ("torch.nn.functional.relu(y, inplace=True)", "relu"),
        ("y.relu_()", "relu"),
    ],
)
def test_activation(call: str, epilogue: str) -> None:
    program = fused(f'y: "f32[s0, 8]" = {QUERY}\nz: "f32[s0, 8]" = {call}\nreturn (z,)')
    assert [v.epilogue for v in program.linears()] == [epilogue]
    assert sum(n.op.startswith("call_") for n in program.graph.nodes) == 1


def test_not_with_a_second_user() -> None:
    program = fused(f'y: "f32[s0, 8]" = {QUERY}\nz: "f32[s0, 8]" = aten.relu.default(y)\nreturn (z, y)')
    assert [v.epilogue for v in program.linears()] == [""]


@pytest.mark.parametrize("add", ["aten.add.Tensor(y, r)", "operator.add(r, y)", "y.add_(r)", "torch.add(r, y)"])
def test_residual_after_activation(add: str) -> None:
    body = f'y0: "f32[s0, 8]" = {QUERY}\ny: "f32[s0, 8]" = aten.gelu.default(y0)\nz: "f32[s0, 8]" = {add}\nreturn (z,)'
    view = next(fused(body).linears())
    assert (view.epilogue, view.residual is not None) == ("gelu", True)


@pytest.mark.parametrize(
    "add",
    ["aten.add.Tensor(y, r, alpha=2)", "operator.iadd(r, y)", "operator.add(y, 1)", "aten.add.Tensor(y, one)", "aten.add.Tensor(y, y)"],
)
def test_not_a_residual(add: str) -> None:
    body = f"""
y: "f32[s0, 8]" = {QUERY}
one: "f32[s0, 1]" = aten.slice.Tensor(r, 1, 0, 1)
z: "f32[s0, 8]" = {add}
return (z, one)"""
    assert next(fused(body).linears()).residual is None


def test_a_later_residual_moves_the_linear_down_unless_something_is_written_between() -> None:
    body = f"""
y: "f32[s0, 8]" = {QUERY}
t: "f32[s0, 8]" = aten.tanh.default(r)
z: "f32[s0, 8]" = aten.add.Tensor(y, t)
return (z,)"""
    assert next(fused(body).linears()).residual is not None
    written = body.replace("z:", 'm: "f32[s0, 16]" = x.mul_(2)\nz:').replace("return (z,)", "return (z, m)")
    assert next(fused(written).linears()).residual is None


def test_of_two_linears_the_later_takes_the_other() -> None:
    body = f'p: "f32[s0, 6]" = {GATE}\nq: "f32[s0, 6]" = {GATE.replace("None, None", "None, p")}\nreturn (q,)'
    fused(body)
    body = f'p: "f32[s0, 8]" = {QUERY}\nq: "f32[s0, 8]" = {KEY.replace("(x", "(x2")}\nz: "f32[s0, 8]" = aten.add.Tensor(p, q)\nreturn (z,)'
    program = fused('x2: "f32[s0, 16]" = aten.tanh.default(x)\n' + body)
    first, second = program.linears()
    assert (first.residual, second.residual) == (None, first.node)


def test_constant_bias() -> None:
    body = f'y: "f32[s0, 8]" = {KEY}\nz: "f32[s0, 8]" = operator.add(y, b)\nt: "f32[s0, 8]" = aten.relu.default(z)\nreturn (t,)'
    view = next(fused(body).linears())
    assert view.bias is not None
    assert view.epilogue == "relu"


SIBLINGS = f"""
q: "f32[s0, 8]" = {QUERY}
g: "f32[s0, 6]" = {GATE}
k: "f32[s0, 8]" = {KEY}
qv: "f32[s0, 2, 4]" = aten.view.default(q, [-1, 2, 4])
kv: "f32[8*s0]" = k.view(-1)
return (qv, kv, g)"""


def test_siblings_of_one_family_become_one() -> None:
    program = fused(SIBLINGS)
    gate, merged = sorted(program.linears(), key=lambda v: v.shape[0])
    assert str(merged.terms[0]) == "f32[16, 16] % block(4, 1, 0.5)"
    assert merged.bias is not None
    assert program.region(merged.node).name == "a.{query,key}"
    assert program.region(merged.node).weights == ("a.query.weight", "a.key.weight")
    assert program.weight_name(merged.params[0]) == "a.{query,key}.weight"
    assert str(gate.terms[0]) == "f32[6, 16] % nm(2, 4)"
    assert "aten.reshape.default" in print_program(program)


def test_siblings_that_must_stay_apart() -> None:
    plain = SIBLINGS.replace(" % block(4, 1, 0.5)", "")
    assert len(list(fused(plain).linears())) == 3
    assert len(list(fused(plain.replace(" % block(4, 1, 0.75)", ""), Fuse(dense_siblings=True)).linears())) == 2
    written = SIBLINGS.replace("k: ", 'm: "f32[s0, 16]" = x.mul_(2)\nk: ', 1)
    assert len(list(fused(written).linears())) == 3


def test_columns_do_not_stack() -> None:
    text = HEAD + "".join(f"    {line}\n" for line in SIBLINGS.strip().splitlines())
    program = parse_program(text.replace("block(4, 1, 0.5)", "cols").replace("block(4, 1, 0.75)", "cols"))
    Fuse().run(program)
    assert len(list(program.linears())) == 3


@pytest.mark.parametrize(
    ("names", "joint"),
    [
        (["a.q.weight", "a.k.weight"], "a.{q,k}.weight"),
        (["q", "k"], "q + k"),
        (["a.b.c", "a.d"], "a.{b.c,d}"),
        (["a.b.w", "c.w"], "{a.b,c}.w"),
    ],
)
def test_joint_name(names: list[str], joint: str) -> None:
    assert joint_name(names) == joint
