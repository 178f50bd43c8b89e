"""Family pointwise: what needs one token and few features of it at a time, on token-minor values: every token is a lane.

gate        y[n][m] = act(a[n][m]) * b[n][m]
rotary      y[d][m] = x[d][m] cos[d][m] - x[d + D/2][m] sin[d][m],  y[d + D/2][m] = x[d + D/2][m] cos[d + D/2][m] + x[d][m] sin[d + D/2][m]
mask_tiles  tiles[m / 64][key / 64] = 0 where all of mask[key][m] is -inf, 1 where all of it is 0, else 2
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsecc.codegen.tvm.activation import write_activation
from sparsecc.codegen.tvm.keys import KEYS
from sparsecc.codegen.tvm.tiles import SPAN, place, write_parts
from sparsecc.codegen.tvm.writer import Writer, constant, splat, vec

CHUNK = 128  # features per task of a gate
_STEPS = ("stride", "span", "batch")
GATE_INTS = ("S", "N", "tiles", "per", *(f"{value}_{step}" for value in "aby" for step in _STEPS))
"""As in the spmm family; tiles: of all sequences, per: of one."""
ROTARY_INTS = ("S", "half", "heads", "tasks", "per", *(f"{value}_{step}" for value in "xy" for step in ("stride", "span", "head", "batch")),
               *(f"{value}_{step}" for value in "cs" for step in _STEPS))  # fmt: skip
"""half: of a head's features; c and s: cos and sin."""
TILES_INTS = ("S", "Sk", "heads", "tasks", "per", "across", "m_stride", "m_span", "m_head", "m_batch")
"""`heads` of the mask, per: tiles of queries of one; across: tiles of keys."""


@dataclass(frozen=True)
class GateSpec:
    """y = activation(a) * b, float32."""

    activation: str = "silu"

    def __str__(self) -> str:
        return f"gate {self.activation}".strip()


def gate_source(spec: GateSpec, vectors: int, lanes: int) -> str:
    """f(a, b, y, *GATE_INTS)."""
    w = Writer()
    with w.function("gate", dict.fromkeys(("a", "b", "y"), "float32"), GATE_INTS):
        w(f"chunks: T.let = (N + {CHUNK - 1}) // {CHUNK}")
        with w.block("for task in T.parallel(tiles * chunks):"):
            w.opaque("batch", "task // chunks // per")
            w.opaque("first", f"task % chunks * {CHUNK}")
            w.opaque("count", f"T.min(N - first, T.int64({CHUNK}))")
            for part, offset in _parts(w, "task // chunks", vectors, lanes):
                for value in "aby":
                    w.opaque(f"{value}t", f"{place(value)} + {offset} + first * {value}_stride")
                with w.block("for n in range(count):"):
                    at = lambda value, r: vec(value, f"{value}t + n * {value}_stride + {r * lanes}", lanes)  # noqa: E731
                    gates = [at("a", r) for r in range(part)]
                    if spec.activation:
                        gates = write_activation(w, spec.activation, gates, lanes)
                    for r, gate in enumerate(gates):
                        w(f"{at('y', r)} = {gate} * {at('b', r)}")
    return w.text


def rotary_source(vectors: int, lanes: int) -> str:
    """f(x, y, c, s, *ROTARY_INTS)."""
    w = Writer()
    with w.function("rotary", dict.fromkeys(("x", "y", "c", "s"), "float32"), ROTARY_INTS):
        with w.block("for task in T.parallel(tasks):"):
            w.opaque("batch", "task // heads // per")
            w.opaque("head", "task % heads")
            for part, offset in _parts(w, "task // heads", vectors, lanes):
                for value in "xycs":
                    w.opaque(f"{value}t", f"{place(value)} + {offset}{f' + head * {value}_head' if value in 'xy' else ''}")
                with w.block("for d in range(half):"):
                    _turn(w, part, lanes)
    return w.text


def _turn(w: Writer, vectors: int, lanes: int) -> None:
    for r in range(vectors):
        at = lambda value, d: vec(value, f"{value}t + ({d}) * {value}_stride + {r * lanes}", lanes)  # noqa: B023, E731
        low, high = w.let("low", at("x", "d")), w.let("high", at("x", "d + half"))
        w(f"{at('y', 'd')} = {low} * {at('c', 'd')} - {high} * {at('s', 'd')}")
        w(f"{at('y', 'd + half')} = {high} * {at('c', 'd + half')} + {low} * {at('s', 'd + half')}")


def _parts(w: Writer, tile: str, vectors: int, lanes: int):
    w.opaque("start", f"({tile}) % per * {vectors * lanes}")
    w.opaque("left", f"T.min((S - start + {lanes - 1}) // {lanes}, T.int64({vectors}))")
    return write_parts(w, vectors, lanes)


def mask_tiles_source(rows: bool, lanes: int) -> str:
    """f(mask, tiles, *TILES_INTS). `rows`: token-minor, a row for every query; else one row for all."""
    w = Writer()
    lanes = lanes if rows else 1
    zero, one = constant(0.0, lanes), constant(1.0, lanes)
    with w.function("mask_tiles", dict.fromkeys(("mask", "tiles"), "float32"), TILES_INTS):
        with w.block("for task in T.parallel(tasks):"):
            w.opaque("batch", "task // per // heads")
            w.opaque("head", "task // per % heads")
            w.opaque("start", f"task % per * {SPAN}")
            w.opaque("mt", f"head * m_head + {place('m') if rows else 'batch * m_batch'}")
            w.opaque("vectors", f"(T.min(S - start, T.int64({SPAN})) + {lanes - 1}) // {lanes}" if rows else "T.int64(1)")
            for name in ("seen", "changed"):
                w(f'{name} = T.alloc_buffer(({lanes},), "float32", scope="global")')
            with w.block("for block in range(across):"):
                seen, changed = (vec(name, 0, lanes) for name in ("seen", "changed"))
                w(f"{seen} = {zero}")
                w(f"{changed} = {zero}")
                w.opaque("key", f"block * {KEYS}")
                with w.block(f"for j in range(T.min(Sk - key, T.int64({KEYS}))):"), w.block("for i in range(vectors):"):
                    value = w.let("value", vec("mask", f"mt + (key + j) * m_stride + i * {lanes}", lanes))
                    query = f"T.Cast('int32', start + i * {lanes})"
                    queries = query if lanes == 1 else f"T.ramp({query}, 1, {lanes})"
                    inside = f"T.Select({queries} < {splat(f'T.Cast({chr(39)}int32{chr(39)}, S)', lanes)}, {one}, {zero})" if rows else one
                    inside = w.let("inside", inside)
                    hides = splat('T.float32("-inf")', lanes)
                    w(f"{seen} = T.max({seen}, T.Select({value} == {hides}, {zero}, {inside}))")
                    w(f"{changed} = T.max({changed}, T.Select({value} == {zero}, {zero}, {inside}))")
                with w.block(f"for i in range({lanes - 1}):"):
                    w("seen[0] = T.max(seen[0], seen[i + 1])")
                    w("changed[0] = T.max(changed[0], changed[i + 1])")
                w("tiles[task * across + block] = T.Select(seen[0] == T.float32(0), T.float32(0), T.float32(1) + changed[0])")
    return w.text
