"""Made-up constants for programs that come as text alone: always the same for the same name, with the zeros their types claim."""
from __future__ import annotations

import zlib
from dataclasses import replace

import torch
from torch import fx

from sparsecc.formats import ANY, NM, Level, Pattern, Unstructured
from sparsecc.formats import level as levels
from sparsecc.ir.ops import LINEAR, parse_terms, split_params
from sparsecc.ir.program import TYPE_KEY
from sparsecc.ir.types import TensorType

_SPARSITY = 0.5
"""For patterns that don't say how much is zero."""


def invent(graph: fx.Graph) -> dict[str, torch.Tensor]:
    """A tensor for every get_attr of the graph, by attribute; formatted terms get the packed parts of one matrix."""
    made: dict[str, torch.Tensor] = {}
    wanted: dict[str, TensorType] = {str(n.target): n.meta[TYPE_KEY] for n in graph.nodes if n.op == "get_attr"}
    for node in graph.nodes:
        if node.op != "call_function" or node.target is not LINEAR:
            continue
        terms = parse_terms(node.args[4])
        for term, params in zip(terms, split_params(terms, node.args[1]), strict=True):
            names = [str(p.target) for p in params if p.op == "get_attr"]
            if term.format is not None and len(names) == len(params) and names[0] not in made:
                weight = invent_one(names[0], term.with_(pattern=_for_level(term.zeros, term.format.level)))
                made |= zip(names, (term.format.pack(weight)[c] for c in term.format.components()), strict=True)
            elif term.format is None and term.rank is None and names and wanted[names[0]].pattern == ANY:
                wanted[names[0]] = wanted[names[0]].with_(pattern=term.pattern)
    return {name: made[name] if name in made else invent_one(name, found) for name, found in wanted.items()}


def invent_one(name: str, found: TensorType) -> torch.Tensor:
    """Normal numbers (positive ones for variances), 0 and 1 for integers and bools, zeros imposed by the pattern."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    shape = tuple(int(d) for d in found.shape)
    if not (found.dtype.is_floating_point or found.dtype.is_complex):
        return torch.randint(0, 2, shape, generator=generator).to(found.dtype)
    value = torch.randn(shape, generator=generator)
    if name.endswith("running_var"):
        value = value.abs() + 0.5
    if found.zeros != ANY and len(shape) == 2:
        value = value * _concrete(found.zeros).topk_mask(value.abs())
    return value.to(found.dtype)


def _concrete(pattern: Pattern) -> Pattern:
    """The pattern with a sparsity, so that it says which mask to make."""
    if hasattr(pattern, "sparsity") and getattr(pattern, "sparsity") is None:  # noqa: B009
        return replace(pattern, sparsity=_SPARSITY)  # type: ignore[call-arg]
    return pattern


def _for_level(pattern: Pattern, level: Level) -> Pattern:
    """A pattern that the level can hold, if the term states none."""
    if pattern != ANY:
        return pattern
    return NM(level.n, level.m) if isinstance(level, levels.NM) else Unstructured(_SPARSITY)
