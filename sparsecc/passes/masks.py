"""masks: where a mask's own arithmetic says what it hides, attention is told so and the mask goes.

    m = le(index(arange(S), ...), index(arange(S), ...)) & eq(cumsum(ne(diff(arange(S)), 1)), ...)     b1[1, 1, S, S]
    y = scaled_dot_product_attention(q, k, v, m)    -->  y = scaled_dot_product_attention(q, k, v, is_causal=True)

transformers makes the mask of every prompt from positions, as if several sequences might lie in one row. What stands for a tensor here is
its value as an affine function of its indices, or, of a bool one, where such a function is not positive; so the proof is exact, for every
size. A mask that depends on an input is none of this, and stays. One that hides nothing goes, too.
"""
from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from sparsecc.ir.effects import mutates
from sparsecc.ir.infer import value_of
from sparsecc.ir.program import Program
from sparsecc.passes.attention import SDPA

aten = torch.ops.aten
INTEGERS = (torch.int64, torch.int32)


@dataclass(frozen=True)
class Affine:
    """value[i, j, ...] = const + sum of steps[d] * index d; steps are 0 along dimensions of one entry."""

    const: Any
    steps: tuple[Any, ...]

    def __sub__(self, other: Affine) -> Affine:
        rank = max(len(self.steps), len(other.steps))
        pairs = zip(self.over(rank).steps, other.over(rank).steps, strict=True)
        return Affine(sympy.expand(self.const - other.const), tuple(sympy.expand(a - b) for a, b in pairs))

    def over(self, rank: int) -> Affine:
        """The same with so many dimensions."""
        return Affine(self.const, (0,) * (rank - len(self.steps)) + self.steps)

    def plus(self, more: Any) -> Affine:
        return Affine(sympy.expand(self.const + more), self.steps)


@dataclass(frozen=True)
class Where:
    """A bool tensor: true where `value` <= 0."""

    value: Affine


ALWAYS, NEVER = Where(Affine(0, ())), Where(Affine(1, ()))


@dataclass(frozen=True)
class Masks:
    """The pass; see the file's docstring."""

    name: str = "masks"
    requires: tuple[str, ...] = ("linears",)
    ensures: tuple[str, ...] = ()

    def run(self, program: Program, context: Any = None) -> None:
        if any(mutates(node) for node in program.graph.nodes if node.op != "output"):
            return  # perhaps to what a mask is made of
        proof = _Proof()
        for node in list(program.graph.nodes):
            if node.target is SDPA and isinstance(_mask(node), fx.Node):
                kind = proof.kind(node)
                if kind:
                    _tell(node, kind == "causal")
        program.finish()


def _mask(node: fx.Node) -> Any:
    return node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")


def _tell(node: fx.Node, causal: bool) -> None:
    """No mask; causal or not."""
    dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    node.args = (*node.args[:3], None, dropout, causal)
    node.kwargs = {name: value for name, value in node.kwargs.items() if name in ("scale", "enable_gqa")}


class _Proof:
    """What nodes stand for, None where nothing is known."""

    def __init__(self) -> None:
        self.known: dict[fx.Node, Affine | Where | None] = {}

    def kind(self, node: fx.Node) -> str:
        """"causal" or "all" of an attention's mask, "" if neither is proved."""
        mask = _mask(node)
        found = self.of(mask)
        if not isinstance(found, Where):
            return ""
        if found == ALWAYS:
            return "all"
        q, k = (value_of(arg) for arg in node.args[:2])  # type: ignore[arg-type]
        *others, row, column = found.value.over(max(4, len(found.value.steps))).steps
        square = str(q.shape[-2]) == str(k.shape[-2])
        return "causal" if square and not any(others) and (found.value.const, row, column) == (0, -1, 1) else ""

    def of(self, node: Any) -> Affine | Where | None:
        """A tensor's, or a number's."""
        if not isinstance(node, fx.Node):
            return Affine(sympy.Integer(node), ()) if isinstance(node, int) and not isinstance(node, bool) else None
        if node not in self.known:
            self.known[node] = None
            self.known[node] = self._of(node)
        return self.known[node]

    def _of(self, node: fx.Node) -> Affine | Where | None:
        value = value_of(node)
        if isinstance(value, torch.SymInt):
            return Affine(value.node.expr, ())
        rule = RULES.get(node.target)
        if rule is None or not isinstance(value, torch.Tensor) or value.dtype not in (*INTEGERS, torch.bool):
            return None
        found = rule(self, node)
        if found is None:
            return None
        inner = found.value if isinstance(found, Where) else found
        steps = zip(value.shape, inner.over(value.ndim).steps, strict=True)
        inner = Affine(inner.const, tuple(0 if _one(size) else step for size, step in steps))
        return _decided(inner, value.shape) if isinstance(found, Where) else inner


def _decided(value: Affine, shape: Any) -> Where:
    """Where it is not positive; ALWAYS or NEVER, if that holds of its largest or smallest entry whatever the sizes are."""
    sizes = [sympy.Integer(size) if isinstance(size, int) else size.node.expr for size in shape]
    ends = [(step, step * (size - 1)) for size, step in zip(sizes, map(sympy.sympify, value.over(len(sizes)).steps), strict=True)]
    if all(step.is_number for step, _ in ends):
        highest = sympy.expand(value.const + sum(end for step, end in ends if step > 0))
        lowest = sympy.expand(value.const + sum(end for step, end in ends if step < 0))
        if highest.is_number and highest <= 0:
            return ALWAYS
        if lowest.is_number and lowest > 0:
            return NEVER
    return Where(value)


def _one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


# ---- rules: what an op makes of what is known of its arguments

Rule = Callable[[_Proof, fx.Node], "Affine | Where | None"]


def _arange(proof: _Proof, node: fx.Node) -> Affine | None:
    start, step = (0, 1) if len(node.args) < 2 else (node.args[0], node.args[2] if len(node.args) > 2 else 1)
    first = proof.of(start)
    return Affine(first.const, (step,)) if isinstance(first, Affine) and isinstance(step, int) else None


def _sum(sign: int) -> Rule:
    def rule(proof: _Proof, node: fx.Node) -> Affine | None:
        a, b = (proof.of(arg) for arg in node.args[:2])
        if not isinstance(a, Affine) or not isinstance(b, Affine) or node.kwargs.get("alpha", 1) != 1:
            return None
        return a - (Affine(-b.const, tuple(-step for step in b.steps)) if sign > 0 else b)

    return rule


def _compare(name: str) -> Rule:
    """Of integers: a < b is a + 1 <= b."""

    def rule(proof: _Proof, node: fx.Node) -> Where | None:
        a, b = (proof.of(arg) for arg in node.args[:2])
        if not isinstance(a, Affine) or not isinstance(b, Affine):
            return None
        match name:
            case "le" | "lt":
                return Where((a - b).plus(int(name == "lt")))
            case "ge" | "gt":
                return Where((b - a).plus(int(name == "gt")))
        difference = a - b
        if any(difference.steps) or not sympy.sympify(difference.const).is_number:
            return None
        return ALWAYS if (difference.const == 0) == (name == "eq") else NEVER

    return rule


def _and(proof: _Proof, node: fx.Node) -> Where | None:
    a, b = (proof.of(arg) for arg in node.args[:2])
    if NEVER in (a, b):
        return NEVER
    if not isinstance(a, Where) or not isinstance(b, Where):
        return None
    return b if a == ALWAYS else a if b in (ALWAYS, a) else None


def _same(proof: _Proof, node: fx.Node) -> Affine | Where | None:
    """Conversions between integers, and views that add dimensions in front."""
    found = proof.of(node.args[0])
    return found if isinstance(found, Affine) == (value_of(node).dtype in INTEGERS) else None


def _unsqueeze(proof: _Proof, node: fx.Node) -> Affine | Where | None:
    found, rank = proof.of(node.args[0]), value_of(node).ndim
    at = int(node.args[1]) % rank  # type: ignore[arg-type]
    inner = found.value if isinstance(found, Where) else found
    if inner is None:
        return None
    steps = inner.over(rank - 1).steps
    inner = Affine(inner.const, (*steps[:at], 0, *steps[at:]))
    return Where(inner) if isinstance(found, Where) else inner


def _slice(proof: _Proof, node: fx.Node) -> Affine | None:
    found = proof.of(node.args[0])
    dim, start, _, step = (*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :])
    start = 0 if start is None else start
    if not isinstance(found, Affine) or not isinstance(start, int) or start < 0 or not isinstance(step, int):
        return None
    rank = value_of(node).ndim
    steps = list(found.over(rank).steps)
    at = int(dim) % rank  # type: ignore[arg-type]
    first, steps[at] = steps[at] * start, steps[at] * step
    return Affine(sympy.expand(found.const + first), tuple(steps))


def _diff(proof: _Proof, node: fx.Node) -> Affine | None:
    """Of each entry and the one before it, the first one being `prepend`."""
    x, n, dim, prepend, append = (*node.args, *(None, 1, -1, None, None)[len(node.args) :])
    found, before = proof.of(x), None if prepend is None else proof.of(prepend)
    if n != 1 or append is not None or not isinstance(found, Affine):
        return None
    rank = value_of(node).ndim
    at = int(dim) % rank  # type: ignore[arg-type]
    step = found.over(rank).steps[at]
    if prepend is not None:
        if not isinstance(before, Affine) or not _one(value_of(prepend).shape[at]):  # type: ignore[arg-type]
            return None
        gap = found - before
        if gap.const != step or any(s for d, s in enumerate(gap.over(rank).steps) if d != at):
            return None
    return Affine(sympy.sympify(step), (0,) * rank)


def _cumsum(proof: _Proof, node: fx.Node) -> Affine | None:
    zero = proof.of(node.args[0]) in (NEVER, Affine(0, (0,) * value_of(node).ndim))
    return Affine(sympy.Integer(0), ()) if zero else None


def _index(proof: _Proof, node: fx.Node) -> Affine | None:
    """An entry for every index: the function of those. They are in range, and counted from the front if they are positive."""
    found, given = proof.of(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
    if not isinstance(found, Affine) or None in given or len(given) != value_of(node.args[0]).ndim:  # type: ignore[arg-type]
        return None
    steps, total = found.over(len(given)).steps, Affine(found.const, ())
    for step, one in zip(steps, given, strict=True):
        if step == 0:
            continue
        at = proof.of(one)
        if not isinstance(at, Affine) or not _counts_up(at):
            return None
        total = total - Affine(-step * at.const, tuple(-step * s for s in at.steps))
    return total


def _counts_up(at: Affine) -> bool:
    """Whether no index is negative."""
    numbers = [sympy.sympify(number) for number in (at.const, *at.steps)]
    return all(number.is_nonnegative for number in numbers)


def _ones(proof: _Proof, node: fx.Node) -> Where | None:
    return ALWAYS if value_of(node).dtype == torch.bool else None


COMPARISONS = ("le", "lt", "ge", "gt", "eq", "ne")
RULES: dict[Any, Rule] = {
    aten.arange.default: _arange, aten.arange.start: _arange, aten.arange.start_step: _arange,
    aten.add.Tensor: _sum(1), aten.sub.Tensor: _sum(-1), aten.unsqueeze.default: _unsqueeze, aten.slice.Tensor: _slice,
    aten.diff.default: _diff, aten.cumsum.default: _cumsum, aten.index.Tensor: _index,
    **dict.fromkeys((aten.expand.default, aten.to.dtype, aten._to_copy.default, aten.clone.default), _same),
    **dict.fromkeys((aten.ones.default, aten.new_ones.default, aten.ones_like.default), _ones),
    **dict.fromkeys((aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default, operator.and_), _and),
    **{getattr(getattr(aten, name), kind): _compare(name) for name in COMPARISONS for kind in ("Tensor", "Scalar")},
}  # fmt: skip
