"""Family bsr: blocks of 16x16 to 128x128 for the matrix instructions; a program owns a row of blocks.

Blocks are stored column by column, so a step takes any part of a block's columns as one contiguous piece.
"""

from __future__ import annotations

from sparsecc.codegen.triton.tile import Tile
from sparsecc.formats import Format

SIDES = (16, 32, 64, 128)
"""Of blocks that fill matrix instructions."""


def refuses_bsr(fmt: Format) -> str | None:
    """Why this family cannot run the format, or None."""
    if not all(side in SIDES for side in fmt.block):
        return f"blocks of {fmt.block[0]}x{fmt.block[1]} don't fill matrix instructions: sides of {', '.join(map(str, SIDES))} do"
    return None


def write_bsr(tile: Tile, t: int) -> None:
    """acc += W_t x over the kept blocks of a row."""
    w, fmt = tile.w, tile.spec.formats[t]
    br, bc = fmt.block
    bk = min(tile.config.bk, bc)
    parts = bc // bk
    w(f"lo{t} = tl.load(ptr{t} + tile_n)")
    w(f"hi{t} = tl.load(ptr{t} + tile_n + 1)")
    w(f"k{t} = tl.arange(0, {bk})")
    w(f"size{t} = tl.full((), {br * bk}, tl.int64)")  # of a step's weights: all of them may be more than 2^31
    w(f"in{t} = tl.arange(0, {br})[:, None] + k{t}[None, :] * {br}")
    tile.begin(t, bk)
    first, last = tile.share(t, *(f"{end}{t}{f' * {parts}' if parts > 1 else ''}" for end in ("lo", "hi")))
    with w.block(tile.loop(first, last)):
        block, offset = ("j", "") if parts == 1 else (f"j // {parts}", f" + j % {parts} * {bk}")
        w(f"column = tl.load(idx{t} + {block}).to(tl.int32) * {bc}{offset}")
        w(f"weights = tl.load(val{t} + j * size{t} + in{t})")
        tile.multiply(t, "weights", f"(column + k{t})")
    tile.end(t)
