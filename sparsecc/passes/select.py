"""select: which zeros each weight has, or must have.

    y = linear(x, [w], terms="f32[N, K]")     -->  y = linear(x, [w], terms="f32[N, K] % block(4, 1)")

Under "detect" the pattern is the most structured one that explains the zeros that are there. A named pattern is a requirement:
a weight that breaks it raises.
"""
from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sparsecc.errors import PatternViolation, SpecError
from sparsecc.formats import ANY, Pattern, measure
from sparsecc.ir.program import LinearView, Program, Region, Rule
from sparsecc.names import Names
from sparsecc.passes.context import Context
from sparsecc.spec import Rule as SpecRule
from sparsecc.spec import SparsitySpec

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Select:
    """The pass; see the file's docstring."""

    name: str = "select"
    requires: tuple[str, ...] = ("linears",)
    ensures: tuple[str, ...] = ("patterns",)

    @property
    def rules(self) -> Mapping[Any, Rule]:
        return {}

    def run(self, program: Program, context: Any = None) -> None:
        spec = context.spec if isinstance(context, Context) else SparsitySpec()
        views = [view for view in program.linears() if view.plain and program.is_const(view.params[0])]
        _check_globs(program, views, spec)
        for view in views:
            _select(program, view, spec)


def _select(program: Program, view: LinearView, spec: SparsitySpec) -> None:
    weight, modules = program.const(view.params[0]), _modules(program, view)
    region, named = program.region(view.node), any(map(spec.names, modules))
    region.more["shape"] = tuple(weight.shape)
    region.more["dense_bytes"] = weight.numel() * weight.element_size()
    rule = _rule(spec, modules)
    if rule.codec or rule.compute:
        region.more["codec"] = f"{rule.codec or ''}{' products' if rule.compute else ''}"
    if rule.mode == "dense":
        region.reason = "the spec leaves it dense"
    elif weight.numel() == 0:
        region.reason = "empty weight"
    elif rule.mode == "require" and _tied(view.params[0]) and not named:
        region.reason = "tied to an embedding: name it in the spec to include it"
    else:
        if rule.pattern is not None:
            _require(modules[0], weight, rule.pattern)
            region.more["zeros"] = _zeros(weight)
        if weight.dtype not in FLOATS:
            region.reason = f"weights of {weight.dtype} are not packed"
            return
        pattern = _found(region, weight) if rule.pattern is None else rule.pattern
        if pattern != ANY:
            region.pattern = str(pattern)
            view.replace(terms=(view.terms[0].with_(pattern=pattern),))


def _check_globs(program: Program, views: Sequence[LinearView], spec: SparsitySpec) -> None:
    """A glob may name any linear of the model, in this graph or not. Where the rest of the model is unknown, a miss is a warning."""
    names = Names.found(program)
    known = dict.fromkeys([module for view in views for module in _modules(program, view)] + list(names.linears))
    try:
        spec.check_globs(known)
    except SpecError as error:
        if not names.partial:
            raise
        warnings.warn(f"sparsecc: in this part of the model {error}", stacklevel=2)


def _rule(spec: SparsitySpec, modules: Sequence[str]) -> SpecRule:
    """The rule of a weight, which may be named by any of its modules. Raises SpecError where two of them have different rules."""
    rules = {module: spec.rule_for(module) for module in modules if spec.names(module)}
    if len(set(rules.values())) > 1:
        said = ", ".join(f"{module} -> {rule}" for module, rule in rules.items())
        raise SpecError(f"these modules share one weight, but the spec has different rules for them: {said}")
    return next(iter(rules.values()), spec.rule_for(modules[0]))


def _require(name: str, weight: Tensor, pattern: Pattern) -> None:
    violation = pattern.mask_violation(weight)
    if violation:
        raise PatternViolation(
            f"{name}.weight must be {pattern}, but {violation}. "
            f"Make it so with sparsecc.prune(model, {{{name!r}: {str(pattern)!r}}}), or ask for sparsity=\"detect\""
        )


def _found(region: Region, weight: Tensor) -> Pattern:
    measured = measure(weight)
    region.more["zeros"] = 1 - measured.density
    pattern = measured.explain()
    if pattern == ANY:
        zeros = 1 - measured.density
        region.reason = "no zeros" if zeros == 0 else f"only {zeros:.1%} zeros"
    return pattern


def _zeros(weight: Tensor) -> float:
    return 1 - int(weight.count_nonzero()) / max(1, weight.numel())


def _tied(node: fx.Node) -> bool:
    """Whether something other than linears reads the weight, such as the embedding that shares it."""
    return any(not _reads_as_weight(node, user) for user in node.users)


def _reads_as_weight(node: fx.Node, user: fx.Node) -> bool:
    return user.op == "call_function" and "sparsecc.linear" in str(user.target) and user.args[0] is not node


def _modules(program: Program, view: LinearView) -> tuple[str, ...]:
    return Names.found(program).modules(program.weight_name(view.params[0]))
