"""Running programs of which a token may go past some blocks: what no row goes through isn't run.

A program is cut at each decision: a part that leads to it, the block's own work, and so on. Each part is finished by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from sparsecc.ir.conditional_ops import GOES, HELD, HELD_SHOWN, THROUGH
from sparsecc.ir.infer import new_size, value_of
from sparsecc.ir.program import TYPE_KEY, Program, get_attr, make_module

Run = Callable[..., Sequence[Any]]
JOINS = (THROUGH, HELD, HELD_SHOWN)


@dataclass(frozen=True)
class Part:
    """Nodes that run together: fn(values of `inputs`) -> values of `outputs`; only where some row `goes`, if there is such a node."""

    run: Run
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    goes: fx.Node | None


def conditional(program: Program, finish: Callable[[Program], Run]) -> Run | None:
    """fn(*flat inputs) of a program with decisions; None for a program without one."""
    nodes = [node for node in program.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    decisions = [node for node in nodes if node.target is GOES]
    if not decisions:
        return None
    at = {node: i for i, node in enumerate(decisions)}
    own = {i: _only_for_joins(node, nodes) for node, i in at.items()}
    inner = {node: i for i, some in own.items() for node in some}
    level: dict[fx.Node, int] = {}
    for node in nodes:
        before = max((level.get(source, 0) for source in node.all_input_nodes), default=0)
        level[node] = at[_decision(node)] + 1 if node.target in JOINS else max(before, inner.get(node, 0))
    steps: list[Part | fx.Node] = []
    for i in range(len(decisions) + 1):
        joins = [node for node in nodes if node.target in JOINS and level[node] == i]
        plain = [node for node in nodes if level[node] == i and node not in inner and node.target not in (*JOINS, GOES)]
        steps += [*joins, *_part(program, plain, None, finish)]
        if i < len(decisions):
            steps += [decisions[i]]
            steps += _part(program, [node for node in nodes if inner.get(node) == i], decisions[i], finish)
    return lambda *inputs: _run(program, steps, inputs)


def _run(program: Program, steps: Sequence[Part | fx.Node], inputs: Sequence[Any]) -> list[Any]:
    values: dict[fx.Node, Any] = dict(zip(program.inputs, inputs, strict=True))
    with torch.no_grad():
        for step in steps:
            if isinstance(step, fx.Node):
                args = map_arg(step.args, values.get)
                values[step] = step.target(*args)  # type: ignore[operator]
            elif step.goes is None or bool(values[step.goes].any()):
                values |= zip(step.outputs, step.run(*(values[node] for node in step.inputs)), strict=True)
    return [values[one] if isinstance(one, fx.Node) else one for one in program.outputs]


def _decision(join: fx.Node) -> fx.Node:
    return join.args[2 if join.target is HELD else 1]  # type: ignore[return-value]


def _only_for_joins(decision: fx.Node, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """What nobody needs but one of these joins, for what it gives where a row goes through."""
    wanted: dict[fx.Node, int] = {THROUGH: 2, HELD: 1}  # type: ignore[dict-item]
    found: set[fx.Node] = set()
    for node in reversed(nodes):
        if node.target in JOINS or node.target is GOES or not node.users:
            continue
        joins = [user for user in node.users if user.target in wanted and _decision(user) is decision]
        others = [user for user in node.users if user not in joins]
        needed = all(sum(arg is node for arg in user.args) == 1 and user.args[wanted[user.target]] is node for user in joins)  # type: ignore[index]
        if needed and all(user in found for user in others):
            found.add(node)
    return found


def _part(program: Program, some: Sequence[fx.Node], goes: fx.Node | None, finish: Callable[[Program], Run]) -> list[Part]:
    """A program of these nodes, in program order; none for no nodes."""
    if not some:
        return []
    inside, graph, fresh = set(some), fx.Graph(), dict[str, Any]()
    entering = list(dict.fromkeys(source for node in some for source in node.all_input_nodes if source not in inside))
    given = [node for node in entering if node.op != "get_attr"]
    leaving = [node for node in some if any(user not in inside for user in node.users)]
    values: dict[fx.Node, fx.Node] = {}
    for node in [*(n for n in entering if n.op == "get_attr"), *given, *some]:
        if node.op == "get_attr":
            values[node] = graph.get_attr(str(node.target))
            values[node].meta.update(node.meta)
        elif node in inside:
            values[node] = graph.node_copy(node, values.__getitem__)
        else:
            values[node] = graph.placeholder(f"{node.name}_given")
            values[node].meta.update({TYPE_KEY: node.meta.get(TYPE_KEY), "val": _sized(value_of(node), fresh)})
    graph.output(tuple(values[node] for node in leaving))
    attrs = {str(node.target): get_attr(program.gm, str(node.target)) for node in entering if node.op == "get_attr"}
    part = Program(make_module(attrs, graph), program.stage, program.origin)
    return [Part(finish(part), tuple(given), tuple(leaving), goes)]


def _sized(value: Any, fresh: dict[str, Any]) -> Any:
    """A fake tensor whose computed sizes, such as n + 1, are sizes of their own: what reads a part's inputs finds each of them there."""
    if not isinstance(value, torch.Tensor) or all(isinstance(s, int) or s.node.expr.is_Symbol for s in value.shape):
        return value
    mode: Any = value.fake_mode  # type: ignore[attr-defined]
    for s in value.shape:
        if not isinstance(s, int) and not s.node.expr.is_Symbol and str(s) not in fresh:
            fresh[str(s)] = new_size(mode, f"part_{len(fresh)}_{id(fresh)}", int(s.node.hint or 3))
    with mode:
        return torch.empty([fresh.get(str(s), s) for s in value.shape], dtype=value.dtype, device=value.device)
