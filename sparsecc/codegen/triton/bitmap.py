"""Family bitmap: one bit per entry or small block. Loaded sparse, computed dense: a tile of weights is put together in registers.

One offset per tile, the rest is counting bits: of a row before this one (a scan over the tile's rows), of the row's nibbles before this
one (bytes added up by one multiplication), and within a nibble one addition per bit. Reading the values is then a masked load whose
lanes hit consecutive addresses. Load-as-sparse, compute-as-dense: Xia et al., "Flash-LLM", VLDB 2024; bits instead of indices: Fan et
al., "SpInfer", EuroSys 2025.
"""

from __future__ import annotations

from sparsecc.codegen.triton.tile import Tile, interleave
from sparsecc.formats import Bitmap, Format, Panels

WORD = 32
"""Coordinates whose bits are looked at at once."""


def refuses_bitmap(fmt: Format) -> str | None:
    """Why this family cannot run the format, or None."""
    assert isinstance(fmt.level, Bitmap)
    br, bc = fmt.block
    if br * bc > 8 or br & (br - 1) or bc & (bc - 1):
        return f"blocks of {br}x{bc}: a bit stands for at most 8 entries, and sides are powers of two"
    if fmt.level.every not in (16, 32, 64, 128) or not 16 <= bitmap_rows(fmt) <= 128:
        return f"{fmt.level} has no tiles of 16 to 128 rows: bitmap(64) has"
    if not isinstance(fmt.swizzle, Panels) or fmt.swizzle.width not in (WORD, 2 * WORD, 4 * WORD):
        return f"{fmt} has no tiles of columns: panels(32), panels(64) or panels(128) have"
    return None


def bitmap_rows(fmt: Format) -> int:
    """Rows of W under one offset."""
    assert isinstance(fmt.level, Bitmap)
    return fmt.level.every * fmt.block[0]


def bitmap_columns(fmt: Format) -> int:
    """Columns of W that a step goes through: a panel."""
    assert isinstance(fmt.swizzle, Panels)
    return fmt.swizzle.width * fmt.block[1]


def write_bitmap(tile: Tile, t: int) -> None:
    """acc += W_t x over the panels."""
    w, fmt = tile.w, tile.spec.formats[t]
    assert isinstance(fmt.level, Bitmap) and isinstance(fmt.swizzle, Panels)
    (br, bc), parents, width = fmt.block, fmt.level.every, fmt.swizzle.width
    words = width // WORD
    w(f"tiles{t} = tl.cdiv(N, {tile.bn})")
    w(f"words{t} = bits{t}.to(tl.pointer_type(tl.uint32))")  # two stored words at a time
    w(f"parent{t} = tl.arange(0, {parents})")
    w(f"nibble{t} = tl.arange(0, 8)[None, :]")
    w(f"byte{t} = nibble{t} // 2 * 8")
    w(f"k{t} = tl.arange(0, {WORD * bc})")
    tile.begin(t, WORD * bc)
    first, last = tile.share(t, "0", f"tl.cdiv(K, {width * bc})")
    with w.block(tile.loop(first, last)):
        w(f"window = j * tiles{t} + tile_n")
        w(f"stored = val{t} + tl.load(ptr{t} + window).to(tl.int64)" + (f" * {br * bc}" if br * bc > 1 else ""))
        w(f"bits = words{t} + (window.to(tl.int64) * {parents} + parent{t}){f' * {words}' if words > 1 else ''}")
        for q in range(words):
            w(f"word_{q} = tl.load(bits{f' + {q}' if q else ''})")
            _count(tile, q)
        total = " + ".join(f"count_{q}" for q in range(words))
        w(f"counts = {total}")
        w("at = tl.cumsum(counts, 0) - counts")
        for q in range(words):
            _expand(tile, t, q)
            tile.multiply(t, "weights", f"(j * {width * bc} + {q * WORD * bc} + k{t})")
            if q < words - 1:
                w(f"at += count_{q}")
    tile.end(t)


def _count(tile: Tile, q: int) -> None:
    """Bits of the word: by nibble, added up by byte, and in all."""
    w = tile.w
    w(f"pairs = word_{q} - ((word_{q} >> 1) & 0x55555555)")
    w(f"nibbles_{q} = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)")
    w(f"sums_{q} = ((nibbles_{q} + (nibbles_{q} >> 4)) & 0x0F0F0F0F) * 0x01010101")
    w(f"count_{q} = (sums_{q} >> 24).to(tl.int32)")


def _expand(tile: Tile, t: int, q: int) -> None:
    """`weights` [BN, 32 * bc] from the word and the values."""
    w, fmt = tile.w, tile.spec.formats[t]
    br, bc = fmt.block
    w(f"before = ((sums_{q} << 8)[:, None] >> byte{t}) & 0xFF")
    w(f"before += tl.where(nibble{t} % 2 == 1, (nibbles_{q}[:, None] >> byte{t}) & 0xF, 0)")
    w("rank = at[:, None] + before.to(tl.int32)")
    w(f"four = (word_{q}[:, None] >> (nibble{t} * 4)).to(tl.int32)")
    for e in range(4):
        w(f"kept_{e} = (four & {1 << e}) != 0")
        place = "rank" if br * bc == 1 else f"rank * {br * bc}"
        for c in range(bc):
            for r in range(br):
                offset = c * br + r
                w(f"value_{r}_{e * bc + c} = tl.load(stored + {place}{f' + {offset}' if offset else ''}, mask=kept_{e}, other=0.0)")
        if e < 3:
            w(f"rank += kept_{e}.to(tl.int32)")
    rows = [f"tl.reshape({interleave([f'value_{r}_{i}' for i in range(4 * bc)])}, ({tile.bn // br}, {WORD * bc}))" for r in range(br)]
    if br == 1:
        w(f"weights = {rows[0]}")
        return
    for r, row in enumerate(rows):
        w(f"rows_{r} = {row}")
    joined = f"tl.reshape({interleave([f'rows_{r}' for r in range(br)])}, ({tile.bn // br}, {WORD * bc}, {br}))"
    w(f"weights = tl.reshape(tl.permute({joined}, (0, 2, 1)), ({tile.bn}, {WORD * bc}))")
