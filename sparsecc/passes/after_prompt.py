"""One token after a prompt whose blocks skipped tokens: it goes through every block, on the keys that the block has.

    y = block(x, cos, sin, keys)  -->  the same with the feed-forward branch times p, if the router's probability scales it,
                                       and with the rotary tables of the place behind the block's own keys, if positions are compact
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from sparsecc.errors import SpecError
from sparsecc.ir.infer import value_of
from sparsecc.ir.program import Program
from sparsecc.passes.blocks import Block, outer
from sparsecc.passes.grouped import group_queries
from sparsecc.passes.route import Routes
from sparsecc.routing import DepthRouter
from sparsecc.skipping import Tokens

aten = torch.ops.aten


def after_prompt(program: Program, routes: Routes, chosen: Iterable[tuple[Block, Tokens, int]]) -> None:
    """For blocks with their rules and their places under the rules' globs, in program order."""
    moved: dict[fx.Node, fx.Node] = {}
    for block, rule, at in chosen:
        source = moved.get(block.x, block.x)
        if isinstance(rule.router, DepthRouter) and rule.scale != "none":
            with program.graph.inserting_before(block.inside[0]):
                p = routes.gate(block, source, rule.router, at)
            moved[block.y] = routes.scale(block, rule, p, None, source)
        if rule.positions == "compact":
            _renumber(program, block)
    program.finish()
    group_queries(program)


def _renumber(program: Program, block: Block) -> None:
    """Tables of rotary embeddings for a place that counts the block's keys: a copy of what computes them from the token's position."""
    entering = outer(block.inside)
    past = next((node for node in sorted(entering, key=lambda n: n.name) if node.op == "placeholder" and value_of(node).ndim == 4
                 and not _is_mask(node)), None)
    tables = {node: path for node in entering - {block.x} if (path := _from_position(node)) is not None}
    position = {path[0] for path in tables.values()}
    if past is None or len(position) != 1:
        raise SpecError(f"{block.names[0]}: compact positions need its keys, and rotary tables that one input's positions give, not "
                        f"{len(position)}")
    graph = program.graph
    wanted = {node for path in tables.values() for node in path}
    mask = next((node for node in entering if node.op == "placeholder" and _is_mask(node)), None)
    with graph.inserting_before(block.inside[0]):
        made = {place: _count(graph, place, past, mask) for place in position}
        for node in [n for n in graph.nodes if n in wanted and n not in made]:
            made[node] = graph.node_copy(node, lambda n: made.get(n, n))
    for node in block.inside:
        node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: made[n] if n in tables else n)  # type: ignore[assignment]


def _is_mask(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.ndim == 4 and value.dtype == torch.bool


def _count(graph: fx.Graph, place: fx.Node, past: fx.Node, mask: fx.Node | None) -> fx.Node:
    """i64[B, 1]: how many keys [B, G, n, D] the block has, or how many of them a mask [B, 1, 1, n + 1] shows besides the token's own."""
    if mask is None:
        return graph.call_function(aten.full_like.default, (place, graph.call_function(aten.sym_size.int, (past, 2))))
    seen = graph.call_function(aten.sum.dim_IntList, (mask, [2, 3]))
    return graph.call_function(aten.sub.Tensor, (seen, 1))


def _from_position(table: fx.Node) -> Sequence[fx.Node] | None:
    """An input of whole numbers [B, 1], then what lies between it and a table of floats; None for values of another kind."""
    value: Any = value_of(table)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or table.op != "call_function":
        return None
    above: dict[fx.Node, None] = {}
    todo = [table]
    while todo:
        node = todo.pop()
        if node not in above:
            above[node] = None
            todo += node.all_input_nodes
    inputs = [node for node in above if node.op == "placeholder"]
    if len(inputs) != 1 or not isinstance(place := value_of(inputs[0]), torch.Tensor) or place.is_floating_point() or place.ndim != 2:
        return None
    return [inputs[0], *(node for node in above if node.op == "call_function")]
