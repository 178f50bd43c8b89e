"""Family image: what reads a neighbourhood of every pixel, on token-minor values: a token is a pixel, its channel's plane is contiguous.

depthwise  y[c][oh, ow] = act(bias[c] + sum_ij w[c][i, j] x[c][oh * s + i - top, ow * s + j - left])
patches    y[(c, i, j)][oh, ow] = x[c][oh * s + i - top, ow * s + j - left]                  a k x k convolution is a linear of those
pool       y[c] = mean of x[c]

Vectors lie along a row of the result. A tap of stride 1 is one unaligned load; of stride 2, the even or odd lanes of two. Lanes outside
the picture are masked out of the load, so they are zeros and their memory is not touched. A task has whole planes; lanes behind the last
pixel are finite.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsecc.codegen.tvm.activation import write_activation
from sparsecc.codegen.tvm.writer import Writer, constant, splat, vec

ROWS = 7
"""Rows of the result that a step computes: an input row is loaded once for all of them, and most pictures have a multiple of 7."""
GROUP = 8
"""Planes per task."""
FEW_TAPS = 9
"""Weights that stay in registers, beside the sums."""

_SIZES = ("H", "W", "OH", "OW", "top", "left")
DEPTHWISE_INTS = ("B", "C", *_SIZES, "x_stride", "x_batch", "y_stride", "y_batch")
PATCHES_INTS = ("B", "C", *_SIZES, "x_stride", "x_batch", "x_token", "y_stride", "y_batch")
POOL_INTS = ("B", "C", "S", "x_stride", "x_batch")
"""x_stride, y_stride: between channels; x_batch, y_batch: between pictures; x_token: between pixels."""


@dataclass(frozen=True)
class WindowSpec:
    """The window of a convolution: `kernel` and `stride` are (vertical, horizontal). `epilogue` is a depthwise one's; `planes`: whether the
    pixels of a channel are contiguous."""

    kind: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    epilogue: str = ""
    planes: bool = True

    def __str__(self) -> str:
        window = "x".join(map(str, self.kernel))
        step = f" /{'x'.join(map(str, self.stride))}"
        return f"{self.kind} {window}{step}{' ' + self.epilogue if self.epilogue else ''}{'' if self.planes else ' by pixels'}"


def depthwise_source(spec: WindowSpec, lanes: int) -> str:
    """f(x, y, weight [C, kh * kw], bias, *DEPTHWISE_INTS)."""
    w = Writer()
    with w.function("depthwise", dict.fromkeys(("x", "y", "weight", "bias"), "float32"), DEPTHWISE_INTS):
        _planes(w, "C")
        with w.block("for n in range(count):"):
            w.opaque("c", "first + n")
            w.opaque("xt", "batch * x_batch + c * x_stride")
            w.opaque("yt", "batch * y_batch + c * y_stride")
            _write_behind(w, lanes, "yt")
            taps = spec.kernel[0] * spec.kernel[1]
            weights = [splat(f"weight[c * {taps} + {i}]", lanes) for i in range(taps)]
            if taps <= FEW_TAPS:
                weights = [w.let("weight", weight) for weight in weights]
            _write_blocks(w, spec, weights, lanes)
    return w.text


def _write_blocks(w: Writer, spec: WindowSpec, weights: list[str], lanes: int) -> None:
    """Vectors along a row, ROWS below each other. Of few taps those in the middle of the picture, or of its height, ask nothing. Of
    more, or of two rows of the picture for every one of the result, LLVM would load all first, which registers can't hold."""
    with w.block(f"for block in range((OH + {ROWS - 1}) // {ROWS}):"):
        w.opaque("oh", f"block * {ROWS}")
        w.opaque("ih", f"oh * {spec.stride[0]} - top")
        inside = f"(ih >= 0) and (ih + {(ROWS - 1) * spec.stride[0] + spec.kernel[0]} <= H) and (oh + {ROWS} <= OH)"
        w.opaque("rows_inside", f"T.if_then_else({inside}, T.int64(1), T.int64(0))")
        with w.block(f"for across in range((OW + {lanes - 1}) // {lanes}):"):
            w.opaque("ow", f"across * {lanes}")
            w.opaque("iw", f"ow * {spec.stride[1]} - left")
            across = f"(iw >= 0) and (iw + {reach(spec, lanes)} <= W) and (ow + {lanes} <= OW)"
            if spec.stride[0] > 1 or len(weights) > FEW_TAPS:
                with w.block(f"if {across}:"):
                    _write_rows(w, spec, weights, lanes, masked=False, whole=False)
                with w.block("else:"):
                    _write_rows(w, spec, weights, lanes, masked=True, whole=False)
                return
            with w.block(f"if (rows_inside == 1) and {across}:"):
                _write_rows(w, spec, weights, lanes, masked=False, whole=True)
            with w.block("else:"):
                with w.block("if rows_inside == 1:"):
                    _write_rows(w, spec, weights, lanes, masked=True, whole=True)
                with w.block("else:"):
                    _write_rows(w, spec, weights, lanes, masked=True, whole=False)


def _write_rows(w: Writer, spec: WindowSpec, weights: list[str], lanes: int, masked: bool, whole: bool) -> None:
    """ROWS vectors of the result, below each other. `masked`: some lanes may be outside of the picture; `whole`: no row is."""
    kh, kw = spec.kernel
    step = spec.stride[0]
    taps = Taps(w, spec, lanes, masked)
    sums = w.registers("sum", ROWS, 1, lanes)
    for r in range(ROWS):
        w(f"{sums(r, 0)} = {splat('bias[c]', lanes)}")
    for row in range((ROWS - 1) * step + kh):
        uses = [(r, row - r * step) for r in range(ROWS) if 0 <= row - r * step < kh]
        if not uses:
            continue
        with w.block_if(not whole, f"if (ih + {row} >= 0) and (ih + {row} < H):"):
            at = w.let("at", f"xt + (ih + {row}) * W")
            for j, x in enumerate(taps.load(at)):
                for r, i in uses:
                    w(f"{sums(r, 0)} = {sums(r, 0)} + {weights[i * kw + j]} * {x}")
    inside = lanes_between(w, "T.int64(0)", "OW - ow", lanes) if masked else ""
    for r in range(ROWS):
        with w.block_if(not whole, f"if oh + {r} < OH:"):
            result = write_activation(w, spec.epilogue, [sums(r, 0)], lanes)[0] if spec.epilogue else sums(r, 0)
            to = w.let("to", f"yt + (oh + {r}) * OW + ow")
            if masked:
                w(f'T.evaluate(T.call_llvm_intrin("void", "llvm.masked.store", {result}, T.address_of(y[{to}]), {inside}))')
            else:
                w(f"{vec('y', to, lanes)} = {result}")


def reach(spec: WindowSpec, lanes: int) -> int:
    """Columns that `Taps` loads for a vector of the result, from `iw` on."""
    step = spec.stride[1]
    return (spec.kernel[1] - 1) // step * step + step * lanes


class Taps:
    """The vectors of x that a vector of a row of the result needs, one for every column of the window; masks are made once, here. `iw` is
    bound, the first one's column."""

    def __init__(self, w: Writer, spec: WindowSpec, lanes: int, masked: bool = True) -> None:
        self.w, self.spec, self.lanes = w, spec, lanes
        step, kw = spec.stride[1], spec.kernel[1]
        # With stride 2 the taps of a pair of columns are the even and the odd lanes of the same two vectors.
        starts = range(kw) if step == 1 else [start for at in range(0, kw, 2) for start in (at, at + lanes)]
        self.masks = {at: self._mask(at) if masked else "" for at in starts}

    def _mask(self, at: int) -> str:
        return lanes_between(self.w, f"0 - iw - {at}", f"W - iw - {at}", self.lanes)

    def _vector(self, at: str, mask: str) -> str:
        return self.w.let("x", masked_load(f"x[{at}]", mask, self.lanes) if mask else vec("x", at, self.lanes))

    def load(self, row: str) -> list[str]:
        """Names of the vectors; `row` is where the picture's row begins."""
        w, lanes, kw = self.w, self.lanes, self.spec.kernel[1]
        loaded = {at: self._vector(f"{row} + iw + {at}", mask) for at, mask in self.masks.items()}
        if self.spec.stride[1] == 1:
            return [loaded[j] for j in range(kw)]
        found = []
        for j in range(kw):
            first, odd = divmod(j, 2)
            low, high = loaded[2 * first], loaded[2 * first + lanes]
            found.append(w.let("tap", f"T.Shuffle([{low}, {high}], {[2 * i + odd for i in range(lanes)]})"))
        return found


def lanes_between(w: Writer, first: str, end: str, lanes: int) -> str:
    """A mask of the lanes from `first` up to `end`, both of any value. As bits, where there are enough: LLVM keeps those, but would compare
    vectors anew wherever it reads a mask."""
    if lanes != 16:
        lane = f"T.ramp(T.int32(0), 1, {lanes})"
        bounds = (splat(f"T.Cast('int32', {w.let('bound', bound)})", lanes) for bound in (first, end))
        low, high = bounds
        return f"T.And({lane} >= {low}, {lane} < {high})"
    return w.let("mask", f'T.reinterpret("uint1x{lanes}", {bits_between(w, first, end, lanes)})')


def bits_between(w: Writer, first: str, end: str, lanes: int) -> str:
    """The same as bits, for 16 lanes."""
    low, high = (w.let("bound", f"T.max(T.int64(0), T.min(T.int64({lanes}), {bound}))") for bound in (first, end))
    bits = f"T.max(T.int64(0), T.shift_left(T.int64(1), {high}) - T.shift_left(T.int64(1), {low}))"
    return w.let("bits", f'T.Cast("uint16", {bits})')


def masked_load(element: str, mask: str, lanes: int) -> str:
    """A vector of float32; lanes outside the mask are zero and not read."""
    zero = constant(0.0, lanes)
    return f'T.call_llvm_pure_intrin("float32x{lanes}", "llvm.masked.load", T.address_of({element}), {mask}, {zero})'


def patches_source(spec: WindowSpec, lanes: int) -> str:
    """f(x, y, *PATCHES_INTS). A task has the planes of some channels."""
    w = Writer()
    kh, kw = spec.kernel
    with w.function("patches", dict.fromkeys(("x", "y"), "float32"), PATCHES_INTS):
        with w.block("for task in T.parallel(B * C):"):
            w.opaque("batch", "task // C")
            w.opaque("c", "task % C")
            w.opaque("xt", "batch * x_batch + c * x_stride")
            w.opaque("yt", f"batch * y_batch + c * {kh * kw} * y_stride")
            for tap in range(kh * kw):
                _write_behind(w, lanes, f"yt + {tap} * y_stride")
            with w.block("for oh in range(OH):"), w.block(f"for i in range({kh}):"):
                w.opaque("row", f"oh * {spec.stride[0]} + i - top")
                w.opaque("to", f"yt + i * {kw} * y_stride + oh * OW")
                with w.block("if (row >= 0) and (row < H):"):
                    _write_patch_row(w, spec, lanes)
                with w.block("else:"), w.block(f"for across in range((OW + {lanes - 1}) // {lanes}):"):
                    for j in range(kw):
                        w(f"{vec('y', f'to + {j} * y_stride + across * {lanes}', lanes)} = {constant(0.0, lanes)}")
    return w.text


def _write_patch_row(w: Writer, spec: WindowSpec, lanes: int) -> None:
    kw = spec.kernel[1]
    if spec.planes and spec.stride[1] <= 2:
        w.opaque("at", "xt + row * W")
        with w.block(f"for across in range((OW + {lanes - 1}) // {lanes}):"):
            w.opaque("ow", f"across * {lanes}")
            w.opaque("iw", f"ow * {spec.stride[1]} - left")
            for j, x in enumerate(Taps(w, spec, lanes).load("at")):
                w(f"{vec('y', f'to + {j} * y_stride + ow', lanes)} = {x}")
        return
    for j in range(kw):
        with w.block("for ow in range(OW):"):
            iw = w.let("iw", f"ow * {spec.stride[1]} + {j} - left")
            inside = f"T.if_then_else(({iw} >= 0) and ({iw} < W), x[xt + (row * W + {iw}) * x_token], T.float32(0))"
            w(f"y[to + {j} * y_stride + ow] = {inside}")


def pool_source(lanes: int) -> str:
    """f(x, y [B, C], *POOL_INTS)."""
    w = Writer()
    with w.function("pool", dict.fromkeys(("x", "y"), "float32"), POOL_INTS):
        _planes(w, "C")
        w(f'total = T.alloc_buffer(({lanes},), "float32", scope="global")')
        every = vec("total", 0, lanes)
        with w.block("for n in range(count):"):
            w.opaque("xt", "batch * x_batch + (first + n) * x_stride")
            w(f"{every} = {constant(0.0, lanes)}")
            with w.block(f"for i in range(S // {lanes}):"):
                w(f"{every} = {every} + {vec('x', f'xt + i * {lanes}', lanes)}")
            with w.block(f"for i in range(S % {lanes}):"):
                w(f"total[0] = total[0] + x[xt + S // {lanes} * {lanes} + i]")
            with w.block(f"for i in range({lanes - 1}):"):
                w("total[0] = total[0] + total[i + 1]")
            w('y[batch * C + first + n] = total[0] / T.Cast("float32", S)')
    return w.text


def _planes(w: Writer, planes: str) -> None:
    """A task: `count` planes of a picture, from `first` on."""
    w(f"groups: T.let = ({planes} + {GROUP - 1}) // {GROUP}")
    w("for task in T.parallel(B * groups):")
    w.depth += 1
    w.opaque("batch", "task // groups")
    w.opaque("first", f"task % groups * {GROUP}")
    w.opaque("count", f"T.min({planes} - first, T.int64({GROUP}))")


def _write_behind(w: Writer, lanes: int, plane: str) -> None:
    """Zeros in the last vector that has pixels: those are written afterwards, what is behind them stays."""
    w(f"{vec('y', f'{plane} + (OH * OW - 1) // {lanes} * {lanes}', lanes)} = {constant(0.0, lanes)}")
