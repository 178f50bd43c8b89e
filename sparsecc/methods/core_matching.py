"""CoreMatching end to end (Wang et al., ICML 2025): prefill and decode of a decoder, or a vision-language model, with a cache of its own.

    core = CoreMatching(model, sparsecc.core_matching(rho=0.2, beta=0.4, layer=2), {"input_ids": ids, "pixel_values": picture})
    state = core.prefill(input_ids=ids, pixel_values=picture)      # chooses core neurons and core tokens
    state = core.step(state.logits.argmax(-1), state)              # one token: core neurons alone, on the kept tokens' keys
    tokens = core.generate(32, input_ids=ids, pixel_values=picture)

Blocks up to the cut keep keys of all M tokens, those behind it of the kept ones; positions go on from M. The model is one of transformers
with a DynamicCache; each of the two calls is one captured graph, whose outputs are the logits of the last token and the cache's tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from sparsecc.compile import compile
from sparsecc.cores import Cores
from sparsecc.errors import SelectionError, SpecError
from sparsecc.runtime.module import CompiledModule


@dataclass(frozen=True)
class State:
    """After a prompt or a token: logits f32[1, 1, V] of the last one, keys and values [1, H, n_l, D] of each block l, and the position that
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


class CoreMatching:
    """A model whose prompts and tokens run by a `core_matching` rule; `rule=None` runs the same two graphs densely.

    example_inputs: of a prompt: input_ids i64[1, M], M >= 2, for a vision-language model with pixel_values; later prompts may be of another
    length. Other options are those of `compile`. `prompt` and `token` are the compiled modules, for `explain()`. Raises SpecError,
    CaptureError.
    """

    def __init__(
        self, model: nn.Module, rule: Cores | None, example_inputs: Mapping[str, Tensor], target: str = "cpu", glob: str = "*",
        **options: Any,
    ) -> None:
        _require_whole_attention(model)
        if rule is not None and rule.positions != "original":
            raise SpecError("CoreMatching: tokens after a prompt go on from its length; compact positions are for prompts without a cache")
        sparsity: Any = None if rule is None else {glob: rule}
        inputs = _checked(example_inputs)
        shapes: Any = {name: {1: Dim.AUTO} if name == "input_ids" else None for name in inputs}
        self.rule = rule
        self.prompt: CompiledModule = compile(Prompt(model), target, sparsity, inputs, shapes, **options)
        state = self.prefill(**inputs)
        past: Any = [{2: Dim.AUTO} for _ in state.keys]
        shapes = {"input_ids": None, "position_ids": None, "keys": past, "values": past}
        first = self._inputs(state.logits.argmax(-1), state)
        self.token: CompiledModule = compile(Token(model), target, sparsity, first, shapes, **options)

    def prefill(self, **inputs: Tensor) -> State:
        """The prompt. Raises SelectionError for a batch, a prompt of one token, one without image tokens, and NaN activations."""
        given = _checked(inputs)
        logits, keys, values = self.prompt(**given)
        keys, values = ([t.contiguous() for t in part] for part in (keys, values))  # as later ones lie, which one graph is made for
        return State(logits, keys, values, given["input_ids"].shape[1])

    def step(self, token: Tensor, state: State) -> State:
        """One more token i64[1, 1] after a state of the latest prompt."""
        logits, keys, values = self.token(**self._inputs(token, state))
        return State(logits, list(keys), list(values), state.position + 1)

    def generate(self, count: int, **inputs: Tensor) -> Tensor:
        """The next `count` tokens i64[1, count], each the most likely one."""
        state = self.prefill(**inputs)
        tokens = [state.logits.argmax(-1)]
        while len(tokens) < count:
            state = self.step(tokens[-1], state)
            tokens.append(state.logits.argmax(-1))
        return torch.cat(tokens, 1)

    @staticmethod
    def _inputs(token: Tensor, state: State) -> dict[str, Any]:
        place = torch.full((1, 1), state.position, dtype=torch.long, device=token.device)
        return {"input_ids": token, "position_ids": place, "keys": state.keys, "values": state.values}


def _checked(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A prompt's inputs. Raises SpecError for others than those that graphs take, SelectionError for a shape that nothing can leave."""
    if unknown := set(inputs) - {"input_ids", "pixel_values"}:
        names = ", ".join(sorted(unknown))
        raise SpecError(f"CoreMatching takes input_ids and pixel_values, not {names}: prompts come one at a time, unpadded")
    ids = inputs.get("input_ids")
    if ids is None or ids.ndim != 2:
        raise SpecError("CoreMatching needs input_ids [1, M]")
    if ids.shape[0] != 1:
        raise SelectionError(f"input_ids is a batch of {ids.shape[0]} prompts, of which each keeps another number: give one at a time")
    if ids.shape[1] < 2:
        raise SelectionError("input_ids is a prompt of one token, of which none can leave: give the whole prompt")
    return dict(inputs)


def _require_whole_attention(model: nn.Module) -> None:
    """Raises SpecError for models whose blocks see a window of the latest tokens: kept tokens have other distances."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = getattr(text, "layer_types", None) or ()
    if any("full" not in kind for kind in kinds) or (not kinds and getattr(text, "sliding_window", None)):
        raise SpecError(f"CoreMatching: {type(model).__name__} attends within a sliding window, which kept tokens alone do not have")
