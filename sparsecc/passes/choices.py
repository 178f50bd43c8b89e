"""Part of pack: what runs each linear and each attention, chosen together.

A linear is timed as it will be called: on token-minor values where kernels stand before or behind it, on rows where torch does. So what
runs one decides how the others are called. Where dense code wins, its neighbours are asked again.

Torch's attention may be the faster one alone and yet lose, since values change layout and dtype around it, and what else stands between
it and the linears is torch's then, too. Such a one is `contested`: the compiler times the program both ways.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from sparsecc.ir.program import Program
from sparsecc.passes.context import Attention, Choice, Context, Problem, Tuner
from sparsecc.passes.token_minor import TokenMinor

HOPELESS = 2.0
"""An attention that takes so many times as long as torch's is not contested."""


def choices(program: Program, problems: Mapping[fx.Node, Problem], context: Context) -> dict[fx.Node, Choice]:
    """The best for each linear; `context.attention` and `context.contested` say what became of attention."""
    tuner = context.tuner
    assert tuner is not None
    if tuner.between is None:
        return {node: tuner.choose(problem) for node, problem in problems.items()}
    chosen = _linears(program, problems, tuner, context.attention)
    packed = [node for node, choice in chosen.items() if choice.format is not None]
    lost: dict[Attention, bool] = {}
    for one in dict.fromkeys(TokenMinor.of(program, packed, context.attention).attentions()):
        times = tuner.between.attention_times(one)
        if times is None or math.isinf(times[0]):
            lost |= {} if times is None else {one: False}
            continue
        kernel, torchs = (1e6 * seconds for seconds in times)
        if kernel > HOPELESS * torchs:
            lost[one] = False
        elif kernel > torchs:
            context.contested.append(one)
        context.notes.append(f"attention: {kernel:.0f} us {'would replace' if one in lost else 'instead of'} torch's {torchs:.0f} us")
    if not lost:
        return chosen
    context.attention |= lost
    return _linears(program, problems, tuner, context.attention)


def _linears(
    program: Program, problems: Mapping[fx.Node, Problem], tuner: Tuner, attention: Mapping[Attention, bool]
) -> dict[fx.Node, Choice]:
    """The best for each, until no dense one stands where a kernel was presumed."""
    packed, chosen = set(problems), dict[fx.Node, tuple[Problem, Choice]]()
    while True:
        plan = TokenMinor.of(program, packed, attention)
        for node, problem in problems.items():
            asked = problem
            if problem.picture is None:
                reads, layout = plan.layouts(node)
                asked = replace(problem, reads=reads, layout=layout)
            if node not in chosen or chosen[node][0] != asked:
                chosen[node] = asked, tuner.choose(asked)
        still = {node for node in packed if chosen[node][1].format is not None}
        if still == packed:
            return {node: choice for node, (_, choice) in chosen.items()}
        packed = still
