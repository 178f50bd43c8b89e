"""layout: token-minor between packed linears, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from sparsecc.ir.infer import infer
from sparsecc.ir.program import Program
from sparsecc.ir.text import parse_program
from sparsecc.ir.verify import verify
from sparsecc.passes.layout import Layout

HEAD = """\
# sparsecc program, stage: pack
def program(x: "f32[40, 8]"):
    wp: "i32[3]" = const("wp")
    wi: "u16[8]" = const("wi")
    wv: "f32[32]" = const("wv")
    d: "f32[8, 8]" = const("d")
"""
TERM = "f32[8, 8] % block(4, 1) @ bsr(4, 1)"


def linear(x: str, residual: str = "None", packed: bool = True) -> str:
    params, terms = ("wp, wi, wv", TERM) if packed else ("d", "f32[8, 8]")
    return f'sparsecc.linear({x}, [{params}], None, {residual}, terms="{terms}", epilogue="", layout="row", kernel="")'


def after(*lines: str, head: str = HEAD) -> Program:
    program = parse_program(head + "".join(f"    {line}\n" for line in lines))
    infer(program)
    before = program.clone()
    Layout().run(program)
    program.stage = "layout"
    program.finish()
    verify(program)
    tokens = program.inputs[0].meta["sparsecc_type"].shape[0]
    x = torch.randn(tokens, 8)
    for got, want in zip(program.run(x), before.run(x), strict=True):
        torch.testing.assert_close(got, want)
    return program


def layouts(program: Program) -> list[str]:
    return [view.layout for view in program.linears()]


def test_between_packed_linears() -> None:
    program = after(f"a = {linear('x')}", f"b = {linear('a')}", f"c = {linear('b')}", "return (c,)")
    assert layouts(program) == ["token", "token", "row"]


def test_every_user_counts() -> None:
    assert layouts(after(f"a = {linear('x')}", f"b = {linear('a')}", f"c = {linear('a')}", "return (b, c)")) == ["token", "row", "row"]


@pytest.mark.parametrize(
    "lines",
    [
        ("t = aten.tanh.default(a)", f"b = {linear('a')}", "return (b, t)"),
        (f"b = {linear('x', 'a')}", "return (b,)"),
        (f"b = {linear('a', 'a')}", "return (b,)"),
        (f"b = {linear('a', packed=False)}", "return (b,)"),
        ("t = aten.tanh.default(a)", f"b = {linear('t')}", "return (b,)"),
    ],
    ids=["other op", "residual", "both", "dense linear", "op between"],
)
def test_anything_else_keeps_rows(lines: tuple[str, ...]) -> None:
    assert layouts(after(f"a = {linear('x')}", *lines)) == ["row", "row"]


def test_what_the_program_returns_besides_is_copied_into_rows() -> None:
    program = after(f"a = {linear('x')}", f"b = {linear('a')}", "return (b, a)")
    assert layouts(program) == ["token", "row"]
    assert all(one.is_contiguous() for one in program.run(torch.randn(12, 8)))
    assert layouts(after(f"a = {linear('x')}", "return (a,)")) == ["row"], "nothing but returned"


def test_dense_producer_keeps_rows() -> None:
    assert layouts(after(f"a = {linear('x', packed=False)}", f"b = {linear('a')}", "return (b,)")) == ["row", "row"]


def test_one_token_has_no_layout() -> None:
    head = HEAD.replace("40", "1")
    assert layouts(after(f"a = {linear('x')}", f"b = {linear('a')}", "return (b,)", head=head)) == ["row", "row"]
