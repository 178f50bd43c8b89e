"""Moving activations between torch's layouts and the vectors of tokens that the kernels read, by transposing in registers.

pack_rows    x[m][k], features consecutive  -> vectors of tokens, zeros where k >= K
pack_tokens  x[k][m], tokens consecutive    -> the same
write_rows   the inverse of pack_rows, written into the kernels that produce the values
Tokens up to the next full vector are zero in what the first two write.

Token-minor values lie in spans: the vectors of SPAN tokens of a sequence for all features, then those of the next SPAN tokens. What a
task reads is then contiguous, and no two threads write near each other. A plain [feature][token] matrix is one whose spans are
SPAN floats apart.
"""

from __future__ import annotations

from collections.abc import Iterator

from sparsecc.codegen.tvm.writer import Writer, vec

BLOCK = 128  # features per task: a task's tile of 128 x 16 floats is 8 KiB
SPAN = 64  # tokens: four full vectors, as many as a kernel's tile has at most
FLOATS = {"x": "float32", "y": "float32"}
INTS = ("B", "S", "K", "padded_k", "x_stride", "x_span", "x_batch", "y_stride", "y_span", "y_batch")
"""B sequences of S tokens. Token s, feature k of sequence b goes to y[b * y_batch + s // SPAN * y_span + k * y_stride + s % SPAN]."""


def place(name: str, token: str = "start") -> str:
    """Where a token of sequence `batch` begins in a token-minor value."""
    return f"batch * {name}_batch + {token} // {SPAN} * {name}_span + {token} % {SPAN}"


def pack_rows_source(lanes: int) -> str:
    """f(x, y, *INTS): x[b * x_batch + s * x_stride + k]."""
    w = Writer()
    with w.function("pack_rows", FLOATS, INTS):
        _tasks(w, "padded_k", lanes, "batch * x_batch")
        w.opaque("whole", f"T.Select(s + {lanes} <= S, T.max(first, T.min(last, K // {lanes} * {lanes})), first)")
        with w.block(f"for kb in range((whole - first) // {lanes}):"):
            w(f"k: T.let = first + kb * {lanes}")
            load = lambda i: vec("x", f"at + (s + {i}) * x_stride + k", lanes)  # noqa: E731
            write_transposed(w, lanes, load, lambda i: vec("y", f"to + (k + {i}) * y_stride", lanes), {})
        with w.block("for kr in range(last - whole):"), w.block(f"for i in range({lanes}):"):
            w("k: T.let = whole + kr")
            w("y[to + k * y_stride + i] = T.if_then_else((s + i < S) and (k < K), x[at + (s + i) * x_stride + k], T.float32(0))")
    return w.text


def pack_tokens_source(lanes: int) -> str:
    """f(x, y, *INTS): x as y."""
    w = Writer()
    with w.function("pack_tokens", FLOATS, INTS):
        _tasks(w, "padded_k", lanes, place("x", "s"))
        w.opaque("whole", f"T.Select(s + {lanes} <= S, T.max(first, T.min(last, K)), first)")
        with w.block("for kb in range(whole - first):"):
            w("k: T.let = first + kb")
            w(f"{vec('y', 'to + k * y_stride', lanes)} = {vec('x', 'at + k * x_stride', lanes)}")
        with w.block("for kr in range(last - whole):"), w.block(f"for i in range({lanes}):"):
            w("k: T.let = whole + kr")
            w("y[to + k * y_stride + i] = T.if_then_else((s + i < S) and (k < K), x[at + k * x_stride + i], T.float32(0))")
    return w.text


def write_parts(w: Writer, vectors: int, lanes: int) -> Iterator[tuple[int, str]]:
    """Yields (vectors, their offset in the tile) inside a branch for each: all of a whole tile's `vectors`, or, in a sequence's last tile
    with `left` of them, powers of two that add up to those."""
    part = vectors
    while part:
        test = f"left == {part}" if part == vectors else f"T.bitwise_and(left, T.int64({part})) != 0"
        if part < vectors:
            test = f"(left < {vectors}) and ({test})"
        with w.block(f"if {test}:"):
            yield part, "T.int64(0)" if part == vectors else w.let("offset", f"left // {2 * part} * {2 * part * lanes}")
        part //= 2


def write_rows(w: Writer, lanes: int, residual: bool, token: str, offset: str, width: int) -> None:
    """Transposes `lanes` tokens, from `token` of the sequence on, of `out`[feature - first][width], from `offset` on, into
    y[m * y_stride + n] for features first..last, and adds res[m * res_stride + n]; m = batch * S + token."""
    plus = lambda row, n, size: f" + {vec('res', f'({row}) * res_stride + {n}', size)}" if residual else ""  # noqa: E731
    w.opaque("token", token)
    w.opaque("m", "batch * S + token")
    w.opaque("whole", f"T.Select(token + {lanes} <= S, (last - first) // {lanes} * {lanes}, T.int64(0))")
    with w.block(f"for nb in range(whole // {lanes}):"):
        w(f"n: T.let = nb * {lanes}")
        extra = {i: plus(f"m + {i}", "first + n", lanes) for i in range(lanes)}
        load = lambda i: vec("out", f"(n + {i}) * {width} + {offset}", lanes)  # noqa: E731
        write_transposed(w, lanes, load, lambda i: vec("y", f"(m + {i}) * y_stride + first + n", lanes), extra)
    with w.block("for nr in range(last - first - whole):"), w.block(f"for i in range(T.min(T.int64({lanes}), S - token)):"):
        w("n: T.let = whole + nr")
        w(f"y[(m + i) * y_stride + first + n] = out[n * {width} + {offset} + i]{plus('m + i', 'first + n', 1)}")


def _tasks(w: Writer, features: str, lanes: int, at: str) -> None:
    """One task: `lanes` tokens of one sequence from s on, features first..last; where they are in x and go in y."""
    w(f"vectors: T.let = (S + {lanes - 1}) // {lanes}")
    w(f"blocks: T.let = ({features} + {BLOCK - 1}) // {BLOCK}")
    w("for task in T.parallel(B * vectors * blocks):")
    w.depth += 1
    w.opaque("batch", "task // blocks // vectors")
    w.opaque("s", f"task // blocks % vectors * {lanes}")
    w.opaque("first", f"task % blocks * {BLOCK}")
    w.opaque("last", f"T.min({features}, first + {BLOCK})")
    w.opaque("at", at)
    w.opaque("to", place("y", "s"))


def write_transposed(w: Writer, lanes: int, load, store, extra: dict[int, str], name: str = "v") -> None:
    """lanes x lanes floats: stage s exchanges bit s of the row number with bit s of the lane number."""
    row = w.registers(name, 2 * lanes, 1, lanes)
    at = lambda half, i: row(half * lanes + i, 0)  # noqa: E731
    for i in range(lanes):
        w(f"{at(0, i)} = {load(i)}")
    half = 0
    for stage in range(lanes.bit_length() - 1):
        bit = 1 << stage
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
