"""A part of `benchmarks.skipping`: a prompt and the tokens after it with KV caches of another length in each block, end to end.

Compared in turns on the same two graphs (a prompt, a token): torch.compile, sparsecc without a rule, and with one: FTP on SmolLM2-135M with
a real text, CoreMatching on a LLaVA-style stack of random weights with planted core tokens. All give logits of the last token alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import sparsecc
from benchmarks.core_matching import LAYER, SHAPE, TEXT
from examples import models
from examples.core_matching import llava, vlm_inputs
from sparsecc.autotune.measure import Timing, interleaved
from sparsecc.methods.cached import Cached
from sparsecc.methods.cached_graphs import Prompt, Token
from sparsecc.methods.core_matching import CoreMatching

PREFILL, STEPS = 1024, 64
KINDS = ("ftp", "core")


class Inductor(Cached):
    """The same two graphs under torch.compile."""

    def _prompt(self, given: Mapping[str, Tensor]) -> Any:
        return self.prompts.setdefault(False, _compiled(Prompt(self.model)))

    def _token(self, given: Mapping[str, Any]) -> Any:
        return self.tokens.setdefault(False, _compiled(Token(self.model)))


def _compiled(module: nn.Module) -> Any:
    made: Any = torch.compile(module, dynamic=True)

    def call(**given: Any) -> Any:
        with torch.no_grad():
            return made(**given)

    return call


def build(kind: str, remainder: str = "inductor") -> tuple[dict[str, Cached], dict[str, Tensor], dict[str, Any]]:
    """What is compared, a prompt, and what a row says of them."""
    how: dict[str, Any] = {"autotune": "none", "remainder": remainder}
    if kind == "ftp":
        model, skipped = models.smollm2(), 0.3
        text = models.smollm2_tokenizer()(" ".join(models.sentences(400)), return_tensors="pt")
        inputs = {"input_ids": text["input_ids"][:, :PREFILL]}
        ours = Cached(model, {"model.layers.*": sparsecc.ftp(skipped)}, inputs, **how)
        same: dict[str, Any] = {"model": "SmolLM2-135M", "skipped": skipped}
    else:
        model = llava(**SHAPE)
        inputs = vlm_inputs(model, TEXT)
        ours = CoreMatching(model, sparsecc.core_matching(rho=0.2, beta=0.4, layer=LAYER), inputs, **how)
        same = {"model": f"llava {SHAPE['hidden']}/{SHAPE['ffn']} x {SHAPE['layers']}"}
    made = {"torch_compile": Inductor(model, None, inputs), "dense": Cached(model, None, inputs, **how), "skipped": ours}
    return made, inputs, {"part": "cached", "kind": kind, **same, "tokens": inputs["input_ids"].shape[1], "remainder": remainder}


def measure(
    made: Mapping[str, Cached], inputs: Mapping[str, Tensor], same: Mapping[str, Any], threads: int, seconds: float, steps: int = STEPS,
    rounds: int = 3,
) -> list[dict[str, Any]]:
    """A row: seconds of a prompt, of a token after it, and of a prompt with `steps` tokens, for each of which the caches grow."""
    states = {name: one.prefill(**inputs) for name, one in made.items()}
    token = next(iter(states.values())).logits.argmax(-1)
    whole = interleaved({name: lambda one=one: one.generate(steps, **inputs) for name, one in made.items()}, seconds, rounds)
    prompt = interleaved({name: lambda one=one: one.prefill(**inputs) for name, one in made.items()}, seconds / 2, rounds)
    after = interleaved({name: lambda one=one, s=states[name]: one.step(token, s) for name, one in made.items()}, seconds / 4, 9)
    keys = sum(k.shape[2] for k in states["skipped"].keys) / sum(k.shape[2] for k in states["dense"].keys)
    row = {**same, "threads": threads, "steps": steps, "keys": keys,
           "prompt": _times(prompt), "token": _times(after), "whole": _times(whole)}  # fmt: skip
    print(json.dumps(row), flush=True)
    return [row]


def _times(times: Mapping[str, Timing]) -> dict[str, Any]:
    """Speed-ups of what skips over the others: medians over rounds, and of the fastest ones."""
    ours, others = times["skipped"], [name for name in times if name != "skipped"]
    return {
        "seconds": {n: t.median for n, t in times.items()}, "best": {n: t.best for n, t in times.items()},
        "speed_up": {n: times[n].ratio / ours.ratio for n in others}, "speed_up_best": {n: times[n].best / ours.best for n in others},
    }  # fmt: skip
