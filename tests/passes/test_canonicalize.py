"""canonicalize: which forms become sparsecc.linear, which stay, and that the values are the same."""
from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers.pytorch_utils import Conv1D

from sparsecc.capture import capture
from sparsecc.ir.program import Program
from sparsecc.ir.text import parse_program, print_program
from sparsecc.passes.canonicalize import Canonicalize
from sparsecc.passes.manager import run_passes


def canonical(program: Program) -> Program:
    return run_passes(program, (Canonicalize(),), disable=()).program


def check(model: nn.Module, *inputs: torch.Tensor, linears: int) -> Program:
    """The pass keeps the values and leaves so many linears."""
    captured = capture(model.eval(), inputs)
    program = canonical(captured.program)
    flat = captured.flatten(inputs, {})
    with torch.no_grad():
        torch.testing.assert_close(captured.unflatten(program.run(*flat)), model(*inputs))
    assert sum(1 for _ in program.linears()) == linears
    return program


class Call(nn.Module):
    """A function of x and two weights."""

    def __init__(self, fn: Any, w: torch.Tensor, b: torch.Tensor | None = None) -> None:
        super().__init__()
        self.fn, self.w, self.b = fn, nn.Parameter(w, requires_grad=False), b if b is None else nn.Parameter(b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fn(x, self.w, self.b)


W, WT, B = torch.randn(6, 8), torch.randn(8, 6), torch.randn(6)


@pytest.mark.parametrize(
    ("fn", "w", "b"),
    [
        (lambda x, w, b: F.linear(x, w, b), W, B),
        (lambda x, w, b: F.linear(x, w), W, None),
        (lambda x, w, b: torch.addmm(b, x, w), WT, B),
        (lambda x, w, b: torch.addmm(b, x, w.t()), W, B),
        (lambda x, w, b: x @ w, WT, None),
        (lambda x, w, b: x.unsqueeze(0) @ w.transpose(0, 1), W, None),
        (lambda x, w, b: x.mm(w.T), W, None),
        (lambda x, w, b: F.linear(x, (w * 2).abs(), -b), W, B),
    ],
)
def test_forms_of_a_linear(fn: Any, w: torch.Tensor, b: torch.Tensor | None) -> None:
    program = check(Call(fn, w, b), torch.randn(3, 8), linears=1)
    assert {n.target for n in program.graph.nodes if n.op.startswith("call_")} <= {
        torch.ops.sparsecc.linear.default, torch.ops.aten.unsqueeze.default}
    assert next(program.linears()).shape == (6, 8)


@pytest.mark.parametrize(
    ("fn", "w"),
    [
        (lambda x, w, b: x @ x.t(), W),
        (lambda x, w, b: w @ x.t(), W),
        (lambda x, w, b: torch.addmm(x[:, :6], x, w, beta=2), WT),
        (lambda x, w, b: F.linear(x.int(), w.int()), W),
        (lambda x, w, b: torch.bmm(x.unsqueeze(0), w.unsqueeze(0)), WT),
    ],
)
def test_what_stays(fn: Any, w: torch.Tensor) -> None:
    check(Call(fn, w), torch.randn(3, 8), linears=0)


def test_conv1d_weight_is_transposed_under_its_own_name() -> None:
    layer = Conv1D(6, 8)
    layer.weight.data.normal_()
    program = check(nn.Sequential(layer), torch.randn(2, 3, 8), linears=1)
    view = next(program.linears())
    assert program.weight_name(view.params[0]) == "0.weight"
    assert torch.equal(program.const(view.params[0]), layer.weight.t())
    assert program.const(view.params[0]).is_contiguous()


@pytest.mark.parametrize("kind", ["prune", "parametrize", "weight_norm", "orthogonal"])
def test_computed_weights_fold_to_the_module_weight(kind: str) -> None:
    layer = nn.Linear(8, 8)
    if kind == "prune":
        prune.l1_unstructured(layer, "weight", 0.5)
    elif kind == "parametrize":
        parametrize.register_parametrization(layer, "weight", nn.Tanh())
    elif kind == "weight_norm":
        parametrizations.weight_norm(layer)
    else:
        parametrizations.orthogonal(layer)
    program = check(nn.Sequential(layer), torch.randn(3, 8), linears=1)
    assert [program.weight_name(p) for p in next(program.linears()).params] == ["0.weight"]


def test_dropouts_casts_and_whole_slices_go() -> None:
    def forward(x: torch.Tensor, w: torch.Tensor, b: Any) -> torch.Tensor:
        y = F.dropout(F.linear(x.to(torch.float32), w), 0.5, training=False)
        return y[:, :].float().detach()

    program = check(Call(forward, W), torch.randn(3, 8), linears=1)
    assert sum(n.op.startswith("call_") for n in program.graph.nodes) == 1


def test_real_casts_stay() -> None:
    program = check(Call(lambda x, w, b: F.linear(x.double(), w.double()).float(), W), torch.randn(3, 8), linears=1)
    assert str(next(program.linears()).terms[0]) == "f64[6, 8]"


TORCH_LEVEL = """\
# sparsecc program, stage: capture
def program(x: "f32[s0, 8]"):
    w: "f32[6, 8]" = const("w")
    v: "f32[6, 4]" = const("v")
    a: "f32[s0, 6]" = torch.nn.functional.linear(x, w)
    b: "f32[s0, 6]" = torch.nn.functional.dropout(a, p=0.1, training=False)
    c: "f32[s0, 6]" = b.to(torch.float32)
    d: "f32[s0, 6]" = operator.getitem(c, (slice(None, None, None), slice(0, None, None)))
    e: "f32[s0, 4]" = torch.matmul(d, v)
    return (e,)
"""


def test_torch_level_functions_of_a_dynamo_graph() -> None:
    program = canonical(parse_program(TORCH_LEVEL))
    assert print_program(program).splitlines()[2:] == [
        '    v_1: "f32[4, 6]" = const("v_1", "v")',
        '    w: "f32[6, 8]" = const("w")',
        '    linear: "f32[s0, 6]" = sparsecc.linear(x, [w], None, None, terms="f32[6, 8]", epilogue="", layout="row", kernel="")',
        '    linear_1: "f32[s0, 4]" = sparsecc.linear(linear, [v_1], None, None, terms="f32[4, 6]", epilogue="", layout="row", kernel="")',
        "    return (linear_1,)",
    ]


def test_modules_of_a_symbolic_trace() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Dropout()).eval()
    gm = torch.fx.symbolic_trace(model)
    gm.graph.output_node().args = (gm.graph.output_node().args,)
    program = canonical(Program(gm))
    x = torch.randn(3, 8)
    torch.testing.assert_close(program.run(x)[0], model(x))
    assert sum(1 for _ in program.linears()) == 1
