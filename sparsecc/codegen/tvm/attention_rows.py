"""Attention of a few queries (decode): softmax(scale * q k^T + mask) v, the features of a head are lanes.

    for query in parallel(batch * heads * queries):
        for block of BLOCK keys that the query may see:
            p[key] = scale * q . k[key] + mask;  top = max(top, p)
            p = exp(p - top);  total = total * exp(old top - top) + sum p
            y = y * exp(old top - top) + sum_key p[key] v[key]
        y /= total                                            0 for a query that may see no key, as in torch

Keys and values are read as they lie in the cache, rows of features of float32, bf16 or fp16; sums are float32. The bound on exp's error
is that of `attention`.
"""

from __future__ import annotations

from sparsecc.codegen.tvm.activation import write_exp
from sparsecc.codegen.tvm.entries import STORED, load, store
from sparsecc.codegen.tvm.streams import total
from sparsecc.codegen.tvm.writer import Writer, splat, vec

INTS = ("B", "H", "S", "Sk", "group", *(f"{value}_{step}" for value in "qkv" for step in ("batch", "head", "token")))
"""Between sequences, heads and tokens. The result is [B, S, H, D]."""
MASK_INTS = ("m_batch", "m_head", "m_row")
BLOCK = 64
ALONE = 1 << 15
"""Products of q and k that one thread computes: less is not worth a launch."""
NONE = 'T.float32("-inf")'


def attention_rows_source(D: int, hides: str, dtype: str, lanes: int) -> str:
    """f(q, k, v, y, scale f32[1], [mask f32,] *INTS, [*MASK_INTS]). `hides`: "", "causal", or what a mask says ("mask")."""
    w, stored, mask = Writer(), STORED[dtype], hides == "mask"
    pointers: dict[str, str] = {**dict.fromkeys("qkvy", stored), **dict.fromkeys(("scale", "mask") if mask else ("scale",), "float32")}
    with w.function("attention_rows", pointers, INTS + (MASK_INTS if mask else ())):
        w.opaque("rows", "B * S * H")
        w.opaque("parts", f"T.if_then_else(rows * Sk * {D} > {ALONE}, rows, T.int64(1))")
        with w.block("for part in T.parallel(parts):"):
            w.opaque("begin", "part * rows // parts")
            with w.block("for i in range((part + 1) * rows // parts - begin):"):
                w.opaque("row", "begin + i")  # the heads of a token follow each other, and those that share keys
                w.opaque("batch", "row // H // S")
                w.opaque("token", "row // H % S")
                w.opaque("head", "row % H")
                w.opaque("qt", "batch * q_batch + head * q_head + token * q_token")
                for value in "kv":
                    w.opaque(f"{value}t", f"batch * {value}_batch + head // group * {value}_head")
                if mask:
                    w.opaque("mt", "batch * m_batch + head * m_head + token * m_row")
                w.opaque("seen", "T.min(Sk, token + 1)" if hides == "causal" else "Sk")
                _write_query(w, D, mask, dtype, lanes)
    return w.text


def _write_query(w: Writer, D: int, mask: bool, dtype: str, lanes: int) -> None:
    parts_of_head = pieces(D, lanes)
    for name, size in (("q1", D), ("out", D), ("p", BLOCK), ("top", 1), ("sum", 1), ("fade", 1)):
        w(f'{name} = T.alloc_buffer(({size},), "float32", scope="global")')
    for at, size in parts_of_head:
        w(f"{vec('q1', at, size)} = {load('q', dtype, f'qt + {at}', size)} * {splat('scale[0]', size)}")
        w(f"{vec('out', at, size)} = {splat('T.float32(0)', size)}")
    w(f"top[0] = {NONE}")
    w("sum[0] = T.float32(0)")
    with w.block(f"for block in range((seen + {BLOCK - 1}) // {BLOCK}):"):
        w.opaque("key", f"block * {BLOCK}")
        w.opaque("count", f"T.min(seen - key, T.int64({BLOCK}))")
        w("fade[0] = top[0]")
        with w.block("for j in range(count):"):
            parts = []
            for at, size in parts_of_head:
                products = f"{vec('q1', at, size)} * {load('k', dtype, f'kt + (key + j) * k_token + {at}', size)}"
                if size == lanes and parts and parts[0][1] == lanes:
                    parts[0] = (w.let("dot", f"{parts[0][0]} + {products}"), size)
                else:
                    parts.append((w.let("dot", products), size))
            dot = " + ".join(total(w, value, size) for value, size in parts)
            score = w.let("score", f"{dot} + mask[mt + key + j]" if mask else dot)
            w(f"p[j] = {score}")
            w(f"top[0] = T.max(top[0], {score})")
        with w.block(f"for j in range((count + {lanes - 1}) // {lanes} * {lanes} - count):"):
            w(f"p[count + j] = {NONE}")
        # While no key was seen top is -inf: 0 stands for it.
        highest = w.let("highest", f"T.if_then_else(top[0] == {NONE}, T.float32(0), top[0])")
        faded = write_exp(w, [f"T.broadcast(fade[0] - {highest}, {lanes})" if lanes > 1 else f"fade[0] - {highest}"], lanes)[0]
        w(f'fades = T.alloc_buffer(({lanes},), "float32", scope="global")')
        w(f"{vec('fades', 0, lanes)} = {faded}")
        w("fade[0] = fades[0]")
        w("sum[0] = sum[0] * fade[0]")
        with w.block(f"for j in range((count + {lanes - 1}) // {lanes}):"):
            value = write_exp(w, [f"{vec('p', f'j * {lanes}', lanes)} - {splat(highest, lanes)}"], lanes)[0]
            w(f"{vec('p', f'j * {lanes}', lanes)} = {value}")
            w(f"sum[0] = sum[0] + {total(w, value, lanes)}")
        for at, size in parts_of_head:
            w(f"{vec('out', at, size)} = {vec('out', at, size)} * {splat('fade[0]', size)}")
        with w.block("for j in range(count):"):
            for at, size in parts_of_head:
                value = load("v", dtype, f"vt + (key + j) * v_token + {at}", size)
                w(f"{vec('out', at, size)} = {vec('out', at, size)} + {splat('p[j]', size)} * {value}")
    share = w.let("share", "T.if_then_else(sum[0] == T.float32(0), T.float32(0), T.float32(1) / sum[0])")
    for at, size in parts_of_head:
        result = store(w, f"{vec('out', at, size)} * {splat(share, size)}", dtype, size)
        w(f"{vec('y', f'row * {D} + {at}', size)} = {result}")


def pieces(D: int, lanes: int) -> list[tuple[int, int]]:
    """(offset, lanes) of D features: whole vectors, then powers of two."""
    found, at = [], 0
    while at < D:
        while at + lanes > D:
            lanes //= 2
        found.append((at, lanes))
        at += lanes
    return found
