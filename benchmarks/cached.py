"""A part of `benchmarks.skipping`: a prompt and the tokens after it with KV caches of another length in each block, end to end.

Compared in turns: transformers' own code, the same two graphs (a prompt, a token) compiled densely, and with FTP, on SmolLM2-135M with a
real text. All give logits of the last token alone. `Eager` and `speed_ups` serve `benchmarks/core_matching.py` too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import sparsecc
from examples import models
from sparsecc.autotune.measure import Timing, interleaved
from sparsecc.methods.cached import Cached, State
from sparsecc.methods.cached_graphs import Prompt, Token

PREFILL, STEPS, SKIPPED = 1024, 32, 0.3


class Eager:
    """transformers' code, called as `Cached` calls what it compiled."""

    def __init__(self, model: Any) -> None:
        self.prompt, self.token = Prompt(model), Token(model)

    @torch.no_grad()
    def prefill(self, **inputs: Any) -> State:
        logits, keys, values = self.prompt(**inputs)
        return State(logits, keys, values, inputs["input_ids"].shape[1])

    @torch.no_grad()
    def step(self, token: Tensor, state: State) -> State:
        place = torch.full(token.shape, state.position)
        logits, keys, values = self.token(input_ids=token, position_ids=place, keys=state.keys, values=state.values)
        return State(logits, keys, values, state.position + 1)


def build(remainder: str = "inductor") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is compared, and a prompt."""
    model, how = models.smollm2(), {"autotune": "none", "remainder": remainder}
    text = models.smollm2_tokenizer()(" ".join(models.sentences(400)), return_tensors="pt")
    inputs = {"input_ids": text["input_ids"][:, :PREFILL]}
    rules = {"dense": None, "skipped": {"model.layers.*": sparsecc.ftp(SKIPPED)}}
    return {"torch": Eager(model), **{name: Cached(model, rule, inputs, **how) for name, rule in rules.items()}}, inputs


def measure(made: Mapping[str, Any], inputs: Mapping[str, Tensor], threads: int, seconds: float, rounds: int = 3) -> list[dict[str, Any]]:
    """A row: seconds of a prompt, of a token after it, and of a prompt with STEPS tokens, for each of which the caches grow."""
    states = {name: one.prefill(**inputs) for name, one in made.items()}
    token = states["dense"].logits.argmax(-1)

    def whole(one: Any) -> None:
        state = one.prefill(**inputs)
        for _ in range(STEPS - 1):
            state = one.step(state.logits.argmax(-1), state)

    times = [
        interleaved({name: lambda one=one: one.prefill(**inputs) for name, one in made.items()}, seconds, rounds),
        interleaved({name: lambda one=one, s=states[name]: one.step(token, s) for name, one in made.items()}, seconds / 2, 9),
        interleaved({name: lambda one=one: whole(one) for name, one in made.items()}, seconds, rounds),
    ]
    keys = sum(k.shape[2] for k in states["skipped"].keys) / sum(k.shape[2] for k in states["dense"].keys)
    prompt, after, both = (speed_ups(one, "skipped") for one in times)
    row = {"part": "cached", "model": "SmolLM2-135M", "skipped": SKIPPED, "tokens": PREFILL, "threads": threads, "steps": STEPS,
           "keys": keys, "prompt": prompt, "token": after, "whole": both}  # fmt: skip
    print(json.dumps(row), flush=True)
    return [row]


def speed_ups(times: Mapping[str, Timing], ours: str) -> dict[str, Any]:
    """Of one over the others: medians over rounds, and of the fastest ones."""
    mine, others = times[ours], [name for name in times if name != ours]
    return {
        "seconds": {n: t.median for n, t in times.items()}, "best": {n: t.best for n, t in times.items()},
        "speed_up": {n: times[n].ratio / mine.ratio for n in others}, "speed_up_best": {n: times[n].best / mine.best for n in others},
    }  # fmt: skip
