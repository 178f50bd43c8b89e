"""Family spmv: sparse weight [N, K] times one token, or a few (decode).

Bytes decide here: every one of the weight is read once for all tokens of a tile, from several places at once (see `streams`), because
one core that reads one place has too few cache lines under way.

    for group of tokens:                                      work: memory of the calling thread, for xs and out
        xs = x in float32, padded with zeros
        for task in parallel(tasks):                          rows of about as many bytes
            for tile of tokens:
                out = bias;  out += every term;  y = epilogue(out) + residual

x, y, the bias and the residual are of `spec.dtype`, rows of features; sums are float32.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

from sparsecc.codegen.kernel import FEW, KernelSpec
from sparsecc.codegen.tvm.activation import write_activation
from sparsecc.codegen.tvm.entries import STORED, load, pointers, store, value_bytes
from sparsecc.codegen.tvm.few_tiles import write_tiled, write_x_tiles
from sparsecc.codegen.tvm.half import configured
from sparsecc.codegen.tvm.host import Isa
from sparsecc.codegen.tvm.streams import write_term
from sparsecc.codegen.tvm.terms import Term, term_x
from sparsecc.codegen.tvm.writer import Writer, vec
from sparsecc.formats import Bitmap, Compressed, Panels

INTS = ("M", "N", "K", "reach", "pitch", "x_stride", "y_stride", "res_stride", "tasks")
"""Scalar arguments: tokens, features; floats of a token in `xs` and in `out`, both beyond what any block reaches; between tokens; parts of
the work. Per term follow C{t} (coordinates per parent) and P{t} (panels)."""

TILES = (1, 2, 4, 8)
"""Tokens that a kernel may take together."""
WIDE = 16
"""Those of a kernel on tiles (see `few_tiles`)."""
GROUP = FEW
"""Tokens for which memory is read once: what one tile has read of a task is in cache for the next."""


def spmv_source(spec: KernelSpec, tokens: int, streams: int, gather: bool, isa: Isa) -> str:
    """The kernel's text for `tokens` at a time. `streams`: rows read at once; `gather`: whether nonzeros are taken a vector at a time."""
    w = Writer()
    dtype = STORED[spec.dtype]
    params = {"x": dtype, "y": dtype} | ({"res": dtype} if spec.residual else {}) | {"work": "float32", "bias": dtype}
    for t, fmt in enumerate(spec.formats):
        params |= pointers(fmt, spec.wide, t)
    sizes = tuple(f"{name}{t}" for t in range(len(spec.formats)) for name in "CP")
    wide = tokens == WIDE
    names = ["xs"] if wide else sorted({term_x(fmt, isa) for fmt in spec.formats})
    group = GROUP if tokens == max(TILES) else tokens
    terms = [Term(w, fmt, t, tokens, streams, gather, isa, spec.wide) for t, fmt in enumerate(spec.formats)]
    with w.function("spmv", params, INTS + sizes):
        with w.block(f"for group in range((M + {group - 1}) // {group}):"):
            w.opaque("head", f"group * {group}")
            w.opaque("tokens", f"T.min(M - head, T.int64({group}))")
            for i, name in enumerate(names):
                _write_x(w, spec, group, isa.lanes, name, f"{group} * (pitch + {i} * reach)")
            if wide:
                write_x_tiles(w, spec.dtype)
            with w.block("for task in T.parallel(tasks):"):
                _write_bounds(w, spec)
                with w.block(f"for tile in range((tokens + {tokens - 1}) // {tokens}):"):
                    for name in names:
                        w.opaque(f"{name}_at", f"{name} + tile * {tokens} * reach")
                    w.opaque("ot", f"tile * {tokens} * pitch")
                    with w.block(f"for m in range({tokens}):"):
                        _write_rows(w, isa.lanes, lambda at, n: _write_bias(w, spec, at, n))
                    with configured(w) if wide else nullcontext():
                        for term in terms:
                            write_tiled(term, spec.dtype) if wide else write_term(term)
                    with w.block(f"for m in range(T.min(T.int64({tokens}), tokens - tile * {tokens})):"):
                        w.opaque("row", f"head + tile * {tokens} + m")
                        _write_rows(w, isa.lanes, lambda at, n: _write_y(w, spec, at, n))
    return w.text


def _write_x(w: Writer, spec: KernelSpec, tokens: int, lanes: int, name: str, start: str) -> None:
    """Bind `name`, where work holds x[token][k], zero from K to `reach`; "xp" has the even and the odd of every two vectors apart.
    Missing tokens repeat the last one."""
    paired = name == "xp"
    step = 2 * lanes if paired else lanes
    w.opaque(name, start)
    with w.block(f"for m in range({tokens}):"):
        w.opaque(f"{name}_from", "(head + T.min(m, tokens - 1)) * x_stride")
        w.opaque(f"{name}_to", f"{name} + m * reach")
        with w.block(f"for k in range(K // {step}):"):
            parts = [load("x", spec.dtype, f"{name}_from + k * {step} + {i * lanes}", lanes) for i in range(step // lanes)]
            if paired:
                parts = [w.let("part", part) for part in parts]
                parts = [f"T.Shuffle([{', '.join(parts)}], {list(range(odd, step, 2))})" for odd in (0, 1)]
            for i, part in enumerate(parts):
                w(f"{vec('work', f'{name}_to + k * {step} + {i * lanes}', lanes)} = {part}")
        with w.block(f"for rest in range(reach - K // {step} * {step}):"):
            w(f"k: T.let = K // {step} * {step} + rest")
            at = f"k // {step} * {step} + k % 2 * {lanes} + k % {step} // 2" if paired else "k"
            w(f"work[{name}_to + {at}] = T.if_then_else(k < K, {load('x', spec.dtype, f'{name}_from + k', 1)}, T.float32(0))")


def _write_bounds(w: Writer, spec: KernelSpec) -> None:
    """Bind `first` and `last`, the rows of a task: whole windows of blocks, of about as many bytes as those of the other tasks."""
    unit = math.lcm(*(fmt.block[0] * fmt.level.window for fmt in spec.formats))
    fmt = spec.formats[0]
    w.opaque("units", f"(N + {unit - 1}) // {unit}")
    if not isinstance(fmt.level, Compressed | Bitmap) or isinstance(fmt.swizzle, Panels):
        w.opaque("first", f"T.min(N, task * units // tasks * {unit})")
        w.opaque("last", f"T.min(N, (task + 1) * units // tasks * {unit})")
        return
    by_bits = isinstance(fmt.level, Bitmap)
    entry = fmt.block[0] * fmt.block[1] * value_bytes(fmt) + (0 if by_bits else 4 if spec.wide else 2)
    parent = "(C0 + 15) // 16 * 2 + 32" if by_bits else "64"  # what a row costs without any entry
    w.opaque("parents", f"(N + {fmt.block[0] - 1}) // {fmt.block[0]}")
    cost = lambda p: f'T.Cast("int64", ptr0[{p}]) * {entry} + {p} * ({parent})'  # noqa: E731
    w.opaque("total", cost("parents"))
    for name, number in (("first", "task"), ("last", "(task + 1)")):
        for side, start in (("low", "T.int64(0)"), ("high", "units")):
            w(f'{name}_{side} = T.alloc_buffer((1,), "int64", scope="global")')
            w(f"{name}_{side}[0] = {start}")
        with w.block(f"while {name}_low[0] < {name}_high[0]:"):
            w(f"middle: T.let = ({name}_low[0] + {name}_high[0]) // 2")
            w(f"parent: T.let = T.min(parents, middle * {unit // fmt.block[0]})")
            with w.block(f"if ({cost('parent')}) * tasks < {number} * total:"):
                w(f"{name}_low[0] = middle + 1")
            with w.block("else:"):
                w(f"{name}_high[0] = middle")
        w.opaque(name, f"T.min(N, {name}_low[0] * {unit})")


def _write_rows(w: Writer, lanes: int, write) -> None:
    """`write(row, lanes)` for the task's rows: vectors, then one by one."""
    with w.block(f"for v in range((last - first) // {lanes}):"):
        w(f"at: T.let = first + v * {lanes}")
        write("at", lanes)
    if lanes > 1:
        with w.block(f"for v in range((last - first) % {lanes}):"):
            w(f"at: T.let = first + (last - first) // {lanes} * {lanes} + v")
            write("at", 1)


def _write_bias(w: Writer, spec: KernelSpec, at: str, lanes: int) -> None:
    w(f"{vec('work', f'ot + m * pitch + {at}', lanes)} = {load('bias', spec.dtype, at, lanes)}")


def _write_y(w: Writer, spec: KernelSpec, at: str, lanes: int) -> None:
    result = vec("work", f"ot + m * pitch + {at}", lanes)
    if spec.epilogue:
        result = write_activation(w, spec.epilogue, [result], lanes)[0]
    if spec.residual:
        result = f"{result} + {load('res', spec.dtype, f'row * res_stride + {at}', lanes)}"
    w(f"{vec('y', f'row * y_stride + {at}', lanes)} = {store(w, result, spec.dtype, lanes)}")

