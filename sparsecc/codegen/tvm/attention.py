"""Family attention: softmax(scale * q k^T + mask) v on token-minor values, block by block of keys (FlashAttention, Dao et al. 2022).

Every query is a lane. Both products are then the spmm family's: scalars of k and v broadcast over vectors of queries, 4 x `vectors`
accumulators in registers, and the softmax needs nothing across lanes.

    for task in parallel(batch * query tiles * heads):        a thread keeps to the tokens that it has in the linears
        for block of KEYS keys that a query of the tile may see:
            p[key][query] = scale * sum_d k[d][key] q[d][query];  top = max(top, p)
            where some of them are hidden:                    what is hidden must not count in top
                p += mask;  top = max(old top, p)
            p = exp(p - top);  total = total * exp(old top - top) + sum p
            y[d][query] = y[d][query] * exp(old top - top) + sum_key v[d][key] p[key][query]
        y /= total                                            0 for a query that may see no key, as in torch

Everything is float32. exp's relative error is below 3e-7 and below -87 it is 0 (see `activation`), so a weight p / total is off by at
most 1e-6 of itself for every block that changed top, and by 2e-38 where it was cut off.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsecc.codegen.tvm.activation import write_exp
from sparsecc.codegen.tvm.keys import KEYS, SIGHTS, Keys, Sight, TokenMinor
from sparsecc.codegen.tvm.tiles import place, write_parts
from sparsecc.codegen.tvm.writer import Writer, constant, splat, vec

INTS = ("S", "Sk", "heads", "group", "tasks", "per", *(f"{value}_{step}" for value in "qy" for step in ("stride", "span", "head", "batch")))
"""S queries, Sk keys, `heads` of q, `group` of them per head of k and v; per: query tiles of a head. *_stride: between features, and
between keys of the mask; *_span: between spans of tokens, see `tiles`. Those of the keys and of what is hidden follow, see `keys`."""


@dataclass(frozen=True)
class AttentionSpec:
    """q f32[B, H, S, D], k and v f32[B, H / group, Sk, D], tokens consecutive. `hides`: nothing (""), what comes later ("causal"), or
    what a mask says, one row for every query ("rows") or one for all ("keys")."""

    D: int
    hides: str = ""

    def __str__(self) -> str:
        return f"attention D={self.D}{f' -{self.hides}' if self.hides else ''}"


def attention_source(spec: AttentionSpec, vectors: int, lanes: int) -> str:
    """f(q, y, scale [1], k, v, [mask, tiles,] *INTS, *ints of the keys, *ints of the mask)."""
    w = Writer()
    keys, sight = TokenMinor(), SIGHTS[spec.hides]
    width = vectors * lanes
    pointers: dict[str, str] = dict.fromkeys(("q", "y", "scale", *keys.pointers, *sight.pointers), "float32")
    with w.function("attention", pointers, (*INTS, *keys.ints, *sight.ints)):
        with w.block("for task in T.parallel(tasks):"):
            w.opaque("batch", "task // heads // per")
            w.opaque("head", "task % heads")
            w.opaque("start", f"task // heads % per * {width}")
            w.opaque("left", f"T.min((S - start + {lanes - 1}) // {lanes}, T.int64({vectors}))")
            w.opaque("shared", "head // group")
            keys.head(w)
            for part, offset in write_parts(w, vectors, lanes):
                w.opaque("offset", offset)
                _Tile(w, spec.D, keys, sight, part, lanes).write()
    return w.text


@dataclass(frozen=True)
class _Tile:
    """`vectors` vectors of queries against all keys."""

    w: Writer
    D: int
    keys: Keys
    sight: Sight
    vectors: int
    lanes: int

    @property
    def width(self) -> int:
        return self.vectors * self.lanes

    def write(self) -> None:
        w = self.w
        for value in "qy":
            w.opaque(f"{value}t", f"{place(value)} + head * {value}_head + offset")
        self.sight.head(w)
        w(f'p = T.alloc_buffer(({KEYS * self.width},), "float32", scope="global")')
        for name in ("top", "total", "shift", "fade"):
            w(f'{name} = T.alloc_buffer(({self.width},), "float32", scope="global")')
        for r in range(self.vectors):
            w(f"{self.at('top', r)} = {self.fill('-inf')}")
            w(f"{self.at('total', r)} = {self.fill(0.0)}")
        with w.block(f"for d in range({self.D}):"):
            for r in range(self.vectors):
                w(f"{self.y('d', r)} = {self.fill(0.0)}")
        with self.sight.blocks(w, self.width):
            self.block()
        for r in range(self.vectors):
            total = self.at("total", r)
            w(f"{total} = T.Select({total} == {self.fill(0.0)}, {self.fill(0.0)}, {self.fill(1.0)} / {total})")
        with w.block(f"for d in range({self.D}):"):
            for r in range(self.vectors):
                w(f"{self.y('d', r)} = {self.y('d', r)} * {self.at('total', r)}")

    def block(self) -> None:
        """What a block of keys adds."""
        w, D = self.w, self.D
        w.opaque("key", f"block * {KEYS}")
        w.opaque("count", f"T.min(Sk - key, T.int64({KEYS}))")
        self.keys.load(w)
        for r in range(self.vectors):
            w(f"{self.at('shift', r)} = {self.at('top', r)}")
        with w.block("for j in range(count // 4):"):
            self.scores("j * 4", 4)
        with w.block("for j in range(count % 4):"):
            self.scores("(count // 4 * 4 + j)", 1)
        if mixed := self.sight.mixed(self.width):
            with w.block(f"if {mixed}:"):
                self.hide()
        self.softmax()
        with w.block(f"for i in range({D // 4}):"):
            self.values("i * 4", 4)
        if D % 4:
            with w.block(f"for i in range({D % 4}):"):
                self.values(f"({D // 4 * 4} + i)", 1)

    def scores(self, first: str, keys: int) -> None:
        """p of `keys` keys from `first` of the block on."""
        w = self.w
        acc = w.registers("acc", keys, self.vectors, self.lanes)
        for b in range(keys):
            for r in range(self.vectors):
                w(f"{acc(b, r)} = {self.fill(0.0)}")
        with w.block(f"for d in range({self.D}):"):
            for b in range(keys):
                for r in range(self.vectors):
                    q = vec("q", f"qt + d * q_stride + {r * self.lanes}", self.lanes)
                    w(f"{acc(b, r)} = {acc(b, r)} + {splat(self.keys.k('d', f'{first} + {b}'), self.lanes)} * {q}")
        for b in range(keys):
            for r in range(self.vectors):
                score = w.let("score", f"{acc(b, r)} * {splat('scale[0]', self.lanes)}")
                w(f"{self.p(f'({first} + {b})', r)} = {score}")
                w(f"{self.at('top', r)} = T.max({self.at('top', r)}, {score})")

    def hide(self) -> None:
        """Apply the mask, and find the largest score again."""
        w = self.w
        for r in range(self.vectors):
            w(f"{self.at('top', r)} = {self.at('shift', r)}")
        with w.block("for j in range(count):"):
            for r in range(self.vectors):
                score = w.let("score", self.sight.seen(self.p("j", r), "j", r, self.lanes))
                w(f"{self.p('j', r)} = {score}")
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
                    value = splat(self.keys.v(f"({first} + {b})", "j"), self.lanes)
                    w(f"{acc(b, r)} = {acc(b, r)} + {value} * {self.p('j', r)}")
        for b in range(features):
            for r in range(self.vectors):
                w(f"{self.y(f'({first} + {b})', r)} = {acc(b, r)}")

    def at(self, buffer: str, r: int) -> str:
        return vec(buffer, r * self.lanes, self.lanes)

    def p(self, key: str, r: int) -> str:
        return vec("p", f"{key} * {self.width} + {r * self.lanes}", self.lanes)

    def y(self, feature: str, r: int) -> str:
        return vec("y", f"yt + {feature} * y_stride + {r * self.lanes}", self.lanes)

    def fill(self, value: float | str) -> str:
        return splat('T.float32("-inf")', self.lanes) if value == "-inf" else constant(float(value), self.lanes)
