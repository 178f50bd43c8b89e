"""Parts of a program on fewer tokens: what stands for their values where some tokens are taken out."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._pytree import tree_map

from sparsecc.ir.infer import new_size, value_of
from sparsecc.ir.program import TYPE_KEY

aten = torch.ops.aten


@dataclass
class Shorter:
    """`like`: the fake tensor [B, S, D] of a value with all tokens; S is symbolic.

    Equal values are made once: a block has a hundred of a dozen shapes, and each takes milliseconds to make."""

    like: Any
    made: dict[Any, Any] = field(default_factory=dict)
    sizes: dict[Any, Any] = field(default_factory=dict)

    def indices(self, name: str, hint: int) -> torch.Tensor:
        """What stands for indices i32[B, K], K a size of its own: inference would be slow with one that is computed from the length."""
        with self.like.fake_mode:
            return torch.empty((self.like.shape[0], new_size(self.like.fake_mode, name, max(2, hint))), dtype=torch.int32)

    def rows(self, value: Any, name: str) -> torch.Tensor:
        """What stands for rows [B, G, n, D] of a value [B, G, S, D], n a size of its own."""
        B, G, S, D = value.shape
        hint = S if isinstance(S, int) else int(S.node.hint or 128)
        with self.like.fake_mode:
            return torch.empty((B, G, new_size(self.like.fake_mode, name, max(2, hint)), D), dtype=value.dtype, device=value.device)

    def move(self, nodes: Iterable[fx.Node], swapped: Mapping[fx.Node, fx.Node], idx: fx.Node) -> None:
        """Let nodes work on the tokens `idx` alone; `swapped`: what they read instead of values with all tokens."""
        shorter = partial(self._shorter, kept=value_of(idx).shape[1])  # type: ignore[union-attr]
        for node in nodes:
            node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: swapped.get(n, n))  # type: ignore[assignment]
            node.meta.pop(TYPE_KEY, None)
            for key in ("val", "example_value"):
                if key in node.meta:
                    node.meta[key] = tree_map(shorter, node.meta[key])

    def _shorter(self, value: Any, kept: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return self._size(value, kept)
        if not isinstance(value, torch.Tensor):
            return value
        key = (str(kept), value.dtype, str(tuple(value.shape)), str(value.stride()))
        if key not in self.made:
            for s in (*value.shape, *value.stride()):
                if isinstance(s, torch.SymInt) and s.node.expr.is_Symbol:
                    self.sizes[s.node.expr] = s
            shape, strides = ([self._size(s, kept) for s in sizes] for sizes in (value.shape, value.stride()))
            with self.like.fake_mode:
                self.made[key] = torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)
        return self.made[key]

    def _size(self, s: Any, kept: Any) -> Any:
        full = self.like.shape[1].node.expr
        if isinstance(s, int) or full not in s.node.expr.free_symbols:
            return s
        names = sorted(s.node.expr.free_symbols, key=str)
        return sympy.lambdify(names, s.node.expr)(*(kept if name == full else self.sizes[name] for name in names))


def renumbered(graph: fx.Graph, count: fx.Node) -> fx.Node:
    """0, 1, 2, ... as indices [1, count]."""
    return graph.call_function(aten.unsqueeze.default, (graph.call_function(aten.arange.default, (count,)), 0))


def is_table(node: fx.Node, dims: tuple[int, ...]) -> bool:
    """Whether a value holds something for each position, such as a rotary table."""
    value = value_of(node)
    return len(dims) == 1 and isinstance(value, torch.Tensor) and value.dtype.is_floating_point
