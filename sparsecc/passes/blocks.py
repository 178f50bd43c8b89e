"""Transformer blocks, found by their dataflow: attention and a feed-forward block, each added to the stream that runs through the model.

    h = x + attention(norm(x));  y = h + ffn(norm(h))              before the branches: Llama, ViT, OPT
    h = norm(x + attention(x));  y = norm(h + ffn(h))              after them: BERT

A block is everything between x and y. It can be run on some of its tokens if each value that enters it from elsewhere (masks, rotary
tables, sizes) has the sequence as a dimension of its own or doesn't have it at all, and nothing but y leaves it, or also keys and values
[B, G, S, D], as outputs of the program, where a cache is made for blocks that keep keys of different tokens.
"""
from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsecc.ir.cache_ops import SHOWN
from sparsecc.ir.infer import value_of
from sparsecc.ir.ops import LINEAR
from sparsecc.ir.program import LinearView, Program
from sparsecc.names import Names
from sparsecc.passes.attention import SDPA
from sparsecc.passes.ffn import Ffn, common_module
from sparsecc.passes.site import RESHAPES, copies

aten = torch.ops.aten
SUMS = (aten.add.Tensor, operator.add, torch.add)
ATTENTIONS = (SDPA, torch.nn.functional.scaled_dot_product_attention)


@dataclass(frozen=True)
class Block:
    """x [B, S, D] -> y [B, S, D]. `inside`: its nodes, in program order. `tokens`: values from elsewhere with the sequence in the
    dimensions given; `sizes`: nodes that are its length; `attention`: torch's attention in it; `names` of the module it is; `cache`: its
    keys and values that are outputs of the program."""

    x: fx.Node
    y: fx.Node
    inside: tuple[fx.Node, ...]
    tokens: dict[fx.Node, tuple[int, ...]]
    sizes: tuple[fx.Node, ...]
    attention: fx.Node
    ffn: Ffn
    names: tuple[str, ...]
    cache: tuple[fx.Node, ...] = ()


def find_blocks(program: Program, ffns: list[Ffn], cached: bool = False) -> tuple[list[Block], list[str]]:
    """The blocks around these feed-forward blocks, in program order, and why the others are in none. `cached`: keys and values may be
    outputs, and the program may be of one token."""
    found, missed = [], []
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    for ffn in ffns:
        made = _block(program, ffn, order, cached)
        if isinstance(made, Block):
            found.append(made)
        else:
            missed.append(f"{ffn.names[0]}: {made}")
    return found, missed


def _block(program: Program, ffn: Ffn, order: dict[fx.Node, int], cached: bool) -> Block | str:
    ends = _ends(ffn)
    if ends is None:
        return "nothing like x + attention(x), then h + ffn(h), stands around its feed-forward block"
    x, y = ends
    size = _sequence(x)
    if size is None:
        return f"its input is {program.type(x)}, not a batch of sequences [B, S, D]"
    if isinstance(size, int) and not (cached and size == 1):
        return f"its sequences are captured as {size} tokens long: capture with more than one token and dynamic_shapes"
    inside = _with_views(_between(x, y, order), order)
    attentions = [node for node in inside if node.target in ATTENTIONS]
    if len(attentions) != 1:
        return f"{len(attentions)} scaled_dot_product_attention stand in it, not one; load the model with attn_implementation='sdpa'"
    leaks = [node for node in inside if node is not y and any(user not in inside for user in node.users)]
    cache = tuple(node for node in leaks if cached and _is_cache(node, inside))
    if wrong := [node.name for node in leaks if node not in cache]:
        return f"{wrong[0]} is used outside of it (by a KV cache? use methods/cached.py, or calls with use_cache=False)"
    if x in {a for a in outer(inside) if a is not x}:
        return "its input is read in an unknown way"
    found = entering(outer(inside) - {x}, str(size))
    if isinstance(found, str):
        return found
    linears = [LinearView(node) for node in inside if node.target is LINEAR]
    modules = [Names.found(program).modules(program.weight_name(view.params[0]))[0] for view in linears]
    name = common_module(modules)
    return Block(x, y, inside, *found, attentions[0], ffn, (name,), cache)


def _is_cache(node: fx.Node, inside: tuple[fx.Node, ...]) -> bool:
    """Keys or values [B, G, S, D] whose other users are the program's outputs, or what says which of them are tokens."""
    value = value_of(node)
    known = all(user in inside or user.op == "output" or copies(user) or user.target is SHOWN for user in node.users)
    return isinstance(value, torch.Tensor) and value.ndim == 4 and known


def _ends(ffn: Ffn) -> tuple[fx.Node, fx.Node] | None:
    """(x, y) of the block."""
    total = next(iter(ffn.down.node.users), None)
    if total is None or len(ffn.down.node.users) != 1 or total.target not in SUMS or len(total.args) != 2:
        return None
    h = _unshaped(next(a for a in total.args if a is not ffn.down.node))
    if not isinstance(h, fx.Node):
        return None
    total = joined(total)
    after = ffn.x is h  # norms stand behind the sums
    add = _last_sum(h) if after else h
    if add is None or add.target not in SUMS or len(add.args) != 2:
        return None
    branches = [a for a in add.args if isinstance(a, fx.Node) and a.target is LINEAR]
    if len(branches) != 1 or not isinstance(x := next(a for a in add.args if a is not branches[0]), fx.Node):
        return None
    if not after:
        return x, total
    y = next(iter(total.users), None)
    return (x, y) if y is not None and len(total.users) == 1 and y.target in (aten.layer_norm.default, aten.rms_norm.default) else None


def common_part(program: Program, ffn: Ffn) -> tuple[fx.Node, tuple[fx.Node, ...], str] | str:
    """(h, the nodes from the block's input to it, the name of the block's module), or why there is no such block around an FFN."""
    ends = _ends(ffn)
    if ends is None:
        return "nothing like x + attention(x), then h + ffn(h), stands around its feed-forward block"
    total = next(iter(ffn.down.node.users))
    h = next(a for a in total.args if a is not ffn.down.node)
    assert isinstance(h, fx.Node)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    inside = _between(ends[0], h, order)
    linears = [LinearView(node) for node in (*inside, ffn.down.node) if node.target is LINEAR]
    names = [Names.found(program).modules(program.weight_name(view.params[0]))[0] for view in linears]
    return h, inside, common_module(names)


def _unshaped(node: Any) -> Any:
    """What [batch * tokens, D] was [batch, tokens, D]."""
    return node.args[0] if isinstance(node, fx.Node) and node.target in RESHAPES else node


def joined(total: fx.Node) -> fx.Node:
    """The sum as [batch, tokens, D]: OPT works on [batch * tokens, D] and shapes it back."""
    user = next(iter(total.users), None)
    flat = isinstance(value := value_of(total), torch.Tensor) and value.ndim == 2
    return user if flat and user is not None and len(total.users) == 1 and user.target in RESHAPES else total


def _last_sum(h: fx.Node) -> fx.Node | None:
    """What a norm is of."""
    return h.args[0] if h.target in (aten.layer_norm.default, aten.rms_norm.default) and isinstance(h.args[0], fx.Node) else None


def _sequence(x: fx.Node) -> Any:
    value = value_of(x)
    if not isinstance(value, torch.Tensor) or value.ndim != 3:
        return None
    size = value.shape[1]
    return size if isinstance(size, int) else size.node.expr


def _between(x: fx.Node, y: fx.Node, order: dict[fx.Node, int]) -> tuple[fx.Node, ...]:
    """Everything that leads from x to y, y too."""
    back: set[fx.Node] = set()
    todo = [y]
    while todo:
        node = todo.pop()
        if node not in back and order[node] > order[x]:
            back.add(node)
            todo += node.all_input_nodes
    forward: set[fx.Node] = {x}
    inside = []
    for node in sorted(back, key=order.__getitem__):
        if any(source in forward for source in node.all_input_nodes):
            forward.add(node)
            inside.append(node)
    return tuple(inside)


def _with_views(inside: tuple[fx.Node, ...], order: dict[fx.Node, int]) -> tuple[fx.Node, ...]:
    """Added dimensions that only this block uses, such as each layer's own of the rotary tables: their sources are one for all layers."""
    own = set(inside)
    views = {n for n in outer(inside) if n.target in (aten.unsqueeze.default, torch.unsqueeze, "unsqueeze") and own.issuperset(n.users)}
    return tuple(sorted(own | views, key=order.__getitem__))


def outer(inside: tuple[fx.Node, ...]) -> set[fx.Node]:
    """What a part of a program reads from elsewhere."""
    own = set(inside)
    return {source for node in inside for source in node.all_input_nodes if source not in own}


def entering(sources: set[fx.Node], size: str) -> tuple[dict[fx.Node, tuple[int, ...]], tuple[fx.Node, ...]] | str:
    """Values with the sequence in a dimension, and nodes that are its length; or why the block cannot be cut."""
    tokens, sizes = {}, []
    for node in sorted(sources, key=lambda n: n.name):
        value = value_of(node)
        if isinstance(value, torch.SymInt):
            if str(value.node.expr) == size:
                sizes.append(node)
            elif size in {str(s) for s in value.node.expr.free_symbols}:
                return f"{node.name}, a size that is computed from the sequence's length, enters it"
        elif isinstance(value, torch.Tensor) and node.op != "get_attr":
            dims = tuple(d for d, s in enumerate(value.shape) if not isinstance(s, int) and str(s.node.expr) == size)
            others: list[Any] = [s for d, s in enumerate(value.shape) if d not in dims and not isinstance(s, int)]
            if any(size in {str(f) for f in s.node.expr.free_symbols} for s in others):
                return f"{node.name} enters it with a size that is computed from the sequence's length"
            if dims and (dims[0] == 0 or len(dims) > 2):
                return f"{node.name}, a value without a dimension for the batch, enters it"
            if dims:
                tokens[node] = dims
    return tokens, tuple(sizes)
