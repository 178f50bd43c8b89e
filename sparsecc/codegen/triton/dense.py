"""Family dense: a term without zeros beside sparse ones. Alone it is the vendor's."""

from __future__ import annotations

from sparsecc.codegen.triton.tile import Tile
from sparsecc.formats import Format


def refuses_dense(fmt: Format) -> str | None:
    """Why this family cannot run the format, or None."""
    return f"{fmt}: dense terms are stored row by row" if fmt.block != (1, 1) or str(fmt.swizzle) else None


def write_dense(tile: Tile, t: int) -> None:
    """acc += W_t x."""
    w, bk = tile.w, tile.config.bk
    row = "tl.minimum(rn, N - 1)" if tile.spec.ragged else "rn"
    w(f"row{t} = val{t} + {row}.to(tl.int64)[:, None] * K")
    w(f"k{t} = tl.arange(0, {bk})")
    tile.begin(t, bk)
    first, last = tile.share(t, "0", f"tl.cdiv(K, {bk})")
    with w.block(tile.loop(first, last)):
        w(f"ks = j * {bk} + k{t}")
        mask = ", mask=(ks < K)[None, :], other=0.0" if tile.spec.tail else ""
        w(f"weights = tl.load(row{t} + ks[None, :]{mask})")
        tile.multiply(t, "weights", "ks")
    tile.end(t)
