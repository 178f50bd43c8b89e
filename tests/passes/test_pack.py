"""pack: what is offered to the tuner, and what its choice does to the program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecc.formats import Format, Pattern, parse_format, parse_pattern
from sparsecc.ir.infer import infer
from sparsecc.ir.program import Program
from sparsecc.ir.text import parse_program
from sparsecc.ir.verify import verify
from sparsecc.passes.context import Attention, Choice, Context, Problem
from sparsecc.passes.pack import Pack, formats_for, tokens_of
from sparsecc.spec import SparsitySpec, options

SLICED = "sell(4, 64).panels(192)"

TEXT = """\
# sparsecc program, stage: select
def program(x: "f32[3, s0, 16]"):
    w: "f32[8, 16] % block(4, 1)" = const("up.weight")
    v: "f32[6, 8] % nm(2, 4)" = const("down.weight")
    u: "f32[6, 8]" = const("dense.weight")
    b: "f32[8]" = const("up.bias")
    h: "f32[3, s0, 8]" = sparsecc.linear(x, [w], b, None, terms="f32[8, 16] % block(4, 1)", epilogue="gelu", layout="row", kernel="")
    r: "f32[3, s0, 6]" = sparsecc.linear(h, [u], None, None, terms="f32[6, 8]", epilogue="", layout="row", kernel="")
    y: "f32[3, s0, 6]" = sparsecc.linear(h, [v], None, r, terms="f32[6, 8] % nm(2, 4)", epilogue="", layout="row", kernel="")
    return (y,)
"""


class FakeTuner:
    """Takes the first format offered, or what `pick` says, and remembers the problems."""

    between = None

    def __init__(self, pick: Callable[[Problem], Format | None] = lambda p: p.formats[0]) -> None:
        self.pick, self.problems = pick, []

    def formats(self, pattern: Pattern, weight: Tensor, codec: str | None, tokens: int, compute: str | None) -> list[Format]:
        return formats_for(pattern, weight, codec, tokens, compute)

    def choose(self, problem: Problem) -> Choice:
        self.problems.append(problem)
        fmt = self.pick(problem)
        return Choice(fmt, "cpu(vectors=2)" if fmt else "", 1e-6, 2e-6, 4e-6, 0.4, "because", {"dense": 4e-6})

    def kernel(self, formats: Sequence[Format], epilogue: str, residual: bool, layout: str, shape: tuple[int, int], config: str,
               dtype: torch.dtype, tokens: int) -> Any:
        raise AssertionError("pack makes no kernels")


def packed(tuner: FakeTuner, sparsity: Any = None, text: str = TEXT) -> Program:
    program = parse_program(text)
    infer(program)
    Pack().run(program, Context(SparsitySpec.parse(sparsity), tuner))
    program.stage = "pack"
    program.finish()
    return program


def test_packed_terms_and_their_parts() -> None:
    before, tuner = parse_program(TEXT), FakeTuner()
    program = packed(tuner)
    verify(program, patterns=True)
    up, dense, down = program.linears()
    assert str(up.terms[0]) == "f32[8, 16] % block(4, 1) @ bsr(4, 1)"
    assert [p.name for p in up.params] == ["up_weight_ptr", "up_weight_idx", "up_weight_val"]
    assert [program.weight_name(p) for p in up.params] == ["up.weight"] * 3
    assert str(dense.terms[0]) == "f32[6, 8]"
    assert str(down.terms[0]) == "f32[6, 8] % nm(2, 4) @ nm(2, 4)"
    assert (up.bias is not None, up.epilogue, down.residual) == (True, "gelu", dense.node)
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(program.run(x), before.run(x))
    assert not hasattr(program.gm, "up.weight"), "the dense weight is gone"


def test_problems_are_complete() -> None:
    tuner = FakeTuner()
    program = packed(tuner)
    up, down = tuner.problems
    assert (up.name, up.tokens, up.epilogue, up.residual) == ("up", 3 * 113, "gelu", False)  # a free size is hinted 113
    assert (down.name, down.epilogue, down.residual) == ("down", "", True)
    assert tokens_of(next(program.linears()).x) == 3 * 113


def test_the_choice_is_noted() -> None:
    program = packed(FakeTuner(lambda p: None if p.name == "up" else p.formats[0]))
    up, dense, down = program.linears()
    notes = program.region(up.node)
    assert up.plain and (notes.format, notes.choice, notes.reason) == ("dense", "dense", "because")
    assert dense.node.name not in program.regions or program.region(dense.node).format == ""
    notes = program.region(down.node)
    assert (notes.format, notes.choice, notes.bytes) == ("nm(2, 4)", "nm(2, 4) cpu(vectors=2)", 6 * 4 * 5)
    assert notes.times == {"dense": pytest.approx(4.0)}
    assert notes.more["measured_us"] == pytest.approx(2.0) and notes.more["m"] == 3 * 113 and notes.more["break_even"] == 0.4
    assert notes.more["config"] == "cpu(vectors=2)" and notes.more["dense_bytes"] == 6 * 8 * 4


def test_codec_by_name_only() -> None:
    tuner = FakeTuner()
    packed(tuner, {"up": options("block(4, 1)", codec="bf16")})
    assert [str(p.formats[0]) for p in tuner.problems] == ["bsr(4, 1).bf16", "nm(2, 4)"]


def test_without_a_tuner_nothing_changes() -> None:
    for context in (None, Context()):
        program = parse_program(TEXT)
        infer(program)
        Pack().run(program, context)
        assert all(view.plain for view in program.linears())


def test_no_tokens_no_measurement() -> None:
    tuner = FakeTuner()
    program = packed(tuner, text=TEXT.replace("3, s0", "0, 4"))
    assert not tuner.problems
    assert program.region(next(program.linears()).node).reason == "no tokens"


def weight(kept: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return ((torch.arange(64 * 64) % 100 < 100 * kept).float().view(64, 64)).to(dtype)


@pytest.mark.parametrize(
    ("pattern", "kept", "codec", "dtype", "formats"),
    [
        ("block(4, 1)", 0.3, None, torch.float32, ["bsr(4, 1)"]),
        ("block(32, 32, 0.5)", 0.3, None, torch.float32, ["bsr(32, 32)"]),
        ("block(1, 1)", 0.1, None, torch.float32, ["csr", SLICED]),
        ("nm(2, 4)", 0.5, None, torch.float32, ["nm(2, 4)", SLICED, "csr", "bitmap"]),
        ("nm(1, 8)", 0.1, None, torch.float32, ["nm(1, 8)", SLICED, "csr"]),
        ("unstructured", 0.1, None, torch.float32, [SLICED, "csr"]),
        ("unstructured(0.5)", 0.5, None, torch.float32, [SLICED, "csr", "bitmap"]),
        ("rows", 0.1, None, torch.float32, [SLICED, "csr"]),
        ("unstructured", 0.1, "f16", torch.float32, ["sell(4, 64).f16.panels(192)", "csr.f16"]),
        ("unstructured", 0.1, None, torch.bfloat16, ["sell(4, 64).bf16.panels(192)", "csr.bf16"]),
        ("unstructured", 0.1, "f32", torch.bfloat16, [SLICED, "csr"]),
        ("block(4, 1)", 0.1, None, torch.float16, ["bsr(4, 1).f16"]),
    ],
)
def test_formats_for(pattern: str, kept: float, codec: str | None, dtype: torch.dtype, formats: list[str]) -> None:
    found = formats_for(parse_pattern(pattern), weight(kept, dtype), codec, 17)
    assert [str(f) for f in found] == formats
    assert all(parse_format(text) == fmt for text, fmt in zip(formats, found, strict=True))


@pytest.mark.parametrize(
    ("pattern", "kept", "tokens", "formats"),
    [
        ("nm(2, 4)", 0.5, 1, ["nm(2, 4)", "csr", "bitmap"]),
        ("unstructured", 0.1, 1, ["csr", "bitmap"]),
        ("unstructured", 0.1, 16, [SLICED, "csr", "bitmap"]),
        ("unstructured", 0.02, 1, ["csr"]),
        ("block(4, 1)", 0.1, 1, ["bsr(4, 1)"]),
    ],
)
def test_formats_for_a_few_tokens(pattern: str, kept: float, tokens: int, formats: list[str]) -> None:
    assert [str(f) for f in formats_for(parse_pattern(pattern), weight(kept), None, tokens)] == formats


CHAIN = """\
# sparsecc program, stage: select
def program(x: "f32[2, 64, 16]"):
    a: "f32[32, 16] % unstructured" = const("a.weight")
    b: "f32[32, 32] % unstructured" = const("b.weight")
    c: "f32[32, 32] % unstructured" = const("c.weight")
    d: "f32[8, 32] % unstructured" = const("d.weight")
    h: "f32[2, 64, 32]" = sparsecc.linear(x, [a], None, None, terms="f32[32, 16] % unstructured", epilogue="", layout="row", kernel="")
    i: "f32[2, 64, 32]" = sparsecc.linear(h, [b], None, None, terms="f32[32, 32] % unstructured", epilogue="", layout="row", kernel="")
    j: "f32[2, 64, 32]" = sparsecc.linear(i, [c], None, None, terms="f32[32, 32] % unstructured", epilogue="", layout="row", kernel="")
    y: "f32[2, 64, 8]" = sparsecc.linear(j, [d], None, None, terms="f32[8, 32] % unstructured", epilogue="", layout="row", kernel="")
    return (y,)
"""


def test_linears_in_a_chain_are_asked_as_the_chain_calls_them() -> None:
    tuner = FakeTuner()
    tuner.between = object()  # type: ignore[assignment]
    packed(tuner, text=CHAIN)
    asked = {p.name: (p.reads, p.layout) for p in tuner.problems}
    assert asked == {"a": ("row", "token"), "b": ("token", "token"), "c": ("token", "token"), "d": ("token", "row")}, "the ends move rows"


def test_where_dense_stays_its_neighbours_are_asked_again() -> None:
    tuner = FakeTuner(lambda p: None if p.name == "b" else p.formats[0])
    tuner.between = object()  # type: ignore[assignment]
    program = packed(tuner, text=CHAIN)
    asked = [(p.name, p.reads, p.layout) for p in tuner.problems]
    assert asked[4:] == [("a", "row", "row"), ("b", "row", "row"), ("c", "row", "token")], "torch stands between them"
    assert [view.terms[0].format is not None for view in program.linears()] == [True, False, True, True]


def head(name: str, at: int) -> str:
    """A third of qkv as heads [2, 4, 64, 4]."""
    return (
        f"    {name}: \"f32[2, 64, 16]\" = aten.slice.Tensor(qkv, -1, {at}, {at + 16})\n"
        f"    {name}4: \"f32[2, 64, 4, 4]\" = aten.reshape.default({name}, [2, 64, 4, 4])\n"
        f"    {name}t: \"f32[2, 4, 64, 4]\" = aten.transpose.int({name}4, 1, 2)\n"
    )


ATTENTION = f"""\
# sparsecc program, stage: select
def program(x: "f32[2, 64, 16]"):
    a: "f32[48, 16] % unstructured" = const("qkv.weight")
    b: "f32[16, 16] % unstructured" = const("out.weight")
    c: "f32[16, 16] % unstructured" = const("next.weight")
    qkv: "f32[2, 64, 48]" = sparsecc.linear(x, [a], None, None, terms="f32[48, 16] % unstructured", epilogue="", layout="row", kernel="")
{head("q", 0)}{head("k", 16)}{head("v", 32)}\
    s: "f32[2, 4, 64, 4]" = aten.scaled_dot_product_attention.default(qt, kt, vt)
    st: "f32[2, 64, 4, 4]" = aten.transpose.int(s, 1, 2)
    sj: "f32[2, 64, 16]" = aten.reshape.default(st, [2, 64, 16])
    o: "f32[2, 64, 16]" = sparsecc.linear(sj, [b], None, None, terms="f32[16, 16] % unstructured", epilogue="", layout="row", kernel="")
    y: "f32[2, 64, 16]" = sparsecc.linear(o, [c], None, None, terms="f32[16, 16] % unstructured", epilogue="", layout="row", kernel="")
    return (y,)
"""


@pytest.mark.parametrize(("took", "asked"), [((1e-3, 2e-3), "token"), ((1.5e-3, 1e-3), "token"), ((5e-3, 1e-3), "row"), (None, "token")])
def test_a_linear_behind_torchs_attention_reads_rows(took: tuple[float, float] | None, asked: str) -> None:
    """One that is a little slower than torch's is left to whoever times the whole."""
    tuner, problems = FakeTuner(), []

    class Between:
        def attention_times(self, problem: Attention) -> tuple[float, float] | None:
            problems.append(problem)
            return took

    tuner.between = Between()  # type: ignore[assignment]
    program, context = parse_program(ATTENTION), Context(SparsitySpec(), tuner)
    infer(program)
    Pack().run(program, context)
    assert {p.name: p.reads for p in tuner.problems}["out"] == asked
    assert set(problems) == {Attention(2, 4, 4, 64, 64, 4, "")}
    assert bool(context.contested) == (took == (1.5e-3, 1e-3)) and bool(context.attention) == (asked == "row")
