"""select: which zeros each weight has, or must have.

    y = linear(x, [w], terms="f32[N, K]")     -->  y = linear(x, [w], terms="f32[N, K] % block(4, 1)")

A convolution's weight counts as a matrix [out, in * kh * kw]; what is known of it is written down when it becomes a linear (`convolve`).
Under "detect" the pattern is the most structured one that explains the zeros that are there. A named pattern is a requirement:
a weight that breaks it raises.
"""
from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sparsecc.errors import PatternViolation, SpecError
from sparsecc.formats import ANY, Pattern, measure
from sparsecc.ir.program import Program, Region
from sparsecc.names import Names
from sparsecc.passes.context import Context
from sparsecc.passes.convolution import CONVOLUTION, ConvView, conv_region, convolutions
from sparsecc.spec import DETECT, SparsitySpec
from sparsecc.spec import Rule as SpecRule

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Select:
    """The pass; see the file's docstring."""

    name: str = "select"
    requires: tuple[str, ...] = ("linears",)
    ensures: tuple[str, ...] = ("patterns",)

    def run(self, program: Program, context: Any = None) -> None:
        spec = context.spec if isinstance(context, Context) else SparsitySpec()
        views = [view for view in program.linears() if view.plain and program.is_const(view.params[0])]
        convs = convolutions(program)
        _check_globs(program, [view.params[0] for view in views] + [conv.node.args[1] for conv in convs], spec)
        for view in views:
            pattern = zeros_of(program, view.params[0], program.const(view.params[0]), program.region(view.node), spec)
            if pattern != ANY:
                view.replace(terms=(view.terms[0].with_(pattern=pattern),))
        for conv in convs:
            zeros_of_convolution(program, conv, spec)


def zeros_of_convolution(program: Program, conv: ConvView, spec: SparsitySpec, enforce: bool = True) -> Pattern:
    """The pattern of a convolution's weight as a matrix [out, in * kh * kw]; notes are left on its region."""
    region, weight = conv_region(program, conv), conv.node.args[1]
    region.reason = conv.dense_because()
    if region.reason:
        region.more |= {"shape": tuple(conv.weight.shape), "dense_bytes": conv.weight.numel() * conv.weight.element_size()}
        return ANY
    return zeros_of(program, weight, conv.matrix(), region, spec, enforce, conv.plain)  # type: ignore[arg-type]


def zeros_of(
    program: Program, node: fx.Node, weight: Tensor, region: Region, spec: SparsitySpec, enforce: bool = True, bare: bool = True
) -> Pattern:
    """The pattern of a weight, which is `node`'s as a matrix; notes are left on its region.

    `enforce`: raise PatternViolation where a named pattern does not hold, else the zeros that are there count. `bare`: whether a pattern
    for all weights means this one too.
    """
    modules = _modules(program, node)
    named = any(map(spec.names, modules))
    region.more["shape"] = tuple(weight.shape)
    region.more["dense_bytes"] = weight.numel() * weight.element_size()
    rule = _rule(spec, modules)
    if rule.mode == "require" and not (bare or named):
        rule = DETECT
    if rule.codec or rule.compute:
        region.more["codec"] = f"{rule.codec or ''}{' products' if rule.compute else ''}"
    if rule.mode == "dense":
        region.reason = "the spec leaves it dense"
    elif weight.numel() == 0:
        region.reason = "empty weight"
    elif rule.mode == "require" and _tied(node) and not named:
        region.reason = "tied to an embedding: name it in the spec to include it"
    else:
        wanted = rule.pattern
        if wanted is not None and not enforce and wanted.mask_violation(weight):
            wanted = None
        if wanted is not None:
            _require(modules[0], weight, wanted)
            region.more["zeros"] = _zeros(weight)
        if weight.dtype not in FLOATS:
            region.reason = f"weights of {weight.dtype} are not packed"
            return ANY
        pattern = _found(region, weight) if wanted is None else wanted
        if pattern != ANY:
            region.pattern = str(pattern)
        return pattern
    return ANY


def _check_globs(program: Program, weights: Sequence[Any], spec: SparsitySpec) -> None:
    """A glob may name any linear or convolution of the model, in this graph or not. Where the rest of the model is unknown, a miss is a
    warning."""
    names = Names.found(program)
    known = dict.fromkeys([module for weight in weights for module in _modules(program, weight)] + list(names.linears))
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
    return user.op == "call_function" and ("sparsecc.linear" in str(user.target) or user.target is CONVOLUTION) and user.args[0] is not node


def _modules(program: Program, weight: fx.Node) -> tuple[str, ...]:
    return Names.found(program).modules(program.weight_name(weight))
