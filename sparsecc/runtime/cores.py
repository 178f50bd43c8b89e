"""Calling what counts core neurons, and running programs whose prompts shrink on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import c_void_p
from typing import Any

import torch
from torch import Tensor, fx

from sparsecc.codegen.tvm.backend import TvmBackend
from sparsecc.codegen.tvm.cores import cores_source
from sparsecc.errors import SelectionError
from sparsecc.ir.core_ops import SHRINK, shrink
from sparsecc.ir.policy import ratio_of
from sparsecc.ir.program import TYPE_KEY, Program
from sparsecc.runtime.few import DTYPES


class CoreCounts:
    """fn(a [..., F], "core(rho)") -> i32[F], as `ir/skip_ops.request_scores`; None for another score or dtype, and for empty prompts."""

    def __init__(self, backend: TvmBackend) -> None:
        self.backend = backend

    def source(self, tokens: int) -> str:
        """The text of the kernel for float32."""
        return cores_source("f32", self.backend.isa)

    def __call__(self, a: Tensor, score: str) -> Tensor | None:
        F = a.shape[-1]
        M = a.numel() // F
        if not score.startswith("core(") or a.dtype not in DTYPES or not M:
            return None
        num, den = ratio_of(float(score[5:-1]))
        a, tasks = a.contiguous(), min(torch.get_num_threads(), M)
        work, out, flag = (torch.empty(n, dtype=torch.int32) for n in (tasks * F, F, tasks))
        kernel = self.backend.load(cores_source(DTYPES[a.dtype], self.backend.isa))
        kernel(*(c_void_p(t.data_ptr()) for t in (a, work, out, flag)), M, F, num, den, tasks)
        if bool(flag.any()):
            raise SelectionError("the prompt gives NaN activations, by which no neurons can be chosen")
        return out


Run = Callable[..., Sequence[Any]]


def shrinking(program: Program, finish: Callable[[Program], Run]) -> Run | None:
    """fn(*flat inputs) of a program with a `shrink`: what stands before it and what its result decides are finished apart, since the
    second one's sizes are known when the first has run. None for a program without one."""
    at = next((node for node in program.graph.nodes if node.target is SHRINK), None)
    if at is None:
        return None
    behind = {at}
    for node in program.graph.nodes:
        if node.op != "output" and any(source in behind for source in node.all_input_nodes):
            behind.add(node)
    behind.remove(at)
    outputs = program.outputs
    order = [node for node in program.graph.nodes if node not in behind and node is not at and node.op not in ("get_attr", "output")]
    crossing = [node for node in order if any(user in behind for user in node.users)]
    given = [node for node in outputs if isinstance(node, fx.Node) and node not in behind and node is not at]
    padded, count = at.all_input_nodes
    made = list(dict.fromkeys([padded, count, *crossing, *given]))
    head = finish(_part(program, lambda node: node in behind or node is at, [], made))
    results = [node for node in outputs if isinstance(node, fx.Node) and node in behind]
    tail = finish(_part(program, lambda node: node not in behind, [at, *crossing], results))

    def run(*inputs: Any) -> Sequence[Any]:
        values = dict(zip(made, head(*inputs), strict=True))
        values[at] = shrink(values[padded], values[count])
        values |= dict(zip(results, tail(values[at], *(values[node] for node in crossing)), strict=True))
        return [values[one] if isinstance(one, fx.Node) else one for one in outputs]

    return run


def _part(program: Program, without: Callable[[fx.Node], bool], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Program:
    """A program of some of the nodes. `inputs` become placeholders, before them those of the program if none are given."""
    part = program.clone()
    pairs = dict(zip(program.graph.nodes, part.graph.nodes, strict=True))
    graph = part.graph
    first = next(iter(graph.nodes))
    swapped: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        with graph.inserting_before(first):
            fresh = graph.placeholder(f"{node.name}_given")
        fresh.meta.update({key: node.meta[key] for key in ("val", "example_value", TYPE_KEY) if key in node.meta})
        swapped[pairs[node]] = fresh
    graph.output_node().args = (tuple(swapped.get(pairs[node], pairs[node]) for node in outputs),)
    for old, fresh in swapped.items():
        old.replace_all_uses_with(fresh)
    for node in reversed(list(program.graph.nodes)):
        if node.op not in ("output", "get_attr") and (without(node) or (inputs and node.op == "placeholder")):
            graph.erase_node(pairs[node])
    part.finish()
    return part
