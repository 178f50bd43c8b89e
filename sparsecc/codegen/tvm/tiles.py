"""Moving activations between torch's layouts and the tiles [tile][feature][T] of the spmm family, by transposing in registers.

pack_rows    x[m][k], features consecutive  -> tiles, zeros where k >= K
pack_tokens  x[k][m], tokens consecutive    -> tiles
write_rows   the inverse of pack_rows, written into the kernels that produce the values
Tokens up to the next full vector are zero in packed tiles.
"""

from __future__ import annotations

from sparsecc.codegen.tvm.writer import Writer, vec

BLOCK = 128  # features per task: a task's tile of 128 x 16 floats is 8 KiB
FLOATS = {"x": "float32", "y": "float32"}


def pack_rows_source(lanes: int) -> str:
    """f(x, y=tiles, M, K, padded_k, stride, width): x[m * stride + k]."""
    w = Writer()
    with w.function("pack_rows", FLOATS, ("M", "K", "padded_k", "stride", "width")):
        _tasks(w, "padded_k", lanes)
        w("to: T.let = m // width * padded_k * width + m % width")
        w.opaque("whole", f"T.Select(m + {lanes} <= M, T.max(first, T.min(last, K // {lanes} * {lanes})), first)")
        with w.block(f"for kb in range((whole - first) // {lanes}):"):
            w(f"k: T.let = first + kb * {lanes}")
            load = lambda i: vec("x", f"(m + {i}) * stride + k", lanes)  # noqa: E731
            _transpose(w, lanes, load, lambda i: vec("y", f"to + (k + {i}) * width", lanes), {})
        with w.block("for kr in range(last - whole):"), w.block(f"for i in range({lanes}):"):
            w("k: T.let = whole + kr")
            w("y[to + k * width + i] = T.if_then_else((m + i < M) and (k < K), x[(m + i) * stride + k], T.float32(0))")
    return w.text


def pack_tokens_source(lanes: int) -> str:
    """f(x, y=tiles, M, K, padded_k, stride, width): x[k * stride + m]."""
    w = Writer()
    with w.function("pack_tokens", FLOATS, ("M", "K", "padded_k", "stride", "width")):
        _tasks(w, "padded_k", lanes)
        w("to: T.let = m // width * padded_k * width + m % width")
        w.opaque("whole", f"T.Select(m + {lanes} <= M, T.max(first, T.min(last, K)), first)")
        with w.block("for kb in range(whole - first):"):
            w("k: T.let = first + kb")
            w(f"{vec('y', 'to + k * width', lanes)} = {vec('x', 'k * stride + m', lanes)}")
        with w.block("for kr in range(last - whole):"), w.block(f"for i in range({lanes}):"):
            w("k: T.let = whole + kr")
            w("y[to + k * width + i] = T.if_then_else((m + i < M) and (k < K), x[k * stride + m + i], T.float32(0))")
    return w.text


def write_rows(w: Writer, lanes: int, residual: bool, m: str, offset: str, width: int) -> None:
    """Transposes `lanes` tokens of `out`[feature - first][width], from `offset` on, into y[m * y_stride + n] for features first..last,
    and adds res[m * res_stride + n]."""
    plus = lambda row, n, size: f" + {vec('res', f'({row}) * res_stride + {n}', size)}" if residual else ""  # noqa: E731
    w.opaque("m", m)
    w.opaque("whole", f"T.Select(m + {lanes} <= M, (last - first) // {lanes} * {lanes}, T.int64(0))")
    with w.block(f"for nb in range(whole // {lanes}):"):
        w(f"n: T.let = nb * {lanes}")
        extra = {i: plus(f"m + {i}", "first + n", lanes) for i in range(lanes)}
        load = lambda i: vec("out", f"(n + {i}) * {width} + {offset}", lanes)  # noqa: E731
        _transpose(w, lanes, load, lambda i: vec("y", f"(m + {i}) * y_stride + first + n", lanes), extra)
    with w.block("for nr in range(last - first - whole):"), w.block(f"for i in range(T.min(T.int64({lanes}), M - m)):"):
        w("n: T.let = whole + nr")
        w(f"y[(m + i) * y_stride + first + n] = out[n * {width} + {offset} + i]{plus('m + i', 'first + n', 1)}")


def _tasks(w: Writer, features: str, lanes: int) -> None:
    """One task: `lanes` tokens from m on, features first..last."""
    w(f"blocks: T.let = ({features} + {BLOCK - 1}) // {BLOCK}")
    w(f"for task in T.parallel((M + {lanes - 1}) // {lanes} * blocks):")
    w.depth += 1
    w.opaque("m", f"task // blocks * {lanes}")
    w.opaque("first", f"task % blocks * {BLOCK}")
    w.opaque("last", f"T.min({features}, first + {BLOCK})")


def _transpose(w: Writer, lanes: int, load, store, extra: dict[int, str]) -> None:
    """lanes x lanes floats: stage s exchanges bit s of the row number with bit s of the lane number."""
    w(f'v = T.alloc_buffer(({2 * lanes * lanes},), "float32", scope="local")')
    at = lambda half, i: vec("v", (half * lanes + i) * lanes, lanes)  # noqa: E731
    for i in range(lanes):
        w(f"{at(0, i)} = {load(i)}")
    half = 0
    for s in range(lanes.bit_length() - 1):
        bit = 1 << s
        for i in range(lanes):
            low, high = at(half, i & ~bit), at(half, i | bit)
            if i & bit:
                picks = [lane | bit if not lane & bit else lanes + lane for lane in range(lanes)]
            else:
                picks = [lane if not lane & bit else lanes + (lane ^ bit) for lane in range(lanes)]
            w(f"{at(1 - half, i)} = T.Shuffle([{low}, {high}], {picks})")
        half = 1 - half
    for i in range(lanes):
        w(f"{store(i)} = {at(half, i)}{extra.get(i, '')}")
