"""Family rows: what stands between linears when there are a few tokens (decode): rows of features, every feature is a lane.

norm      y[m][n] = (x[m][n] - mean) / sqrt(variance + eps) * weight[n] + bias[n]
gate      y[m][n] = act(a[m][n]) * b[m][n]
rotary    y[d] = x[d] cos[d] - x[d + D/2] sin[d],  y[d + D/2] = x[d + D/2] cos[d + D/2] + x[d] sin[d + D/2], per token and head
append    y = the cached tokens of every head, then the new ones

Values are float32, bf16 or fp16 and are computed in float32. What the model's own code rounds in between (the activation, the
normalized value before its weight, the products of a rotary embedding) is rounded here too. One thread does all: a launch costs more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sparsecc.codegen.tvm.activation import write_activation
from sparsecc.codegen.tvm.entries import STORED, load, store, widen
from sparsecc.codegen.tvm.streams import total
from sparsecc.codegen.tvm.writer import Writer, splat, vec

NORM_INTS = ("M", "N", "x_stride")
GATE_INTS = ("M", "N", "a_stride", "b_stride")
"""*_stride: between tokens; results are contiguous."""
ROTARY_INTS = ("B", "H", "S", "half", "x_batch", "x_head", "x_token", "c_batch", "c_token", "s_batch", "s_token")
"""half: of a head's features. The result is [B, S, H, D]."""
APPEND_INTS = ("heads", "G", "past", "S", "D", "x_batch", "x_head", "x_token")
"""heads: of all sequences, G of each; `past` tokens are cached for each, S come with x. The cache and the result are contiguous."""
ALONE = 1 << 16
"""Elements of a cache that one thread copies."""


def norm_rows_source(kind: str, dtype: str, lanes: int) -> str:
    """f(x, y, weight, bias, eps f32[1], *NORM_INTS)."""
    w, stored = Writer(), STORED[dtype]
    with w.function("norm_rows", dict.fromkeys(("x", "y", "weight", "bias"), stored) | {"eps": "float32"}, NORM_INTS):
        with w.block("for m in range(M):"):
            w.opaque("at", "m * x_stride")
            mean = "T.float32(0)"
            if kind == "layer":
                mean = w.let("mean", f"{_sum(w, lanes, lambda n, size: load('x', dtype, f'at + {n}', size))} / T.Cast('float32', N)")

            def centred(n: str, size: int) -> str:
                value = load("x", dtype, f"at + {n}", size)
                return w.let("d", value if kind == "rms" else f"{value} - {splat(mean, size)}")

            def square(n: str, size: int) -> str:
                d = centred(n, size)
                return f"{d} * {d}"

            squares = _sum(w, lanes, square)
            scale = w.let("scale", f"T.float32(1) / T.sqrt({squares} / T.Cast('float32', N) + eps[0])")
            for n, size in _whole(w, "N", lanes):
                value = f"{centred(n, size)} * {splat(scale, size)}"
                weight = load("weight", dtype, n, size)
                if kind == "rms":
                    result = f"{_rounded(w, value, dtype, size)} * {weight}"
                else:
                    result = f"{value} * {weight} + {load('bias', dtype, n, size)}"
                w(f"{vec('y', f'm * N + {n}', size)} = {store(w, result, dtype, size)}")
    return w.text


def gate_rows_source(activation: str, dtype: str, lanes: int) -> str:
    """f(a, b, y, *GATE_INTS)."""
    w = Writer()
    with w.function("gate_rows", dict.fromkeys(("a", "b", "y"), STORED[dtype]), GATE_INTS), w.block("for m in range(M):"):
        for n, size in _whole(w, "N", lanes):
            a, b = (load(name, dtype, f"m * {name}_stride + {n}", size) for name in "ab")
            if activation:
                a = _rounded(w, write_activation(w, activation, [a], size)[0], dtype, size)
            w(f"{vec('y', f'm * N + {n}', size)} = {store(w, f'{a} * {b}', dtype, size)}")
    return w.text


def rotary_rows_source(dtype: str, lanes: int) -> str:
    """f(x, y, c, s, *ROTARY_INTS)."""
    w = Writer()
    with w.function("rotary_rows", dict.fromkeys(("x", "y", "c", "s"), STORED[dtype]), ROTARY_INTS):
        with w.block("for row in range(B * S * H):"):
            w.opaque("batch", "row // H // S")
            w.opaque("token", "row // H % S")
            w.opaque("xt", "batch * x_batch + row % H * x_head + token * x_token")
            w.opaque("yt", "row * half * 2")
            for table in "cs":
                w.opaque(f"{table}t", f"batch * {table}_batch + token * {table}_token")
            for d, size in _whole(w, "half", lanes):

                def product(x: str, table: str, at: str, size: int = size) -> str:
                    return _rounded(w, f"{x} * {load(table, dtype, f'{table}t + {at}', size)}", dtype, size)

                low, high = (w.let("x", load("x", dtype, f"xt + {at}", size)) for at in (d, f"half + {d}"))
                for at, straight, turned, sign in ((d, low, high, "-"), (f"half + {d}", high, low, "+")):
                    result = f"{product(straight, 'c', at)} {sign} {product(turned, 's', at)}"
                    w(f"{vec('y', f'yt + {at}', size)} = {store(w, result, dtype, size)}")
    return w.text


def append_source(dtype: str, lanes: int) -> str:
    """f(cache, x, y, *APPEND_INTS)."""
    w = Writer()
    with w.function("append", dict.fromkeys(("cache", "x", "y"), STORED[dtype]), APPEND_INTS):
        w.opaque("parts", f"T.if_then_else(heads * past * D > {ALONE}, heads, T.int64(1))")
        with w.block("for part in T.parallel(parts):"):
            w.opaque("first", "part * heads // parts")
            with w.block("for i in range((part + 1) * heads // parts - first):"):
                w.opaque("head", "first + i")
                w.opaque("count", "past * D")
                w.opaque("to", "head * (past + S) * D")
                for n, size in _whole(w, "count", 2 * lanes):
                    w(f"{vec('y', f'to + {n}', size)} = {vec('cache', f'head * count + {n}', size)}")
                with w.block("for s in range(S):"):
                    w.opaque("from_x", "head // G * x_batch + head % G * x_head + s * x_token")
                    w.opaque("new", "to + count + s * D")
                    for n, size in _whole(w, "D", lanes):
                        w(f"{vec('y', f'new + {n}', size)} = {vec('x', f'from_x + {n}', size)}")
    return w.text


def _whole(w: Writer, count: str, lanes: int) -> Iterator[tuple[str, int]]:
    """(index, lanes) inside a loop over whole vectors of `count` elements, then inside one over what is left."""
    with w.block(f"for v in range({count} // {lanes}):"):
        yield w.let("n", f"v * {lanes}"), lanes
    with _rest(w, count, lanes) as n:
        yield n, 1


@contextmanager
def _rest(w: Writer, count: str, lanes: int) -> Iterator[str]:
    with w.block(f"for v in range({count} % {lanes}):"):
        yield w.let("n", f"{count} // {lanes} * {lanes} + v")


def _sum(w: Writer, lanes: int, value: Callable[[str, int], str]) -> str:
    """Over N features."""
    w.made += 1
    wide, narrow = (w.registers_of("float32", f"{name}_{w.made}", size) for name, size in (("wide", lanes), ("narrow", 1)))
    w(f"{wide} = {splat('T.float32(0)', lanes)}")
    w(f"{narrow} = T.float32(0)")
    for n, size in _whole(w, "N", lanes):
        acc = wide if size == lanes else narrow
        w(f"{acc} = {acc} + {value(n, size)}")
    return w.let("sum", f"{total(w, wide, lanes)} + {narrow}")


def _rounded(w: Writer, value: str, dtype: str, lanes: int) -> str:
    """As if it had been written and read again."""
    return f"({value})" if dtype == "f32" else w.let("rounded", widen(store(w, value, dtype, lanes), dtype, lanes))
