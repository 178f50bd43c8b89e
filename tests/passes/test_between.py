"""layout: what a Llama block has between its linears is found in ATen as exporters write it, and only where it is just that."""

from __future__ import annotations

import pytest
import torch

from sparsecc.ir.infer import infer
from sparsecc.ir.program import Program
from sparsecc.ir.text import parse_program, print_program
from sparsecc.ir.verify import verify
from sparsecc.passes.layout import Layout

B, S, F = 2, 40, 16
HEAD = f"""\
# sparsecc program, stage: pack
def program(x: "f32[{B}, {S}, {F}]", m: "b1[{B}, 1, {S}, {S}]", c: "f32[1, {S}, 4]", s: "f32[1, {S}, 4]"):
    p: "i32[5]" = const("p")
    i: "u16[24]" = const("i")
    v: "f32[96]" = const("v")
    pq: "i32[9]" = const("pq")
    iq: "u16[48]" = const("iq")
    vq: "f32[192]" = const("vq")
    w: "f32[{F}]" = const("w")
"""
REST = 'epilogue="", layout="row", kernel=""'
MAX = 9223372036854775807


def linear(x: str, residual: str = "None") -> str:
    return f'sparsecc.linear({x}, [p, i, v], None, {residual}, terms="f32[16, 16] % block(4, 1) @ bsr(4, 1)", {REST})'


def joint(x: str) -> str:
    """Two of 16 features, or 4 heads of 4 for q and 2 of 4 each for k and v."""
    return f'sparsecc.linear({x}, [pq, iq, vq], None, None, terms="f32[32, 16] % block(4, 1) @ bsr(4, 1)", {REST})'


def rms(x: str, square: str = "pow.Tensor_Scalar({x}, 2)", out: str = "mul.Tensor(w, xn)", dims: str = "[-1]") -> tuple[str, ...]:
    return (f"sq = aten.{square.format(x=x)}", f"me = aten.mean.dim(sq, {dims}, True)", "pl = aten.add.Tensor(me, 1e-06)",
            "rs = aten.rsqrt.default(pl)", f"xn = aten.mul.Tensor({x}, rs)", f"n = aten.{out}")  # fmt: skip


def rotary(x: str, name: str, cut: int = 2, turned: str = "[{n}n, {n}a]") -> tuple[str, ...]:
    n = name
    return (f"{n}c = aten.unsqueeze.default(c, 1)", f"{n}s = aten.unsqueeze.default(s, 1)", f"{n}m = aten.mul.Tensor({x}, {n}c)",
            f"{n}a = aten.slice.Tensor({x}, 3, 0, {cut})", f"{n}b = aten.slice.Tensor({x}, 3, {cut}, {MAX})",
            f"{n}n = aten.neg.default({n}b)", f"{n}h = aten.cat.default({turned.format(n=n)}, -1)",
            f"{n}t = aten.mul.Tensor({n}h, {n}s)", f"{n} = aten.add.Tensor({n}m, {n}t)")  # fmt: skip


def heads(name: str, start: int, count: int) -> tuple[str, ...]:
    return (f"{name}0 = aten.slice.Tensor(qkv, -1, {start}, {start + 4 * count})",
            f"{name}1 = aten.reshape.default({name}0, [{B}, {S}, {count}, 4])", f"{name}2 = aten.transpose.int({name}1, 1, 2)")  # fmt: skip


def repeated(x: str, name: str, dim: int = 2) -> tuple[str, ...]:
    shape = [B, 2, 2, S, 4]
    return (f"{name}u = aten.unsqueeze.default({x}, {dim})", f"{name}e = aten.expand.default({name}u, {shape})",
            f"{name} = aten.reshape.default({name}e, [{B}, 4, {S}, 4])")  # fmt: skip


HEADS = (f"qkv = {joint('x')}", *heads("q", 0, 4), *heads("k", 16, 2), *heads("z", 24, 2))
JOIN = ("at = aten.transpose.int(a, 1, 2)", f"aj = aten.reshape.default(at, [{B}, {S}, {F}])", f"o = {linear('aj')}", "return (o,)")
SDPA = "a = aten.scaled_dot_product_attention.default"


def after(*lines: str) -> Program:
    program = parse_program(HEAD + "".join(f"    {line}\n" for line in lines))
    infer(program)
    before = program.clone()
    Layout().run(program)
    program.stage = "layout"
    infer(program)
    verify(program)
    text = print_program(program)
    assert print_program(parse_program(text)) == text
    x, m = torch.randn(B, S, F), torch.ones(B, 1, S, S).tril().bool()
    m[1, :, :, :5] = False  # padding on the left: five queries see nothing
    c, s = torch.randn(1, S, 4), torch.randn(1, S, 4)
    for got, want in zip(program.run(x, m, c, s), before.run(x, m, c, s), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    return program


def ops(program: Program) -> list[str]:
    """The dialect's ops between linears, and what ATen kept of them."""
    kept = ("rsqrt", "silu", "cat", "scaled_dot_product_attention", "rms_norm")
    found = [str(node.target).split(".")[:2] for node in program.graph.nodes if node.op == "call_function"]
    return [name for root, name in found if (root == "sparsecc" and name != "linear") or name in kept]


def layouts(program: Program) -> list[str]:
    return [view.layout for view in program.linears()]


@pytest.mark.parametrize(
    "lines",
    [
        rms("h"),
        rms("h", "mul.Tensor({x}, {x})", "mul.Tensor(xn, w)", "[2]"),
        ("n = aten.rms_norm.default(h, [16], w, 1e-06)",),
        ("n = aten.rms_norm.default(h, [16], w)",),
    ],
    ids=["hub", "other order", "torch", "torch's epsilon"],
)
def test_rms_norm(lines: tuple[str, ...]) -> None:
    program = after(f"h = {linear('x')}", *lines, f"y = {linear('n')}", "return (y,)")
    assert ops(program) == ["norm"] and layouts(program) == ["token", "row"]
    begins = [line.replace("(h", "(x").replace(", h)", ", x)") for line in lines]
    program = after(*begins, f"y = {linear('n')}", f"z = {linear('y', 'x')}", "return (z,)")
    assert ops(program) == ["norm"] and layouts(program) == ["token", "row"]


@pytest.mark.parametrize(
    "lines",
    [
        (f"h = {linear('x')}", *rms("h"), f"y = {linear('n')}", "return (y, rs)"),
        (f"h = {linear('x')}", *rms("h", dims="[1]"), f"y = {linear('n')}", "return (y,)"),
        (f"h = {linear('x')}", *rms("h", "pow.Tensor_Scalar({x}, 4)"), f"y = {linear('n')}", "return (y,)"),
        (f"h = {linear('x')}", *rms("h", "abs.default({x})"), f"y = {linear('n')}", "return (y,)"),
        (f"h = {linear('x')}", *rms("h", out="mul.Tensor(xn, x)"), f"y = {linear('n')}", "return (y,)"),
    ],
    ids=["a part is used", "over tokens", "fourth powers", "magnitudes", "no weight"],
)
def test_what_is_no_rms_norm(lines: tuple[str, ...]) -> None:
    program = after(*lines)
    assert ops(program) == ["rsqrt"] and set(layouts(program)) == {"row"}


GATED = (f"u = {joint('x')}", f"a = aten.slice.Tensor(u, -1, 0, {F})", f"b = aten.slice.Tensor(u, -1, {F}, {2 * F})")


def test_gate() -> None:
    program = after(*GATED, "g = aten.silu.default(a)", "h = aten.mul.Tensor(g, b)", f"y = {linear('h')}", "return (y,)")
    assert ops(program) == ["gate"] and layouts(program) == ["token", "row"]
    program = after(*GATED, "g = aten.gelu.default(b)", "h = aten.mul.Tensor(a, g)", f"y = {linear('h')}", "return (y,)")
    assert ops(program) == ["gate"] and '"gelu"' in print_program(program)
    alone = linear("x").replace('epilogue=""', 'epilogue="silu"')
    program = after(f"a = {alone}", f"b = {linear('x')}", "h = aten.mul.Tensor(a, b)", f"y = {linear('h')}", "return (y,)")
    assert ops(program) == ["gate"] and layouts(program) == ["token", "token", "row"]


USED = ("t = aten.tanh.default(u)",)


@pytest.mark.parametrize(
    "lines",
    [
        (*GATED, "g = aten.silu.default(a)", "h = aten.mul.Tensor(g, b)", f"y = {linear('h')}", "return (y, g)"),
        (*GATED, *USED, "g = aten.silu.default(a)", "h = aten.mul.Tensor(g, b)", f"y = {linear('h')}", "return (y, t)"),
        (*GATED, "g = aten.silu.default(a)", "h = aten.mul.Tensor(g, x)", f"y = {linear('h')}", "return (y,)"),
        (*GATED, "g = aten.silu.default(a)", "h = aten.mul.Tensor(g, b)", "t = aten.tanh.default(h)", f"y = {linear('t')}", "return (y,)"),
    ],
    ids=["activation is used", "linear is used", "gates an input", "for others"],
)
def test_what_gates_in_torch(lines: tuple[str, ...]) -> None:
    program = after(*lines)
    assert ops(program) == ["silu"] and set(layouts(program)) == {"row"}


WHOLE = (*HEADS, *rotary("q2", "qr"), *rotary("k2", "kr"), *repeated("kr", "kk"), *repeated("z2", "zz"), f"{SDPA}(qr, kk, zz, m)", *JOIN)


def test_attention_with_rotary_embeddings_and_shared_keys() -> None:
    program = after(*WHOLE)
    assert sorted(ops(program)) == ["attention", "mask_tiles", "rotary", "rotary", "tokens", "tokens", "tokens"]
    assert layouts(program) == ["token", "row"]
    program = after(*HEADS, f"{SDPA}(q2, k2, z2, None, 0.0, True, enable_gqa=True)", *JOIN)
    assert ops(program) == ["attention"]
    repeats = (*HEADS, *repeated("k2", "kk"), *repeated("z2", "zz"))
    program = after(*repeats, "m1 = aten.slice.Tensor(m, 2, 30, 31)", f"{SDPA}(q2, kk, zz, m1)", *JOIN)
    assert ops(program) == ["mask_tiles", "attention"]


@pytest.mark.parametrize(
    "lines",
    [
        (*HEADS, *rotary("q2", "qr", turned="[{n}a, {n}n]"), f"{SDPA}(qr, k2, z2, m, enable_gqa=True)", *JOIN),
        (*HEADS, *rotary("q2", "qr", cut=3), f"{SDPA}(qr, k2, z2, m, enable_gqa=True)", *JOIN),
        (*HEADS, *rotary("q2", "qr"), f"{SDPA}(qr, k2, z2, m, enable_gqa=True)", *JOIN[:-1], "return (o, qrh)"),
    ],
    ids=["other order", "other half", "a part is used"],
)
def test_what_is_no_rotary_embedding(lines: tuple[str, ...]) -> None:
    program = after(*lines)
    assert ops(program) == ["cat", "scaled_dot_product_attention"] and layouts(program) == ["row", "row"]


@pytest.mark.parametrize(
    "lines",
    [
        (*HEADS, *repeated("k2", "kk", 1), *repeated("z2", "zz", 1), f"{SDPA}(q2, kk, zz, m)", *JOIN),
        (*HEADS, *repeated("k2", "kk"), *repeated("z2", "zz"), f"{SDPA}(q2, kk, zz, m)", *JOIN[:-1], "return (o, kk)"),
    ],
    ids=["keys in another order", "keys are used"],
)
def test_heads_that_stay_repeated(lines: tuple[str, ...]) -> None:
    assert ops(after(*lines)) == ["scaled_dot_product_attention"]


def test_a_program_that_writes_keeps_what_takes_several_reads() -> None:
    lines = (f"h = {linear('x')}", *rms("h"), f"y = {linear('n')}", "z = aten.copy_.default(x, y)", "return (z,)")
    program = parse_program(HEAD + "".join(f"    {line}\n" for line in lines))
    infer(program)
    Layout().run(program)
    assert ops(program) == ["rsqrt"]
