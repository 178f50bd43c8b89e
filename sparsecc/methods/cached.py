"""Decoders whose blocks keep keys of different tokens: prefill and decode with a KV cache of its own length in each block.

    decoder = Cached(model, {"layers.*": sparsecc.ftp(0.3)}, {"input_ids": ids})
    state = decoder.prefill(input_ids=ids)                     # blocks skip tokens, and keep no keys of those that they skip
    state = decoder.step(state.logits.argmax(-1), state)       # one token, through every block, on the keys that it has
    tokens = decoder.generate(32, input_ids=ids)

FTP, mixture-of-depths and CoreMatching (`core_matching.py`) run so. A prompt and a token are a captured graph each, whose outputs are the
logits of the last token and the tensors of the cache. The model's own cache object is none of them: its masks would be as long as the first
block's keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from sparsecc.compile import compile
from sparsecc.errors import SelectionError, SpecError
from sparsecc.runtime.module import CompiledModule
from sparsecc.skipping import Tokens

INPUTS = ("input_ids", "pixel_values")
"""What a prompt may have."""


@dataclass(frozen=True)
class State:
    """After a prompt or a token: logits f32[B, 1, V] of the last one, keys and values [B, H, n_l, D] of each block l, and the position that
    comes next."""

    logits: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    position: int


class Prompt(nn.Module):
    """model(prompt) -> logits of its last token, and the cache's tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        from transformers import DynamicCache

        pictures = {} if pixel_values is None else {"pixel_values": pixel_values}
        cache: Any = DynamicCache()
        out = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **pictures)
        return out.logits, [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]


class Token(nn.Module):
    """model(one token, its position, the cache's tensors) -> its logits, and the tensors with its own rows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        cache: Any = DynamicCache()
        for key, value in zip(keys, values, strict=True):
            layer = DynamicLayer()
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value
            cache.layers.append(layer)
        # A mask of the usual form would be as long as the first block's keys; this one lets the token see whatever a block has.
        seen = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
        out = self.model(input_ids=input_ids, position_ids=position_ids, attention_mask=seen, past_key_values=cache, use_cache=True)
        return out.logits, [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]


class Cached:
    """A decoder of transformers that attends to the whole prompt, compiled for prompts and for single tokens after them.

    sparsity: a dict as `compile` takes it. example_inputs: of a prompt: input_ids i64[B, S], S >= 2, for a vision-language model with
    pixel_values; later prompts may be of another length. Prompts are not padded; where the number of tokens that a block keeps depends on
    their scores, they come one at a time. Other options are those of `compile`. `prompt` and `token` are the compiled modules, for
    `explain()`. Raises SpecError, SelectionError, CaptureError.
    """

    def __init__(
        self, model: nn.Module, sparsity: Mapping[str, Any] | None, example_inputs: Mapping[str, Tensor], target: str = "cpu",
        **options: Any,
    ) -> None:
        _require_whole_attention(model)
        rules = None if sparsity is None else {glob: cached(rule) for glob, rule in sparsity.items()}
        inputs = self._checked(example_inputs)
        shapes: Any = {name: {1: Dim.AUTO} if name == "input_ids" else None for name in inputs}
        self.prompt: CompiledModule = compile(Prompt(model), target, rules, inputs, shapes, **options)
        state = self.prefill(**inputs)
        past: Any = [{2: Dim.AUTO} for _ in state.keys]
        shapes = {"input_ids": None, "position_ids": None, "keys": past, "values": past}
        # Captured at its first call: blocks with one key, or none, have a graph of their own.
        self.token: CompiledModule = compile(Token(model), target, rules, None, shapes, **options)
        self.step(state.logits.argmax(-1), state)

    def prefill(self, **inputs: Tensor) -> State:
        """The prompt. Raises SelectionError for one of a single token, NaN scores, and a batch of which each prompt keeps other tokens."""
        given = self._checked(inputs)
        logits, keys, values = self.prompt(**given)
        keys, values = ([t.contiguous() for t in part] for part in (keys, values))  # as later ones lie, which one graph is made for
        return State(logits, keys, values, given["input_ids"].shape[1])

    def step(self, token: Tensor, state: State) -> State:
        """One more token i64[B, 1] after a state of the latest prompt."""
        place = torch.full(token.shape, state.position, dtype=torch.long, device=token.device)
        logits, keys, values = self.token(input_ids=token, position_ids=place, keys=state.keys, values=state.values)
        return State(logits, list(keys), list(values), state.position + 1)

    def generate(self, count: int, **inputs: Tensor) -> Tensor:
        """The next `count` tokens i64[B, count], each the most likely one."""
        state = self.prefill(**inputs)
        tokens = [state.logits.argmax(-1)]
        while len(tokens) < count:
            state = self.step(tokens[-1], state)
            tokens.append(state.logits.argmax(-1))
        return torch.cat(tokens, 1)

    def _checked(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A prompt's inputs. Raises SpecError for others than those that graphs take, SelectionError for a shape that nothing can leave."""
        name = type(self).__name__
        if unknown := set(inputs) - set(INPUTS):
            raise SpecError(f"{name} takes {' and '.join(INPUTS)}, not {', '.join(sorted(unknown))}: prompts come unpadded")
        ids = inputs.get("input_ids")
        if ids is None or ids.ndim != 2:
            raise SpecError(f"{name} needs input_ids [B, S]")
        if ids.shape[1] < 2:
            raise SelectionError("input_ids is a prompt of one token, of which none can leave: give the whole prompt")
        return dict(inputs)


def cached(rule: Any) -> Any:
    """The rule for graphs whose keys and values are outputs."""
    return replace(rule, cached=True) if isinstance(rule, Tokens) else rule


def _require_whole_attention(model: nn.Module) -> None:
    """Raises SpecError for models whose blocks see a window of the latest tokens: kept tokens have other distances."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = getattr(text, "layer_types", None) or ()
    if any("full" not in kind for kind in kinds) or (not kinds and getattr(text, "sliding_window", None)):
        raise SpecError(f"{type(model).__name__} attends within a sliding window, which kept tokens alone do not have")
