"""layout: values between two sparse linears stay token-minor, as their kernels read and write them.

    h = linear(x, ..., layout="row");  y = linear(h, ...)      -->  h = linear(x, ..., layout="token");  y = linear(h, ...)

Only where every user of the value is a packed linear that takes it as its activation: anything else would pay for the transpose.
One token has no layout to choose.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch import fx

from sparsecc.ir.ops import LINEAR
from sparsecc.ir.program import LinearView, Program, Rule
from sparsecc.passes.pack import tokens_of


@dataclass(frozen=True)
class Layout:
    """The pass; see the file's docstring."""

    name: str = "layout"
    requires: tuple[str, ...] = ("linears",)
    ensures: tuple[str, ...] = ()

    @property
    def rules(self) -> Mapping[Any, Rule]:
        return {}

    def run(self, program: Program, context: Any = None) -> None:
        flow = nx.DiGraph()
        packed = {view.node: view for view in program.linears() if _packed(view)}
        for node in packed:
            flow.add_edges_from((node, user) for user in node.users)
        for node, view in packed.items():
            users = list(flow.successors(node)) if node in flow else []
            if users and all(user in packed and _only_as_x(packed[user], node) for user in users) and tokens_of(view.x) > 1:
                view.replace(layout="token")


def _packed(view: LinearView) -> bool:
    return all(term.format is not None for term in view.terms)


def _only_as_x(view: LinearView, node: fx.Node) -> bool:
    return view.x is node and view.residual is not node and view.node.target is LINEAR
