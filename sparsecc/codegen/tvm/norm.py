"""Family norm: layer norm and RMS norm of token-minor values: every token is a lane, so nothing is summed across lanes.

    for task in parallel(tiles):                              one tile of tokens, all features
        mean, variance = over features                        two passes, as torch does: no cancellation
        y[n][m] = (x[n][m] - mean) / sqrt(variance + eps) * weight[n] + bias[n]
        y[m][n] = transposed                                  layout "row", in chunks that stay in L1
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsecc.codegen.tvm.tiles import place, write_parts, write_rows
from sparsecc.codegen.tvm.writer import Writer, splat, vec

INTS = ("S", "N", "tiles", "per", "x_stride", "x_span", "x_batch", "y_stride", "y_span", "y_batch")
"""As in the spmm family; x_stride is between features."""
CHUNK = 64  # features that wait in L1 to be transposed


@dataclass(frozen=True)
class NormSpec:
    """y = norm(x) * weight + bias over the last dimension N. `kind` is "layer", or "rms" (no mean, no bias); `layout` is y's."""

    kind: str = "layer"
    layout: str = "token"

    def __str__(self) -> str:
        return f"{self.kind} norm -> {self.layout}"


def norm_source(spec: NormSpec, vectors: int, lanes: int) -> str:
    """f(x, y, weight, bias, eps [1], *INTS)."""
    w = Writer()
    width = vectors * lanes
    with w.function("norm", dict.fromkeys(("x", "y", "weight", "bias", "eps"), "float32"), INTS):
        with w.block("for task in T.parallel(tiles):"):
            w.opaque("batch", "task // per")
            w.opaque("start", f"task % per * {width}")
            w.opaque("left", f"T.min((S - start + {lanes - 1}) // {lanes}, T.int64({vectors}))")
            for part, offset in write_parts(w, vectors, lanes):
                w.opaque("offset", offset)
                _write_tile(w, spec, part, lanes)
    return w.text


def _write_tile(w: Writer, spec: NormSpec, vectors: int, lanes: int) -> None:
    w.opaque("xt", f"{place('x')} + offset")
    x = lambda n, r: vec("x", f"xt + {n} * x_stride + {r * lanes}", lanes)  # noqa: E731
    size = 2 * vectors * lanes
    w(f'stats = T.alloc_buffer(({size},), "float32", scope="global")')
    mean = lambda r: vec("stats", r * lanes, lanes)  # noqa: E731
    scale = lambda r: vec("stats", (vectors + r) * lanes, lanes)  # noqa: E731
    count, zero = splat('T.Cast("float32", N)', lanes), splat("T.float32(0)", lanes)
    for r in range(vectors):
        w(f"{mean(r)} = {zero}")
        w(f"{scale(r)} = {zero}")
    if spec.kind == "layer":
        with w.block("for n in range(N):"):
            for r in range(vectors):
                w(f"{mean(r)} = {mean(r)} + {x('n', r)}")
        for r in range(vectors):
            w(f"{mean(r)} = {mean(r)} / {count}")
    with w.block("for n in range(N):"):
        for r in range(vectors):
            d = w.let("d", f"{x('n', r)} - {mean(r)}")
            w(f"{scale(r)} = {scale(r)} + {d} * {d}")
    for r in range(vectors):
        w(f"{scale(r)} = {splat('T.float32(1)', lanes)} / T.sqrt({scale(r)} / {count} + {splat('eps[0]', lanes)})")

    def result(n: str, r: int) -> str:
        product = f"({x(n, r)} - {mean(r)}) * {scale(r)} * {splat(f'weight[{n}]', lanes)}"
        return f"{product} + {splat(f'bias[{n}]', lanes)}" if spec.kind == "layer" else product

    if spec.layout == "token":
        w.opaque("yt", f"{place('y')} + offset")
        with w.block("for n in range(N):"):
            for r in range(vectors):
                w(f"{vec('y', f'yt + n * y_stride + {r * lanes}', lanes)} = {result('n', r)}")
        return
    w(f'out = T.alloc_buffer(({CHUNK * vectors * lanes},), "float32", scope="global")')
    with w.block(f"for chunk in range((N + {CHUNK - 1}) // {CHUNK}):"):
        w.opaque("first", f"chunk * {CHUNK}")
        w.opaque("last", f"T.min(N, first + {CHUNK})")
        with w.block("for c in range(last - first):"):
            w("n: T.let = first + c")
            for r in range(vectors):
                w(f"{vec('out', f'c * {vectors * lanes} + {r * lanes}', lanes)} = {result('n', r)}")
        with w.block(f"for slab in range({vectors}):"):
            write_rows(w, lanes, False, f"start + offset + slab * {lanes}", f"slab * {lanes}", vectors * lanes)
