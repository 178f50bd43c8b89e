"""Family routing: what choosing the tokens of a block computes, see `ir/route_ops`.

    received   1  parallel over sequences, heads of keys and chunks of tokens    logits = scale * q_last k^T
               2  parallel over sequences                                        softmax, averaged over heads
    route      parallel over sequences    rank by a radix sort; four features through two small layers, a token in each lane
    keep       parallel over sequences    the places whose score is beyond a threshold, in order

As torch operations they are some forty of a few microseconds each, more than the arithmetic takes.
"""

from __future__ import annotations

from sparsecc.codegen.tvm.activation import write_exp, write_sigmoid
from sparsecc.codegen.tvm.attention_rows import pieces
from sparsecc.codegen.tvm.entries import STORED, load
from sparsecc.codegen.tvm.streams import total
from sparsecc.codegen.tvm.writer import Writer, splat, vec

CHUNK = 128
"""Tokens whose keys stay in the first-level cache while the heads that share them go by."""
TOGETHER = 4
"""Vectors of tokens side by side, so that their sums do not wait for each other."""
RADIX = 11
"""Bits of a pass: three passes sort 32."""

RECEIVED_INTS = ("B", "S", "H", "group", "q_batch", "q_head", "q_token", "q_feature", "k_batch", "k_head", "k_stride", "pitch")
"""Of `received`: k_stride is between tokens, or between features where a feature's tokens lie side by side; pitch: floats of a row of
`work` f32[B, H + 1, pitch], a multiple of PAD that S fits in."""
ROUTE_INTS = ("B", "S", "pitch")
"""Of `route`: `ints` i32[B, 4 * pitch + BINS], `room` f32[B, 4, pitch]."""
KEEP_INTS = ("B", "S")
BINS = 1 << RADIX
PAD = 64
INFINITE = 'T.float32("inf")'
NONE = 'T.float32("-inf")'


def received_source(D: int, by_token: bool, counted: bool, dtype: str, lanes: int) -> str:
    """f(q, k, count i32[B], scale f32[1], work, out f32[B, S], *RECEIVED_INTS). `by_token`: keys have their features side by side.
    `counted`: a row's tokens are the first count[b], else all; `count` isn't read then."""
    w, stored = Writer(), STORED[dtype]
    pointers = {"q": stored, "k": stored, "count": "int32", "scale": "float32", "work": "float32", "out": "float32"}
    number = 'T.Cast("int64", count[batch])' if counted else "S"
    with w.function("received", pointers, RECEIVED_INTS):
        w.opaque("chunks", f"(S + {CHUNK - 1}) // {CHUNK}")
        w.opaque("shared_heads", "H // group")
        with w.block("for task in T.parallel(B * shared_heads * chunks):"):
            w.opaque("batch", "task // chunks // shared_heads")
            w.opaque("shared", "task // chunks % shared_heads")
            w.opaque("first", f"task % chunks * {CHUNK}")
            w.opaque("n", number)
            w.opaque("tokens", f"T.max(T.int64(0), T.min(n - first, T.int64({CHUNK})))")
            w(f'query = T.alloc_buffer(({D},), "float32", scope="global")')
            with w.block("for one in range(group):"):
                w.opaque("head", "shared * group + one")
                w.opaque("qt", "batch * q_batch + head * q_head + T.max(n - 1, T.int64(0)) * q_token")
                w.opaque("kt", f"batch * k_batch + shared * k_head + first{' * k_stride' if by_token else ''}")
                w.opaque("to", "(batch * (H + 1) + head) * pitch + first")
                with w.block(f"for d in range({D}):"):
                    w(f"query[d] = {load('q', dtype, 'qt + d * q_feature')} * scale[0]")
                (_write_dots if by_token else _write_lanes)(w, D, dtype, lanes)
        with w.block("for batch in T.parallel(B):"):
            w.opaque("n", number)
            _write_shares(w, lanes)
    return w.text


def _write_dots(w: Writer, D: int, dtype: str, lanes: int) -> None:
    """A token after the other, features in the lanes."""
    with w.block("for token in range(tokens):"):
        w.opaque("row", "kt + token * k_stride")
        parts = []
        for at, size in pieces(D, lanes):
            product = f"{vec('query', at, size)} * {load('k', dtype, f'row + {at}', size)}"
            if parts and parts[0][1] == size:
                parts[0] = (w.let("dot", f"{parts[0][0]} + {product}"), size)
            else:
                parts.append((w.let("dot", product), size))
        w(f"work[to + token] = {' + '.join(total(w, value, size) for value, size in parts)}")


def _write_lanes(w: Writer, D: int, dtype: str, lanes: int) -> None:
    """Tokens in the lanes, a feature after the other; what is left of a chunk token by token."""
    wide = TOGETHER * lanes

    def write(at: str, together: int, size: int) -> None:
        sums = w.registers("logit", 1, together, size)
        for r in range(together):
            w(f"{sums(0, r)} = {splat('T.float32(0)', size)}")
        with w.block(f"for d in range({D}):"):
            for r in range(together):
                value = load("k", dtype, f"kt + d * k_stride + {at} + {r * size}", size)
                w(f"{sums(0, r)} = {sums(0, r)} + {splat('query[d]', size)} * {value}")
        for r in range(together):
            w(f"{vec('work', f'to + {at} + {r * size}', size)} = {sums(0, r)}")

    with w.block(f"for v in range(tokens // {wide}):"):
        write(f"v * {wide}", TOGETHER, lanes)
    with w.block(f"for v in range(tokens % {wide}):"):
        write(f"tokens // {wide} * {wide} + v", 1, 1)


def _write_shares(w: Writer, lanes: int) -> None:
    """out = the softmax of each head's row of `work`, averaged; 0 behind the first n tokens. The sum is in the row behind the heads."""
    w.opaque("rows", "batch * (H + 1) * pitch")
    w.opaque("shares", "rows + H * pitch")
    w.opaque("whole", f"(n + {lanes - 1}) // {lanes}")
    with w.block("for v in range(pitch):"):
        w("work[shares + v] = T.float32(0)")
    with w.block("for head in range(H):"):
        w.opaque("row", "rows + head * pitch")
        with w.block(f"for rest in range(whole * {lanes} - n):"):
            w(f"work[row + n + rest] = {NONE}")
        for name, start in (("tops", NONE), ("sums", "T.float32(0)")):
            w(f'{name} = T.alloc_buffer(({lanes},), "float32", scope="global")')
            w(f"{vec(name, 0, lanes)} = {splat(start, lanes)}")
        w('top = T.alloc_buffer((1,), "float32", scope="global")')
        at = vec("work", f"row + v * {lanes}", lanes)
        with w.block("for v in range(whole):"):
            w(f"{vec('tops', 0, lanes)} = T.max({vec('tops', 0, lanes)}, {at})")
        w("top[0] = tops[0]")
        with w.block(f"for lane in range({lanes}):"):
            w("top[0] = T.max(top[0], tops[lane])")
        with w.block("for v in range(whole):"):
            value = write_exp(w, [f"{at} - {splat('top[0]', lanes)}"], lanes)[0]
            w(f"{at} = {value}")
            w(f"{vec('sums', 0, lanes)} = {vec('sums', 0, lanes)} + {value}")
        w(f"share: T.let = T.float32(1) / (({total(w, vec('sums', 0, lanes), lanes)}) * T.Cast(\"float32\", H))")
        with w.block("for v in range(whole):"):
            mean = vec("work", f"shares + v * {lanes}", lanes)
            w(f"{mean} = {mean} + {at} * {splat('share', lanes)}")
    with w.block("for v in range(S):"):
        w("out[batch * S + v] = T.if_then_else(v < n, work[shares + v], T.float32(0))")


def route_source(hidden: int, outputs: int, lanes: int) -> str:
    """f(importance f32[B, S], -inf for padding, required f32[1], fc1 [hidden, 4], bias, fc2 [outputs, hidden], bias, ints, room,
    out f32[B, S], *ROUTE_INTS)."""
    w = Writer()
    floats = ("importance", "required", "fc1", "bias1", "fc2", "bias2")
    pointers = {**dict.fromkeys(floats, "float32"), "ints": "int32", "room": "float32", "out": "float32"}
    with w.function("route", pointers, ROUTE_INTS):
        with w.block("for batch in T.parallel(B):"):
            w.opaque("row", "batch * S")
            for i, name in enumerate(("places", "values", "ranks", "scores")):
                w.opaque(name, f"(batch * 4 + {i}) * pitch")
            for i, name in enumerate(("keys_a", "at_a", "keys_b", "at_b", "bins")):
                w.opaque(name, f"batch * (4 * pitch + {BINS}) + {i} * pitch")
            w('real = T.alloc_buffer((1,), "int64", scope="global")')
            w("real[0] = T.int64(0)")
            with w.block("for s in range(S):"):
                value = w.let("value", "importance[row + s]")
                w(f"room[values + s] = {value}")
                w('room[places + s] = T.Cast("float32", real[0])')
                w(f"real[0] = real[0] + T.if_then_else({value} == {NONE}, T.int64(0), T.int64(1))")
                zero = f"{value} == T.float32(0)"  # -0.0, too: they are tied
                bits = w.let("bits", f'T.if_then_else({zero}, T.int32(0), T.reinterpret("int32", {value}))')
                flipped = f"T.bitwise_or(T.shift_right({bits}, T.int32(31)), T.int32(-2147483648))"
                w(f"ints[keys_a + s] = T.bitwise_not(T.bitwise_xor({bits}, {flipped}))")  # ascending, as if unsigned: the largest first
                w('ints[at_a + s] = T.Cast("int32", s)')
            for i, (of, to) in enumerate((("a", "b"), ("b", "a"), ("a", "b"))):
                _write_pass(w, of, to, i * RADIX)
            with w.block("for s in range(S):"):
                w('room[ranks + T.Cast("int64", ints[at_b + s])] = T.Cast("float32", s)')
            w('number: T.let = T.Cast("float32", T.max(real[0], T.int64(1)))')
            wide = TOGETHER * lanes
            with w.block(f"for v in range((S + {wide - 1}) // {wide}):"):
                _write_layers(w, hidden, outputs, f"v * {wide}", lanes)
            with w.block("for s in range(S):"):
                place = w.let("place", "room[places + s]")
                last = 'T.Cast("float32", real[0] - 1)'
                ends = f"T.Or({place} == T.float32(0), {place} == {last})"
                score = f"T.if_then_else({ends}, {INFINITE}, room[scores + s])"
                w(f"out[row + s] = T.if_then_else(room[values + s] == {NONE}, {NONE}, {score})")
    return w.text


def _write_pass(w: Writer, of: str, to: str, shift: int) -> None:
    """A stable pass of a radix sort of (key, place)."""
    digit = lambda key: f"T.bitwise_and(T.shift_right(T.reinterpret('uint32', {key}), T.uint32({shift})), T.uint32({BINS - 1}))"  # noqa: E731
    with w.block(f"for b in range({BINS}):"):
        w("ints[bins + b] = 0")
    with w.block("for s in range(S):"):
        at = w.let("bin", f'bins + T.Cast("int64", {digit(f"ints[keys_{of} + s]")})')
        w(f"ints[{at}] = ints[{at}] + 1")
    w(f'before{shift} = T.alloc_buffer((1,), "int32", scope="global")')
    w(f"before{shift}[0] = 0")
    with w.block(f"for b in range({BINS}):"):
        w(f"before{shift}[0] = before{shift}[0] + ints[bins + b]")
        w(f"ints[bins + b] = before{shift}[0] - ints[bins + b]")
    with w.block("for s in range(S):"):
        key = w.let("key", f"ints[keys_{of} + s]")
        at = w.let("bin", f'bins + T.Cast("int64", {digit(key)})')
        place = w.let("place", f'T.Cast("int64", ints[{at}])')
        w(f"ints[keys_{to} + {place}] = {key}")
        w(f"ints[at_{to} + {place}] = ints[at_{of} + s]")
        w(f"ints[{at}] = ints[{at}] + 1")


def _write_layers(w: Writer, hidden: int, outputs: int, at: str, lanes: int) -> None:
    """scores = the probability that a token is kept, for TOGETHER vectors of tokens."""
    place = lambda name, r: vec("room", f"{name} + {at} + {r * lanes}", lanes)  # noqa: E731
    some, number = range(TOGETHER), splat("number", lanes)
    inputs = [
        (w.let("place", f"{place('places', r)} / {number}"), w.let("value", place("values", r)),
         w.let("rank", f"{place('ranks', r)} / {number}")) for r in some
    ]  # fmt: skip
    sums = w.registers("logit", outputs, TOGETHER, lanes)
    for o in range(outputs):
        for r in some:
            w(f"{sums(o, r)} = {splat(f'bias2[{o}]', lanes)}")
    with w.block(f"for h in range({hidden}):"):
        start = w.let("start", "bias1[h] + fc1[h * 4 + 3] * required[0]")
        for r in some:
            products = " + ".join(f"{splat(f'fc1[h * 4 + {i}]', lanes)} * {x}" for i, x in enumerate(inputs[r]))
            value = w.let("hidden", f"{splat(start, lanes)} + {products}")
            zero = splat("T.float32(0)", lanes)
            kept = w.let("kept", f"T.Select({value} < {zero}, {zero}, {value})")  # NaN stays NaN
            for o in range(outputs):
                w(f"{sums(o, r)} = {sums(o, r)} + {splat(f'fc2[{o * hidden} + h]', lanes)} * {kept}")
    logits = [sums(0, r) if outputs == 1 else f"{sums(1, r)} - {sums(0, r)}" for r in some]
    for r, score in enumerate(write_sigmoid(w, logits, lanes)):
        w(f"{place('scores', r)} = {score}")


def keep_source(compare: str) -> str:
    """f(scores f32[B, S], level f32[1], idx i32[B, S], found i32[B, 3], *KEEP_INTS): places whose score is `compare` (">" or ">=") the
    level, -1 behind them; how many, how many aren't -inf, and 1 + the place of the last NaN, or 0."""
    w = Writer()
    with w.function("keep", {"scores": "float32", "level": "float32", "idx": "int32", "found": "int32"}, KEEP_INTS):
        with w.block("for batch in T.parallel(B):"):
            w.opaque("row", "batch * S")
            for name in ("kept", "real", "bad"):
                w(f'{name} = T.alloc_buffer((1,), "int32", scope="global")')
                w(f"{name}[0] = 0")
            with w.block("for s in range(S):"):
                score = w.let("score", "scores[row + s]")
                w('idx[row + T.Cast("int64", kept[0])] = T.Cast("int32", s)')
                w(f'kept[0] = kept[0] + T.Cast("int32", {score} {compare} level[0])')
                w(f'real[0] = real[0] + T.Cast("int32", {score} > {NONE})')
                size = f"T.bitwise_and(T.reinterpret('int32', {score}), T.int32(2147483647))"
                w(f'bad[0] = T.if_then_else({size} > T.int32(2139095040), T.Cast("int32", s) + 1, bad[0])')
            with w.block('for rest in range(S - T.Cast("int64", kept[0])):'):
                w('idx[row + T.Cast("int64", kept[0]) + rest] = -1')
            for i, name in enumerate(("kept", "real", "bad")):
                w(f"found[batch * 3 + {i}] = {name}[0]")
    return w.text
