"""Parts of `benchmarks.skipping`: a learned router in front of blocks, and merging tokens, against what they save."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import sparsecc
from examples import models
from sparsecc.autotune.measure import interleaved
from sparsecc.codegen.tvm.backend import TvmBackend
from sparsecc.ir.ops import KERNELS
from sparsecc.ir.route_ops import KEEP, RECEIVED, ROUTE, SCATTER_KEPT
from sparsecc.runtime.routing import KeepKernel, ReceivedKernel, RouteKernel

LAYERS, TOKENS = 4, 1024
IMAGES = (2, 8)


def router(skipped: float) -> dict[str, Tensor]:
    """FTP's router with weights that keep the tokens behind the first `skipped` of a sequence: as many as the static one, judged one by
    one."""
    fc1, fc2 = torch.zeros(64, 4), torch.zeros(1, 64)
    fc1[0, 0], fc2[0, 0] = 1.0, 50.0
    return {
        "router.fc1.weight": fc1, "router.fc1.bias": torch.zeros(64),
        "router.fc2.weight": fc2, "router.fc2.bias": torch.tensor([-50.0 * skipped]),
    }  # fmt: skip


def learned(threads: int, seconds: float, skipped: float = 0.3) -> list[dict[str, Any]]:
    """SmolLM2's layers with random weights, run whole, with the static router, and with learned ones that keep the same tokens. What it
    takes to score and choose them, as a part of what skipping saves: `of_saved` timed by itself, with caches that hold nothing of it,
    `in_place` what the model takes more than with the static router."""
    times = interleaved({**_llamas(skipped), "selection": _selection(skipped)}, seconds, 9)
    saved = (times["dense"].median - times["static"].median) / LAYERS
    rows = [{
        "part": "router", "model": f"SmolLM2 x {LAYERS}", "tokens": TOKENS, "skipped": skipped, "threads": threads, "policy": name,
        "seconds": times[name].median, "best": times[name].best, "speed_up": times["dense"].median / times[name].median,
        "speed_up_best": times["dense"].best / times[name].best, "selection": times["selection"].median,
        "of_saved": times["selection"].median / saved, "in_place": (times[name].median - times["static"].median) / LAYERS / saved,
    } for name in ("static", "threshold", "strict")]  # fmt: skip
    print(json.dumps(rows), flush=True)
    return rows


def merging(threads: int, seconds: float, ratio: float = 0.9) -> list[dict[str, Any]]:
    """ViT-B/16 with random weights, whole and with tokens merged. `ideal`: the floating-point operations that are left out."""
    config, rule, made = _encoders(ratio)
    rows = []
    for images in IMAGES:
        pixels = torch.randn(images, 3, 224, 224)
        times = interleaved({name: lambda one=one, pixels=pixels: one(pixels) for name, one in made.items()}, seconds, 7)
        gain, ideal = times["dense"].median / times["merged"].median, _ideal(config, rule)
        rows.append({
            "part": "merge", "model": "ViT-B/16", "images": images, "ratio": ratio, "threads": threads,
            "seconds": {n: times[n].median for n in made}, "best": {n: times[n].best for n in made}, "speed_up": gain,
            "speed_up_best": times["dense"].best / times["merged"].best, "ideal": ideal, "of_ideal": gain / ideal,
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


@lru_cache
def _llamas(skipped: float) -> dict[str, Callable[[], Any]]:
    model = models.llama_stack(576, 1536, LAYERS, heads=9, kv_heads=3, vocab=256)
    inputs = {"input_ids": torch.randint(0, 256, (1, TOKENS)), "use_cache": False, "logits_to_keep": 1}
    specs: dict[str, Any] = {
        "dense": None, "static": sparsecc.ftp(skipped), "threshold": sparsecc.ftp(skipped, router(skipped)),
        "strict": sparsecc.ftp(skipped, router(skipped), policy="schedule"),
    }  # fmt: skip
    calls = {}
    for name, spec in specs.items():
        made = sparsecc.compile(model, sparsity=spec and {"layers.*": spec}, example_inputs=inputs, autotune="none")
        calls[name] = lambda made=made: made(**inputs)
    return calls


def _selection(skipped: float) -> Callable[[], Any]:
    """What one block's learned router computes."""
    q, k = (torch.randn(1, TOKENS, heads, 64).transpose(1, 2) for heads in (9, 3))
    weights, before, policy, backend = list(router(skipped).values()), torch.rand(1, TOKENS), "threshold(0.5)", TvmBackend.of()
    KERNELS.update(received=ReceivedKernel(backend), route=RouteKernel(backend), keep=KeepKernel(backend, policy))

    def run() -> Any:
        idx, _ = KEEP(ROUTE(before, None, skipped, weights, "route"), policy, "", "keep")
        return SCATTER_KEPT(before, idx, RECEIVED(q, k, None, None, None, "received")[:, : idx.shape[1]])

    return run


@lru_cache
def _encoders(ratio: float) -> tuple[Any, Any, dict[str, Any]]:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig()
    config._attn_implementation = "sdpa"
    model = ViTModel(config, add_pooling_layer=False).eval().requires_grad_(False)
    rule = sparsecc.merge(ratio)
    pixels = torch.randn(2, 3, 224, 224)
    specs = {"dense": None, "merged": {"layers.*": rule}}
    how: dict[str, Any] = {"autotune": "none", "remainder": "eager"}
    return config, rule, {name: sparsecc.compile(model, sparsity=s, example_inputs=pixels, **how) for name, s in specs.items()}


def _ideal(config: Any, rule: Any) -> float:
    tokens, D, width = (config.image_size // config.patch_size) ** 2 + 1, config.hidden_size, config.intermediate_size
    left, whole, some = tokens, 0, 0
    for layer in range(config.num_hidden_layers):
        attention = lambda n: 8 * n * D * D + 4 * n * n * D  # noqa: E731
        whole += attention(tokens) + 4 * tokens * D * width
        some += attention(left)
        left -= rule.merged(left, layer, config.num_hidden_layers)
        some += 4 * left * D * width
    return whole / some
