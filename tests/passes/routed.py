"""Blocks that skip tokens, by the definition: a masked dense model, routers with random weights, inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from examples.models import llama_stack


def llama(layers: int = 6, dtype: torch.dtype = torch.float32) -> Any:
    return llama_stack(64, 96, layers, heads=4, kv_heads=2, vocab=128).to(dtype)


def ftp_router(outputs: int = 1, bias: float = 0.0, seed: int = 1) -> dict[str, Tensor]:
    """Random weights under which some tokens of any place and rank go, some stay."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
    fc1, b1, fc2 = 4 * draw(64, 4), draw(64), draw(1, 64)
    places = torch.rand(2000, 4, generator=random) * torch.tensor([1.0, 0.03, 1.0, 0.9])
    y = torch.relu(places @ fc1.T + b1) @ fc2.T
    fc2 = fc2 / y.std()
    b2 = -(y / y.std()).quantile(0.4).view(1) + bias
    if outputs == 2:
        fc2, b2 = torch.cat([-fc2 / 2, fc2 / 2]), torch.cat([-b2 / 2, b2 / 2])
    return {"router.fc1.weight": fc1, "router.fc1.bias": b1, "router.fc2.weight": fc2, "router.fc2.bias": b2}


def batch(lengths: tuple[int, ...] = (97, 40, 1), left: bool = False, masked: bool = True) -> dict[str, Any]:
    S = max(lengths)
    ids = torch.randint(0, 128, (len(lengths), S), generator=torch.Generator().manual_seed(1))
    mask = torch.stack([torch.arange(S) < n for n in lengths]).long()
    mask = mask.flip(-1) if left else mask
    return {"input_ids": ids, "use_cache": False, **({"attention_mask": mask} if masked else {})}


class Oracle:
    """The model's own modules on all tokens; where a block skips some, they pass unchanged, and are no keys unless `keys` is "all"."""

    def __init__(self, model: Any, inputs: dict[str, Any], keys: str = "kept") -> None:
        self.model, self.ids, self.keys = model, inputs["input_ids"], keys
        self.B, self.S = self.ids.shape
        self.real = inputs.get("attention_mask", torch.ones_like(self.ids)).bool()
        self.causal = torch.ones(self.S, self.S, dtype=torch.bool).tril()[None, None] & self.real[:, None, None]

    def seen(self, kept: Tensor) -> Tensor:
        if self.keys == "all":
            return self.causal | torch.eye(self.S, dtype=torch.bool)
        return self.causal & kept[:, None, None] | torch.eye(self.S, dtype=torch.bool)

    def tables(self, x: Tensor, kept: Tensor, compact: bool) -> Any:
        """Rotary tables, [B, S, D]: of the place in the sequence, or among the kept tokens."""
        at = (kept.cumsum(-1) - 1).clamp_min(0) if compact else torch.arange(self.S).expand(self.B, -1)
        return self.model.model.rotary_emb(x, at)

    def block(self, layer: Any, x: Tensor, kept: Tensor, compact: bool = False, scale: str = "none", p: Tensor | None = None) -> Tensor:
        added = torch.zeros(self.B, 1, self.S, self.S, dtype=x.dtype).masked_fill(~self.seen(kept), -torch.inf)
        attended = layer.self_attn(layer.input_layernorm(x), attention_mask=added, position_embeddings=self.tables(x, kept, compact))[0]
        h = x + attended
        mlp = layer.mlp(layer.post_attention_layernorm(h))
        y = h + (mlp if scale != "mlp" else p[..., None] * mlp)
        y = x + p[..., None] * (y - x) if scale == "block" else y
        return torch.where(kept[..., None], y, x)

    def attention(self, layer: Any, x: Tensor, kept: Tensor) -> Tensor:
        """What the last real token pays each of the kept ones, by the definition: all rows of the attention, then one of them."""
        attn, h = layer.self_attn, layer.input_layernorm(x)
        q, k = (f(h).view(self.B, self.S, -1, attn.head_dim).transpose(1, 2) for f in (attn.q_proj, attn.k_proj))
        q, k = apply_rotary_pos_emb(q, k, *self.tables(x, kept, False))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        return self.row((q @ k.transpose(-1, -2) * attn.head_dim**-0.5), kept)

    def row(self, scores: Tensor, kept: Tensor) -> Tensor:
        full = scores.masked_fill(~self.seen(kept & self.real), -torch.inf).softmax(-1).mean(1)
        last = torch.stack([real.nonzero()[-1, 0] for real in self.real])
        return full[torch.arange(self.B), last]

    def finish(self, x: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(x))

    def ftp(
        self, router: dict[str, Tensor], schedule: list[float], threshold: float = 0.5, strict: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        x, keeps = self.model.model.embed_tokens(self.ids), []
        paid = self.row((x @ x.transpose(-1, -2) * x.shape[-1] ** -0.5)[:, None], self.real)
        for layer, skipped in zip(self.model.model.layers, schedule, strict=True):
            kept = torch.ones(self.B, self.S, dtype=torch.bool) if not skipped else self.decide(router, paid, skipped, threshold, strict)
            keeps.append(kept)
            new = self.attention(layer, x, kept)
            paid = torch.where(kept & self.real, new, paid)
            x = self.block(layer, x, kept)
        return self.finish(x), keeps

    def decide(self, router: dict[str, Tensor], paid: Tensor, skipped: float, threshold: float, strict: bool) -> Tensor:
        """Token by token."""
        kept = torch.zeros(self.B, self.S, dtype=torch.bool)
        for b in range(self.B):
            real = self.real[b].nonzero()[:, 0].tolist()
            order = sorted(real, key=lambda i: (-float(paid[b, i]), i))
            scores = {}
            for n, i in enumerate(real):
                seen = torch.tensor([n / len(real), float(paid[b, i]), order.index(i) / len(real), skipped])
                hidden = torch.relu(router["router.fc1.weight"] @ seen + router["router.fc1.bias"])
                y = router["router.fc2.weight"] @ hidden + router["router.fc2.bias"]
                scores[i] = float(y.sigmoid()[0] if len(y) == 1 else y.softmax(0)[1])
                if i in (real[0], real[-1]):
                    scores[i] = torch.inf
            if strict:
                count = -(-self.S * round((1 - skipped) * 1000) // 1000)
                ranked = sorted(range(self.S), key=lambda i: (-scores.get(i, -torch.inf), i))[:count]
                kept[b, ranked] = True
            else:
                kept[b, [i for i in real if scores[i] > threshold]] = True
        return kept


def depth_router(outputs: int = 2, layers: int = 0) -> Any:
    """A weight, or one for each of so many layers."""
    random = torch.Generator().manual_seed(2)
    weights = [torch.randn(outputs, 64, generator=random) / 3 for _ in range(max(1, layers))]
    return {f"model.layers.{i}.router.weight": w for i, w in enumerate(weights)} if layers else weights[0]


def depths(oracle: Oracle, routers: list[Tensor | None], policy: Any, **how: Any) -> tuple[Tensor, list[Tensor]]:
    """The oracle of mixture-of-depths: policy(p of the tokens that compete) says which of them stay."""
    x, keeps = oracle.model.model.embed_tokens(oracle.ids), []
    for layer, router in zip(oracle.model.model.layers, routers, strict=True):
        if router is None:
            x = oracle.block(layer, x, torch.ones_like(oracle.real))
            continue
        y = (x if how.get("stream") else layer.input_layernorm(x)) @ router.T
        p = y[..., 0].sigmoid() if len(router) == 1 else y.softmax(-1)[..., 1]
        first, end = how.get("span") or (0, oracle.S)
        kept = oracle.real.clone()
        for b in range(oracle.B):
            rivals = [i for i in range(first, min(end, oracle.S)) if oracle.real[b, i]]
            kept[b, rivals] = policy(p[b, rivals])
        keeps.append(kept)
        x = oracle.block(layer, x, kept, how.get("compact", True), how.get("scale", "mlp"), p)
    return oracle.finish(x), keeps


def knee(p: Tensor) -> float:
    s = sorted(p.double().tolist(), reverse=True)
    n = len(s)
    far = [abs((s[-1] - s[0]) * i - (n - 1) * (s[i] - s[0])) for i in range(n)]
    return s[far.index(max(far))]


def mass(p: Tensor, fraction: float) -> float:
    s, total = sorted(p.double().tolist(), reverse=True), 0.0
    for value in s:
        total += value
        if total >= fraction * sum(s):
            return value
    return s[-1]
