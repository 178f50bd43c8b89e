"""Family spmv: sparse weight [N, K] times one token (decode).

The vector lies along the rows of a block (8x1, 16x1, 32x32), along its columns (1x16), or, for single entries and small blocks,
there is none: several scalar accumulators then keep the multiply-adds independent. Bytes decide here, and each is read once.
"""

from __future__ import annotations

from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.tvm.activation import write_activation
from sparsecc.codegen.tvm.entries import pointers, rows_of_blocks, slices, steps, value, write_entries, write_parents
from sparsecc.codegen.tvm.writer import Writer, splat, vec
from sparsecc.formats import Format, Panels

INTS = ("N", "chunk")


def spmv_source(spec: KernelSpec, unroll: int, lanes: int) -> str:
    """The kernel's text; x is contiguous and zero-padded to whole blocks and groups."""
    w = Writer()
    params = {"x": "float32", "y": "float32", "bias": "float32"} | ({"res": "float32"} if spec.residual else {})
    for t, fmt in enumerate(spec.formats):
        params |= pointers(fmt, spec.wide, t)
    sizes = tuple(f"{name}{t}" for t in range(len(spec.formats)) for name in "CP")
    with w.function("spmv", params, INTS + sizes), w.block("for task in T.parallel((N + chunk - 1) // chunk):"):
        w.opaque("first", "task * chunk")
        w.opaque("last", "T.min(N, first + chunk)")
        with w.block("for n in range(last - first):"):
            w("y[first + n] = bias[first + n]")
        for t in range(len(spec.formats)):
            _write_term(w, spec, t, unroll, lanes)
        if spec.epilogue or spec.residual:
            with w.block("for out in range(last - first):"):
                result = write_activation(w, spec.epilogue, ["y[first + out]"], 1)[0] if spec.epilogue else "y[first + out]"
                w(f"y[first + out] = {result}{' + res[first + out]' if spec.residual else ''}")
    return w.text


def _write_term(w: Writer, spec: KernelSpec, t: int, unroll: int, lanes: int) -> None:
    fmt = spec.formats[t]
    br, bc = fmt.block
    panels = isinstance(fmt.swizzle, Panels)
    # Lanes along the rows, else along the columns, else one.
    along_rows = max(v for v in (lanes, lanes // 2, lanes // 4, 4, 2, 1) if br % v == 0) if br > 1 else 1
    along_cols = max(v for v in (lanes, lanes // 2, 4, 2, 1) if bc % v == 0) if br == 1 else 1
    width = max(along_rows, along_cols)
    parts, c = br // along_rows, slices(fmt)
    sets = c if c > 1 else max(1, min(unroll, 16 // parts)) if bc // along_cols == 1 else 1
    with (
        w.block_if(panels, f"for p{t} in range(P{t}):"),
        w.block(f"for i in range({steps(fmt)}):"),
    ):
        rows = write_parents(w, fmt, t, f"p{t} * {rows_of_blocks(fmt)} + " if panels else "", "i")
        w(f'acc = T.alloc_buffer(({sets * parts * width},), "float32", scope="global")')
        acc = lambda s, q: vec("acc", (s * parts + q) * width, width)  # noqa: E731
        for s in range(sets):
            for q in range(parts):
                w(f"{acc(s, q)} = {splat('T.float32(0)', width)}")
        _write_products(w, fmt, t, unroll, sets, parts, width, along_cols, acc, f"p{t} * C{t} + " if panels else "")
        for s in range(len(rows), sets):
            for q in range(parts):
                w(f"{acc(0, q)} = {acc(0, q)} + {acc(s, q)}")
        for s, row in enumerate(rows):
            if along_cols > 1:
                total = " + ".join(f"acc[{s * width + lane}]" for lane in range(along_cols))
                with w.block_if(c > 1, f"if {row} < N:"):
                    w(f"y[{row}] = y[{row}] + ({total})")
            else:
                with w.block(f"for b in range(T.min(T.int64({br}), N - {row})):"):
                    w(f"y[{row} + b] = y[{row} + b] + acc[{s * parts * width} + b]")


def _write_products(
    w: Writer, fmt: Format, t: int, unroll: int, sets: int, parts: int, width: int, along_cols: int, acc, panel: str
) -> None:
    br, bc = fmt.block

    def block(j: str, col: str, s: int) -> None:
        first = w.let("block", j)
        xb = w.let("xb", f"({panel}{col}) * {bc}")
        steps = bc // along_cols
        with w.block_if(steps > 1, f"for cc in range({steps}):"):
            cc = "cc" if steps > 1 else "0"
            for q in range(parts):
                weight = value(fmt, t, f"{first} * {br * bc} + {cc} * {br * along_cols} + {q * width}", width)
                x = vec("x", f"{xb} + {cc} * {along_cols}", along_cols) if along_cols > 1 else splat(f"x[{xb} + {cc}]", width)
                w(f"{acc(s, q)} = {acc(s, q)} + {weight} * {x}")

    write_entries(w, fmt, t, f"parent{t}", f"C{t}", unroll if bc // along_cols == 1 else 1, sets, block)
