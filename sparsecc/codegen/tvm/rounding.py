"""Activations rounded to bf16, in the orders that `half` reads: 64 tokens at a time, zero beyond K.

    tokens   y[batch][span][padded_k][64]; every 32 tokens so that interleaving two columns in 128-bit lanes gives 16 after 16
    pairs    y[batch][span][padded_k / 2][64][2]
"""

from __future__ import annotations

from sparsecc.codegen.tvm.tiles import SPAN, place
from sparsecc.codegen.tvm.writer import Writer, splat, vec

INTS = ("B", "S", "K", "padded_k", "x_stride", "x_span", "x_batch")
"""x as in `tiles`, K features of it."""
LANES = 16
VECTORS = SPAN // LANES
_FEATURES = 128  # per task


def round_source(pairs: bool) -> str:
    """f(x f32, y bf16, *INTS): token-minor tokens rounded to the nearest, and then to the even one."""
    w = Writer()
    with w.function("round_pairs" if pairs else "round_tokens", {"x": "float32", "y": "uint16"}, INTS):
        w(f"spans: T.let = (S + {SPAN - 1}) // {SPAN}")
        w(f"blocks: T.let = (padded_k + {_FEATURES - 1}) // {_FEATURES}")
        with w.block("for task in T.parallel(B * spans * blocks):"):
            w.opaque("batch", "task // blocks // spans")
            w.opaque("span", "task // blocks % spans")
            w.opaque("start", f"span * {SPAN}")
            w.opaque("first", f"task % blocks * {_FEATURES}")
            w.opaque("last", f"T.min(padded_k, first + {_FEATURES})")
            w.opaque("left", f"T.min((S - start + {LANES - 1}) // {LANES}, T.int64({VECTORS}))")
            w.opaque("at", place("x"))
            w.opaque("to", f"((batch * spans + span) * padded_k + first) * {SPAN}")
            (_round_pairs if pairs else _round_tokens)(w)
    return w.text


def _rounded(low: str, high: str) -> str:
    """Two vectors of float32, one behind the other, as bf16."""
    return f'T.call_llvm_pure_intrin("uint16x32", "llvm.x86.avx512bf16.cvtne2ps2bf16.512", {high}, {low})'


def _round_tokens(w: Writer) -> None:
    """32 tokens of a feature in the order in which `_interleaved` parts them again."""
    order = [half * 16 + 4 * lane + i for lane in range(4) for half in (0, 1) for i in range(4)]
    with w.block("for k in range(T.max(T.int64(0), T.min(last, K) - first)):"), w.block("for half in range((left + 1) // 2):"):
        w("from_x: T.let = at + (first + k) * x_stride + half * 32")
        low = w.let("low", vec("x", "from_x", LANES))
        w('second = T.alloc_buffer((16,), "float32", scope="global")')
        w(f"{vec('second', 0, LANES)} = {low}")  # a tile's last vector may have no neighbour
        with w.block("if half * 2 + 1 < left:"):
            w(f"{vec('second', 0, LANES)} = {vec('x', 'from_x + 16', LANES)}")
        both = w.let("both", _rounded(low, vec("second", 0, LANES)))
        w(f"{vec('y', f'to + k * {SPAN} + half * 32', 32)} = T.Shuffle([{both}], {order})")
    _write_zeros(w, "T.max(first, T.min(last, K))")


def _round_pairs(w: Writer) -> None:
    """Two features of 16 tokens, interleaved."""
    order = [i + part * 16 for i in range(16) for part in (0, 1)]
    with w.block("for k in range((T.max(first, T.min(last, K)) - first) // 2):"), w.block("for v in range(left):"):
        w(f"from_x: T.let = at + (first + k * 2) * x_stride + v * {LANES}")
        both = w.let("both", _rounded(vec("x", "from_x", LANES), vec("x", "from_x + x_stride", LANES)))
        w(f"{vec('y', f'to + k * {2 * SPAN} + v * 32', 32)} = T.Shuffle([{both}], {order})")
    with w.block("if (K % 2 == 1) and (first < K) and (K <= last):"), w.block("for v in range(left):"):
        zero = splat("T.float32(0)", LANES)
        both = w.let("both", _rounded(vec("x", f"at + (K - 1) * x_stride + v * {LANES}", LANES), zero))
        w(f"{vec('y', f'to + (K - 1 - first) * {SPAN} + v * 32', 32)} = T.Shuffle([{both}], {order})")
    _write_zeros(w, "T.max(first, T.min(last, (K + 1) // 2 * 2))")


def _write_zeros(w: Writer, start: str) -> None:
    w.opaque("end", start)
    with w.block(f"for v in range((last - end) * {SPAN // 32}):"):
        w(f"{vec('y', f'to + (end - first) * {SPAN} + v * 32', 32)} = {splat('T.uint16(0)', 32)}")
