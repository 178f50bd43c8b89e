"""Family direct: a convolution that reads few channels, the first of most nets, on planes.

    y[n][oh, ow] = act(bias[n] + sum_cij w[n][c, i, j] x[c][oh * s + i - top, ow * s + j - left])

A task has a row of the result. What its windows see lies in one array per tap, contiguous along the row, in the first-level cache; every
product of a tile of outputs and vectors of pixels then stays in registers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsecc.codegen.tvm.activation import write_activation
from sparsecc.codegen.tvm.image import Taps, WindowSpec, lanes_between
from sparsecc.codegen.tvm.writer import Writer, constant, splat, vec

LINE = 16
"""Floats of a line of memory."""
OUTPUTS = 3
"""Of a tile: what is loaded serves so many multiply-adds."""

DIRECT_INTS = ("B", "N", "H", "W", "OH", "OW", "top", "left", "x_stride", "x_batch", "x_token", "y_stride", "y_batch")
"""As in `image`."""


@dataclass(frozen=True)
class DirectSpec:
    """`channels` of x; `tile`: outputs and vectors of pixels whose sums are in registers."""

    window: WindowSpec
    channels: int
    tile: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.window} of {self.channels} channels, tile {'x'.join(map(str, self.tile))}"

    @property
    def taps(self) -> int:
        """Pixels that a window sees, of all channels."""
        return self.channels * math.prod(self.window.kernel)


def direct_tile(OW: int, lanes: int, registers: int) -> tuple[int, int]:
    """Outputs and vectors: as many as registers hold beside a weight and x, a row of the result in equal parts."""
    most, vectors = registers // OUTPUTS, -(-OW // lanes)
    return OUTPUTS, -(-vectors // -(-vectors // most))


def direct_source(spec: DirectSpec, lanes: int) -> str:
    """f(x, y, weight [N, C * kh * kw], bias, *DIRECT_INTS)."""
    w = Writer()
    _, vectors = spec.tile
    with w.function("direct", dict.fromkeys(("x", "y", "weight", "bias"), "float32"), DIRECT_INTS):
        with w.block("for task in T.parallel(B * OH):"):
            w.opaque("batch", "task // OH")
            w.opaque("oh", "task % OH")
            w.opaque("ih", f"oh * {spec.window.stride[0]} - top")
            w(f'taps = T.alloc_buffer(({spec.taps * vectors * lanes},), "float32", scope="global")')
            with w.block(f"for across in range((OW + {vectors * lanes - 1}) // {vectors * lanes}):"):
                w.opaque("first", f"across * {vectors * lanes}")
                with w.block(f"for part in range({vectors}):"):
                    _write_taps(w, spec, lanes)
                w.opaque("to", "batch * y_batch + oh * OW + first")
                with w.block(f"if first + {vectors * lanes} <= OW:"):
                    _write_outputs(w, spec, lanes, whole=True)
                with w.block("else:"):
                    _write_outputs(w, spec, lanes, whole=False)
            with w.block("if oh == OH - 1:"), w.block("for n in range(N):"), w.block(f"for behind in range((0 - OH * OW) % {lanes}):"):
                w('y[batch * y_batch + n * y_stride + OH * OW + behind] = T.float32(0)')
    return w.text


def _write_taps(w: Writer, spec: DirectSpec, lanes: int) -> None:
    """A vector of every tap's array; zeros outside of the picture."""
    (kh, kw), (_, step), size = spec.window.kernel, spec.window.stride, spec.tile[1] * lanes
    w.opaque("iw", f"(first + part * {lanes}) * {step} - left")
    taps = Taps(w, spec.window, lanes) if spec.window.planes else None
    if taps is not None:
        _write_prefetches(w, spec, lanes)
    for i in range(kh):
        to = [(c, [f"{((c * kh + i) * kw + j) * size} + part * {lanes}" for j in range(kw)]) for c in range(spec.channels)]
        with w.block(f"if (ih + {i} >= 0) and (ih + {i} < H):"):
            for c, places in to:
                at = w.let("at", f"batch * x_batch + {c} * x_stride + (ih + {i}) * W{'' if taps is not None else ' * x_token'}")
                if taps is not None:
                    for place, x in zip(places, taps.load(at), strict=True):
                        w(f"{vec('taps', place, lanes)} = {x}")
                    continue
                for j, place in enumerate(places):
                    with w.block(f"for lane in range({lanes}):"):
                        column = w.let("column", f"iw + lane * {step} + {j}")
                        inside = f"({column} >= 0) and ({column} < W)"
                        w(f"taps[{place} + lane] = T.if_then_else({inside}, x[{at} + {column} * x_token], T.float32(0))")
        with w.block("else:"):
            for _, places in to:
                for place in places:
                    w(f"{vec('taps', place, lanes)} = {constant(0.0, lanes)}")


def _write_prefetches(w: Writer, spec: DirectSpec, lanes: int) -> None:
    """The rows that the next task sees besides: the picture often comes from memory."""
    (rows, step), height = spec.window.stride, spec.window.kernel[0]
    for c in range(spec.channels):
        for row in range(min(rows, height)):
            at = w.let("next", f"batch * x_batch + {c} * x_stride + (ih + {max(rows, height) + row}) * W + iw")
            for line in range(0, step * lanes, LINE):
                where = f"T.address_of(x[{at} + {line}])"
                w(f'T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", {where}, T.int32(0), T.int32(3), T.int32(1)))')


def _write_outputs(w: Writer, spec: DirectSpec, lanes: int, whole: bool) -> None:
    """All outputs of a tile's pixels."""
    outputs = spec.tile[0]
    with w.block(f"for block in range(N // {outputs}):"):
        w.opaque("n", f"block * {outputs}")
        _write_tile(w, spec, outputs, lanes, whole)
    for rest in range(1, outputs):
        with w.block(f"if N % {outputs} == {rest}:"):
            w.opaque("n", f"N - {rest}")
            _write_tile(w, spec, rest, lanes, whole)


def _write_tile(w: Writer, spec: DirectSpec, outputs: int, lanes: int, whole: bool) -> None:
    """`outputs` planes from the n-th on, a tile's vectors of each; `to`: where the pixels begin in a plane. `whole`: no lane is outside."""
    vectors, taps, epilogue = spec.tile[1], spec.taps, spec.window.epilogue
    sums = w.registers(f"sum{outputs}{whole}_", outputs, vectors, lanes)
    for r in range(outputs):
        bias = w.let("bias", splat(f"bias[n + {r}]", lanes))
        for v in range(vectors):
            w(f"{sums(r, v)} = {bias}")
    with w.block(f"for tap in range({taps}):"):
        weights = [w.let("weight", splat(f"weight[(n + {r}) * {taps} + tap]", lanes)) for r in range(outputs)]
        for v in range(vectors):
            x = w.let("x", vec("taps", f"tap * {vectors * lanes} + {v * lanes}", lanes))
            for r, weight in enumerate(weights):
                w(f"{sums(r, v)} = {sums(r, v)} + {weight} * {x}")
    results = []
    for r in range(outputs):
        values = [sums(r, v) for v in range(vectors)]
        results.append(write_activation(w, epilogue, values, lanes) if epilogue else values)
    for v in range(vectors):
        inside = "" if whole else lanes_between(w, "T.int64(0)", f"OW - first - {v * lanes}", lanes)
        for r in range(outputs):
            here = f"(n + {r}) * y_stride + to + {v * lanes}"
            if whole:
                w(f"{vec('y', here, lanes)} = {results[r][v]}")
            else:
                w(f'T.evaluate(T.call_llvm_intrin("void", "llvm.masked.store", {results[r][v]}, T.address_of(y[{here}]), {inside}))')
