"""Family csr: few entries or small blocks per row, of any N:M too, multiplied one by one without matrix instructions.

Every row reads activations at its own columns. For many tokens those are rows of x^T, contiguous along the tokens; the launcher
transposes x once (Gale et al., "Sparse GPU Kernels for Deep Learning", SC 2020, keep it so throughout).
"""

from __future__ import annotations

from sparsecc.codegen.triton.tile import Tile, interleave
from sparsecc.formats import Format
from sparsecc.formats.level import NM


def refuses_csr(fmt: Format) -> str | None:
    """Why this family cannot run the format, or None."""
    br, bc = fmt.block
    if br * bc > 16 or br & (br - 1) or bc & (bc - 1) or str(fmt.swizzle):
        return f"{fmt}: blocks of at most 16 entries with sides that are powers of two, in order, are multiplied one by one"
    return None


def columns_at_once(tile: Tile, t: int) -> int:
    """Columns of a row's blocks per step, so that a thread holds about 16 products at a time."""
    br, bc = tile.spec.formats[t].block
    rows, threads = tile.bn // br, 32 * tile.config.warps
    products = max(8, 16 * threads // rows) if tile.one else max(1, min(4, 16 * threads // (rows * tile.config.bm)))
    return max(bc, products // br if tile.one else products)


def write_csr(tile: Tile, t: int) -> None:
    """acc += W_t x over the blocks of each row, one sum per row of a block."""
    w, fmt, spec = tile.w, tile.spec.formats[t], tile.spec
    br, bc = fmt.block
    rows, count = tile.bn // br, columns_at_once(tile, t)
    _ends(tile, t, rows)
    first, last = tile.share(t, f"lo{t}", f"hi{t}")
    w(f"longest{t} = tl.max({last} - {first}, 0)")
    w(f"lane{t} = tl.arange(0, {count})[None, :]")
    shape = f"({rows}, {count})" if tile.one else f"({rows}, {tile.config.bm})"
    for r in range(br):
        w(f"rows{t}_{r} = tl.zeros({shape}, tl.float32)")
    with w.block(tile.loop("0", f"longest{t}", str(count // bc))):
        w(f"at = {first}[:, None] + j + lane{t}{f' // {bc}' if bc > 1 else ''}")
        w(f"live = at < {last}[:, None]")
        w(f"k = tl.load(idx{t} + at, mask=live, other=0).to(tl.int32)")
        if isinstance(fmt.level, NM):
            w(f"k += (at - lo{t}[:, None]) // {fmt.level.n} * {fmt.level.m}")
        if bc > 1:
            w(f"k = k * {bc} + lane{t} % {bc}")
        if br * bc > 1:
            w(f"at = at.to(tl.int64) * {br * bc}{f' + lane{t} % {bc} * {br}' if bc > 1 else ''}")
        inside = "live & (k < K)" if spec.tail else "live"
        if tile.one:
            w(f"xs = tl.load(x + k, mask={inside}, other=0.0).to(tl.float32)")
        else:
            w(f"xs = tl.load(xt + k.to(tl.int64)[:, :, None] * xt_step + rm[None, None, :], mask=({inside})[:, :, None], other=0.0)")
        for r in range(br):
            w(f"weights = tl.load(val{t} + at{f' + {r}' if r else ''}, mask=live, other=0.0).to(tl.float32)")
            product = "weights * xs" if tile.one else "tl.sum(weights[:, :, None] * xs.to(tl.float32), 1)"
            w(f"rows{t}_{r} += {product}")
    parts = [f"tl.sum(rows{t}_{r}, 1)" if tile.one else f"rows{t}_{r}" for r in range(br)]
    if br == 1:
        w(f"acc += {parts[0]}")
    elif tile.one:
        w(f"acc += tl.reshape({interleave(parts)}, {tile.shape})")
    else:
        joined = f"tl.reshape({interleave(parts)}, ({rows}, {tile.config.bm}, {br}))"
        w(f"acc += tl.reshape(tl.permute({joined}, (0, 2, 1)), {tile.shape})")


def _ends(tile: Tile, t: int, rows: int) -> None:
    """lo and hi of the tile's rows of blocks, [rows] each; rows beyond the last are empty."""
    w, fmt = tile.w, tile.spec.formats[t]
    w(f"parent{t} = tile_n * {rows} + tl.arange(0, {rows})")
    w(f"real{t} = parent{t} < tl.cdiv(N, {fmt.block[0]})")
    if isinstance(fmt.level, NM):
        w(f"slots{t} = tl.cdiv(tl.cdiv(K, {fmt.block[1]}), {fmt.level.m}) * {fmt.level.n}")
        w(f"lo{t} = parent{t}.to(tl.int64) * slots{t}")
        w(f"hi{t} = tl.where(real{t}, lo{t} + slots{t}, lo{t})")
        return
    w(f"lo{t} = tl.load(ptr{t} + parent{t}, mask=real{t}, other=0)")
    w(f"hi{t} = tl.load(ptr{t} + parent{t} + 1, mask=real{t}, other=0)")
