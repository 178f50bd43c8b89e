"""Merging tokens in the blocks of an encoder; a part of `skip`.

    h = x + attention(norm(x));  y = h + ffn(norm(h))
      -->  h = x + attention(norm(x));  m, size = merge_tokens(h, keys, size, r, ...);  y = m + ffn(norm(m))

What stands behind has r tokens fewer: sizes that are written in the program are replaced there. The number of tokens must be fixed, as that
of an image's patches is, and attention unmasked: what a merged token may see no mask says.
"""
from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsecc.errors import SpecError
from sparsecc.ir.infer import infer, value_of
from sparsecc.ir.merge_ops import MERGE
from sparsecc.ir.program import TYPE_KEY, Program, Region
from sparsecc.merging import Merge
from sparsecc.passes.attention import is_causal, mask_of
from sparsecc.passes.blocks import ATTENTIONS, common_part
from sparsecc.passes.ffn import Ffn
from sparsecc.passes.route import arguments
from sparsecc.passes.site import RESHAPES
from sparsecc.skipping import matches

aten = torch.ops.aten
SIZED = (*RESHAPES, aten.expand.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class Encoder:
    """One block: h [B, T, D] between attention and feed-forward part, torch's attention, T, the name of its module."""

    h: fx.Node
    attention: fx.Node
    tokens: int
    name: str


def merge_blocks(program: Program, rules: list[tuple[str, Merge]], ffns: list[Ffn], nothing: Any) -> None:
    """Merge in every block that a glob names; the last one counts. `nothing(program, glob, what, names, missed)` refuses an empty glob.

    Raises SpecError, naming what stands in the way.
    """
    found: list[Encoder] = []
    missed: list[str] = []
    for ffn in ffns:
        made = _encoder(program, ffn)
        if isinstance(made, Encoder):
            found.append(made)
        else:
            missed.append(f"{ffn.names[0]}: {made}")
    taken: dict[int, tuple[Merge, int, int]] = {}
    for glob, rule in rules:
        under = [i for i, block in enumerate(found) if matches(glob, (block.name,))]
        if not under:
            nothing(program, glob, "block that tokens can be merged in", [block.name for block in found], missed)
        taken |= {i: (rule, at, len(under)) for at, i in enumerate(under)}
    if not taken:
        return
    full = found[0].tokens
    if len({block.tokens for block in found}) > 1:
        raise SpecError(f"merge: blocks have different numbers of tokens, {sorted({block.tokens for block in found})}")
    left, size = full, None
    merged: dict[fx.Node, int] = {}
    for i, block in enumerate(found):
        _set_mask(block.attention, None)
        rule, at, blocks = taken.get(i, (None, 0, 0))
        if size is not None and rule is not None and rule.proportional:
            _weigh(program, block, size)
        r = 0 if rule is None else rule.merged(left, at, blocks)
        if rule is not None and r:
            size = _insert(program, block, rule, r, left, at, blocks, size)
            left -= r
            merged[size.all_input_nodes[0]] = left
    if merged:
        _resize(program, merged, full)


def _encoder(program: Program, ffn: Ffn) -> Encoder | str:
    part = common_part(program, ffn)
    if isinstance(part, str):
        return part
    h, between, name = part
    value = value_of(h)
    tokens = value.shape[1] if isinstance(value, torch.Tensor) and value.ndim == 3 else None
    if tokens is None:
        return "its stream is no batch of sequences [B, T, D]"
    if not isinstance(tokens, int):
        return "its sequences vary in length: capture with dynamic_shapes=None, tokens are merged in sequences of one length"
    attentions = [node for node in between if node.target in ATTENTIONS]
    if len(attentions) != 1:
        return f"{len(attentions)} scaled_dot_product_attention stand in it, not one; load the model with attn_implementation='sdpa'"
    mask = mask_of(attentions[0])
    if mask is not None and not _open(program, mask):
        return "its attention has a mask, which says nothing about merged tokens: leave the mask out"
    if is_causal(attentions[0]):
        return "its attention is causal, merged tokens have no place in the order"
    return Encoder(h, attentions[0], tokens, name)


def _insert(program: Program, block: Encoder, rule: Merge, r: int, left: int, at: int, blocks: int, size: fx.Node | None) -> fx.Node:
    """The merge behind h; returns the new sizes."""
    graph, users = program.graph, list(block.h.users)
    variant = rule.variant_of(at, blocks)
    args = (block.h, arguments(block.attention)["key"], size, r, rule.margin_of(at, blocks), variant, rule.leading)
    with graph.inserting_after(block.h):
        both = graph.create_node("call_function", MERGE, args, name="merge_tokens")
    with graph.inserting_after(both):
        sizes = graph.call_function(operator.getitem, (both, 1))
        out = graph.call_function(operator.getitem, (both, 0))
    for user in users:
        user.replace_input_with(block.h, out)
    more = {"m": left, "expected_kept": (left - r) / left}
    reason = f"{rule}: {variant} matching, margin {rule.margin_of(at, blocks):.3g}"
    program.regions[both.name] = Region(block.name, (), f"merges {r} of {left} tokens", reason, more=more)
    return sizes


def _weigh(program: Program, block: Encoder, size: fx.Node) -> None:
    """softmax(q k^T + log(size)): a merged token counts as often as the tokens that it stands for."""
    node, call = block.attention, program.graph.call_function
    with program.graph.inserting_before(node):
        log = call(aten.log.default, (size,))
        bias = call(aten.unsqueeze.default, (call(aten.unsqueeze.default, (log, 1)), 1))
        dtype = value_of(node).dtype
        bias = bias if dtype in (torch.float32, torch.float64) else call(aten.to.dtype, (bias, dtype))
    _set_mask(node, bias)


def _set_mask(node: fx.Node, mask: fx.Node | None) -> None:
    if len(node.args) > 3:
        node.args = (*node.args[:3], mask, *node.args[4:])
    else:
        node.kwargs = {**node.kwargs, "attn_mask": mask}


def _open(program: Program, mask: fx.Node) -> bool:
    """Whether a mask is the same for all inputs and hides nothing, as the one that models make where none is given."""
    order: list[fx.Node] = []
    todo = [mask]
    while todo:
        node = todo.pop()
        if node.op not in ("call_function", "get_attr") or node.target is aten.sym_size.int:
            return False
        order.append(node)
        todo += node.all_input_nodes
    values: dict[fx.Node, Any] = {}
    for node in reversed(order):
        if node.op == "get_attr":
            values[node] = program.const(node)
        elif node not in values:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)  # type: ignore[arg-type]
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    found = values[mask]
    return bool(found.all()) if found.dtype == torch.bool else bool((found == 0).all())


def _resize(program: Program, merged: dict[fx.Node, int], full: int) -> None:
    """Behind each merge, sizes of `full` tokens are what is left of them. Raises SpecError where a node has another use for the number."""
    length: dict[fx.Node, int] = {}
    for node in program.graph.nodes:
        sources = {length[i] for i in node.all_input_nodes if i in length}
        if node in merged:
            length[node] = merged[node]
        elif not sources or node.op == "output":
            continue
        elif len(sources) > 1:
            raise SpecError(f"merge: {node.name} joins tokens from before and behind a merge")
        else:
            value = value_of(node)
            dims = list(value.shape) if isinstance(value, torch.Tensor) else []
            if sum(isinstance(d, int) and d == full for d in dims) > 1:
                raise SpecError(f"merge: {node.name} is {program.type(node)}, whose tokens cannot be told from another size of {full}")
            length[node] = left = sources.pop()
            node.args, node.kwargs = _sized(node, node.args, full, left), _sized(node, node.kwargs, full, left)  # type: ignore[assignment]
        for key in ("val", "example_value", TYPE_KEY):
            node.meta.pop(key, None)
    infer(program)
    for node in length:
        if value_of(node) is None:
            raise SpecError(f"merge: {node.name} behind a merge cannot do with fewer tokens ({node.target})")


def _sized(node: fx.Node, args: Any, full: int, left: int) -> Any:
    def one(value: Any) -> Any:
        if isinstance(value, bool) or value != full or not isinstance(value, int):
            return value
        if node.target not in SIZED and node.target is not aten.slice.Tensor:
            raise SpecError(f"merge: {node.name} behind a merge computes with {full}, the number of tokens ({node.target})")
        return left

    if isinstance(args, dict):
        return {key: _sized(node, value, full, left) for key, value in args.items()}
    if isinstance(args, list | tuple):
        return type(args)(_sized(node, value, full, left) for value in args)
    return one(args)
