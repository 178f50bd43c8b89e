"""Activations as vector arithmetic, without calls into libm (which LLVM would make lane by lane).

exp is 2^n * p(r) with |r| <= ln2/2 and a degree-6 polynomial: relative error below 3e-7 for |v| <= 87. Below it stays exp(-87), from
about 88.4 on it is infinity, so that v / (1 + exp(-v)) goes to zero for large negative v and to NaN for -inf, as in torch.
erf(a) is 1 - exp(a Q(a)) with Q a polynomial fitted to log(erfc(a)) / a on [0, 4.2], where erfc ends in float32: absolute error
below 2e-7 plus that of exp, and no division.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsecc.codegen.tvm.writer import Writer, constant, splat

_EXP = (1.0, 1.0, 0.5, 1.6666667163372040e-01, 4.1666544973850250e-02, 8.3333505317568780e-03, 1.3888889225199819e-03)
_ROUND = 12582912.0 + 127.0
_LOG_ERFC = (-1.1283838141773035, -0.63653689985929, -0.10325379641283151, 0.020415027302298022, -0.0015958874527117468,
             -0.00031989287500620866, 6.946010763553951e-05)


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
    sizes = step("size", [f"T.max({v}, {c(0.0)} - {v})" for v in vs])
    scaled = step("a", [f"T.min({size} * {c(0.7071067811865476)}, {c(4.2)})" for size in sizes])
    logs = [f"{a} * {p}" for a, p in zip(scaled, step.horner(_LOG_ERFC, scaled), strict=True)]
    rest = step.exp(logs, bounded=True)  # 1 - erf(a)
    return [f"{c(0.5)} * ({v} + {size} * ({c(1.0)} - {q}))" for v, size, q in zip(vs, sizes, rest, strict=True)]


def write_exp(w: Writer, values: Sequence[str], lanes: int) -> list[str]:
    """e to each value, exactly 0 below -87: what a softmax needs of keys that are masked."""
    step = _Steps(w, lanes)
    vs = step("v", values)
    zero, least = step.constant(0.0), step.constant(-87.0)
    return step("p", [f"T.Select({v} < {least}, {zero}, {e})" for v, e in zip(vs, step.exp(vs, bounded=True), strict=True)])


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

    def exp(self, values: Sequence[str], bounded: bool = False) -> list[str]:
        """e to each value. `bounded` values lie in [-87, 88] or their result is not used."""
        c = self.constant
        es = self("e", [v if bounded else f"T.max(T.min({v}, {c(89.0)}), {c(-87.0)})" for v in values])
        # Adding 1.5 * 2^23 + 127 rounds v / ln2 to the integer n and leaves n + 127 in the low bits: the exponent of 2^n.
        # An intrinsic, because TVM would cancel the constant that is added here and taken off again.
        suffix = "" if self.lanes == 1 else f"x{self.lanes}"
        fused = f'T.call_llvm_pure_intrin("float32{suffix}", "llvm.fmuladd", '
        sums = self("sum", [f"{fused}{e}, {c(1.4426950408889634)}, {c(_ROUND)})" for e in es])
        ns = self("n", [f"{s} - {c(_ROUND)}" for s in sums])
        rs = self("r", [f"{e} - {n} * {c(0.693359375)} + {n} * {c(2.12194440e-4)}" for e, n in zip(es, ns, strict=True)])
        shift = splat("T.int32(23)", self.lanes)
        bits = [f'T.reinterpret("int32{suffix}", {s})' for s in sums]
        powers = self("power", [f'T.reinterpret("float32{suffix}", T.shift_left({b}, {shift}))' for b in bits])
        return self("exp", [f"{p} * {power}" for p, power in zip(self.horner(_EXP, rs), powers, strict=True)])
