"""9 to 16 tokens on tiles (AMX): a bitmap's bf16 values are expanded into a tile of 16 rows x 32 columns, once for all tokens.

What a weight costs is then its expansion, not a multiply-add for each token: measured, half the time of 16 tokens in two tiles of 8.
Products are exact: bfloat16 activations are taken as they are, and others as a sum of bf16 parts that lose nothing (float32 has 24 bits,
three times those of bf16). Sums are float32.

    x as tiles of pairs, [panel of 32 columns][part][pair][token], made once for all tasks
    for 16 rows of the task:
        for panel:  expand the rows' next values into a buffer, a panel ahead;  sums[part] += buffer . x[panel][part]
        out += sums, transposed
"""

from __future__ import annotations

from sparsecc.codegen.tvm.half import TILE, do_tiles
from sparsecc.codegen.tvm.host import Isa
from sparsecc.codegen.tvm.loops import write_prefetch
from sparsecc.codegen.tvm.rounding import LANES
from sparsecc.codegen.tvm.terms import Term, expands
from sparsecc.codegen.tvm.tiles import write_transposed
from sparsecc.codegen.tvm.writer import Writer, splat, vec
from sparsecc.formats import Format, Panels

PARTS = {"bf16": 1, "f16": 2, "f32": 3}
"""How many bf16 values add up to one of a dtype."""
_ROWS, _COLS = TILE
_WORDS = _COLS // 2 * LANES  # floats of a tile of x


def tiled(fmt: Format, isa: Isa) -> bool:
    """Whether more tokens than one kernel of multiply-adds takes run so."""
    return expands(fmt, isa) == _COLS and str(fmt.codec) == "bf16" and not isinstance(fmt.swizzle, Panels) and isa.has("amx-bf16")


def write_x_tiles(w: Writer, dtype: str) -> None:
    """x as tiles, at `xt` in work, from its float32 rows at `xs`, which are zero up to whole panels."""
    w.opaque("xt", f"xs + {LANES} * reach")
    with w.block(f"for panel in range((K + {_COLS - 1}) // {_COLS}):"):
        rows = [[w.let("row", vec("work", f"xs + {m} * reach + panel * {_COLS} + {i}", LANES)) for i in (0, LANES)] for m in range(LANES)]
        for part in range(PARTS[dtype]):
            words = [_words(w, pair) for pair in rows]
            to = f"xt + (panel * {PARTS[dtype]} + {part}) * {_WORDS}"
            write_transposed(w, LANES, words.__getitem__, lambda i, to=to: vec("work", f"{to} + {i * LANES}", LANES), {}, f"part{part}_")
            if part + 1 < PARTS[dtype]:
                rows = [[_rest(w, value) for value in pair] for pair in rows]


def _upper(value: str) -> str:
    """The bf16 value that a float begins with, as a float."""
    bits = f'T.bitwise_and(T.reinterpret("uint32x16", {value}), {splat("T.uint32(4294901760)", LANES)})'
    return f'T.reinterpret("float32x16", {bits})'


def _rest(w: Writer, value: str) -> str:
    """What that leaves, without rounding; nothing of an infinity."""
    upper = w.let("upper", _upper(value))
    return w.let("rest", f"T.Select({upper} == {value}, {splat('T.float32(0)', LANES)}, {value} - {upper})")


def _words(w: Writer, pair: list[str]) -> str:
    """The upper halves of two vectors, side by side: 32 bf16 values as 16 words."""
    halves = ", ".join(f'T.reinterpret("uint16x32", {value})' for value in pair)
    return w.let("words", f'T.reinterpret("float32x16", T.Shuffle([{halves}], {list(range(1, 4 * LANES, 2))}))')


def write_tiled(term: Term, dtype: str) -> None:
    """Add the term's products to `out` for the rows first..last."""
    w, t, parts = term.w, term.t, PARTS[dtype]
    w(f"words{t}: T.let = (C{t} + 15) // 16")
    w(f'at{t} = T.alloc_buffer(({_ROWS},), "int64", scope="global")')
    w(f'from{t} = T.alloc_buffer(({_ROWS},), "int64", scope="global")')
    w(f'expanded{t} = T.alloc_buffer(({2 * _ROWS * _COLS},), "uint16", scope="global")')
    w(f'sums{t} = T.alloc_buffer(({parts * _ROWS * LANES},), "float32", scope="global")')
    with w.block(f"for i in range((last - first + {_ROWS - 1}) // {_ROWS}):"):
        w.opaque("begin", f"first + i * {_ROWS}")
        with w.block(f"for r in range({_ROWS}):"):
            w("parent: T.let = T.min(begin + r, last - 1)")
            w(f'at{t}[r] = T.Cast("int64", ptr{t}[parent])')
            w(f"from{t}[r] = parent * words{t}")
        for part in range(parts):
            do_tiles(w, "tilezero", f"T.int8({part})")
        w.opaque("whole", f"words{t} // 2")
        with w.block("if whole > 0:"):
            _write_expanded(term, "T.int64(0)", False)
            with w.block("for j in range(whole - 1):"):
                _write_expanded(term, "(j + 1)", False)
                _write_product(term, "j", parts)
            _write_product(term, "(whole - 1)", parts)
        with w.block(f"if words{t} % 2 == 1:"):
            _write_expanded(term, "whole", True)
            _write_product(term, "whole", parts)
        for part in range(parts):
            do_tiles(w, "tilestored64", f"T.int8({part})", f"T.address_of(sums{t}[{part * _ROWS * LANES}])", f"T.int64({4 * LANES})")
        _write_out(term, parts)


def _write_expanded(term: Term, panel: str, half: bool) -> None:
    """The next values of 16 rows as a tile, zeros where their masks have them; of the last 16 columns alone if `half`."""
    w, t = term.w, term.t
    with w.block(f"for r in range({_ROWS}):"):
        where = f"from{t}[r] + {panel} * 2"
        two = f'T.reinterpret("uint32", bits{t}[T.ramp({where}, 1, 2)])'
        mask = w.let("mask", f'T.Cast("uint32", bits{t}[{where}])' if half else two)
        start = w.let("start", f"at{t}[r]")
        write_prefetch(w, f"val{t}", start, 2)
        bits, zero = f'T.reinterpret("uint1x{_COLS}", {mask})', splat("T.uint16(0)", _COLS)
        found = f'T.call_llvm_pure_intrin("uint16x{_COLS}", "llvm.masked.expandload", T.address_of(val{t}[{start}]), {bits}, {zero})'
        w(f"{vec(f'expanded{t}', f'{panel} % 2 * {_ROWS * _COLS} + r * {_COLS}', _COLS)} = {found}")
        w(f'at{t}[r] = {start} + T.Cast("int64", T.popcount({mask}))')


def _write_product(term: Term, panel: str, parts: int) -> None:
    w, t = term.w, term.t
    stride = f"T.int64({2 * _COLS})"
    do_tiles(w, "tileloadd64", "T.int8(6)", f"T.address_of(expanded{t}[{panel} % 2 * {_ROWS * _COLS}])", stride)
    for part in range(parts):
        x = f"T.address_of(work[xt + ({panel} * {parts} + {part}) * {_WORDS}])"
        do_tiles(w, "tileloadd64", f"T.int8({3 + part})", x, stride)
        do_tiles(w, "tdpbf16ps", f"T.int8({part})", "T.int8(6)", f"T.int8({3 + part})")


def _write_out(term: Term, parts: int) -> None:
    w, t = term.w, term.t
    row = lambda r: " + ".join(vec(f"sums{t}", f"{part * _ROWS * LANES} + {r} * {LANES}", LANES) for part in reversed(range(parts)))  # noqa: E731
    out = lambda m: vec("work", f"ot + {m} * pitch + begin", LANES)  # noqa: E731
    with w.block(f"if begin + {_ROWS} <= last:"):
        write_transposed(w, LANES, row, out, {m: f" + {out(m)}" for m in range(LANES)})
    with w.block("else:"), w.block("for r in range(last - begin):"), w.block(f"for m in range({LANES}):"):
        one = " + ".join(f"sums{t}[{part * _ROWS * LANES} + r * {LANES} + m]" for part in reversed(range(parts)))
        w(f"work[ot + m * pitch + begin + r] = work[ot + m * pitch + begin + r] + {one}")
