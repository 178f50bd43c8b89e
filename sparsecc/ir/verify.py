"""What a program may contain at each stage, and the check that runs after every pass."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsecc.errors import SparseccError, VerifyError
from sparsecc.ir.image_ops import IMAGE_MEANINGS
from sparsecc.ir.ops import ACTIVATIONS, LAYOUTS, LINEAR
from sparsecc.ir.program import LinearView, Program, get_attr
from sparsecc.ir.token_ops import DIALECT
from sparsecc.ir.types import TensorType, type_of


@dataclass(frozen=True)
class Stage:
    """Allowed forms of sparsecc.linear after the pass of that name."""

    dialect: bool = True
    formats: bool = True
    layouts: tuple[str, ...] = LAYOUTS
    between: bool = True
    """Whether norms and attention may be the dialect's."""
    kernels: bool | None = None
    """True: every linear has one. False: none has. None: either."""


_GRAPH = Stage(formats=False, layouts=("row",), between=False, kernels=False)
STAGES: dict[str, Stage] = {
    "capture": Stage(dialect=False, between=False),
    "canonicalize": _GRAPH,
    "select": _GRAPH,
    "skip": _GRAPH,
    "core": _GRAPH,
    "propagate": _GRAPH,
    "convolve": _GRAPH,
    "fuse": _GRAPH,
    "pack": Stage(layouts=("row",), between=False, kernels=False),
    "bundle": Stage(layouts=("row",), between=False, kernels=False),
    "layout": Stage(kernels=False),
    "rows": Stage(kernels=False),
    "lower": Stage(kernels=True),
}
ANYTHING = Stage()
"""For stages that the table doesn't name."""


def verify(program: Program, stage: str | None = None, patterns: bool = False) -> None:
    """Raise VerifyError, naming the node and the stage, unless the program keeps the rules of `stage` (default: its own).

    `patterns` also checks that the weights have the zeros their terms claim: slow, for tests and debugging.
    """
    stage = stage or program.stage
    try:
        program.graph.lint()
    except Exception as error:  # lint raises what it likes
        raise VerifyError(f"after {stage}: malformed graph: {error}") from error
    if program.graph.output_node().args and not isinstance(program.graph.output_node().args[0], tuple | list):
        raise VerifyError(f"after {stage}: the output must be a flat tuple")
    for node in program.graph.nodes:
        if node.op == "get_attr":
            _require_attr(program, node, stage)
        if node.op == "call_function" and node.target is LINEAR:
            problem = _stage_problem(node, STAGES.get(stage, ANYTHING)) or _problem(program, node, patterns)
            if problem:
                raise VerifyError(f"after {stage}: {node.name}: {problem}")
        elif node.op == "call_function" and (node.target in DIALECT or node.target in IMAGE_MEANINGS):
            rule = STAGES.get(stage, ANYTHING)
            if node.target in IMAGE_MEANINGS and not rule.dialect:
                raise VerifyError(f"after {stage}: {node.name}: {node.target} is made by convolve")
            if node.target in DIALECT and not rule.between:
                raise VerifyError(f"after {stage}: {node.name}: {node.target} is made by layout and rows")
            if rule.kernels is not None and bool(node.args[-1]) != rule.kernels:
                raise VerifyError(f"after {stage}: {node.name}: {'has no kernel' if rule.kernels else 'has a kernel before lower'}")


def _require_attr(program: Program, node: fx.Node, stage: str) -> None:
    try:
        get_attr(program.gm, str(node.target))
    except AttributeError as error:
        raise VerifyError(f"after {stage}: {node.name}: there is no constant {str(node.target)!r}") from error


def _stage_problem(node: fx.Node, rule: Stage) -> str | None:
    if not rule.dialect:
        return "no sparsecc.linear is allowed yet"
    if len(node.args) != len(LinearView.FIELDS) or node.kwargs:
        return f"takes exactly the positional arguments {', '.join(LinearView.FIELDS)}"
    view = LinearView(node)
    if not all(isinstance(text, str) for text in node.args[4:]):
        return "terms, epilogue, layout and kernel are text"
    try:
        terms = view.terms
    except SparseccError as error:
        return f"terms do not parse: {error}"
    if not rule.formats and any(term.format is not None for term in terms):
        return "no term may have a format yet"
    if view.layout not in rule.layouts:
        return f"layout {view.layout!r} is not one of {', '.join(rule.layouts)}"
    if rule.kernels is not None and bool(view.kernel) != rule.kernels:
        return "has no kernel" if rule.kernels else f"has a kernel ({view.kernel}) before lower"
    if view.epilogue not in ACTIVATIONS:
        return f"unknown epilogue {view.epilogue!r}; known: {', '.join(filter(None, ACTIVATIONS))}"
    return None


def _problem(program: Program, node: fx.Node, patterns: bool) -> str | None:
    view = LinearView(node)
    try:
        groups = view.term_params
    except SparseccError as error:
        return str(error)
    for term, params in zip(view.terms, groups, strict=True):
        if len(term.shape) != 2 or not all(isinstance(d, int) for d in term.shape):
            return f"term {term} is not a matrix [N, K] of fixed size"
        if term.shape != view.terms[0].shape:
            return f"terms disagree on the shape: {view.terms[0]} and {term}"
        if problem := _params_problem(program, term, params, patterns):
            return problem
    return _operands_problem(program, view)


def _operands_problem(program: Program, view: LinearView) -> str | None:
    N, K = view.shape
    x, y = program.type(view.x), program.type(view.node)
    if not isinstance(view.x, fx.Node):
        return "x is not a value"
    if x is not None and (not x.shape or x.shape[-1] != K):
        return f"x is {x}, but the weight has K = {K}"
    bias = _known(program, view.bias)
    if bias is not None and bias.shape != (N,):
        return f"bias is {bias}, not [{N}]"
    if view.residual is None:
        return None
    residual = program.type(view.residual)
    if residual is not None and y is not None and residual.shape != y.shape:
        return f"residual is {residual}, the result {y}"
    return None


def _params_problem(program: Program, term: TensorType, params: Sequence[fx.Node], patterns: bool) -> str | None:
    found = [_known(program, p) for p in params]
    if any(f is None for f in found):
        return None
    N, K = (int(d) for d in term.shape)
    if term.rank is not None:
        for param, has, want in zip(params, found, ((N, term.rank), (term.rank, K)), strict=True):
            if has is not None and has.shape != want:
                return f"factor {param.name} is {has}, not {list(want)}"
        return None
    if term.format is None:
        if found[0] is not None and (found[0].shape, found[0].dtype) != (term.shape, term.dtype):
            return f"weight {params[0].name} is {found[0]}, its term says {term}"
        if patterns and params[0].op == "get_attr" and (bad := term.zeros.mask_violation(program.const(params[0]))):
            return f"weight {params[0].name} is not {term.zeros}: {bad}"
        return None
    dtypes = term.format.dtypes(N, K)
    for name, param, has in zip(term.format.components(), params, found, strict=True):
        if has is not None and has.dtype != dtypes[name]:
            return f"{name} of {term.format} ({param.name}) is {has.dtype}, not {dtypes[name]}"
    return None


def _known(program: Program, node: Any) -> TensorType | None:
    if not isinstance(node, fx.Node):
        return None
    if node.op == "get_attr" and isinstance(tensor := program.const(node), torch.Tensor):
        return type_of(tensor)
    return program.type(node)
