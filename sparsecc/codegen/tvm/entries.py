"""Loops over the kept blocks of one parent, for every kind of level: the only place where kernels know how coordinates are stored."""

from __future__ import annotations

from collections.abc import Callable

from sparsecc.codegen.tvm.writer import Writer, splat
from sparsecc.formats import Bitmap, Compressed, Dense, Format, Sell
from sparsecc.formats.level import NM

Body = Callable[[str, str, int], None]
"""body(block, coordinate, accumulator set): writes the work on one kept block."""


def pointers(fmt: Format, wide: bool, t: int) -> dict[str, str]:
    """The arrays of term `t`, in the order of `fmt.components()`: parameter name -> element dtype."""
    dtypes = {"ptr": "int32", "order": "uint16", "idx": "int32" if wide else "uint16", "bits": "uint16"}
    if isinstance(fmt.level, NM):
        dtypes["idx"] = "uint8"
    dtypes["val"] = STORED[str(fmt.codec)]
    return {f"{name}{t}": dtypes[name] for name in fmt.components()}


STORED = {"f32": "float32", "bf16": "uint16", "f16": "float16"}
"""How kernels see values and activations of a dtype."""


def value(fmt: Format, t: int, offset: str, lanes: int = 1) -> str:
    """The stored value(s) at an offset, as float32."""
    return load(f"val{t}", str(fmt.codec), offset, lanes)


def value_bytes(fmt: Format) -> int:
    """Of one value."""
    return 4 if str(fmt.codec) == "f32" else 2


def load(buffer: str, dtype: str, offset: str, lanes: int = 1) -> str:
    """Elements of a buffer of f32, bf16 or f16, as float32."""
    return widen(f"{buffer}[{offset}]" if lanes == 1 else f"{buffer}[T.ramp({offset}, 1, {lanes})]", dtype, lanes)


def widen(value: str, dtype: str, lanes: int) -> str:
    """A vector (or scalar) of that dtype as float32."""
    suffix = "" if lanes == 1 else f"x{lanes}"
    if dtype == "bf16":
        shift = splat("T.uint32(16)", lanes)
        return f'T.reinterpret("float32{suffix}", T.shift_left(T.Cast("uint32{suffix}", {value}), {shift}))'
    return value if dtype == "f32" else f'T.Cast("float32{suffix}", {value})'


def store(w: Writer, value: str, dtype: str, lanes: int) -> str:
    """float32 rounded to that dtype, to the nearest and then to the even one. NaN stays NaN."""
    suffix = "" if lanes == 1 else f"x{lanes}"
    if dtype != "bf16":
        return value if dtype == "f32" else f'T.Cast("float16{suffix}", {value})'
    number = lambda n: splat(f"T.uint32({n})", lanes)  # noqa: E731
    bits = w.let("bits", f'T.reinterpret("uint32{suffix}", {value})')
    odd = f"T.bitwise_and(T.shift_right({bits}, {number(16)}), {number(1)})"
    rounded = w.let("rounded", f"T.shift_right({bits} + {number(0x7FFF)} + {odd}, {number(16)})")
    nan = f"T.bitwise_and({bits}, {number(0x7FFFFFFF)}) > {number(0x7F800000)}"
    return f'T.Cast("uint16{suffix}", T.Select({nan}, {number(0x7FC0)}, {rounded}))'


def slices(fmt: Format) -> int:
    """Rows of blocks that a loop over entries walks at once."""
    return fmt.level.c if isinstance(fmt.level, Sell) else 1


def rows_of_blocks(fmt: Format) -> str:
    """How many rows of blocks N rows have, the level's windows filled up."""
    window = fmt.level.window
    rows = f"((N + {fmt.block[0] * window - 1}) // {fmt.block[0] * window})"
    return rows if window == 1 else f"{rows} * {window}"


def steps(fmt: Format) -> str:
    """How many steps of `write_parents` walk the rows first..last."""
    rows, per = fmt.block[0] * fmt.level.window, fmt.level.window // slices(fmt)
    return f"(last - first + {rows - 1}) // {rows}{f' * {per}' if fmt.level.window > 1 else ''}"


def write_parents(w: Writer, fmt: Format, t: int, panel: str, i: str) -> list[str]:
    """Bind `parent{t}` to what `write_entries` walks in step `i` of the rows from `first` on; returns the first row of each of its
    rows of blocks. `panel` is the offset of the panel's parents, or ""."""
    br = fmt.block[0]
    if not isinstance(fmt.level, Sell):
        w(f"parent{t}: T.let = {panel}first // {br} + {i}")
        return [w.let("row", f"first + {i} * {br}")]
    c, sigma = fmt.level.c, fmt.level.sigma
    w(f"position{t}: T.let = {panel}first // {br} + {i} * {c}")
    w(f"parent{t}: T.let = position{t} // {c}")
    w(f"window{t}: T.let = first + {i} // {sigma // c} * {sigma * br}")
    return [w.let("row", f'window{t} + T.Cast("int64", order{t}[position{t} + {q}]) * {br}') for q in range(c)]


def write_entries(w: Writer, fmt: Format, t: int, parent: str, coords: str, unroll: int, sets: int, body: Body) -> None:
    """Loop over the kept blocks of `parent` (of `coords` coordinates), calling `body` with accumulator sets 0..sets-1 in turn; in
    slices of rows, with the row's number in the slice."""
    match fmt.level:
        case Sell(c=c):
            w(f'lo{t}: T.let = T.Cast("int64", ptr{t}[{parent}])')
            w(f'count{t}: T.let = T.Cast("int64", ptr{t}[{parent} + T.int64(1)]) - lo{t}')
            with w.block(f"for j in range(count{t}):"):
                for q in range(c):
                    j = f"(lo{t} + j) * {c} + {q}"
                    body(j, f'T.Cast("int64", idx{t}[{j}])', q)
        case Compressed():
            w(f'lo{t}: T.let = T.Cast("int64", ptr{t}[{parent}])')
            w(f'count{t}: T.let = T.Cast("int64", ptr{t}[{parent} + T.int64(1)]) - lo{t}')
            at = lambda j: f'T.Cast("int64", idx{t}[{j}])'  # noqa: E731
            with w.block(f"for j in range(count{t} // {unroll}):"):
                for u in range(unroll):
                    j = f"lo{t} + j * {unroll} + {u}"
                    body(j, at(j), u % sets)
            if unroll > 1:
                with w.block(f"for j in range(count{t} % {unroll}):"):
                    j = f"lo{t} + count{t} // {unroll} * {unroll} + j"
                    body(j, at(j), 0)
        case NM(n=n, m=m):
            w(f"groups{t}: T.let = ({coords} + {m - 1}) // {m}")
            with w.block(f"for g in range(groups{t}):"):
                for s in range(n):
                    j = f"({parent} * groups{t} + g) * {n} + {s}"
                    body(j, f'g * {m} + T.Cast("int64", idx{t}[{j}])', s % sets)
        case Dense():
            with w.block(f"for c in range({coords}):"):
                body(f"{parent} * {coords} + c", "c", 0)
        case Bitmap():
            w(f"words{t}: T.let = ({coords} + 15) // 16")
            w(f'at{t} = T.alloc_buffer((1,), "int64", scope="global")')
            w(f'mask{t} = T.alloc_buffer((1,), "int32", scope="global")')
            w(f'at{t}[0] = T.Cast("int64", ptr{t}[{parent}])')
            with w.block(f"for word in range(words{t}):"):
                w(f'mask{t}[0] = T.Cast("int32", bits{t}[{parent} * words{t} + word])')
                with w.block(f"while mask{t}[0] != 0:"):
                    low = f'T.Cast("int64", T.call_llvm_pure_intrin("int32", "llvm.cttz", mask{t}[0], T.bool(True)))'
                    body(f"at{t}[0]", f"word * 16 + {low}", 0)
                    w(f"at{t}[0] = at{t}[0] + T.int64(1)")
                    w(f"mask{t}[0] = T.bitwise_and(mask{t}[0], mask{t}[0] - 1)")
        case other:
            raise TypeError(f"no loop for level {other}")
