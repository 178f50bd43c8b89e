"""lower: kernels by name, and dense linears back in ATen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecc.formats import Format
from sparsecc.ir.infer import infer, value_of
from sparsecc.ir.ops import KERNELS
from sparsecc.ir.program import Program
from sparsecc.ir.text import parse_program
from sparsecc.passes.context import Choice, Context, Problem
from sparsecc.passes.lower import Lower

HEAD = """\
# sparsecc program, stage: layout
def program(x: "f32[s0, 8]", r: "f32[s0, 8]"):
    wp: "i32[3]" = const("wp")
    wi: "u16[8]" = const("wi")
    wv: "f32[32]" = const("wv")
    d: "f32[8, 8]" = const("d")
    l: "f32[8, 2]" = const("l")
    m: "f32[2, 8]" = const("m")
    b: "f32[8]" = const("b")
"""
PACKED = 'sparsecc.linear(x, [wp, wi, wv], b, r, terms="f32[8, 8] % block(4, 1) @ bsr(4, 1)", epilogue="gelu", layout="row", kernel="")'
LOW_RANK = 'sparsecc.linear(x, [l, m], None, None, terms="f32[8, 8] % lowrank(2)", epilogue="", layout="row", kernel="")'


class FakeTuner:
    """Kernels that return 42 everywhere, and the arguments they were made with."""

    between = None

    def __init__(self) -> None:
        self.made: list[tuple[Any, ...]] = []

    def choose(self, problem: Problem) -> Choice:
        raise AssertionError("lower chooses nothing")

    def kernel(self, formats: Sequence[Format], epilogue: str, residual: bool, layout: str, shape: tuple[int, int], config: str,
               dtype: torch.dtype, tokens: int) -> Any:
        assert dtype == torch.float32
        self.tokens = tokens
        self.made.append(([str(f) for f in formats], epilogue, residual, layout, shape, config))

        def run(x: Tensor, params: list[Tensor], bias: Tensor | None, res: Tensor | None) -> Tensor:
            return torch.full((*x.shape[:-1], shape[0]), 42.0)

        return f"test kernel {len(self.made)}", run


def lowered(call: str, tuner: Any = None, config: str = "") -> tuple[Program, Program]:
    program = parse_program(f"{HEAD}    y = {call}\n    return (y,)\n")
    infer(program)
    before = program.clone()
    if config:
        program.region(next(program.linears()).node).more["config"] = config
    Lower().run(program, Context(tuner=tuner))
    return before, program


def targets(program: Program) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


def test_packed_linear_gets_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsecc.passes.lower.KERNELS", KERNELS)
    tuner = FakeTuner()
    _, program = lowered(PACKED, tuner, "cpu(vectors=4)")
    try:
        assert tuner.made == [(["bsr(4, 1)"], "gelu", True, "row", (8, 8), "cpu(vectors=4)")]
        assert tuner.tokens == value_of(program.inputs[0]).shape[0].node.hint
        assert [view.kernel for view in program.linears()] == ["test kernel 1"]
        assert torch.equal(program.run(torch.randn(3, 8), torch.randn(3, 8))[0], torch.full((3, 8), 42.0))
    finally:
        KERNELS.pop("test kernel 1")


@pytest.mark.parametrize("call", [PACKED, LOW_RANK])
def test_what_has_no_kernel_runs_its_dense_meaning(call: str) -> None:
    before, program = lowered(call)
    assert [view.kernel for view in program.linears()] == ["dense meaning"]
    x, r = torch.randn(3, 8), torch.randn(3, 8)
    torch.testing.assert_close(program.run(x, r), before.run(x, r))


@pytest.mark.parametrize("residual", ["None", "r"])
@pytest.mark.parametrize(
    ("epilogue", "op"), [("", ""), ("relu", "aten.relu.default"), ("gelu", "aten.gelu.default"), ("gelu_tanh", "aten.gelu.default"),
                         ("silu", "aten.silu.default")],
)
def test_dense_linears_return_to_aten(epilogue: str, op: str, residual: str) -> None:
    call = f'sparsecc.linear(x, [d], b, {residual}, terms="f32[8, 8] % block(4, 1)", epilogue="{epilogue}", layout="row", kernel="")'
    before, program = lowered(call, FakeTuner())
    assert targets(program) == ["aten.linear.default", *([op] if op else []), *(["aten.add.Tensor"] if residual == "r" else [])]
    x, r = torch.randn(3, 8), torch.randn(3, 8)
    torch.testing.assert_close(program.run(x, r), before.run(x, r))
