"""Decoders whose blocks keep keys of different tokens: prefill and decode with a KV cache of its own length in each block.

    decoder = Cached(model, {"layers.*": sparsecc.ftp(0.3)}, {"input_ids": ids})
    state = decoder.prefill(input_ids=ids)                     # blocks skip tokens, and keep no keys of those that they skip
    state = decoder.step(state.logits.argmax(-1), state)       # one token, through every block, on the keys that it has
    tokens = decoder.generate(32, input_ids=ids)

FTP, mixture-of-depths and CoreMatching (`core_matching.py`) run so. A prompt and a token are a captured graph each (`cached_graphs.py`),
whose outputs are the logits of the last token and the tensors of the cache. Prompts of different lengths, and those of which blocks keep
different numbers of tokens, have graphs of their own, in which each block has a mask of its keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from sparsecc.compile import compile
from sparsecc.cores import Cores
from sparsecc.errors import SelectionError, SpecError
from sparsecc.methods.cached_graphs import Prompt, Token
from sparsecc.runtime.module import CompiledModule
from sparsecc.skipping import Neurons, Tokens

INPUTS = ("input_ids", "attention_mask", "pixel_values")
"""What a prompt may have."""


@dataclass(frozen=True)
class State:
    """After a prompt or a token: logits f32[B, 1, V] of the last one, keys and values [B, H, n_l, D] of each block l, and the position that
    comes next.

    Of rows that differ: shown bool[B, n_l], which of a block's keys are tokens of the row, and missing i64[B, 1], by how many tokens the
    row is shorter than the longest one, whose position is `position`."""

    logits: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    position: int
    shown: list[Tensor] | None = None
    missing: Tensor | None = None

    @property
    def lengths(self) -> list[Tensor]:
        """i64[B] of each block: how many keys each row has."""
        if self.shown is not None:
            return [one.sum(-1) for one in self.shown]
        return [torch.full((len(one),), one.shape[2]) for one in self.keys]


class Cached:
    """A decoder of transformers that attends to the whole prompt, compiled for prompts and for single tokens after them.

    sparsity: a dict as `compile` takes it. example_inputs: of a prompt: input_ids i64[B, S], S >= 2, attention_mask [B, S] for prompts of
    different lengths (padding may stand anywhere), for a vision-language model with pixel_values. Later prompts may be of another length.
    Every row keeps the tokens that it would keep alone. Other options are those of `compile`. `prompt` and `token` are the compiled
    modules, for `explain()`. Raises SpecError, SelectionError, CaptureError.
    """

    def __init__(
        self, model: nn.Module, sparsity: Mapping[str, Any] | None, example_inputs: Mapping[str, Tensor], target: str = "cpu",
        **options: Any,
    ) -> None:
        _require_whole_attention(model)
        self.model, self.target, self.options = model, target, options
        self.rules = None if sparsity is None else {glob: cached(rule) for glob, rule in sparsity.items()}
        self.prompts: dict[bool, CompiledModule] = {}
        self.tokens: dict[bool, CompiledModule] = {}
        """By whether rows differ."""
        state = self.prefill(**example_inputs)
        self.step(state.logits.argmax(-1), state)
        self.prompt, self.token = (found[state.shown is not None] for found in (self.prompts, self.tokens))

    def prefill(self, **inputs: Tensor) -> State:
        """The prompt. Raises SelectionError for one of a single token, NaN scores, and a mask that shows no token of a row."""
        given = self._checked(inputs)
        mask = given.get("attention_mask")
        logits, keys, values, *shown = self._prompt(given)(**given)
        keys, values = ([t.contiguous() for t in part] for part in (keys, values))  # as later ones lie, which one graph is made for
        length = given["input_ids"].shape[1]
        if mask is None:
            return State(logits, keys, values, length)
        for i, one in enumerate(shown := list(shown[0])):  # of no key, or one, there would be a graph for each block that has so few
            if (none := 2 - one.shape[1]) > 0:
                keys[i], values[i] = (F.pad(part[i], (0, 0, none, 0)) for part in (keys, values))
                shown[i] = F.pad(one, (none, 0))
        return State(logits, keys, values, length, shown, length - mask.sum(-1, keepdim=True))

    def step(self, token: Tensor, state: State) -> State:
        """One more token i64[B, 1] after a state of the latest prompt."""
        place = torch.full(token.shape, state.position, dtype=torch.long, device=token.device)
        given: dict[str, Any] = {"input_ids": token, "position_ids": place, "keys": state.keys, "values": state.values}
        if state.shown is not None and state.missing is not None:
            own = torch.ones_like(token, dtype=torch.bool)
            masks = [torch.cat([one, own], 1)[:, None, None] for one in state.shown]
            given |= {"position_ids": place - state.missing, "masks": masks}
        logits, keys, values, *shown = self._token(given)(**given)
        return State(logits, list(keys), list(values), state.position + 1, *map(list, shown), missing=state.missing)

    def generate(self, count: int, **inputs: Tensor) -> Tensor:
        """The next `count` tokens i64[B, count], each the most likely one."""
        state = self.prefill(**inputs)
        tokens = [state.logits.argmax(-1)]
        while len(tokens) < count:
            state = self.step(tokens[-1], state)
            tokens.append(state.logits.argmax(-1))
        return torch.cat(tokens, 1)

    def _prompt(self, given: Mapping[str, Tensor]) -> CompiledModule:
        """The graph for prompts like this one."""
        differ = "attention_mask" in given
        if differ not in self.prompts:
            shapes: Any = {name: {1: Dim.AUTO} if value.ndim == 2 else None for name, value in given.items()}
            self.prompts[differ] = compile(Prompt(self.model), self.target, self.rules, given, shapes, **self.options)
        return self.prompts[differ]

    def _token(self, given: Mapping[str, Any]) -> CompiledModule:
        """The graph for tokens like this one, captured at its first call: blocks with one key, or none, have a graph of their own."""
        differ = "masks" in given
        if differ not in self.tokens:
            lists = {"keys": 2, "values": 2, "masks": 3}  # the dimension that grows
            shapes: Any = {name: [{lists[name]: Dim.AUTO} for _ in value] if name in lists else None for name, value in given.items()}
            self.tokens[differ] = compile(Token(self.model), self.target, self.rules, None, shapes, **self.options)
        return self.tokens[differ]

    def _checked(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A prompt's inputs, padding in front; a mask only where rows differ, or may have different numbers of keys. Raises SpecError for
        others than those that graphs take, SelectionError for a shape that nothing can leave."""
        name = type(self).__name__
        if unknown := set(inputs) - set(INPUTS):
            raise SpecError(f"{name} takes {', '.join(INPUTS)}, not {', '.join(sorted(unknown))}")
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if ids is None or ids.ndim != 2:
            raise SpecError(f"{name} needs input_ids [B, S]")
        given = dict(inputs) | ({} if mask is None else _padded_in_front(ids, mask))
        given = {key: value for key, value in given.items() if value is not None}
        B, S = given["input_ids"].shape
        if S < 2:
            raise SelectionError("input_ids is a prompt of one token, of which none can leave: give the whole prompt")
        mask, rules = given.get("attention_mask"), (self.rules or {}).values()
        if mask is not None and (chosen := next((r for r in rules if isinstance(r, Cores) or (isinstance(r, Neurons) and r.score)), None)):
            raise SelectionError(f"attention_mask: padding would choose neurons for {chosen}: give prompts of one length, or one at a time")
        tokens = [rule for rule in rules if isinstance(rule, Tokens)]
        if mask is None and any(rule.decode == "routed" or (B > 1 and rule.by_scores) for rule in tokens):
            given["attention_mask"] = torch.ones_like(given["input_ids"])
        return given


def _padded_in_front(ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """input_ids and attention_mask i64[B, S] with each row's tokens last, in order, and no column of padding alone; no mask where nothing
    else is left. Raises SpecError for a mask of another shape, SelectionError for a row without tokens."""
    if mask.shape != ids.shape:
        raise SpecError(f"attention_mask is {list(mask.shape)}, wanted {list(ids.shape)}: 1 for each token, 0 for padding")
    real = mask != 0
    lengths = real.sum(-1)
    if bool((lengths == 0).any()):
        raise SelectionError(f"attention_mask shows no token of row {int((lengths == 0).nonzero()[0])}")
    order = real.to(torch.uint8).sort(dim=-1, stable=True).indices[:, ids.shape[1] - int(lengths.max()) :]
    alike = bool((lengths == lengths[0]).all())
    return {"input_ids": ids.gather(1, order), "attention_mask": None if alike else real.gather(1, order).long()}


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
