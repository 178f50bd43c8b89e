"""Sites: pieces of a graph that one op of the dialect may replace, how to replace them, and what finding them takes."""
from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparsecc.codegen.kernel import FEW
from sparsecc.ir.infer import value_of
from sparsecc.ir.ops import TOKEN_TILE
from sparsecc.ir.program import Program

aten = torch.ops.aten
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
RESHAPES = (aten.reshape.default, aten.view.default)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TO_THE_END = 2**62
"""Slices to "the end" carry 2**63 - 1."""


@dataclass(frozen=True)
class Site:
    """One op of the dialect in the making: it gives `node`'s value, reads `reads`, token-minor unless they are a few tokens, and makes all
    of `inside` useless.

    `views`: nodes that cut what it reads out of wider values, or join its result; they stay. `ends`: it may also read rows, or write them.
    `build(maker, layout)` makes the op, before `node`.
    """

    node: fx.Node
    reads: tuple[fx.Node, ...]
    build: Callable[[Maker, str], fx.Node]
    inside: frozenset[fx.Node] = frozenset()
    views: frozenset[fx.Node] = frozenset()
    ends: bool = False


@dataclass
class Maker:
    """Makes the ops of sites, in program order. What many of them share is made once, where it comes from."""

    program: Program
    made: dict[fx.Node, fx.Node] = field(default_factory=dict)
    shared: dict[Any, fx.Node] = field(default_factory=dict)

    def replace(self, site: Site, layout: str) -> None:
        """Put the op in the site's place."""
        with self.program.graph.inserting_before(site.node):
            new = site.build(self, layout)
        self.made[site.node] = new
        self.program.replace(site.node, new)

    def now(self, node: fx.Node) -> fx.Node:
        """What has taken a node's place."""
        return self.made.get(node, node)

    def once(self, node: fx.Node, target: Any, *args: Any) -> fx.Node:
        """target(node, *args), right behind the node, or behind the last input."""
        key = (node, target, args)
        if key not in self.shared:
            with self.program.graph.inserting_after(self.program.inputs[-1] if node.op == "placeholder" else node):
                self.shared[key] = self.program.graph.call_function(target, (node, *args))
        return self.shared[key]


def has_tokens(x: Any) -> bool:
    """Whether kernels read it: sequences that fill a vector, or a few tokens in all. One row of tokens of many sequences stays as it is."""
    return fills_vectors(x) or has_few(x)


def fills_vectors(x: Any) -> bool:
    """Sequences that fill a vector of tokens."""
    value = value_of(x) if isinstance(x, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.ndim < 2 or value.dtype not in DTYPES:
        return False
    size = _hint(value.shape[-2])
    return size is None or size >= TOKEN_TILE


def has_few(x: Any) -> bool:
    """A few tokens [B, S, F], or their heads [B, H, S, D]: decode."""
    value = value_of(x) if isinstance(x, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.ndim not in (3, 4) or value.dtype not in DTYPES:
        return False
    B, S = _hint(value.shape[0]), _hint(value.shape[-2])
    return B is not None and S is not None and S < TOKEN_TILE and B * S <= FEW


def hints(sizes: Sequence[Any]) -> list[int | None]:
    """What the sizes were in the capture. Caches that must be equally long may each have a size of its own there."""
    return [_hint(size) for size in sizes]


def _hint(size: Any) -> int | None:
    return size if isinstance(size, int) else size.node.hint


def root(value: Any, views: set[fx.Node]) -> fx.Node:
    """What a view is a view of."""
    while value in views:
        value = value.args[0]
    return value


def head_views(value: fx.Node, views: set[fx.Node]) -> None:
    """The views of transpose(reshape(x or a part of it)): [B, S, F] -> [B, H, S, D]."""
    if not swaps(value):
        return
    split = value.args[0]
    if isinstance(split, fx.Node) and split.target in RESHAPES and same_tokens(split, split.args[0], 3):
        views |= {value, split}
        cut_views(split.args[0], views)


def cut_views(value: Any, views: set[fx.Node]) -> None:
    """The views of a slice, or of a part of a split, along the features of [B, S, F]."""
    if not isinstance(value, fx.Node):
        return
    if value.target is aten.slice.Tensor and value.args[1] in (-1, 2) and len(value.args) == 4:
        views.add(value)
    elif value.target is operator.getitem:
        parts = value.args[0]
        if isinstance(parts, fx.Node) and parts.target in SPLITS and parts.args[2:] in ((-1,), (2,)):
            views |= {value, parts}


def same_tokens(a: Any, b: Any, rank: int) -> bool:
    """Whether b has this rank, and both as many sequences and tokens."""
    return len(shape_of(b)) == rank and [str(size) for size in shape_of(a)[:2]] == [str(size) for size in shape_of(b)[:2]]


def swaps(node: fx.Node) -> bool:
    """Whether it exchanges the middle dimensions of four."""
    return node.target is aten.transpose.int and tuple(node.args[1:]) in ((1, 2), (2, 1)) and len(shape_of(node)) == 4


def return_rows(program: Program, value: fx.Node, x: fx.Node) -> None:
    """Return a copy of x, in rows and in memory of its own, where the program returned `value`."""
    output = program.graph.output_node()
    with program.graph.inserting_before(output):
        copy = program.graph.call_function(aten.clone.default, (x,), {"memory_format": torch.contiguous_format})
    output.replace_input_with(value, copy)


def copies(node: fx.Node) -> bool:
    """Whether it does nothing but that."""
    rows = node.target is aten.clone.default and node.kwargs.get("memory_format") == torch.contiguous_format
    return rows and all(user.op == "output" for user in node.users)


def return_instead(program: Program, node: fx.Node, new: fx.Node) -> None:
    """Return `new`, which has memory of its own, where the program returned `node`, or a copy of it."""
    output = program.graph.output_node()
    for old in (node, *(user for user in node.users if copies(user))):
        output.replace_input_with(old, new)


def only(node: Any, target: Any, user: Any) -> bool:
    """Whether this is a call of `target` that nobody else uses."""
    return isinstance(node, fx.Node) and node.target is target and list(node.users) == [user]


def factors(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """Both readings of a product, or a sum."""
    if len(node.args) == 2 and not node.kwargs:
        a, b = node.args
        yield a, b
        yield b, a


def shape_of(node: Any) -> tuple[Any, ...]:
    """() where none is known."""
    value = value_of(node) if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()
