"""Family spmm: sparse weight [N, K] times many tokens.

Activations come token-minor, best in spans x[span][k][64 tokens], so that a weight (or a row of a block) is one broadcast and every
load is one aligned cache line. A block of rows x `vectors` accumulators stays in registers over the kept
blocks of a row. Terms, and panels of columns, add up through the task's output, which stays in cache.

    for task in parallel(tiles * chunks):                     one tile of tokens x `chunk` rows
        for term, panel, block row in the chunk:
            acc = bias or out
            for kept block (j, col):  acc[row][v] += val[j][row] * x[tile][col][v]
            out = acc, with the epilogue after the last term
        y[m][n] = transposed out + residual                   layout "row"; for "token", out is y[n][m] itself

Tokens come as sequences of `S`; a tile never reaches into the next one, so token-minor values [sequence][feature][token] are read and
written where they are, and a plain matrix is one sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.tvm.activation import write_activation
from sparsecc.codegen.tvm.entries import pointers, rows_of_blocks, slices, steps, value, write_entries, write_parents
from sparsecc.codegen.tvm.tiles import place, write_parts, write_rows
from sparsecc.codegen.tvm.writer import Writer, splat, vec
from sparsecc.formats import Format, Panels

INTS = ("S", "N", "tiles", "per", "x_stride", "x_span", "x_batch", "y_stride", "y_span", "y_batch", "res_stride", "res_span",
        "res_batch")
"""Scalar arguments. S: tokens per sequence; tiles: of all sequences; per: of one. x_stride, x_span, x_batch: between features, spans of
tokens (see `tiles`) and sequences of x; y_stride, res_stride: between tokens (layout "row") or features ("token"); those of spans and
sequences serve "token" only. Per term follow C{t} (coordinates per parent) and P{t} (panels)."""


CHAINS = 8
"""Vectors of an epilogue that are computed side by side."""


@dataclass(frozen=True)
class Tile:
    """Registers of one variant: `vectors` token vectors starting at `offset` (an expression) in the tile; where its rows go."""

    lanes: int
    vectors: int
    offset: str
    buffer: str
    row_at: str

    def out(self, row: str, vector: int | str) -> str:
        """The output's vector of a row."""
        step = f"{vector * self.lanes}" if isinstance(vector, int) else f"{vector} * {self.lanes}"
        return vec(self.buffer, f"{self.row_at.format(row=row)} + {self.offset} + {step}", self.lanes)


def spmm_source(spec: KernelSpec, vectors: int, unroll: int, chunk: int, lanes: int, registers: int) -> str:
    """The kernel's text. `vectors` is a power of two; `chunk`, rows per task, a multiple of every block's rows; `registers` bounds
    the accumulators."""
    w = Writer()
    params = {"x": "float32", "y": "float32", "bias": "float32"} | ({"res": "float32"} if spec.residual else {})
    for t, fmt in enumerate(spec.formats):
        params |= pointers(fmt, spec.wide, t)
    sizes = tuple(f"{name}{t}" for t in range(len(spec.formats)) for name in "CP")
    width, by_rows = lanes * vectors, spec.layout == "row"
    buffer, row_at = ("out", f"({{row}} - first) * {width}") if by_rows else ("y", "yt + ({row}) * y_stride")
    with w.function("spmm", params, INTS + sizes):
        w(f"chunks: T.let = (N + {chunk - 1}) // {chunk}")
        with w.block("for task in T.parallel(tiles * chunks):"):
            w.opaque("tile", "task // chunks")
            w.opaque("first", f"task % chunks * {chunk}")
            w.opaque("last", f"T.min(N, first + {chunk})")
            w.opaque("batch", "tile // per")
            w.opaque("start", f"tile % per * {width}")
            w.opaque("left", f"T.min((S - start + {lanes - 1}) // {lanes}, T.int64({vectors}))")
            w.opaque("xt", place("x"))
            if not by_rows:
                w.opaque("yt", place("y"))
                if spec.residual:
                    w.opaque("rt", place("res"))
            if by_rows:
                w(f'out = T.alloc_buffer(({chunk * width},), "float32", scope="global")')
            for part, offset in write_parts(w, vectors, lanes):
                tile = Tile(lanes, part, offset, buffer, row_at)
                for t in range(len(spec.formats)):
                    _write_term(w, spec, t, tile, unroll, registers)
            if by_rows:
                with w.block("for slab in range(left):"):
                    write_rows(w, lanes, spec.residual, f"start + slab * {lanes}", f"slab * {lanes}", width)
    return w.text


def _write_term(w: Writer, spec: KernelSpec, t: int, tile: Tile, unroll: int, registers: int) -> None:
    fmt = spec.formats[t]
    br, c = fmt.block[0], slices(fmt)
    fits = lambda r: r == 1 or (r * tile.vectors * c <= registers and r <= 8)  # noqa: E731
    rows = max(r for r in range(1, br + 1) if br % r == 0 and fits(r))
    sets = c if c > 1 else max(1, min(unroll * fmt.block[1], registers // (rows * tile.vectors), 4))
    panels = isinstance(fmt.swizzle, Panels)
    with (
        w.block_if(panels, f"for p{t} in range(P{t}):"),
        w.block(f"for i in range({steps(fmt)}):"),
        w.block_if(br > rows, f"for sub in range({br // rows}):"),
    ):
        firsts = write_parents(w, fmt, t, f"p{t} * {rows_of_blocks(fmt)} + " if panels else "", "i")
        sub = f"sub * {rows}" if br > rows else "0"
        if br > rows:
            firsts = [f"{first} + {sub}" for first in firsts]
        registers_of = w.registers("acc", sets * rows, tile.vectors, tile.lanes)
        acc = lambda s, b, r: registers_of(s * rows + b, r)  # noqa: E731
        for q, first in enumerate(firsts):
            _write_start(w, spec, t, tile, first, rows, acc, q, panels)
        for s in range(len(firsts), sets):
            for b in range(rows):
                for r in range(tile.vectors):
                    w(f"{acc(s, b, r)} = {splat('T.float32(0)', tile.lanes)}")
        _write_products(w, fmt, t, tile, unroll, rows, sets, acc, f"p{t} * C{t} + " if panels else "", sub)
        for q, first in enumerate(firsts):
            for b in range(rows):
                with _guard(w, spec, first, b):
                    for r in range(tile.vectors):
                        total = " + ".join(acc(s, b, r) for s in range(q, sets, len(firsts)))
                        w(f"{tile.out(f'{first} + {b}', r)} = {total}")
        residual = spec.residual and spec.layout == "token"
        if t == len(spec.formats) - 1 and (spec.epilogue or residual):
            with w.block_if(panels, f"if p{t} == P{t} - 1:"):
                group = 1 if rows > 1 or spec.ragged else max(1, CHAINS // tile.vectors)
                for i in range(0, len(firsts), group):
                    _write_end(w, spec, tile, firsts[i : i + group], rows, residual)


def _guard(w: Writer, spec: KernelSpec, row: str, b: int):
    """Rows past N exist only where N isn't a multiple of the block's rows, or of a window of those."""
    return w.block_if(spec.ragged, f"if {row} + {b} < N:")


def _write_start(w: Writer, spec: KernelSpec, t: int, tile: Tile, row: str, rows: int, acc, s: int, panels: bool) -> None:
    """Accumulators start at the bias, or at what earlier terms and panels left in y."""

    def start(from_bias: bool) -> None:
        for b in range(rows):
            with _guard(w, spec, row, b):
                for r in range(tile.vectors):
                    left = tile.out(f"{row} + {b}", r)
                    w(f"{acc(s, b, r)} = {splat(f'bias[{row} + {b}]', tile.lanes) if from_bias else left}")

    if t:
        start(False)
    elif panels:
        with w.block(f"if p{t} == 0:"):
            start(True)
        with w.block("else:"):
            start(False)
    else:
        start(True)


def _write_products(
    w: Writer, fmt: Format, t: int, tile: Tile, unroll: int, rows: int, sets: int, acc, xk: str, sub: str
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
                        a = acc(s if slices(fmt) > 1 else (s * bc + c) % sets, b, r)
                        weight = splat(value(fmt, t, f"({first} * {bc} + {k}) * {br} + {sub} + {b}"), tile.lanes)
                        w(f"{a} = {a} + {weight} * {vec('x', f'{xb} + ({k}) * x_stride + {r * tile.lanes}', tile.lanes)}")

    write_entries(w, fmt, t, f"parent{t}", f"C{t}", 1 if bc > 4 else unroll, sets if bc == 1 else 1, block)


def _write_end(w: Writer, spec: KernelSpec, tile: Tile, firsts: Sequence[str], rows: int, residual: bool) -> None:
    # What goes through the epilogue together: one vector is a chain of dependent instructions, and several chains fill the core.
    together = 1 if spec.ragged else math.gcd(rows, max(1, CHAINS // tile.vectors))
    with w.block(f"for e_row in range({f'T.min(T.int64({rows}), N - ({firsts[0]}))' if spec.ragged else rows // together}):"):
        at = [f"{first} + e_row * {together} + {i}" for first in firsts for i in range(together)]
        places = [(row, r) for row in at for r in range(tile.vectors)]
        outs = [tile.out(row, r) for row, r in places]
        results = write_activation(w, spec.epilogue, outs, tile.lanes) if spec.epilogue else outs
        for (row, r), out, result in zip(places, outs, results, strict=True):
            start = f"rt + ({row}) * res_stride + {tile.offset} + {r * tile.lanes}"
            plus = f" + {vec('res', start, tile.lanes)}" if residual else ""
            w(f"{out} = {result}{plus}")
