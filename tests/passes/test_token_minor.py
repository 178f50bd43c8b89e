"""layout: norms and attention between packed linears join them, token-minor, and nothing changes but that."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import sparsecc
from sparsecc.ir.infer import infer
from sparsecc.ir.program import Program
from sparsecc.ir.text import parse_program, print_program
from sparsecc.passes.layout import Layout
from sparsecc.runtime.record import NotAView, Pool, Recorder, empty, span_of
from sparsecc.runtime.tokens import token_output
from sparsecc.runtime.varying import Batch

B, S, F, H = 2, 40, 16, 4
HEAD = f"""\
# sparsecc program, stage: pack
def program(x: "f32[{B}, {S}, {F}]", m: "b1[{B}, 1, {S}, {S}]"):
    p: "i32[5]" = const("p")
    i: "u16[24]" = const("i")
    v: "f32[96]" = const("v")
    pq: "i32[13]" = const("pq")
    iq: "u16[72]" = const("iq")
    vq: "f32[288]" = const("vq")
    w: "f32[{F}]" = const("w")
    b: "f32[{F}]" = const("b")
"""
REST = 'epilogue="", layout="row", kernel=""'
QKV = f'qkv = sparsecc.linear(x, [pq, iq, vq], None, None, terms="f32[48, 16] % block(4, 1) @ bsr(4, 1)", {REST})'
HEADS = [
    f"{n} = aten.slice.Tensor(qkv, -1, {at}, {at + 16})\n"
    f"    {n}4 = aten.reshape.default({n}, [{B}, {S}, {H}, 4])\n"
    f"    {n}t = aten.transpose.int({n}4, 1, 2)"
    for n, at in (("q", 0), ("k", 16), ("z", 32))
]
ATTEND = "a = aten.scaled_dot_product_attention.default(qt, kt, zt, m)"
JOIN = f"at = aten.transpose.int(a, 1, 2)\n    aj = aten.reshape.default(at, [{B}, {S}, {F}])"


def linear(x: str, residual: str = "None") -> str:
    return f'sparsecc.linear({x}, [p, i, v], b, {residual}, terms="f32[16, 16] % block(4, 1) @ bsr(4, 1)", {REST})'


def norm(x: str) -> str:
    return f"aten.layer_norm.default({x}, [{F}], w, b, 1e-5, False)"


def after(*lines: str) -> Program:
    program = parse_program(HEAD + "".join(f"    {line}\n" for line in lines))
    infer(program)
    before = program.clone()
    Layout().run(program)
    program.stage = "layout"
    infer(program)
    x, m = 0.1 * torch.randn(B, S, F), torch.rand(B, 1, S, S) < 0.7
    m[..., 3, :] = False  # a query that sees nothing
    for got, want in zip(program.run(x, m), before.run(x, m), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    return program


def layouts(program: Program) -> list[str]:
    """Of linears and norms, in order; "attention" for those."""
    found = []
    for node in program.graph.nodes:
        match str(node.target):
            case "sparsecc.linear.default":
                found.append(str(node.args[6]))
            case "sparsecc.norm.default":
                found.append(str(node.args[5]))
            case "sparsecc.attention.default":
                found.append("attention")
            case "aten.layer_norm.default" | "aten.scaled_dot_product_attention.default" as name:
                found.append(name.split(".")[1])
    return found


def test_a_whole_encoder_layer() -> None:
    program = after(
        QKV, *HEADS, ATTEND, JOIN, f"o = {linear('aj', 'x')}", f"n = {norm('o')}", f"h = {linear('n')}",
        f"g = {linear('h', 'n')}", f"r = {norm('g')}", "return (r,)",
    )  # fmt: skip
    assert layouts(program) == ["token", "attention", "token", "token", "token", "token", "row"]
    text = print_program(program)
    assert print_program(parse_program(text)) == text and "sparsecc.mask_tiles(" in text


def test_two_attentions_share_the_mask() -> None:
    again = ATTEND.replace("a =", "a2 =").replace("qt, kt", "kt, qt")
    joined = JOIN.replace("(a,", "(a2,").replace("at", "at2", 1).replace("(at,", "(at2,").replace("aj", "aj2")
    program = after(QKV, *HEADS, ATTEND, JOIN, again, joined, f"o = {linear('aj')}", f"p2 = {linear('aj2')}", "return (o, p2)")
    assert layouts(program) == ["token", "attention", "attention", "row", "row"]
    assert print_program(program).count("sparsecc.tokens(") == print_program(program).count("sparsecc.mask_tiles(") == 1


ATTENTION = (QKV, *HEADS, ATTEND, JOIN)
SDPA = "scaled_dot_product_attention"
NORMED = (f"h = {linear('x')}", f"n = {norm('h')}")
WITH_SCALE, CAUSAL = ((QKV, *HEADS, ATTEND.replace("m)", rest), JOIN) for rest in ("m, 0.0, False, scale=0.3)", "None, 0.0, True)"))
BROADCAST = ("m1 = aten.slice.Tensor(m, 2, 4, 5)", QKV, *HEADS, ATTEND.replace("m)", "m1)"), JOIN)
OUT = (f"o = {linear('aj')}", "return (o,)")


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        pytest.param((*NORMED, "return (n,)"), ["token", "row"], id="norm"),
        pytest.param((*NORMED, "return (n, h)"), ["token", "row"], id="norm and output"),
        pytest.param((f"n = {norm('x')}", f"h = {linear('n')}", "return (h,)"), ["token", "row"], id="norm of an input"),
        pytest.param((f"n = {norm('x')}", "return (n,)"), ["layer_norm"], id="norm between other code"),
        pytest.param((*NORMED, f"g = {linear('n', 'n')}", f"r = {norm('g')}", "return (r,)"), ["token", "row", "token", "row"], id="twice"),
        pytest.param((*NORMED, f"g = {linear('x', 'n')}", f"r = {norm('g')}", "return (r,)"), ["token"] * 3 + ["row"], id="residual"),
        pytest.param((*ATTENTION, "return (aj,)"), ["row", SDPA], id="attention into nothing"),
        pytest.param((*ATTENTION, OUT[0], "return (o, qkv)"), ["token", "attention", "row"], id="qkv is an output"),
        pytest.param((*WITH_SCALE, *OUT), ["token", "attention", "row"], id="scale"),
        pytest.param((*BROADCAST, *OUT), ["token", "attention", "row"], id="one row of a mask"),
        pytest.param((*CAUSAL, *OUT), ["token", "attention", "row"], id="causal"),
    ],
)
def test_what_joins(lines: tuple[str, ...], wanted: list[str]) -> None:
    assert layouts(after(*lines)) == wanted


class Block(nn.Module):
    """An encoder layer whose linears are packed."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.up, self.down = nn.Linear(64, 192), nn.Linear(64, 64), nn.Linear(64, 256), nn.Linear(256, 64)
        self.first, self.second = nn.LayerNorm(64), nn.LayerNorm(64)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        B, S, _ = x.shape
        q, k, v = (t.reshape(B, S, 4, 16).transpose(1, 2) for t in self.qkv(x).split(64, -1))
        a = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(B, S, 64)
        x = self.first(self.out(a) + x)
        return self.second(self.down(torch.nn.functional.gelu(self.up(x))) + x)


@pytest.mark.parametrize("target", ["cpu", "cpu:avx2"])
def test_the_compiled_block_replays_every_shape(target: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential().eval()
    model.a, model.b = Block().eval(), Block().eval()
    model.forward = lambda x, mask: model.b(model.a(x, mask), mask)  # type: ignore[method-assign]
    sparsecc.prune(model, "block(4, 1, 0.8)")
    cases = []
    for batch, tokens in ((2, 40), (3, 17), (2, 40), (2, 100), (3, 17), (2, 5), (2, 200), (2, 100)):
        mask = torch.ones(batch, 1, tokens, tokens, dtype=torch.bool)
        mask[0, :, :, tokens // 2 :] = False
        cases.append((torch.randn(batch, tokens, 64), mask))
    with torch.no_grad():
        wanted = [model(*case) for case in cases]
    given = {"example_inputs": cases[0], "autotune": "none", "remainder": "eager"}
    compiled = sparsecc.compile(model, target=target, sparsity="block(4, 1, 0.8)", **given)
    results = [compiled(*case) for case in cases]  # kept: a replay must not write into them
    for got, want in zip(results, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert "sparsecc.attention" in compiled.ir("lower")


@pytest.mark.parametrize(("tokens", "cut"), [(30, True), (20, False)])
def test_a_batch_that_is_also_another_size_is_not_cut(tokens: int, cut: bool) -> None:
    """20 sequences captured with 20 tokens may share the symbol: then no size says which of them it is."""
    sizes = StatelessSymbolicContext([DimDynamic.DUCK, DimDynamic.DUCK, DimDynamic.STATIC])
    value = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.zeros(20, tokens, 64), symbolic_context=sizes)
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.relu, (x,))
    graph.output(y)
    for node in (x, y):
        node.meta["val"] = value
    assert Batch.of([y], [x], []) == (Batch((True,), ()) if cut else None)


def test_values_in_spans_are_not_read_by_strides() -> None:
    """Two spans of 64 tokens lie behind each other; what torch may do with them is views."""
    with Recorder(Pool(), spanned=True) as recorder:
        y = token_output(8, (3, 100))
        assert y.shape == (3, 100, 8) and y.stride() == (2 * 8 * 64, 1, 64) and span_of(y) == 8 * 64
        heads = y.reshape(3, 100, 2, 4).transpose(1, 2)
        assert span_of(heads) == 8 * 64
        for copy in (torch.Tensor.contiguous, lambda t: t + 1, lambda t: t.reshape(24, 100)):
            with pytest.raises(NotAView):
                copy(heads)
        del y, heads
        assert span_of(empty(3 * 2 * 8 * 64)) is None, "the buffer is used again for something else"
    assert recorder.calls == []


def test_a_replay_tells_arguments_apart_that_were_one_tensor() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x)) + y

    model = Two().eval()
    sparsecc.prune(model, "block(4, 1, 0.8)")
    x, y = torch.randn(2, 40, 64), torch.randn(2, 40, 64)
    compiled = sparsecc.compile(model, sparsity="block(4, 1, 0.8)", example_inputs=(x, y), autotune="none", remainder="eager")
    with torch.no_grad():
        for given in ((x, x), (x, y), (y, y), (y, x), (x, x)):
            torch.testing.assert_close(compiled(*given), model(*given), rtol=1e-4, atol=1e-5)
