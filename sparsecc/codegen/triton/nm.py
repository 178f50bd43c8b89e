"""Family nm: N:M with packed positions. Loaded compressed, expanded in registers by comparing positions, multiplied as a dense tile.

Every load is contiguous: a row's values, and codes of all positions of a group in a few bits (2:4 in fp16 is 36 bits for 4 weights).
"""

from __future__ import annotations

from sparsecc.codegen.triton.tile import Tile, interleave
from sparsecc.formats import Format, PackedNM

STEP = 256
"""Columns that K is a multiple of unless the spec says `tail`."""


def refuses_nm(fmt: Format) -> str | None:
    """Why this family cannot run the format, or None."""
    assert isinstance(fmt.level, PackedNM)
    if fmt.block != (1, 1) or str(fmt.swizzle):
        return f"{fmt}: N:M is expanded from single entries in order"
    if fmt.level.n not in (1, 2, 4) or fmt.level.m not in (2, 4, 8, 16):
        return f"{fmt.level} isn't expanded in registers: n of 1, 2 or 4 and m of 2 to 16 are"
    return None


def nm_columns(fmt: Format, bk: int) -> int:
    """Columns of a step: at least those of a stored word."""
    assert isinstance(fmt.level, PackedNM)
    return max(bk, fmt.level.m * fmt.level.per_word)


def write_nm(tile: Tile, t: int) -> None:
    """acc += W_t x over the columns."""
    w, level, bn = tile.w, tile.spec.formats[t].level, tile.bn
    assert isinstance(level, PackedNM)
    n, m = level.n, level.m
    bk = nm_columns(tile.spec.formats[t], tile.config.bk)
    groups = bk // m
    ragged = tile.spec.ragged
    tail = tile.spec.tail
    if tail:
        w(f"groups{t} = tl.cdiv(K, {m})")
        w(f"words{t} = tl.cdiv(groups{t}, {level.per_word})")
    else:  # K is a multiple of 256: said of what is derived from it, so that rows are loaded 16 bytes at a time
        w(f"groups{t} = tl.multiple_of(K // {m}, {STEP // m})")
        w(f"words{t} = tl.multiple_of(K // {m * level.per_word}, {STEP // (m * level.per_word)})")
    w(f"row{t} = {'tl.minimum(rn, N - 1)' if ragged else 'rn'}.to(tl.int64)[:, None]")
    w(f"slot{t} = tl.arange(0, {groups * n})[None, :]")
    w(f"word{t} = tl.arange(0, {groups // level.per_word})[None, :]")
    w(f"k{t} = tl.arange(0, {bk})")
    tile.begin(t, bk)
    first, last = tile.share(t, "0", f"tl.cdiv(K, {bk})")
    with w.block(tile.loop(first, last)):
        within = lambda at, end: f", mask={at} < {end}, other=0" if tail else ""  # noqa: E731
        w(f"slots = j * {groups * n} + slot{t}")
        w(f"packed = tl.load(val{t} + row{t} * (groups{t} * {n}) + slots{within('slots', f'groups{t} * {n}')})")
        w(f"words = j * {groups // level.per_word} + word{t}")
        w(f"codes = tl.load(idx{t} + row{t} * words{t} + words{within('words', f'words{t}')}).to(tl.int32)")
        if level.per_word > 1:
            parts = [f"codes >> {level.bits * g}" for g in range(level.per_word)]
            w(f"codes = tl.reshape({interleave(parts)}, ({bn}, {groups}))")
        values = _split(tile, "packed", groups, n)
        position = m.bit_length() - 1
        for s in range(n):
            w(f"at_{s} = (codes >> {s * position}) & {m - 1}")
        for c in range(m):
            chosen = "0.0"
            for s in reversed(range(n)):
                chosen = f"tl.where(at_{s} == {c}, {values[s]}, {chosen})"
            w(f"column_{c} = {chosen}")
        w(f"weights = tl.reshape({interleave([f'column_{c}' for c in range(m)])}, ({bn}, {bk}))")
        tile.multiply(t, "weights", f"(j * {bk} + k{t})")
    tile.end(t)


def _split(tile: Tile, packed: str, groups: int, n: int) -> list[str]:
    """[BN, groups * n] -> the n slots of every group, [BN, groups] each."""
    w, bn = tile.w, tile.bn
    if n == 1:
        return [packed]
    if n == 2:
        w(f"slot_0, slot_1 = tl.split(tl.reshape({packed}, ({bn}, {groups}, 2)))")
        return ["slot_0", "slot_1"]
    w(f"even, odd = tl.split(tl.reshape({packed}, ({bn}, {groups}, 2, 2)))")
    w("slot_0, slot_2 = tl.split(even)")
    w("slot_1, slot_3 = tl.split(odd)")
    return ["slot_0", "slot_1", "slot_2", "slot_3"]
