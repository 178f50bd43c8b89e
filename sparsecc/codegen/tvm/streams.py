"""The products of one term for one or a few tokens: rows of blocks far apart, walked together.

A core's prefetcher follows a handful of places at once and keeps more cache lines under way for four of them than for one: measured,
18 GB/s instead of 12. So a task's rows are cut into `streams` parts, and a step of the loop advances a row of each. That also hides
the chains of the one row (where its next value lies, its sum) behind the others.

    nonzeros    16 columns at a time are gathered from x, or one by one
    bitmap      a word of bits expands the values that follow into a register, zeros between them
    N:M         16 kept of 32 columns: x is permuted by the offsets
    blocks      lanes along the rows of a block (8x1, 16x1, 32x32), else along its columns (1x16)

Everything else (slices, blocks under a bitmap, narrow vectors) goes entry by entry through `write_entries`.
"""

from __future__ import annotations

from collections.abc import Callable

from sparsecc.codegen.tvm.entries import rows_of_blocks, slices, steps, write_entries, write_parents
from sparsecc.codegen.tvm.loops import write_bitmap, write_block, write_compressed, write_counted, write_gathered, write_permuted
from sparsecc.codegen.tvm.terms import Sums, Term, expands, permutes
from sparsecc.codegen.tvm.writer import Writer, vec
from sparsecc.formats import Compressed, Dense, Panels
from sparsecc.formats.level import NM


def write_term(term: Term) -> None:
    """Add the term's products to `out` for the rows first..last and the tile's tokens."""
    w, fmt, t = term.w, term.fmt, term.t
    panels = isinstance(fmt.swizzle, Panels)
    panel = f"p{t} * {rows_of_blocks(fmt)} + " if panels else ""
    loop = _loop(term)
    with w.block_if(panels, f"for p{t} in range(P{t}):"):
        if loop is None:
            with w.block(f"for i in range({steps(fmt)}):"):
                _write_entries(term, panel)
            return
        br, (width, walk) = fmt.block[0], loop
        streams = max(1, min(term.streams, (term.isa.registers - 8) // (term.tokens * term.parts)))
        w.opaque(f"begin{t}", f"{panel}first // {br}")
        w.opaque(f"count{t}", f"(last - first + {br - 1}) // {br}")
        w.opaque(f"each{t}", f"count{t} // {streams}")
        passes = [(streams, f"each{t}", "i")]
        if streams > 1:  # what is left when the rows are cut
            passes.append((1, f"count{t} - each{t} * {streams}", f"each{t} * {streams} + i"))
        for together, times, start in passes:
            with w.block(f"for i in range({times}):"):
                places = [w.let("place", f"{start}{f' + {s} * each{t}' if s else ''}") for s in range(together)]
                sums = Sums(term, together, width, term.parts)
                walk(term, [w.let("parent", f"begin{t} + {place}") for place in places], sums)
                for s, place in enumerate(places):
                    _write_out(term, sums, s, f"first + {place} * {br}")


Loop = Callable[[Term, list[str], Sums], None]


def _loop(term: Term) -> tuple[int, Loop] | None:
    """Lanes of a sum, and what walks rows of blocks together; None where only `write_entries` does."""
    fmt, isa = term.fmt, term.isa
    width = max(term.along_rows, term.along_cols)
    if expands(fmt, isa):
        return 16, write_bitmap
    if permutes(fmt, isa):
        return 16, write_permuted
    match fmt.level:
        case Compressed():
            wide = fmt.block == (1, 1) and term.gather and isa.has("avx512bw")
            return (16, write_gathered) if wide else (width, write_compressed)
        case Dense() | NM():
            return width, write_counted
    return None


def _write_entries(term: Term, panel: str) -> None:
    """Rows of a slice, or one row, entry by entry."""
    w, fmt, t = term.w, term.fmt, term.t
    firsts = write_parents(w, fmt, t, panel, "i")
    sums = Sums(term, slices(fmt), max(term.along_rows, term.along_cols), term.parts)
    body = lambda j, col, s: write_block(term, sums, s, w.let("entry", j), col)  # noqa: E731
    write_entries(w, fmt, t, f"parent{t}", f"C{t}", 1, 1, body)
    for s, row in enumerate(firsts):
        _write_out(term, sums, s, row)


def _write_out(term: Term, sums: Sums, s: int, row: str) -> None:
    """Lanes along rows are rows; lanes along columns are added up. Rows behind the last one of W have room in `out`."""
    w, single = term.w, term.fmt.block[0] == 1
    for m in range(term.tokens):
        at = f"ot + {f'{m} * pitch + ' if m else ''}{row}"
        if single:
            w(f"work[{at}] = work[{at}] + {total(w, sums(s, m), sums.width)}")
            continue
        for q in range(sums.parts):
            out = vec("work", f"{at} + {q * sums.width}", sums.width)
            w(f"{out} = {out} + {sums(s, m, q)}")


def total(w: Writer, value: str, lanes: int) -> str:
    """The sum of a vector's lanes."""
    while lanes > 1:
        value, lanes = w.let("half", value), lanes // 2
        low, high = (f"T.Shuffle([{value}], {list(range(i, i + lanes))})" for i in (0, lanes))
        value = f"{low} + {high}"
    return value
