"""What `Cached` captures: a decoder of transformers on a prompt, and on one token after it, with the tensors of its cache as outputs.

The model's own cache object is none of them: its masks would be as long as the first block's keys. Where the rows of a batch have other
lengths each attention is given the mask of its own block's keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsecc.errors import CaptureError
from sparsecc.ir.cache_ops import SHOWN


class Prompt(nn.Module):
    """model(prompt) -> logits of its last token, and the cache's tensors; with a mask [B, S], padding in front of tokens, also which keys
    of each block are tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, pixel_values: Tensor | None = None) -> tuple[Any, ...]:
        from transformers import DynamicCache

        given = {} if pixel_values is None else {"pixel_values": pixel_values}
        if attention_mask is not None:
            given |= {"attention_mask": attention_mask, "position_ids": (attention_mask.cumsum(-1) - 1).clamp_min(0)}
        cache: Any = DynamicCache()
        out = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **given)
        made = out.logits, [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]
        if attention_mask is None:
            return made
        real = attention_mask != 0
        return *made, [SHOWN(layer.keys, real) for layer in cache.layers]


class Token(nn.Module):
    """model(one token, its position, the cache's tensors) -> its logits, and the tensors with its own rows. `masks` bool[B, 1, 1, n_l + 1]:
    the keys of each block that the token sees, its own too; all of them without. With masks also which keys of each block are tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, keys: list[Tensor], values: list[Tensor], masks: list[Tensor] | None = None
    ) -> tuple[Any, ...]:
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
        with _masked(self.model, masks):
            out = self.model(input_ids=input_ids, position_ids=position_ids, attention_mask=seen, past_key_values=cache, use_cache=True)
        made = out.logits, [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]
        if masks is None:
            return made
        return *made, [SHOWN(layer.keys, mask[:, 0, 0]) for layer, mask in zip(cache.layers, masks, strict=True)]


@contextmanager
def _masked(model: nn.Module, masks: list[Tensor] | None) -> Iterator[None]:
    """While it lasts, each attention has the mask of its own layer. Raises CaptureError where a layer's attention takes none by name."""
    seen: set[int] = set()

    def replaced(module: Any, args: Any, kwargs: Any) -> Any:
        if masks is None or "attention_mask" not in kwargs:
            return None
        seen.add(module.layer_idx)
        return args, kwargs | {"attention_mask": masks[module.layer_idx]}

    with ExitStack() as stack:
        for module in model.modules() if masks is not None else ():
            if isinstance(getattr(module, "layer_idx", None), int):
                handle = module.register_forward_pre_hook(replaced, with_kwargs=True)
                stack.callback(handle.remove)
        yield
    if masks is not None and seen != set(range(len(masks))):
        raise CaptureError(f"{type(model).__name__}: its attention takes no attention_mask by name: give one prompt at a time")
