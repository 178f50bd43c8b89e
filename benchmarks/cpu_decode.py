"""A causal language model with its KV cache, as the benchmarks call it: one token on a full prompt, and greedy text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from examples import models

PROMPT = 64
NEW = 64
CALIBRATION = (8, 128)
"""Rows and tokens of text that Wanda's statistics are taken on."""


class Decoder:
    """A prompt of PROMPT tokens of real text. `bind` gives one decode step, `check` compares NEW greedy tokens."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokens = model, f"1 after {PROMPT}"
        text = tokenizer(" ".join(models.sentences(400)), return_tensors="pt")["input_ids"]
        self._prompt, self._text = text[:, :PROMPT], text[:, PROMPT:]

    def calibration(self) -> list[dict[str, Any]]:
        """Text that is not in the prompt."""
        rows, length = CALIBRATION
        return [{"input_ids": self._text[:, i * length : (i + 1) * length], "use_cache": False} for i in range(rows)]

    def bind(self, call: Callable[..., Any], eager: Any) -> Callable[[], Tensor]:
        """One token's logits [1, 1, vocabulary]. Every call starts from the same cache, filled by the eager model."""
        cache: Any = DynamicCache(config=self.model.config)
        token = eager(input_ids=self._prompt, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        full = [(layer.keys, layer.values) for layer in cache.layers]

        def step() -> Tensor:
            for layer, (keys, values) in zip(cache.layers, full, strict=True):
                layer.keys, layer.values = keys, values
            return call(input_ids=token, past_key_values=cache, use_cache=True).logits

        return step

    def first(self, compiled: Callable[..., Any]) -> None:
        """What a user waits for: the prompt and a token, which are two programs."""
        self.greedy(compiled, 2)

    def check(self, compiled: Callable[..., Any], quick: bool) -> dict[str, Any]:
        """Whether the greedy tokens are those of the dense model, and how many of them differ from each other."""
        count = 8 if quick else NEW
        ours, theirs = self.greedy(compiled, count), self.greedy(self.model, count)
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), count)
        return {"greedy": {"tokens": count, "same": same, "distinct": len(set(theirs))}}

    def greedy(self, call: Callable[..., Any], count: int) -> list[int]:
        """`count` tokens after the prompt, each the most likely."""
        cache, ids = DynamicCache(config=self.model.config), self._prompt
        found: list[int] = []
        for _ in range(count):
            ids = call(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            found.append(int(ids))
        return found
