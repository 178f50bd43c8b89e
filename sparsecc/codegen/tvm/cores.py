"""Family cores: how many tokens have each neuron among the largest rho of their positive activations (CoreMatching, Wang et al. 2025).

    1  parallel over tokens   the number of a row's positive values, and by it how many count; the smallest value that does, by bisection
                              over the bits, which order positive floats as integers; then a count for each neuron, of each task
    2  parallel over neurons  out = the sum of every task's

A row is read some fifteen times, from the first-level cache, up to thirty where values are tied. Of equal values the first ones count.
NaN raises flag[task].
"""

from __future__ import annotations

from collections.abc import Callable

from sparsecc.codegen.tvm.entries import STORED, load
from sparsecc.codegen.tvm.host import Isa
from sparsecc.codegen.tvm.writer import Writer, splat, vec

INTS = ("M", "F", "num", "den", "tasks")
"""Scalar arguments: tokens; neurons; rho as a fraction; parts of `work` i32[tasks, F]."""


def cores_source(dtype: str, isa: Isa) -> str:
    """The kernel's text for activations of a dtype."""
    w, lanes = Writer(), isa.lanes
    with w.function("cores", {"a": STORED[dtype], "work": "int32", "out": "int32", "flag": "int32"}, INTS):
        with w.block("for task in T.parallel(tasks):"):
            w.opaque("own", "task * F")
            w.opaque("first", "M * task // tasks")
            w.opaque("rows", "M * (task + 1) // tasks - first")
            _vectors(w, lanes, lambda at, n: w(f"{vec('work', f'own + {at}', n)} = {splat('T.int32(0)', n)}"))
            w("flag[task] = 0")
            with w.block("for m in range(rows):"):
                w.opaque("row", "(first + m) * F")
                _write_row(w, dtype, lanes)
        with w.block("for task in T.parallel(tasks):"):
            with w.block("for i in range(F * (task + 1) // tasks - F * task // tasks):"):
                w("at: T.let = F * task // tasks + i")
                w("out[at] = 0")
                with w.block("for other in range(tasks):"):
                    w("out[at] = out[at] + work[other * F + at]")
    return w.text


def _write_row(w: Writer, dtype: str, lanes: int) -> None:
    """Adds one token's core neurons to the task's counts."""
    number = lambda value, n: splat(f"T.int32({value})", n)  # noqa: E731
    bits = lambda at, n: w.let("bits", f'T.reinterpret("int32{_x(n)}", {load("a", dtype, f"row + {at}", n)})')  # noqa: E731
    _count(w, lanes, "positive", bits, lambda b, n: f"{b} > {number(0, n)}")
    size = lambda b, n: f"T.bitwise_and({b}, {number(2147483647, n)})"  # noqa: E731
    _count(w, lanes, "nan", bits, lambda b, n: f"{size(b, n)} > {number(2139095040, n)}")
    w("flag[task] = flag[task] + nan[0]")
    w.opaque("limit", '(T.Cast("int64", positive[0]) * num + den - 1) // den')
    for name, start in (("low", "T.int32(1)"), ("high", "T.int32(2139095040)"), ("tied", "T.int32(1)")):
        w(f'{name} = T.alloc_buffer((1,), "int32", scope="global")')
        w(f"{name}[0] = {start}")
    with w.block("for step in range(T.if_then_else(limit > 0, 31, 0)):"):  # the largest bits that `limit` values reach
        with w.block("if low[0] < high[0]:"):
            w("middle: T.let = low[0] + (high[0] - low[0]) // 2 + (high[0] - low[0]) % 2")
            _count(w, lanes, "reach", bits, lambda b, n: f"{b} >= {splat('middle', n)}")
            w.opaque("enough", 'T.Cast("int64", reach[0]) - limit')
            w("tied[0] = T.if_then_else(enough == 0, 0, tied[0])")  # as many as wanted: the rest of the bits don't matter
            w("high[0] = T.if_then_else(enough > 0, high[0], T.if_then_else(enough < 0, middle - 1, middle))")
            w("low[0] = T.if_then_else(enough >= 0, middle, low[0])")
    with w.block("if limit > 0:"):
        w("cut: T.let = low[0] - 1 + tied[0]")

        def add(at: str, n: int) -> None:
            place = vec("work", f"own + {at}", n)
            w(f'{place} = {place} + T.Cast("int32{_x(n)}", {bits(at, n)} > {splat("cut", n)})')

        _vectors(w, lanes, add)
        with w.block("if tied[0] > 0:"):
            _count(w, lanes, "above", bits, lambda b, n: f"{b} > {splat('cut', n)}")
            w('spare = T.alloc_buffer((1,), "int64", scope="global")')
            w('spare[0] = limit - T.Cast("int64", above[0])')
            with w.block("for i in range(F):"):
                one = bits("i", 1)
                w(f"equal: T.let = T.And({one} == cut, spare[0] > 0)")
                w('work[own + i] = work[own + i] + T.Cast("int32", equal)')
                w('spare[0] = spare[0] - T.Cast("int64", equal)')


def _count(w: Writer, lanes: int, name: str, bits: Callable[[str, int], str], holds: Callable[[str, int], str]) -> None:
    """name[0] = for how many of a row's values, by their bits, something holds."""
    sums = w.registers_of("int32", f"{name}_sums", lanes)
    w(f"{sums} = {splat('T.int32(0)', lanes)}")

    def add(at: str, n: int) -> None:
        place = sums if n == lanes else f"{name}_sums[0]"
        w(f'{place} = {place} + T.Cast("int32{_x(n)}", {holds(bits(at, n), n)})')

    _vectors(w, lanes, add)
    w(f'{name} = T.alloc_buffer((1,), "int32", scope="global")')
    w(f"{name}[0] = 0")
    with w.block(f"for lane in range({lanes}):"):
        w(f"{name}[0] = {name}[0] + {name}_sums[lane]")


def _x(lanes: int) -> str:
    return "" if lanes == 1 else f"x{lanes}"


def _vectors(w: Writer, lanes: int, write: Callable[[str, int], None]) -> None:
    """`write(place, lanes)` for a row: vectors, then one by one."""
    with w.block(f"for v in range(F // {lanes}):"):
        w(f"at: T.let = v * {lanes}")
        write("at", lanes)
    with w.block(f"for v in range(F % {lanes}):"):
        w(f"at: T.let = F // {lanes} * {lanes} + v")
        write("at", 1)
