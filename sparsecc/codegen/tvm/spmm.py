"""Family spmm: sparse weight [N, K] times many tokens.

Activations come token-minor, best in tiles x[tile][k][T] with T = lanes * vectors tokens, so that a weight (or a row of a block) is one broadcast and
every load is one aligned cache line. A block of rows x `vectors` accumulators stays in registers over the kept blocks of a row.
Terms, and panels of columns, add up through y, which stays in cache: one task is one tile x `chunk` rows.

    for task in parallel(tiles * chunks):          y[tile][n][T]  (or token-minor y[n][M])
        for term, panel, block row in the chunk:
            acc = bias or y
            for kept block (j, col):  acc[row][v] += val[j][row] * x[tile][col][v]
            y = acc, with the epilogue after the last term
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.tvm.activation import write_activation
from sparsecc.codegen.tvm.entries import pointers, value, write_entries
from sparsecc.codegen.tvm.writer import Writer, splat, vec
from sparsecc.formats import Format, Panels

INTS = ("M", "N", "tiles", "chunk", "x_stride", "x_tile", "row_stride", "tile_stride", "res_stride")
"""Scalar arguments. chunk: rows per task, a multiple of every block's rows; x_stride, x_tile: between features and between tiles of x,
which may be packed or, with whole vectors of tokens, token-minor; row_stride, tile_stride: likewise of y; res_stride: between the features of a token-minor residual. Per term follow C{t} (coordinates per parent) and P{t} (panels)."""


@dataclass(frozen=True)
class Tile:
    """Registers of one variant: `vectors` token vectors starting at `offset` (an expression) in the tile."""

    lanes: int
    vectors: int
    offset: str

    def address(self, base: str, r: int) -> str:
        return f"{base} + {self.offset} + {r * self.lanes}"


def spmm_source(spec: KernelSpec, vectors: int, unroll: int, lanes: int, registers: int) -> str:
    """The kernel's text. `vectors` is a power of two; `registers` bounds the accumulators."""
    w = Writer()
    params = {"x": "float32", "y": "float32", "bias": "float32"}
    token_residual = spec.residual and spec.layout == "token"
    if token_residual:
        params["res"] = "float32"
    for t, fmt in enumerate(spec.formats):
        params |= pointers(fmt, spec.wide, t)
    sizes = tuple(f"{name}{t}" for t in range(len(spec.formats)) for name in "CP")
    width = lanes * vectors
    with w.function("spmm", params, INTS + sizes):
        w("chunks: T.let = (N + chunk - 1) // chunk")
        with w.block("for task in T.parallel(tiles * chunks):"):
            w.opaque("tile", "task // chunks")
            w.opaque("first", "task % chunks * chunk")
            w.opaque("last", "T.min(N, first + chunk)")
            w.opaque("left", f"T.min((M - tile * {width} + {lanes - 1}) // {lanes}, T.int64({vectors}))")
            w("xt: T.let = tile * x_tile")
            w("yt: T.let = tile * tile_stride")
            part = vectors
            while part:  # the last tile may be narrower: its vectors are the sum of smaller powers of two
                test = f"left == {part}" if part == vectors else f"T.bitwise_and(left, T.int64({part})) != 0"
                if part < vectors:
                    test = f"(left < {vectors}) and ({test})"
                with w.block(f"if {test}:"):
                    offset = "T.int64(0)" if part == vectors else w.let("offset", f"left // {2 * part} * {2 * part * lanes}")
                    tile = Tile(lanes, part, offset)
                    for t in range(len(spec.formats)):
                        _write_term(w, spec, t, tile, unroll, registers, token_residual)
                part //= 2
    return w.text


def _write_term(w: Writer, spec: KernelSpec, t: int, tile: Tile, unroll: int, registers: int, residual: bool) -> None:
    fmt = spec.formats[t]
    br = fmt.block[0]
    rows = max(r for r in range(1, br + 1) if br % r == 0 and (r == 1 or r * tile.vectors <= registers and r <= 8))
    sets = max(1, min(unroll * fmt.block[1], registers // (rows * tile.vectors), 4))
    panels = isinstance(fmt.swizzle, Panels)
    parents = f"((N + {br - 1}) // {br})"
    sub = f"sub * {rows}" if br > rows else "0"
    with w.block_if(panels, f"for p{t} in range(P{t}):"):
        with w.block(f"for i in range((last - first + {br - 1}) // {br}):"):
            with w.block_if(br > rows, f"for sub in range({br // rows}):"):
                w(f"row: T.let = first + i * {br} + {sub}")
                w(f"parent: T.let = {f'p{t} * {parents} + ' if panels else ''}first // {br} + i")
                w(f'acc = T.alloc_buffer(({sets * rows * tile.vectors * tile.lanes},), "float32", scope="local")')
                acc = lambda s, b, r: vec("acc", ((s * rows + b) * tile.vectors + r) * tile.lanes, tile.lanes)  # noqa: E731
                y = lambda b, r: vec("y", tile.address(f"yt + (row + {b}) * row_stride", r), tile.lanes)  # noqa: E731
                _write_start(w, spec, t, tile, rows, sets, acc, y, panels)
                xk = f"p{t} * C{t} + " if panels else ""
                _write_products(w, fmt, t, tile, unroll, rows, sets, acc, xk, sub)
                for b in range(rows):
                    with _guard(w, spec, b):
                        for r in range(tile.vectors):
                            total = " + ".join(acc(s, b, r) for s in range(sets))
                            w(f"{y(b, r)} = {total}")
                if t == len(spec.formats) - 1 and (spec.epilogue or residual):
                    with w.block_if(panels, f"if p{t} == P{t} - 1:"):
                        _write_end(w, spec, tile, rows, residual)


def _guard(w: Writer, spec: KernelSpec, b: int):  # noqa: ANN202
    """Rows past N exist only where N isn't a multiple of the block's rows."""
    return w.block_if(spec.ragged, f"if row + {b} < N:")


def _write_start(w: Writer, spec: KernelSpec, t: int, tile: Tile, rows: int, sets: int, acc, y, panels: bool) -> None:  # noqa: ANN001
    """Accumulators start at the bias, or at what earlier terms and panels left in y."""

    def start(from_bias: bool) -> None:
        for b in range(rows):
            with _guard(w, spec, b):
                for r in range(tile.vectors):
                    w(f"{acc(0, b, r)} = {splat(f'bias[row + {b}]', tile.lanes) if from_bias else y(b, r)}")

    if t:
        start(False)
    elif panels:
        with w.block(f"if p{t} == 0:"):
            start(True)
        with w.block("else:"):
            start(False)
    else:
        start(True)
    for s in range(1, sets):
        for b in range(rows):
            for r in range(tile.vectors):
                w(f"{acc(s, b, r)} = {splat('T.float32(0)', tile.lanes)}")


def _write_products(
    w: Writer, fmt: Format, t: int, tile: Tile, unroll: int, rows: int, sets: int, acc, xk: str, sub: str  # noqa: ANN001
) -> None:
    br, bc = fmt.block
    step = next(s for s in (4, 2, 1) if bc % s == 0) if bc > 4 else bc

    def block(j: str, col: str, s: int) -> None:
        first = w.let("block", j)
        xb = w.let("xb", f"xt + ({xk}{col}) * {f'{bc} * ' if bc > 1 else ''}x_stride + {tile.offset}")
        with w.block_if(bc > step, f"for cc in range({bc // step}):"):
            for c in range(step):
                k = f"cc * {step} + {c}" if bc > step else f"{c}"
                for b in range(rows):
                    for r in range(tile.vectors):
                        a = acc((s * bc + c) % sets, b, r)
                        weight = splat(value(fmt, t, f"({first} * {bc} + {k}) * {br} + {sub} + {b}"), tile.lanes)
                        w(f"{a} = {a} + {weight} * {vec('x', f'{xb} + ({k}) * x_stride + {r * tile.lanes}', tile.lanes)}")

    write_entries(w, fmt, t, "parent", f"C{t}", 1 if bc > 4 else unroll, sets if bc == 1 else 1, block)


def _write_end(w: Writer, spec: KernelSpec, tile: Tile, rows: int, residual: bool) -> None:
    with w.block(f"for out in range(T.min(T.int64({rows}), N - row) * {tile.vectors}):"):
        w(f"at: T.let = yt + (row + out // {tile.vectors}) * row_stride + {tile.offset} + out % {tile.vectors} * {tile.lanes}")
        out = vec("y", "at", tile.lanes)
        result = write_activation(w, spec.epilogue, out, tile.lanes) if spec.epilogue else out
        if residual:
            w(f"rt: T.let = (row + out // {tile.vectors}) * res_stride + (at - yt - (row + out // {tile.vectors}) * row_stride) + yt")
            result = f"{result} + {vec('res', 'rt', tile.lanes)}"
        w(f"{out} = {result}")
