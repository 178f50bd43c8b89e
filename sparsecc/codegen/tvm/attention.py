"""Family attention: softmax(scale * q k^T + mask) v on token-minor values, block by block of keys (FlashAttention, Dao et al. 2022).

Every query is a lane. Both products are then the spmm family's: scalars of k and v broadcast over vectors of queries, 4 x `vectors`
accumulators in registers, and the softmax needs nothing across lanes.

    for task in parallel(batch * query tiles * heads):        a thread keeps to the tokens that it has in the linears
        for block of KEYS keys:
            p[key][query] = scale * sum_d k[d][key] q[d][query] + mask[key][query];  top = max(top, p)
            p = exp(p - top);  total = total * exp(old top - top) + sum p
            y[d][query] = y[d][query] * exp(old top - top) + sum_key v[d][key] p[key][query]
        y /= total                                            0 for a query that may see no key, as in torch
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsecc.codegen.tvm.activation import write_exp
from sparsecc.codegen.tvm.tiles import SPAN, place, write_parts
from sparsecc.codegen.tvm.writer import Writer, constant, splat, vec

INTS = ("S", "Sk", "heads", "group", "tasks", "per",
        *(f"{value}_{step}" for value in ("q", "k", "v", "y", "m") for step in ("stride", "span", "head", "batch")))  # fmt: skip
"""S queries, Sk keys, `heads` of q, `group` of them per head of k and v; per: query tiles of a head. *_stride: between features, and
between keys of the mask; *_span: between spans of tokens, see `tiles`."""
KEYS = SPAN  # with 64 queries a block's p is 16 KiB, its k and v 8 KiB each at D = 32: together in L1


@dataclass(frozen=True)
class AttentionSpec:
    """q f32[B, H, S, D], k and v f32[B, H / group, Sk, D], tokens consecutive. `masked`: a mask f32[B, H, Sk, S] is added."""

    D: int
    masked: bool = False

    def __str__(self) -> str:
        return f"attention D={self.D}{' +mask' if self.masked else ''}"


def attention_source(spec: AttentionSpec, vectors: int, lanes: int) -> str:
    """f(q, k, v, y, scale [1], [mask,] *INTS)."""
    w = Writer()
    width = vectors * lanes
    pointers: dict[str, str] = dict.fromkeys(["q", "k", "v", "y", "scale", *(["mask"] if spec.masked else [])], "float32")
    with w.function("attention", pointers, INTS):
        with w.block("for task in T.parallel(tasks):"):
            w.opaque("batch", "task // heads // per")
            w.opaque("head", "task % heads")
            w.opaque("start", f"task // heads % per * {width}")
            w.opaque("left", f"T.min((S - start + {lanes - 1}) // {lanes}, T.int64({vectors}))")
            w.opaque("shared", "head // group")
            w.opaque("kt", "batch * k_batch + shared * k_head")
            w.opaque("vt", "batch * v_batch + shared * v_head")
            for part, offset in write_parts(w, vectors, lanes):
                w.opaque("offset", offset)
                _Tile(w, spec, part, lanes).write()
    return w.text


@dataclass(frozen=True)
class _Tile:
    """`vectors` vectors of queries against all keys."""

    w: Writer
    spec: AttentionSpec
    vectors: int
    lanes: int

    def write(self) -> None:
        w, width = self.w, self.vectors * self.lanes
        for value in ("q", "y", *(["m"] if self.spec.masked else [])):
            w.opaque(f"{value}t", f"{place(value)} + head * {value}_head + offset")
        w(f'p = T.alloc_buffer(({KEYS * width},), "float32", scope="global")')
        for name in ("top", "total", "shift", "fade"):
            w(f'{name} = T.alloc_buffer(({width},), "float32", scope="global")')
        for r in range(self.vectors):
            w(f"{self.at('top', r)} = {self.fill('-inf')}")
            w(f"{self.at('total', r)} = {self.fill(0.0)}")
        with w.block(f"for d in range({self.spec.D}):"):
            for r in range(self.vectors):
                w(f"{self.y('d', r)} = {self.fill(0.0)}")
        with w.block(f"for block in range((Sk + {KEYS - 1}) // {KEYS}):"):
            w.opaque("key", f"block * {KEYS}")
            w.opaque("count", f"T.min(Sk - key, T.int64({KEYS}))")
            w.opaque("kb", "kt + block * k_span")
            w.opaque("vb", "vt + block * v_span")
            for r in range(self.vectors):
                w(f"{self.at('shift', r)} = {self.at('top', r)}")
            with w.block("for j in range(count // 4):"):
                self.scores("j * 4", 4)
            with w.block("for j in range(count % 4):"):
                self.scores("(count // 4 * 4 + j)", 1)
            self.softmax()
            with w.block(f"for i in range({self.spec.D // 4}):"):
                self.values("i * 4", 4)
            if self.spec.D % 4:
                with w.block(f"for i in range({self.spec.D % 4}):"):
                    self.values(f"({self.spec.D // 4 * 4} + i)", 1)
        for r in range(self.vectors):
            total = self.at("total", r)
            w(f"{total} = T.Select({total} == {self.fill(0.0)}, {self.fill(0.0)}, {self.fill(1.0)} / {total})")
        with w.block(f"for d in range({self.spec.D}):"):
            for r in range(self.vectors):
                w(f"{self.y('d', r)} = {self.y('d', r)} * {self.at('total', r)}")

    def scores(self, first: str, keys: int) -> None:
        """p of `keys` keys from `first` of the block on."""
        w = self.w
        acc = w.registers("acc", keys, self.vectors, self.lanes)
        for b in range(keys):
            for r in range(self.vectors):
                w(f"{acc(b, r)} = {self.fill(0.0)}")
        with w.block(f"for d in range({self.spec.D}):"):
            for b in range(keys):
                for r in range(self.vectors):
                    q = vec("q", f"qt + d * q_stride + {r * self.lanes}", self.lanes)
                    w(f"{acc(b, r)} = {acc(b, r)} + {splat(f'k[kb + d * k_stride + {first} + {b}]', self.lanes)} * {q}")
        for b in range(keys):
            for r in range(self.vectors):
                mask = vec("mask", f"mt + (key + {first} + {b}) * m_stride + {r * self.lanes}", self.lanes)
                score = w.let("score", f"{acc(b, r)} * {splat('scale[0]', self.lanes)}" + (f" + {mask}" if self.spec.masked else ""))
                w(f"{self.p(f'({first} + {b})', r)} = {score}")
                w(f"{self.at('top', r)} = T.max({self.at('top', r)}, {score})")

    def softmax(self) -> None:
        """p = exp(p - top) and what it means for earlier blocks. While no key was seen top is -inf: 0 stands for it."""
        w, some = self.w, self.fill("-inf")
        for r in range(self.vectors):
            top = w.let("seen", f"T.Select({self.at('top', r)} == {some}, {self.fill(0.0)}, {self.at('top', r)})")
            w(f"{self.at('fade', r)} = {self.at('shift', r)} - {top}")
            w(f"{self.at('shift', r)} = {top}")
        fades = write_exp(w, [self.at("fade", r) for r in range(self.vectors)], self.lanes)
        for r, fade in enumerate(fades):
            w(f"{self.at('fade', r)} = {fade}")
            w(f"{self.at('total', r)} = {self.at('total', r)} * {self.at('fade', r)}")
        with w.block("for j in range(count):"):
            exps = write_exp(w, [f"{self.p('j', r)} - {self.at('shift', r)}" for r in range(self.vectors)], self.lanes)
            for r, value in enumerate(exps):
                w(f"{self.p('j', r)} = {value}")
                w(f"{self.at('total', r)} = {self.at('total', r)} + {value}")

    def values(self, first: str, features: int) -> None:
        """`features` features of y from `first` on."""
        w = self.w
        acc = w.registers("sum", features, self.vectors, self.lanes)
        for b in range(features):
            for r in range(self.vectors):
                w(f"{acc(b, r)} = {self.y(f'({first} + {b})', r)} * {self.at('fade', r)}")
        with w.block("for j in range(count):"):
            for b in range(features):
                for r in range(self.vectors):
                    value = splat(f"v[vb + ({first} + {b}) * v_stride + j]", self.lanes)
                    w(f"{acc(b, r)} = {acc(b, r)} + {value} * {self.p('j', r)}")
        for b in range(features):
            for r in range(self.vectors):
                w(f"{self.y(f'({first} + {b})', r)} = {acc(b, r)}")

    def at(self, buffer: str, r: int) -> str:
        return vec(buffer, r * self.lanes, self.lanes)

    def p(self, key: str, r: int) -> str:
        return vec("p", f"{key} * {self.vectors * self.lanes} + {r * self.lanes}", self.lanes)

    def y(self, feature: str, r: int) -> str:
        return vec("y", f"yt + {feature} * y_stride + {r * self.lanes}", self.lanes)

    def fill(self, value: float | str) -> str:
        return splat('T.float32("-inf")', self.lanes) if value == "-inf" else constant(float(value), self.lanes)
