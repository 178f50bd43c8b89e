"""Chains of models in bf16: float32 inside, bf16 outside, constants widened once."""
from __future__ import annotations

import pytest
import torch

from sparsecc.ir.infer import infer
from sparsecc.ir.text import parse_program, print_program
from sparsecc.ir.verify import verify
from sparsecc.passes.layout import Layout

REST = 'epilogue="", layout="row", kernel=""'


def text(dtype: str, tokens: int) -> str:
    sparse = f'None, terms="{dtype}[16, 16] % block(4, 1) @ bsr(4, 1).{dtype}", {REST}'
    return f"""\
# sparsecc program, stage: pack
def program(x: "{dtype}[2, {tokens}, 16]"):
    p: "i32[5]" = const("p")
    i: "u16[24]" = const("i")
    v: "{dtype}[96]" = const("v")
    w: "{dtype}[16]" = const("w")
    b: "{dtype}[16]" = const("b")
    d: "{dtype}[16, 16]" = const("d")
    h = sparsecc.linear(x, [p, i, v], b, {sparse})
    n = aten.layer_norm.default(h, [16], w, b, 1e-5, False)
    y = sparsecc.linear(n, [p, i, v], b, {sparse})
    z = sparsecc.linear(y, [d], None, n, terms="{dtype}[16, 16]", {REST})
    r = aten.layer_norm.default(y, [16], w, b, 1e-5, False)
    return (z, r)
"""


DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def values(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    idx = torch.stack([torch.randperm(16)[:6].sort().values for _ in range(4)]).flatten()
    found = {"p": torch.arange(0, 25, 6, dtype=torch.int32), "i": idx.to(torch.uint16)}
    return found | {name: torch.rand(size).to(dtype) for name, size in (("v", (96,)), ("w", (16,)), ("b", (16,)), ("d", (16, 16)))}


@pytest.mark.parametrize(("dtype", "tokens", "widened"), [("bf16", 40, True), ("f16", 40, True), ("f32", 40, False), ("bf16", 4, False)])
def test_what_comes_in_and_what_leaves(dtype: str, tokens: int, widened: bool) -> None:
    program = parse_program(text(dtype, tokens))
    for name, value in values(DTYPES[dtype]).items():
        program.gm._buffers[name] = value
    infer(program)
    before = program.clone()
    Layout().run(program)
    program.stage = "layout"
    program.finish()
    infer(program)
    verify(program)
    found = print_program(program)
    assert found.count(", torch.float32)") == widened, "x alone: what follows is float32"
    assert ("_wide" in found) == widened
    assert {str(program.type(node)).partition("[")[0] for node in program.outputs} == {dtype}
    x = torch.randn(2, tokens, 16).to(DTYPES[dtype])
    for got, want in zip(program.run(x), before.run(x), strict=True):
        assert got.dtype == want.dtype == DTYPES[dtype]
        torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=(2e-2 if widened else 1e-6) * float(want.abs().max()))
