"""Linears on their active inputs, for `skip`, and the projections of attention, found by dataflow.

    y = linear(x, [w], b)  -->  y = neurons(x, [w], [b], level, "rows", "", "threshold(0.0)", "")
"""
from __future__ import annotations

from torch import fx

from sparsecc.errors import SpecError
from sparsecc.inputs import Inputs
from sparsecc.ir.ops import LINEAR
from sparsecc.ir.program import LinearView, Program, Region
from sparsecc.ir.skip_ops import NEURONS
from sparsecc.names import Names
from sparsecc.passes.blocks import ATTENTIONS
from sparsecc.passes.ffn import is_plain
from sparsecc.passes.pack import tokens_of
from sparsecc.skipping import level_of, matches

PARTS = ("q", "k", "v", "o")


def input_linears(program: Program, rules: list[tuple[str, Inputs]], taken: set[fx.Node]) -> list[tuple[LinearView, str, Inputs]]:
    """The plain linears that the last glob naming them is a rule for, with their names. `taken`: those of blocks that skip neurons.

    Raises SpecError for a glob, or calibrated thresholds, that name none.
    """
    views = [(view, modules_of(program, view)) for view in program.linears() if is_plain(program, view)]
    found: list[tuple[LinearView, str, Inputs]] = []
    for view, names in views if rules else []:
        rule = next((rule for glob, rule in reversed(rules) if matches(glob, names)), None)
        name = names[0] if rule is None else next((n for n in names if n in rule.levels), names[0])
        if rule is None or (rule.levels and name not in rule.levels):
            continue
        if view.node in taken:
            raise SpecError(f"{name} lies in a feed-forward block that skips neurons: its inputs are theirs, leave it out of inputs()")
        found.append((view, name, rule))
    for glob, rule in rules:
        if not any(matches(glob, names) for _, names in views) and not Names.found(program).partial:
            raise SpecError(f"{glob!r} names no linear of this model; there are {', '.join(names[0] for _, names in views[:4])}")
        if rule.levels and not any(one is rule for _, _, one in found) and not Names.found(program).partial:
            raise SpecError(f"{glob!r}: the thresholds are of {', '.join(list(rule.levels)[:3])}, of which it names none")
    return found


def skip_inputs(program: Program, view: LinearView, name: str, rule: Inputs) -> None:
    """One op for the linear."""
    weight, graph, node = view.params[0], program.graph, view.node
    level = level_of(rule.levels, name, view.shape[1])
    const = None if level is None else program.add_const(f"{name}_levels", level)
    with graph.inserting_before(node):
        args = (view.x, [weight], [view.bias], const, "rows", "", str(rule.policy), "")
        new = graph.create_node("call_function", NEURONS, args, name="inputs")
    kept = rule.policy.size(view.shape[1])
    more = {"shape": view.shape, "m": tokens_of(view.x), "dense_bytes": program.const(weight).nbytes}
    more |= {} if kept is None else {"expected_kept": kept / view.shape[1]}
    program.replace(node, new)
    program.regions[new.name] = Region(name, (program.weight_name(weight),), str(rule), "a linear on its active inputs", more=more)


def attention_linears(program: Program, parts: tuple[str, ...]) -> tuple[dict[str, LinearView], list[str]]:
    """The linears that attention's queries, keys, values come from and that its result goes into, by name; and what was not found."""
    found: dict[str, LinearView] = {}
    missed: list[str] = []
    for node in [n for n in program.graph.nodes if n.target in ATTENTIONS]:
        for part in parts:
            view = _after(program, node) if part == "o" else _before(program, node.all_input_nodes[PARTS.index(part)])
            if view is None:
                missed.append(f"{node.name} has no single linear for {part}")
            else:
                found.setdefault(modules_of(program, view)[0], view)
    return found, missed


def modules_of(program: Program, view: LinearView) -> tuple[str, ...]:
    """The names of a linear."""
    return Names.found(program).modules(program.weight_name(view.params[0]))


def _before(program: Program, node: fx.Node) -> LinearView | None:
    """The one linear that a value of heads is computed from: reshaped, turned by its position, normed, repeated."""
    seen: set[fx.Node] = set()
    linears: list[fx.Node] = []
    todo = [node]
    while todo:
        one = todo.pop()
        if one in seen:
            continue
        seen.add(one)
        if one.target is LINEAR:
            linears.append(one)
        else:
            todo += one.all_input_nodes
    return _known(program, linears)


def _after(program: Program, node: fx.Node) -> LinearView | None:
    """The linear that alone reads the joined heads."""
    while len(node.users) == 1 and node.target is not LINEAR:
        node = next(iter(node.users))
    return _known(program, [node] if node.target is LINEAR else [])


def _known(program: Program, linears: list[fx.Node]) -> LinearView | None:
    return view if len(linears) == 1 and is_plain(program, view := LinearView(linears[0])) else None
