"""Activations as vector arithmetic, without calls into libm (which LLVM would make lane by lane).

exp is 2^n * p(r) with |r| <= ln2/2 and a degree-6 polynomial: relative error below 3e-7 for |v| <= 87, clamped outside.
erf(a) is 1 - exp(a Q(a)) with Q a polynomial fitted to log(erfc(a)) / a on [0, 4.2], where erfc ends in float32: absolute error
below 2e-7 plus that of exp, and no division.
"""

from __future__ import annotations

from sparsecc.codegen.tvm.writer import Writer, constant

_EXP = (1.0, 1.0, 0.5, 1.6666667163372040e-01, 4.1666544973850250e-02, 8.3333505317568780e-03, 1.3888889225199819e-03)
_LOG_ERFC = (-1.1283838141773035, -0.63653689985929, -0.10325379641283151, 0.020415027302298022, -0.0015958874527117468,
             -0.00031989287500620866, 6.946010763553951e-05)


def write_activation(w: Writer, name: str, v: str, lanes: int) -> str:
    """Write the steps that compute activation `name` of the expression `v`; returns the resulting expression."""
    c = lambda value: constant(value, lanes)  # noqa: E731
    if name == "relu":
        return f"T.if_then_else({v} > {c(0.0)}, {v}, {c(0.0)})" if lanes == 1 else f"T.Select({v} > {c(0.0)}, {v}, {c(0.0)})"
    w(f"v: T.let = {v}")
    if name == "silu":
        return f"v / ({c(1.0)} + {_exp(w, f'({c(0.0)} - v)', lanes)})"
    if name == "gelu_tanh":
        w(f"u: T.let = {c(1.5957691216057308)} * (v + {c(0.044715)} * v * v * v)")
        return f"v / ({c(1.0)} + {_exp(w, f'({c(0.0)} - u)', lanes)})"  # 0.5 (1 + tanh(u/2)) = 1 / (1 + exp(-u))
    assert name == "gelu", name
    w(f"a: T.let = T.min(T.max(v, {c(0.0)} - v) * {c(0.7071067811865476)}, {c(4.2)})")
    w(f"q: T.let = {_exp(w, f'a * ({_horner(_LOG_ERFC, chr(97), lanes)})', lanes)}")  # 1 - erf(a)
    return f"{c(0.5)} * (v + T.max(v, {c(0.0)} - v) * ({c(1.0)} - q))"


def _horner(coefficients: tuple[float, ...], v: str, lanes: int) -> str:
    text = constant(coefficients[-1], lanes)
    for value in reversed(coefficients[:-1]):
        text = f"({text}) * {v} + {constant(value, lanes)}"
    return text


def _exp(w: Writer, v: str, lanes: int) -> str:
    c = lambda value: constant(value, lanes)  # noqa: E731
    int_type, float_type = ("int32", "float32") if lanes == 1 else (f"int32x{lanes}", f"float32x{lanes}")
    w(f"e: T.let = T.max(T.min({v}, {c(88.0)}), {c(-87.0)})")
    w(f'n: T.let = T.Cast("{int_type}", T.floor(e * {c(1.4426950408889634)} + {c(0.5)}))')
    w(f'nf: T.let = T.Cast("{float_type}", n)')
    w(f"r: T.let = e - nf * {c(0.693359375)} + nf * {c(2.12194440e-4)}")
    power = "T.int32(127)" if lanes == 1 else f"T.broadcast(T.int32(127), {lanes})"
    shift = "T.int32(23)" if lanes == 1 else f"T.broadcast(T.int32(23), {lanes})"
    w(f'two_n: T.let = T.reinterpret("{float_type}", T.shift_left(n + {power}, {shift}))')
    return f"(({_horner(_EXP, 'r', lanes)}) * two_n)"
