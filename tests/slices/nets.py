"""Random networks with dead slices, and their ideal: the same network built without them.

A network is built twice from one recipe: with all sizes, and with those that are left without the dead slices. The second says how many
FLOPs are needed at least; it is made without looking at any weight. `kill` then makes the slices of the first dead, from either side.
"""
from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "hardswish": F.hardswish,
    "softplus": F.softplus,
}


@dataclass
class Dead:
    """Which indices of each named dimension are dead, of how many. `sizes` of the ideal network are what is left."""

    rng: random.Random
    of: dict[str, tuple[int, list[int]]] = field(default_factory=dict)

    def draw(self, name: str, size: int, most: float = 0.6) -> list[int]:
        """Dead indices of a dimension, drawn on first use; at least one stays."""
        if name not in self.of:
            count = self.rng.randint(0, max(0, min(size - 1, int(most * size)))) if self.rng.random() < 0.8 else 0
            self.of[name] = size, sorted(self.rng.sample(range(size), count))
        return self.of[name][1]

    def left(self, name: str, size: int) -> int:
        """Size of the dimension in the ideal network."""
        return size - len(self.draw(name, size))


class Block(nn.Module):
    """x -> y of the same features. `kill` zeroes the weights that make its dead slices dead."""

    def kill(self, dead: Dead) -> None:
        """For the full network only."""


def zero_rows(layer: nn.Linear | nn.Conv2d, rows: list[int], bias: bool) -> None:
    """With `bias`, the rows become constants instead of zeros."""
    layer.weight.data[rows] = 0
    if layer.bias is not None and not bias:
        layer.bias.data[rows] = 0


def zero_columns(layer: nn.Linear | nn.Conv2d, columns: list[int]) -> None:
    """What nobody reads."""
    layer.weight.data[:, columns] = 0


class Mlp(Block):
    """Linear, activation, linear; `cat` joins two activations of halves, `chunk` gates one half with the other."""

    def __init__(self, name: str, width: int, rng: random.Random, left: Callable[[str, int], int], stream: int) -> None:
        super().__init__()
        self.name, self.full = name, width
        self.form = rng.choice(("plain", "gated", "chunk", "cat"))
        self.act = ACTS[rng.choice(list(ACTS))]
        h, bias = left(f"{name}.h", width), rng.random() < 0.6
        h2 = left(f"{name}.h2", width) if self.form == "cat" else h
        self.up = nn.Linear(stream, 2 * h if self.form == "chunk" else h, bias)
        self.gate = nn.Linear(stream, h2, bias) if self.form in ("gated", "cat") else None
        self.down = nn.Linear(h + h2 if self.form == "cat" else h, stream, rng.random() < 0.6)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "plain":
            return self.down(self.act(self.up(x)))
        if self.form == "chunk":
            a, b = self.up(x).chunk(2, -1)
            return self.down(F.silu(a) * b)
        assert self.gate is not None
        if self.form == "gated":
            return self.down(self.act(self.gate(x)) * self.up(x))
        return self.down(torch.cat([self.act(self.up(x)), torch.tanh(self.gate(x))], -1))

    def kill(self, dead: Dead) -> None:
        rng = dead.rng
        for index in dead.draw(f"{self.name}.h", self.full):
            self._one(index, rng.random() < 0.5, rng)
        if self.form == "cat":
            assert self.gate is not None
            for index in dead.draw(f"{self.name}.h2", self.full):
                if rng.random() < 0.5:
                    zero_rows(self.gate, [index], True)
                else:
                    zero_columns(self.down, [self.full + index])

    def _one(self, index: int, reader: bool, rng: random.Random) -> None:
        if reader:
            zero_columns(self.down, [index])
        elif self.form == "chunk":
            zero_rows(self.up, [index + self.full * rng.randint(0, 1)], False)
        elif self.form == "gated":
            zero_rows(self.up, [index], False)  # the gate stays alive
        else:
            zero_rows(self.up, [index], True)


class Attention(Block):
    """Heads of q share those of k and v; some have rotary embeddings, some a causal mask, some one matrix for q, k and v."""

    def __init__(self, name: str, rng: random.Random, dead: Dead, full: bool, stream: int) -> None:
        super().__init__()
        self.name, self.D = name, 4
        self.G = rng.choice((1, 2, 3))
        self.R = rng.choice((1, 2, 3))
        self.fused = self.R == 1 and rng.random() < 0.4
        self.rotary, self.causal = rng.random() < 0.4, rng.random() < 0.5
        self.style = rng.choice(("expand", "eager", "gqa"))
        heads, bias = dead.draw(f"{name}.heads", self.G * self.R), rng.random() < 0.5
        alive = [h for h in range(self.G * self.R) if full or h not in heads]
        groups = sorted({h // self.R for h in alive})
        self.H, self.map = len(alive), [groups.index(h // self.R) for h in alive]
        kv = len(groups)
        if self.fused:
            self.qkv = nn.Linear(stream, 3 * self.H * self.D, bias)
        else:
            self.q, self.k, self.v = (nn.Linear(stream, n * self.D, bias) for n in (self.H, kv, kv))
        self.o = nn.Linear(self.H * self.D, stream, rng.random() < 0.5)

    def forward(self, x: Tensor) -> Tensor:
        B, S, _ = x.shape
        if self.fused:
            q, k, v = self.qkv(x).view(B, S, 3, self.H, self.D).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (m(x).view(B, S, -1, self.D).transpose(1, 2) for m in (self.q, self.k, self.v))
        if self.rotary:
            angle = torch.arange(S)[:, None] * torch.tensor([1.0, 0.1]).repeat(2)
            q, k = ((t * angle.cos() + torch.cat([-t[..., 2:], t[..., :2]], -1) * angle.sin()) for t in (q, k))
        return self.o(self._attend(q, k, v).transpose(1, 2).reshape(B, S, self.H * self.D))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        G = k.shape[1]
        uniform = self.map == [g for g in range(G) for _ in range(self.H // G)]
        if self.style == "gqa" and uniform:
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
        if uniform:
            B, _, S, D = k.shape
            k, v = (t[:, :, None].expand(B, G, self.H // G, S, D).reshape(B, self.H, S, D) for t in (k, v))
        else:
            k, v = k[:, self.map], v[:, self.map]
        if self.style != "eager":
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        scores = torch.matmul(q, k.transpose(-1, -2)) * self.D**-0.5
        if self.causal:
            scores = scores + torch.full(scores.shape[-2:], -1e9).triu(1)
        return torch.matmul(scores.softmax(-1), v)

    def kill(self, dead: Dead) -> None:
        heads, R, D = dead.draw(f"{self.name}.heads", self.G * self.R), self.R, self.D
        for group in range(self.G):
            mine = [h for h in range(group * R, group * R + R) if h in heads]
            if len(mine) == R and dead.rng.random() < 0.5:  # by its values; queries and keys stay alive
                rows = range(group * D, group * D + D)
                if self.fused:
                    zero_rows(self.qkv, [2 * self.H * D + r for r in rows], False)
                else:
                    zero_rows(self.v, list(rows), False)
            else:
                zero_columns(self.o, [c for h in mine for c in range(h * D, h * D + D)])


class Norm(Block):
    """Over the features: layer norm, RMS norm, or RMS norm spelt out."""

    def __init__(self, kind: str, size: int, full: int) -> None:
        super().__init__()
        self.kind, self.full = kind, full
        self.weight, self.bias = nn.Parameter(torch.rand(size) + 0.5), nn.Parameter(torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias)
        if self.kind == "rms":
            return F.rms_norm(x, x.shape[-1:], self.weight, 1e-6)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Stream(nn.Module):
    """A residual stream: into it, blocks with norms before them, out of it."""

    def __init__(self, rng: random.Random, dead: Dead, full: bool) -> None:
        super().__init__()
        left = (lambda name, size: size) if full else dead.left
        self.norm, self.vocabulary = rng.choice(("layer", "rms", "spelt")), rng.choice((0, 11))
        self.hidden = rng.choice((8, 12))
        d = left("stream", self.hidden)
        self.start = nn.Embedding(self.vocabulary, d) if self.vocabulary else nn.Linear(6, d)
        self.blocks = nn.ModuleList()
        self.norms = nn.ModuleList()
        for i in range(rng.choice((1, 2))):
            self.norms.append(Norm(self.norm, d, self.hidden))
            attends = rng.random() < 0.5
            self.blocks.append(Attention(f"b{i}", rng, dead, full, d) if attends else Mlp(f"b{i}", rng.choice((6, 8)), rng, left, d))
        self.last = Norm(self.norm, d, self.hidden)
        self.pooled = rng.choice(("none", "mean", "first"))
        self.head = nn.Linear(d, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        x = self.last(x)
        return self.head(x.mean(1) if self.pooled == "mean" else x[:, 0] if self.pooled == "first" else x)

    def kill(self, dead: Dead) -> None:
        """Channels of the stream die in all that write it, and in a layer norm, whose mean would revive them."""
        for block in self.blocks:
            block.kill(dead)
        channels = dead.draw("stream", self.hidden)
        if isinstance(self.start, nn.Embedding):
            self.start.weight.data[:, channels] = 0
        else:
            zero_rows(self.start, channels, False)
        for block in self.blocks:
            zero_rows(block.down if isinstance(block, Mlp) else block.o, channels, False)
        for norm in (*self.norms, self.last):
            if norm.kind == "layer":
                norm.weight.data[channels] = 0
                if dead.rng.random() < 0.5:
                    norm.bias.data[channels] = 0

    def inputs(self) -> Tensor:
        """[batch, tokens] ids, or [batch, tokens, 6]."""
        return torch.randint(0, self.vocabulary, (2, 5)) if self.vocabulary else torch.randn(2, 5, 6)


class Convs(nn.Module):
    """conv, BN, activation, perhaps depthwise or grouped, 1x1 with a residual or a concatenation, pooling, flatten, linear."""

    def __init__(self, rng: random.Random, dead: Dead, full: bool) -> None:
        super().__init__()
        left = (lambda name, size: size) if full else dead.left
        self.act, self.wide = ACTS[rng.choice(("relu", "silu", "hardswish", "gelu"))], rng.choice((6, 8))
        self.middle = rng.choice(("depthwise", "plain", "grouped", "none"))
        self.join = rng.choice(("residual", "cat", "none"))
        self.pad = rng.choice((0, 1))
        self.per = left("group.out", 3)
        self.width = 8
        a, b = left("a", self.width), left("b", self.wide)
        groups = left("groups", 4)
        if self.middle == "grouped":
            a = 2 * groups
        self.first, self.bn = nn.Conv2d(3, a, 3, padding=1, bias=rng.random() < 0.5), nn.BatchNorm2d(a)
        m = {"depthwise": a, "plain": b, "grouped": groups * self.per, "none": a}[self.middle]
        if self.middle != "none":
            self.mid = nn.Conv2d(a, m, 3, padding=self.pad, groups={"depthwise": a, "plain": 1, "grouped": groups}[self.middle])
        self.out = nn.Conv2d(m, m if self.join == "residual" and self.middle == "plain" else left("c", self.wide), 1)
        self.bn2 = nn.BatchNorm2d(self.out.out_channels)
        last = self.out.out_channels + (m if self.join == "cat" else 0)
        self.pool = rng.choice(("max", "avg"))
        self.head = nn.Linear(last * 4, 5)
        for bn in (self.bn, self.bn2):
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2)
            bn.weight.data.normal_()
            bn.bias.data.normal_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.first(x)))
        if self.middle != "none":
            x = self.act(self.mid(x))
        y = self.act(self.bn2(self.out(x)))
        y = x + y if self.join == "residual" and self.middle == "plain" else torch.cat([y, x], 1) if self.join == "cat" else y
        y = F.max_pool2d(y, 2) if self.pool == "max" else F.avg_pool2d(y, 2)
        return self.head(F.adaptive_avg_pool2d(y, 2).flatten(1))

    def kill(self, dead: Dead) -> None:
        """A channel dies where it is made, in the norm; only zeros pass padding, and depthwise filters make other constants of them."""
        self._kill_first(dead)
        b, c = dead.draw("b", self.wide) if self.middle == "plain" else [], dead.draw("c", self.wide)
        residual = self.join == "residual" and self.middle == "plain"
        if self.middle == "plain":
            zero_rows(self.mid, b, not residual and self.out.padding[0] == 0)
        if residual:
            self._norm_zero(self.bn2, b, True)
            return
        self._norm_zero(self.bn2, c, dead.rng.random() < 0.5)

    def _kill_first(self, dead: Dead) -> None:
        if self.middle == "grouped":
            groups, outs = dead.draw("groups", 4), dead.draw("group.out", 3)
            zero_rows(self.mid, [3 * g + i for g in groups for i in range(3)] + [3 * g + i for g in range(4) for i in outs], True)
            return
        gone = dead.draw("a", self.width)
        self._norm_zero(self.bn, gone, self.middle != "none" and self.pad == 1)
        if self.middle == "depthwise":
            zero_rows(self.mid, gone, True)

    def _norm_zero(self, bn: nn.BatchNorm2d, channels: list[int], shift: bool) -> None:
        bn.weight.data[channels] = 0
        if shift:
            bn.bias.data[channels] = 0

    def inputs(self) -> Tensor:
        """[batch, 3, 9, 9]"""
        return torch.randn(2, 3, 9, 9)


def network(seed: int) -> tuple[nn.Module, nn.Module, Tensor]:
    """(with dead slices, without, an input)."""
    kind = Convs if seed % 3 == 0 else Stream
    dead = Dead(random.Random(seed + 1))
    torch.manual_seed(seed)
    model = kind(random.Random(seed), dead, True).eval().requires_grad_(False)
    ideal = kind(random.Random(seed), dead, False).eval().requires_grad_(False)
    for norm in model.modules():
        if isinstance(norm, nn.LayerNorm | Norm):
            norm.weight.data.uniform_(0.5, 1.5)
    model.kill(dead)
    return model, ideal, model.inputs()
