"""rows: what a decode step has between its linears is found as exporters and Dynamo write it, and only where it is just that."""

from __future__ import annotations

import pytest
import torch

from sparsecc.ir.infer import infer
from sparsecc.ir.program import Program
from sparsecc.ir.text import parse_program, print_program
from sparsecc.ir.verify import verify
from sparsecc.passes.layout import Layout
from sparsecc.passes.rows import Rows

F, PAST = 16, 7
REST = 'epilogue="", layout="row", kernel=""'
MAX = 9223372036854775807


def head(dtype: str, S: int) -> str:
    return f"""\
# sparsecc program, stage: pack
def program(x: "{dtype}[2, {S}, {F}]", keys: "{dtype}[2, 2, {PAST}, 4]", values: "{dtype}[2, 2, {PAST}, 4]",
            m: "b1[2, 1, {S}, {PAST + S}]", c: "{dtype}[1, {S}, 4]", s: "{dtype}[1, {S}, 4]"):
    p: "i32[5]" = const("p")
    i: "u16[24]" = const("i")
    v: "f32[96]" = const("v")
    pq: "i32[9]" = const("pq")
    iq: "u16[48]" = const("iq")
    vq: "f32[192]" = const("vq")
    w: "{dtype}[{F}]" = const("w")
"""


def linear(x: str) -> str:
    return f'sparsecc.linear({x}, [p, i, v], None, None, terms="f32[16, 16] % block(4, 1) @ bsr(4, 1)", {REST})'


def joint(x: str) -> str:
    return f'sparsecc.linear({x}, [pq, iq, vq], None, None, terms="f32[32, 16] % block(4, 1) @ bsr(4, 1)", {REST})'


def rotary(x: str, n: str) -> tuple[str, ...]:
    return (f"{n}c = aten.unsqueeze.default(c, 1)", f"{n}s = aten.unsqueeze.default(s, 1)", f"{n}m = aten.mul.Tensor({x}, {n}c)",
            f"{n}a = aten.slice.Tensor({x}, 3, 0, 2)", f"{n}b = aten.slice.Tensor({x}, 3, 2, {MAX})", f"{n}n = aten.neg.default({n}b)",
            f"{n}h = aten.cat.default([{n}n, {n}a], -1)", f"{n}t = aten.mul.Tensor({n}h, {n}s)",
            f"{n} = aten.add.Tensor({n}m, {n}t)")  # fmt: skip


def heads(name: str, start: int, count: int, S: int) -> tuple[str, ...]:
    return (f"{name}0 = aten.slice.Tensor(qkv, -1, {start}, {start + 4 * count})",
            f"{name}1 = aten.reshape.default({name}0, [2, {S}, {count}, 4])", f"{name}2 = aten.transpose.int({name}1, 1, 2)")  # fmt: skip


def norm(dtype: str, out: str = "n") -> tuple[str, ...]:
    wide = () if dtype == "f32" else ("xw = aten.to.dtype(x, torch.float32)",)
    x, narrow = ("xw", (f"xr = aten.to.dtype(xn, torch.{DTYPES[dtype]})",)) if wide else ("x", ())
    return (*wide, f"sq = aten.pow.Tensor_Scalar({x}, 2)", "me = aten.mean.dim(sq, [-1], True)", "pl = aten.add.Tensor(me, 1e-06)",
            "rs = aten.rsqrt.default(pl)", f"xn = aten.mul.Tensor({x}, rs)", *narrow,
            f"{out} = aten.mul.Tensor(w, {'xr' if wide else 'xn'})")  # fmt: skip


DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
TOLERANCE = {"f32": 1e-5, "bf16": 0.05, "f16": 0.01}


def step(dtype: str, S: int, mask: str = ", m", given: str = "return (o, k, z)") -> tuple[str, ...]:
    return (*norm(dtype), f"qkv = {joint('n')}", *heads("q", 0, 4, S), *heads("k", 16, 2, S), *heads("z", 24, 2, S),
            *rotary("q2", "qr"), *rotary("k2", "kr"), "k = aten.cat.default([keys, kr], -2)", "z = aten.cat.default([values, z2], 2)",
            f"a = aten.scaled_dot_product_attention.default(qr, k, z{mask}, enable_gqa=True)", "at = aten.transpose.int(a, 1, 2)",
            f"aj = aten.reshape.default(at, [2, {S}, {F}])", f"o = {linear('aj')}", given)  # fmt: skip


def after(dtype: str, S: int, *lines: str) -> Program:
    program = parse_program(head(dtype, S) + "".join(f"    {line}\n" for line in lines))
    infer(program)
    before = program.clone()
    for one in (Layout(), Rows()):
        one.run(program)
    program.stage = "rows"
    infer(program)
    verify(program)
    text = print_program(program)
    assert print_program(parse_program(text)) == text
    kind, mask = getattr(torch, DTYPES[dtype]), torch.rand(2, 1, S, PAST + S) < 0.7
    mask[..., 0] = True
    draw = lambda *shape: torch.randn(*shape).to(kind)  # noqa: E731
    inputs = (draw(2, S, F), draw(2, 2, PAST, 4), draw(2, 2, PAST, 4), mask, draw(1, S, 4), draw(1, S, 4))
    for got, want in zip(program.run(*inputs), before.run(*inputs), strict=True):
        torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    return program


def found(program: Program) -> list[str]:
    """The ops between the linears."""
    names = [str(node.target).removeprefix("sparsecc.").removesuffix(".default") for node in program.graph.nodes]
    return [name for name in names if name in ("norm", "gate", "rotary", "append", "attention", "tokens", "mask_tiles")]


@pytest.mark.parametrize("S", [1, 3])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_a_step(dtype: str, S: int) -> None:
    for mask in (", m", ""):
        program = after(dtype, S, *step(dtype, S, mask))
        assert found(program) == ["norm", "rotary", "rotary", "append", "append", "attention"]
        made = [node for node in program.graph.nodes if str(node.target) in ("sparsecc.rotary.default", "sparsecc.attention.default")]
        assert [node.args[-2] for node in made] == ["row"] * 3


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_gate(dtype: str) -> None:
    lines = (f"u = {joint('x')}", f"a = aten.slice.Tensor(u, -1, 0, {F})", f"b = aten.slice.Tensor(u, -1, {F}, {2 * F})",
             "g = aten.silu.default(a)", "h = aten.mul.Tensor(g, b)", f"y = {linear('h')}", "return (y,)")  # fmt: skip
    assert found(after(dtype, 1, *lines)) == ["gate"]


def test_a_gate_of_two_dtypes_stays_torch() -> None:
    lines = (f"u = {joint('x')}", f"a = aten.slice.Tensor(u, -1, 0, {F})", f"r = aten.slice.Tensor(u, -1, {F}, {2 * F})",
             "b = aten.to.dtype(r, torch.float32)", "g = aten.silu.default(a)", "h = aten.mul.Tensor(g, b)",
             "t = aten.to.dtype(h, torch.bfloat16)", f"y = {linear('t')}", "return (y,)")  # fmt: skip
    assert found(after("bf16", 1, *lines)) == []


def test_many_tokens_are_not_for_rows() -> None:
    assert found(after("f32", 9, *step("f32", 9))) == []


def test_what_stays_torch() -> None:
    base = step("f32", 1)
    changed = lambda a, b: tuple(line.replace(a, b) for line in base)  # noqa: E731
    assert found(after("f32", 1, *changed("[keys, kr]", "[kr, keys]"))).count("append") == 1  # the new tokens first: no cache
    assert "norm" not in found(after("f32", 1, *step("f32", 1, given="return (o, k, z, xn)")))  # what a norm hides is returned
    alone = (*norm("f32"), "t = aten.tanh.default(n)", "return (t,)")
    assert found(after("f32", 1, *alone)) == []  # no kernel beside it
    caches = ("kr = aten.reshape.default(x, [2, 2, 2, 4])", "k = aten.cat.default([keys, kr], -2)", f"y = {linear('x')}", "return (y, k)")
    assert found(after("f32", 1, *caches)) == []  # a cache without attention
