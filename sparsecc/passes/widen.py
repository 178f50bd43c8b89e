"""Chains of kernels in models of bf16 or fp16, part of the pass layout: kernels compute in float32, and between them values stay so.

    y = linear(x, ..., layout="token")  of bf16   -->   y = to(linear(to(x, float32), ...), bf16)

Nothing is rounded inside a chain, so that its result is closer to the model's in float32 than the model's own is. What comes from outside
is widened where it comes in, constants at compile time, and what leaves is rounded to the dtype that it had.
"""
from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from sparsecc.ir.infer import infer, value_of
from sparsecc.ir.ops import LINEAR
from sparsecc.ir.program import TYPE_KEY, LinearView, Program
from sparsecc.ir.token_ops import ATTENTION, GATE, NORM, ROTARY, TOKENS

aten = torch.ops.aten
HALVES = (torch.bfloat16, torch.float16)
VIEWS = {
    aten.reshape.default, aten.view.default, aten.transpose.int, aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default,
    aten.chunk.default, operator.getitem,
}  # fmt: skip


def widen(program: Program) -> None:
    """Let every kernel on token-minor values have float32 arguments, and give them to others in the dtype that they had."""
    if not any(half_of(view.node) for view in program.linears()):
        return
    infer(program)  # of what layout has just made
    work = _Widener(program)
    for node in list(program.graph.nodes):
        if half_of(node) is not None and work.takes(node):
            work.widen(node)
    for node, dtype in work.wide.items():
        others = [user for user in node.users if user not in work.wide]
        if others and dtype is not None:
            with program.graph.inserting_after(node):
                back = program.graph.call_function(aten.to.dtype, (node, dtype))
            for user in others:
                user.replace_input_with(node, back)
    for node in work.wide:
        for key in ("val", "example_value", TYPE_KEY):
            node.meta.pop(key, None)
    infer(program)


def half_of(node: fx.Node) -> torch.dtype | None:
    """bf16 or fp16, of a tensor or of the parts of one; None for anything else."""
    value = value_of(node)
    value = value[0] if isinstance(value, list | tuple) and value else value
    return value.dtype if isinstance(value, torch.Tensor) and value.dtype in HALVES else None


@dataclass
class _Widener:
    """`wide`: nodes that give float32 by now, and what they gave; `casts`: what was widened for them."""

    program: Program
    wide: dict[fx.Node, torch.dtype | None] = field(default_factory=dict)
    casts: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def takes(self, node: fx.Node) -> bool:
        """Whether a node works on token-minor values, or cuts one out of them."""
        if node.target is LINEAR:
            view = LinearView(node)
            return all(term.format is not None for term in view.terms) and (view.layout == "token" or view.x in self.wide)
        return node.target in (NORM, GATE, ROTARY, ATTENTION, TOKENS) or (node.target in VIEWS and node.args[0] in self.wide)

    def widen(self, node: fx.Node) -> None:
        """Give it float32 arguments; a weight's values stay as they are stored."""
        self.wide[node] = half_of(node) if not isinstance(value_of(node), list | tuple) else None
        if node.target is LINEAR:
            view = LinearView(node)
            view.replace(x=self.now(view.x, node), bias=self.now(view.bias, node), residual=self.now(view.residual, node))
            return
        node.args = map_arg(node.args, lambda source: self.now(source, node))
        node.kwargs = map_arg(node.kwargs, lambda source: self.now(source, node))

    def now(self, source: Any, user: fx.Node) -> Any:
        """In float32."""
        if not isinstance(source, fx.Node) or half_of(source) is None or source in self.wide:
            return source
        if source not in self.casts:
            if self.program.is_const(source):
                name = self.program.weight_name(source)
                self.casts[source] = self.program.add_const(f"{source.target}_wide", self.program.const(source).float(), name)
            else:
                with self.program.graph.inserting_before(user):
                    self.casts[source] = self.program.graph.call_function(aten.to.dtype, (source, torch.float32))
        return self.casts[source]
