"""Family spmm in bf16 arithmetic: sparse weight [N, K] times many tokens, products of bf16 pairs along K, sums in float32.

Tokens come rounded to bf16, 64 at a time (`rounding`):

    gather   x[span][k][64], for `shared(rows, step)`: any two columns become pairs by interleaving their tokens in registers
    pairs    x[span][k / 2][64][2], for `dense.bf16.panels(32)`: K as it comes

    for task in parallel(chunks * tiles):                     `chunk` rows x one tile of 64 tokens
        for group of rows:
            acc = 0
            for step of the group:  acc += val[step] . pairs of x[idx[step]]
            y = epilogue(acc + bias) + residual

Two instructions multiply: "amx" a tile of 16 rows x 32 columns by 32 x 16 tokens, from memory, so what is interleaved goes through a
buffer, a step ahead of its product; "dpbf16" (`vdpbf16ps`) a pair of a row by 16 tokens, for the rows of a group in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.tvm.activation import write_activation
from sparsecc.codegen.tvm.entries import pointers
from sparsecc.codegen.tvm.rounding import LANES, VECTORS
from sparsecc.codegen.tvm.spmm import INTS
from sparsecc.codegen.tvm.tiles import SPAN, place, write_parts, write_rows
from sparsecc.codegen.tvm.writer import Writer, splat, vec
from sparsecc.formats import Dense, Format, Panels, Shared

TILE = 16, 32
"""Rows and columns (bf16) of an AMX tile of weights: 1 KiB."""
AHEAD = 4
"""Tiles of weights between a product and the prefetch beside it."""
STRIP = 8
"""Steps of columns: 256 of 64 tokens are 32 KiB."""
DOTS = {"amx": "amx-bf16", "dpbf16": "avx512bf16"}
"""What multiplies -> LLVM's name of what it takes."""

DOT_PAIRS = """declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define internal <16 x float> @dot_pairs(<16 x float> %sum, <16 x i32> %a, <16 x i32> %b) alwaysinline {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sum, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}
"""
"""TVM has no vectors of LLVM's bfloat."""


def dot_of(fmt: Format) -> str:
    """The instruction that a format is laid out for, "" if none of these."""
    if str(fmt.codec) != "bf16" or fmt.block != (1, 1):
        return ""
    match fmt.level, fmt.swizzle:
        case Shared(rows=rows, step=step), swizzle if not isinstance(swizzle, Panels):
            return "amx" if (rows, step) == TILE else "dpbf16" if step == 2 and rows <= 8 else ""
        case Dense(), Panels(width=width) if width == TILE[1]:
            return "amx"
    return ""


def paired(fmt: Format) -> bool:
    """Whether K is taken as it comes, so that x may lie in pairs."""
    return isinstance(fmt.level, Dense)


@dataclass(frozen=True)
class _Part:
    """`vectors` of tokens from `offset` in the tile on."""

    vectors: int
    offset: str


def half_source(spec: KernelSpec, dot: str, chunk: int) -> str:
    """The kernel's text; arguments as those of `spmm_source`, x as `rounding` leaves it. `chunk`: rows per task."""
    fmt, w, by_rows = spec.formats[0], Writer(), spec.layout == "row"
    params = {"x": "uint16", "y": "float32", "bias": "float32"} | ({"res": "float32"} if spec.residual else {})
    with w.function("spmm", params | pointers(fmt, spec.wide, 0), (*INTS, "C0", "P0")):
        w(f"chunks: T.let = (N + {chunk - 1}) // {chunk}")
        if dot == "dpbf16":
            w(f'T.attr(T.int32(0), "pragma_import_llvm", {DOT_PAIRS!r})')
        with w.block("for task in T.parallel(tiles * chunks):"):
            w.opaque("tile", "task % tiles")  # a chunk of weights stays in cache for all tiles
            w.opaque("first", f"task // tiles * {chunk}")
            w.opaque("last", f"T.min(N, first + {chunk})")
            w.opaque("batch", "tile // per")
            w.opaque("start", f"tile % per * {SPAN}")
            w.opaque("left", f"T.min((S - start + {LANES - 1}) // {LANES}, T.int64({VECTORS}))")
            w.opaque("xt", place("x"))
            if by_rows:
                w(f'out = T.alloc_buffer(({chunk * SPAN},), "float32", scope="global")')
            else:
                w.opaque("yt", place("y"))
                if spec.residual:
                    w.opaque("rt", place("res"))
            if dot == "amx":
                w(f'sums = T.alloc_buffer(({(chunk if paired(fmt) else TILE[0]) * SPAN},), "float32", scope="global")')
                w(f'pairs = T.alloc_buffer(({2 * TILE[1] * SPAN},), "uint16", scope="global")')
            with configured(w) if dot == "amx" else nullcontext():
                for vectors, offset in write_parts(w, VECTORS, LANES):
                    {"amx": _write_tiles, "dpbf16": _write_pairs}[dot](w, spec, _Part(vectors, offset))
            if by_rows:
                with w.block("for slab in range(left):"):
                    write_rows(w, LANES, spec.residual, f"start + slab * {LANES}", f"slab * {LANES}", SPAN)
    return w.text


def _write_result(w: Writer, spec: KernelSpec, part: _Part, row: str, sums: Sequence[str]) -> None:
    """A row's sums, a vector each, to where it belongs."""
    values = [w.let("total", f"{total} + {splat(f'bias[{row}]', LANES)}") for total in sums]
    values = write_activation(w, spec.epilogue, values, LANES) if spec.epilogue else values
    for v, value in enumerate(values):
        at = f"{part.offset} + {v * LANES}"
        if spec.layout == "row":
            w(f"{vec('out', f'({row} - first) * {SPAN} + {at}', LANES)} = {value}")
        else:
            plus = f" + {vec('res', f'rt + ({row}) * res_stride + {at}', LANES)}" if spec.residual else ""
            w(f"{vec('y', f'yt + ({row}) * y_stride + {at}', LANES)} = {value}{plus}")


def _interleaved(w: Writer, part: _Part, columns: Sequence[str]) -> list[str]:
    """Pairs of two columns of x, 16 tokens a vector. In a register's 128-bit lanes, which is why x lies in another order."""
    found: list[str] = []
    for half in range((part.vectors + 1) // 2):
        a, b = (w.let("x", f"x[T.ramp(xt + {col} * {SPAN} + {part.offset} + {half * 32}, 1, 32)]") for col in columns)
        for high in range(min(2, part.vectors - 2 * half)):
            order = [8 * lane + 4 * high + i + other for lane in range(4) for i in range(4) for other in (0, 32)]
            found.append(w.let("pairs", f"T.Shuffle([{a}, {b}], {order})"))
    return found


def _column(at: str) -> str:
    return f'T.Cast("int64", idx0[{at}])'


# ---- tiles


@contextmanager
def configured(w: Writer) -> Iterator[None]:
    """Sets up the core's tiles for what is written in the block, all of them alike, and gives them back."""
    w('shapes = T.alloc_buffer((64,), "uint8", scope="global")')
    w(f"{vec('shapes', 0, 64)} = T.broadcast(T.uint8(0), 64)")
    w("shapes[0] = T.uint8(1)")
    with w.block("for t in range(8):"):
        w(f"shapes[16 + t * 2] = T.uint8({2 * TILE[1]})")
        w(f"shapes[48 + t] = T.uint8({TILE[0]})")
    do_tiles(w, "ldtilecfg", "T.address_of(shapes[0])")
    yield
    do_tiles(w, "tilerelease")


def do_tiles(w: Writer, name: str, *args: str) -> None:
    """An instruction on tiles."""
    w(f'T.evaluate(T.call_llvm_intrin("void", "llvm.x86.{name}"{"".join(f", {arg}" for arg in args)}))')


def _write_tiles(w: Writer, spec: KernelSpec, part: _Part) -> None:
    """A tile of sums for each vector of tokens, 16 rows at a time, all of their columns."""
    rows = TILE[0]
    if paired(spec.formats[0]):
        _write_strips(w, spec, part)
        return
    w.opaque("step", f'T.Cast("int64", ptr0[first // {rows}])')
    w.opaque("end", f'T.Cast("int64", ptr0[(last + {rows - 1}) // {rows}])')
    with w.block("if step < end:"):
        _write_gather(w, part, "step")
    with w.block(f"for i in range((last - first + {rows - 1}) // {rows}):"):
        w(f"row: T.let = first + i * {rows}")
        w(f'begin: T.let = T.Cast("int64", ptr0[row // {rows}])')
        w(f'until: T.let = T.Cast("int64", ptr0[row // {rows} + 1])')
        for v in range(part.vectors):
            do_tiles(w, "tilezero", f"T.int8({v})")
        with w.block("for j in range(until - begin):"):
            w("now: T.let = begin + j")
            _write_gather(w, part, "T.min(now + 1, end - 1)")
            size = TILE[1] * LANES
            place_of = lambda v: f"now % 2 * {TILE[1] * SPAN} + {v * size}"  # noqa: E731
            _write_product(w, part, f"now * {rows * TILE[1]}", "pairs", place_of, TILE[1])
        _write_sums(w, part, "0", "tilestored64")
        _write_group(w, spec, part, "0")


def _write_strips(w: Writer, spec: KernelSpec, part: _Part) -> None:
    """The same for K as it comes, in strips of columns of which x stays in the first-level cache."""
    rows = TILE[0]
    with w.block(f"for strip in range((P0 + {STRIP - 1}) // {STRIP}):"), w.block(f"for i in range((last - first + {rows - 1}) // {rows}):"):
        w(f"row: T.let = first + i * {rows}")
        w(f"begin: T.let = T.min(row, N - {rows})")  # the last tile may start with rows of the one before
        sums = f"i * {rows * SPAN}"
        with w.block("if strip == 0:"):
            for v in range(part.vectors):
                do_tiles(w, "tilezero", f"T.int8({v})")
        with w.block("else:"):
            _write_sums(w, part, sums, "tileloadd64")
        with w.block(f"for j in range(T.min(T.int64({STRIP}), P0 - strip * {STRIP})):"):
            w(f"panel: T.let = strip * {STRIP} + j")
            place_of = lambda v: f"xt + panel * {TILE[1] * SPAN} + ({part.offset} + {v * LANES}) * 2"  # noqa: E731
            _write_product(w, part, f"(panel * N + begin) * {TILE[1]}", "x", place_of, 2 * SPAN)
        _write_sums(w, part, sums, "tilestored64")
        with w.block(f"if strip == (P0 - 1) // {STRIP}:"):
            _write_group(w, spec, part, f"{sums} + (row - begin) * {SPAN}")


def _write_sums(w: Writer, part: _Part, at: str, do: str) -> None:
    for v in range(part.vectors):
        do_tiles(w, do, f"T.int8({v})", f"T.address_of(sums[{at} + {v * LANES}])", f"T.int64({4 * SPAN})")


def _write_group(w: Writer, spec: KernelSpec, part: _Part, at: str) -> None:
    with w.block(f"for r in range(T.min(T.int64({TILE[0]}), last - row)):"):
        found = [vec("sums", f"{at} + r * {SPAN} + {v * LANES}", LANES) for v in range(part.vectors)]
        _write_result(w, spec, part, "row + r", found)


def _write_gather(w: Writer, part: _Part, step: str) -> None:
    """The 32 columns of a step as tiles of pairs."""
    at = w.let("step", step)
    with w.block(f"for p in range({TILE[1] // 2}):"):
        columns = [w.let("col", _column(f"{at} * {TILE[1]} + p * 2 + {i}")) for i in (0, 1)]
        for v, pair in enumerate(_interleaved(w, part, columns)):
            w(f"{vec('pairs', f'{at} % 2 * {TILE[1] * SPAN} + {v * TILE[1] * LANES} + p * {TILE[1]}', 32)} = {pair}")


def _write_product(w: Writer, part: _Part, weights: str, buffer: str, x: Callable[[int], str], stride: int) -> None:
    """sums += weights . x; `stride`: bf16 values between pairs of columns of x."""
    at = w.let("weights", weights)
    with w.block(f"for line in range({TILE[0]}):"):
        where = f"T.address_of(val0[{at} + {AHEAD * TILE[0] * TILE[1]} + line * {TILE[1]}])"
        w(f'T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", {where}, T.int32(0), T.int32(3), T.int32(1)))')
    do_tiles(w, "tileloadd64", "T.int8(4)", f"T.address_of(val0[{at}])", f"T.int64({2 * TILE[1]})")
    for v in range(part.vectors):
        tile = 5 + v % 3
        do_tiles(w, "tileloadd64", f"T.int8({tile})", f"T.address_of({buffer}[{x(v)}])", f"T.int64({2 * stride})")
        do_tiles(w, "tdpbf16ps", f"T.int8({v})", "T.int8(4)", f"T.int8({tile})")


# ---- vdpbf16ps


def _write_pairs(w: Writer, spec: KernelSpec, part: _Part) -> None:
    """Registers of sums for the rows of a group."""
    level = spec.formats[0].level
    assert isinstance(level, Shared)
    rows = level.rows
    with w.block(f"for i in range((last - first + {rows - 1}) // {rows}):"):
        w(f"row: T.let = first + i * {rows}")
        w(f'begin: T.let = T.Cast("int64", ptr0[row // {rows}])')
        w(f'until: T.let = T.Cast("int64", ptr0[row // {rows} + 1])')
        acc = w.registers("acc", rows, part.vectors, LANES)
        for b in range(rows):
            for v in range(part.vectors):
                w(f"{acc(b, v)} = {splat('T.float32(0)', LANES)}")
        with w.block("for j in range(until - begin):"):
            w("now: T.let = begin + j")
            columns = [w.let("col", _column(f"now * 2 + {i}")) for i in (0, 1)]
            pairs = [f'T.reinterpret("int32x16", {pair})' for pair in _interleaved(w, part, columns)]
            for b in range(rows):
                weight = w.let("weight", f'T.reinterpret("int32", val0[T.ramp((now * {rows} + {b}) * 2, 1, 2)])')
                for v, pair in enumerate(pairs):
                    w(f'{acc(b, v)} = T.call_extern("float32x16", "dot_pairs", {acc(b, v)}, {splat(weight, LANES)}, {pair})')
        for b in range(rows):
            with w.block_if(spec.ragged, f"if row + {b} < N:"):
                _write_result(w, spec, part, f"row + {b}", [acc(b, v) for v in range(part.vectors)])
