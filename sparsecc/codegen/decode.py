"""The stored arrays of a format read back with numpy loops, by what `formats/` documents and none of its code.

An oracle that shared `unpack`'s code would share its mistakes with `pack`; a kernel is checked against this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from sparsecc.formats import Bitmap, Compressed, Dense, Format, PackedNM, Panels, Sell, Shared
from sparsecc.formats.level import NM

Slots = Iterator[tuple[int, int, int]]
"""(stored block, parent, coordinate)."""


def decode(fmt: Format, arrays: Mapping[str, Tensor], shape: tuple[int, int]) -> np.ndarray:
    """float64[N, K] of what is stored. Raises TypeError for a level that is not documented here."""
    (N, K), (br, bc) = shape, fmt.block
    window = fmt.level.window
    block_rows, block_cols = -(-N // (br * window)) * window, -(-K // bc)
    width = fmt.swizzle.width if isinstance(fmt.swizzle, Panels) else max(block_cols, 1)
    panels = -(-block_cols // width)
    found = {name: _numbers(array) for name, array in arrays.items()}
    out = np.zeros((block_rows * br, panels * width * bc))
    values = found["val"].reshape(-1, bc, br)
    for stored, parent, coordinate in _slots(fmt, found, panels * block_rows, width):
        row, col = parent % max(block_rows, 1), parent // max(block_rows, 1) * width + coordinate
        out[row * br : (row + 1) * br, col * bc : (col + 1) * bc] += values[stored].T
    return out[:N, :K]


def _numbers(array: Tensor) -> np.ndarray:
    return array.double().numpy() if array.dtype.is_floating_point else array.to(torch.int64).numpy()


def _slots(fmt: Format, found: Mapping[str, np.ndarray], parents: int, width: int) -> Slots:
    match fmt.level:
        case Dense():
            yield from ((p * width + c, p, c) for p in range(parents) for c in range(width))
        case Sell(c=c, sigma=sigma):
            for position in range(parents):
                parent = position // sigma * sigma + int(found["order"][position])
                for step in range(*found["ptr"][position // c : position // c + 2]):
                    stored = step * c + position % c
                    yield stored, parent, int(found["idx"][stored])
        case Shared(rows=rows, step=step):
            for group in range(parents // rows):
                for s in range(*found["ptr"][group : group + 2]):
                    for r, j in np.ndindex(rows, step):
                        yield (s * rows + r) * step + j, group * rows + r, int(found["idx"][s * step + j])
        case Compressed():
            for p in range(parents):
                yield from ((s, p, int(found["idx"][s])) for s in range(*found["ptr"][p : p + 2]))
        case PackedNM() as level:
            yield from _packed(level, found["idx"].reshape(-1), parents, width)
        case NM(n=n, m=m):
            groups = -(-width // m)
            for s, offset in enumerate(found["idx"]):
                yield s, s // (groups * n), s // n % groups * m + int(offset)
        case Bitmap(every=every):
            stored, words = 0, -(-width // 16)
            for p in range(parents):
                if p % every == 0:
                    assert stored == found["ptr"][p // every], "ptr is not where the bits say"
                for c in range(width):
                    if found["bits"].reshape(-1, words)[p, c // 16] >> c % 16 & 1:
                        yield stored, p, c
                        stored += 1
        case other:
            raise TypeError(f"no decoder for {other}")


def _packed(level: PackedNM, codes: np.ndarray, parents: int, width: int) -> Slots:
    groups, bits = -(-width // level.m), level.bits
    per = max(1, 8 // bits)
    words, step = -(-groups // per), int(np.log2(level.m))
    for p in range(parents):
        for g in range(groups):
            code = int(codes[p * words + g // per]) >> g % per * bits
            for s in range(level.n):
                yield (p * groups + g) * level.n + s, p, g * level.m + (code >> s * step) % level.m
