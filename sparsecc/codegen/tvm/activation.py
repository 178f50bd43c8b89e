"""Activations as vector arithmetic, without calls into libm (which LLVM would make lane by lane).

2^t is 2^n * p(t - n), n the nearest integer and p of degree 5: relative error below 2e-7. exp(v) is 2^(v log2 e), and as exact for
|v| <= 87. Below it stays exp(-87), from about 88.4 on it is infinity, so that v / (1 + exp(-v)) goes to zero for large negative v and to
NaN for -inf, as in torch. Under a softmax, where what counts is the error times the result, v log2 e is rounded once: 2e-7 + 2e-8 |v|
(6e-8 |v| without fused multiply-add).
gelu(v) is max(v, 0) - |v| erfc(|v| / sqrt 2) / 2, and log2 of that erfc is |v| Q(|v|): Q is fitted for the least absolute error of gelu,
1e-7, up to where the second term vanishes in float32. No division.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsecc.codegen.tvm.writer import Writer, constant, splat

_LOG2E = 1.4426950408889634
_EXP2 = (1.0, 0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671513922512531, 0.0013264728477224708)
_EXP = tuple(c * _LOG2E**k for k, c in enumerate(_EXP2))
_ROUND = 12582912.0 + 127.0
"""1.5 * 2^23 + 127: adding it to t rounds t to the integer n and leaves n + 127, the exponent of 2^n, in the low bits."""
_LOG2_ERFC = (-1.1511471271514893, -0.45891568064689636, -0.05323818325996399, 0.007977461442351341, -0.0007398737361654639,
              2.9924127375124954e-05)  # fmt: skip
_ERFC_ENDS = 5.94


def write_activation(w: Writer, name: str, values: Sequence[str], lanes: int) -> list[str]:
    """Write the steps that compute activation `name` of each value; returns the resulting expressions.

    The values advance together, step by step: one alone is a chain of dependent instructions that leaves most of the core idle.
    """
    step = _Steps(w, lanes)
    c = step.constant
    if name == "relu":
        return [step.atleast(v, 0.0) for v in values]
    if name == "relu6":
        return [step.atmost(v, 6.0) for v in step("v", [step.atleast(v, 0.0) for v in values])]
    vs = step("v", values)
    if name == "hardswish":
        bounded = step("b", [step.atmost(b, 6.0) for b in step("b", [step.atleast(f"({v} + {c(3.0)})", 0.0) for v in vs])])
        return [f"{v} * {b} * {c(1 / 6)}" for v, b in zip(vs, bounded, strict=True)]
    if name == "silu":
        return [f"{v} / ({c(1.0)} + {e})" for v, e in zip(vs, step.exp([f"{c(0.0)} - {v}" for v in vs]), strict=True)]
    if name == "gelu_tanh":  # 0.5 (1 + tanh(u/2)) = 1 / (1 + exp(-u))
        us = step("u", [f"{c(-1.5957691216057308)} * ({v} + {c(0.044715)} * {v} * {v} * {v})" for v in vs])
        return [f"{v} / ({c(1.0)} + {e})" for v, e in zip(vs, step.exp(us), strict=True)]
    assert name == "gelu", name
    suffix = "" if lanes == 1 else f"x{lanes}"
    sizes = step("size", [f'T.call_llvm_pure_intrin("float32{suffix}", "llvm.fabs", {v})' for v in vs])
    halves = step.exp2(sizes, step.horner(_LOG2_ERFC, sizes), half=True)  # erfc / 2, garbage where it vanishes
    choose = "T.if_then_else" if lanes == 1 else "T.Select"
    tails = step("tail", [f"{choose}({s} < {c(_ERFC_ENDS)}, {s} * {h}, {c(0.0)})" for s, h in zip(sizes, halves, strict=True)])
    # (v + |v|) / 2 is max(v, 0), but NaN for NaN and for -inf, as torch has it.
    return [f"(({v} + {size}) * {c(0.5)} - {tail})" for v, size, tail in zip(vs, sizes, tails, strict=True)]


def write_exp(w: Writer, values: Sequence[str], lanes: int) -> list[str]:
    """e to each value, none above 0, exactly 0 below -87: what a softmax needs of keys that are masked."""
    step = _Steps(w, lanes)
    vs = step("v", values)
    zero, least = step.constant(0.0), step.constant(-87.0)
    powers = step.exp2(vs, [step.constant(_LOG2E)] * len(vs))
    return step("p", [f"T.Select({v} < {least}, {zero}, {e})" for v, e in zip(vs, powers, strict=True)])


def write_sigmoid(w: Writer, values: Sequence[str], lanes: int) -> list[str]:
    """1 / (1 + exp(-v)) of each value; NaN stays NaN."""
    step = _Steps(w, lanes)
    vs, one = step("v", values), step.constant(1.0)
    powers = step.exp([f"{step.constant(0.0)} - {v}" for v in vs])
    number = lambda value: splat(f"T.int32({value})", lanes)  # noqa: E731
    suffix = "" if lanes == 1 else f"x{lanes}"
    sizes = [f'T.bitwise_and(T.reinterpret("int32{suffix}", {v}), {number(2147483647)})' for v in vs]
    return [f"T.Select({size} > {number(2139095040)}, {v}, {one} / ({one} + {e}))" for size, v, e in zip(sizes, vs, powers, strict=True)]


@dataclass(frozen=True)
class _Steps:
    """Writes one step for every value before the next step of any."""

    w: Writer
    lanes: int

    def __call__(self, name: str, values: Sequence[str]) -> list[str]:
        return [self.w.let(name, value) for value in values]

    def constant(self, value: float) -> str:
        return constant(value, self.lanes)

    def atleast(self, value: str, bound: float) -> str:
        """The larger one; NaN stays NaN."""
        return f"{'T.if_then_else' if self.lanes == 1 else 'T.Select'}({value} < {self.constant(bound)}, {self.constant(bound)}, {value})"

    def atmost(self, value: str, bound: float) -> str:
        """The smaller one; NaN stays NaN."""
        return f"{'T.if_then_else' if self.lanes == 1 else 'T.Select'}({value} > {self.constant(bound)}, {self.constant(bound)}, {value})"

    def horner(self, coefficients: Sequence[float], at: Sequence[str]) -> list[str]:
        """The polynomial of each value, lowest coefficient first."""
        sums = [self.constant(coefficients[-1])] * len(at)
        for value in reversed(coefficients[:-1]):
            sums = self("p", [f"{p} * {v} + {self.constant(value)}" for p, v in zip(sums, at, strict=True)])
        return sums

    def exp2(self, values: Sequence[str], factors: Sequence[str], half: bool = False) -> list[str]:
        """2^(value * factor) where that exponent lies in [-126, 127], garbage elsewhere; with `half`, half of it."""
        bias = self.constant(_ROUND - half)
        sums = self("sum", [self._fused(v, f, bias) for v, f in zip(values, factors, strict=True)])
        zero = self.constant(0.0)
        rs = self("r", [self._fused(v, f, f"({zero} - ({s} - {bias}))") for v, f, s in zip(values, factors, sums, strict=True)])
        return self("exp", [f"{p} * {power}" for p, power in zip(self.horner(_EXP2, rs), self._powers(sums), strict=True)])

    def exp(self, values: Sequence[str]) -> list[str]:
        """e to each value."""
        c = self.constant
        es = self("e", [f"T.max(T.min({v}, {c(89.0)}), {c(-87.0)})" for v in values])
        sums = self("sum", [self._fused(e, c(_LOG2E), c(_ROUND)) for e in es])
        ns = self("n", [f"{s} - {c(_ROUND)}" for s in sums])
        rs = self("r", [f"{e} - {n} * {c(0.693359375)} + {n} * {c(2.12194440e-4)}" for e, n in zip(es, ns, strict=True)])
        return self("exp", [f"{p} * {power}" for p, power in zip(self.horner(_EXP, rs), self._powers(sums), strict=True)])

    def _fused(self, a: str, b: str, c: str) -> str:
        """a * b + c. An intrinsic, because TVM would cancel a constant that is added here and taken off again."""
        suffix = "" if self.lanes == 1 else f"x{self.lanes}"
        return f'T.call_llvm_pure_intrin("float32{suffix}", "llvm.fmuladd", {a}, {b}, {c})'

    def _powers(self, sums: Sequence[str]) -> list[str]:
        """2^n of t + _ROUND."""
        suffix, shift = "" if self.lanes == 1 else f"x{self.lanes}", splat("T.int32(23)", self.lanes)
        bits = [f'T.reinterpret("int32{suffix}", {s})' for s in sums]
        return self("power", [f'T.reinterpret("float32{suffix}", T.shift_left({b}, {shift}))' for b in bits])
