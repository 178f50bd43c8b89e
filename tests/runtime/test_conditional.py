"""Programs that are cut at decisions: what nobody goes through isn't run, and the rest is what it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsecc.ir.program import Program
from sparsecc.ir.text import parse_program, print_program
from sparsecc.runtime.conditional import conditional

PROGRAM = '''# sparsecc program, stage: capture
def program(x: "f32[2, 1, 4]", p: "f32[2, 1]", q: "f32[2, 1]", past: "f32[2, 1, s0, 4]"):
    first: "b1[2]" = sparsecc.goes(p, 'threshold(0.5)')
    shared: "f32[2, 1, 4]" = aten.neg(x)
    key: "f32[2, 1, 1, 4]" = aten.unsqueeze(shared, 1)
    longer: "f32[2, 1, s0 + 1, 4]" = aten.cat([past, key], 2)
    inner: "f32[2, 1, 4]" = aten.exp(shared)
    y: "f32[2, 1, 4]" = aten.mul(inner, 2.0)
    through: "f32[2, 1, 4]" = sparsecc.through(x, first, y)
    second: "b1[2]" = sparsecc.goes(q, 'threshold(0.5)')
    z: "f32[2, 1, 4]" = aten.sin(through)
    through_1: "f32[2, 1, 4]" = sparsecc.through(through, second, z)
    held = sparsecc.held(past, longer, first)
    out: "f32[2, 1, 4]" = aten.add(through_1, shared)
    return (out, held)
'''
P, Q = {True: [0.9, 0.1], False: [0.1, 0.2]}, {True: [0.2, 0.7], False: [0.0, 0.5]}


def cut() -> tuple[Program, Callable[..., Any], list[str]]:
    """The program, its parts run one by one, and the names of what ran."""
    program, ran = parse_program(PROGRAM), list[str]()

    def finish(part: Program) -> Callable[..., Any]:
        names = [node.name for node in part.graph.nodes if node.op == "call_function"]
        return lambda *inputs: ran.extend(names) or part.run(*inputs)

    run = conditional(program, finish)
    assert run is not None
    return program, run, ran


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
def test_only_what_some_row_goes_through_is_run(first: bool, second: bool) -> None:
    program, run, ran = cut()
    inputs = (torch.randn(2, 1, 4), torch.tensor(P[first])[:, None], torch.tensor(Q[second])[:, None], torch.randn(2, 1, 3, 4))
    out, held = run(*inputs)
    wanted, kept = program.run(*inputs)
    assert torch.equal(out, wanted) and torch.equal(held, kept) and held.shape[2] == 3 + first
    assert ({"inner", "y", "key", "longer"} <= set(ran)) == first == ("inner" in ran) == ("longer" in ran)
    assert ("z" in ran) == second and {"shared", "out"} <= set(ran)


def test_programs_without_a_decision_stay_whole() -> None:
    plain = PROGRAM[: PROGRAM.index("    first")] + '    y: "f32[2, 1, 4]" = aten.neg(x)\n    return (y,)\n'
    assert conditional(parse_program(plain), lambda part: part.run) is None


def test_the_text_round_trips() -> None:
    text = print_program(parse_program(PROGRAM))
    assert print_program(parse_program(text)) == text
