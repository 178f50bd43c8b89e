"""Which formats are worth trying on a GPU for given zeros, the natural one first."""

from __future__ import annotations

from dataclasses import replace

import torch

from sparsecc.codegen.triton.bsr import SIDES
from sparsecc.codegen.triton.nm import refuses_nm
from sparsecc.formats import NM, Bitmap, Block, Compressed, Format, PackedNM, Panels, Pattern
from sparsecc.formats.codec import Raw
from sparsecc.formats.level import NM as NMLevel

BITMAP = Format(Bitmap(64), swizzle=Panels(64))
"""One bit per entry, in tiles that a program expands at once."""

CSR_UP_TO = 0.3
"""Above this density entries one by one cannot win: their positions take more bytes than a bit each."""


def storage(pattern: Pattern, density: float, dtype: torch.dtype, codec: str | None) -> list[Format]:
    """Formats that can hold the zeros of `pattern` [N, K] at a density of nonzeros; values rounded only to a codec asked for by name."""
    found: list[Format] = []
    if isinstance(pattern, Block):
        found += _blocks(pattern.rows, pattern.cols)
    elif isinstance(pattern, NM):
        packed = _packed(pattern)
        found += [packed] if packed is not None else [Format(NMLevel(pattern.n, pattern.m))]
    if not any(min(fmt.block) >= 16 for fmt in found):
        found.append(BITMAP)
        if density <= CSR_UP_TO:
            found.append(Format(Compressed()))
    names = {torch.float16: "f16", torch.bfloat16: "bf16"}
    raw = Raw(codec or names.get(dtype, "f32"))
    return list(dict.fromkeys(replace(fmt, codec=raw) for fmt in found))


def _blocks(rows: int, cols: int) -> list[Format]:
    """Storage of blocks: their own, or parts of them that a kernel takes; for large ones also larger squares, which hold some zeros but
    run faster per entry. What pays is a question of how many of those are kept."""
    largest = lambda whole: max((side for side in SIDES if whole % side == 0), default=0)  # noqa: E731
    wide = (largest(rows), largest(cols))
    if all(wide):
        squares = [(side, side) for side in (64, 128) if side > max(wide)]
        return [Format(Compressed(), sides) for sides in (wide, *squares)]
    r = _power(rows, 16)
    c = _power(cols, 16 // r)
    small = [Format(Compressed(), (r, c))]
    if r * c <= 8:
        small.insert(0, Format(Bitmap(64 // r), (r, c), swizzle=Panels(32)))
    return small


def _power(whole: int, most: int) -> int:
    """The largest power of two that divides `whole` and is not above `most`."""
    side = 1
    while 2 * side <= most and whole % (2 * side) == 0:
        side *= 2
    return side


def _packed(pattern: NM) -> Format | None:
    if pattern.m & (pattern.m - 1) or pattern.m > 16 or pattern.n * (pattern.m.bit_length() - 1) > 16:
        return None
    fmt = Format(PackedNM(pattern.n, pattern.m))
    return None if refuses_nm(fmt) else fmt
