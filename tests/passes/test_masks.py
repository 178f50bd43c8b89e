"""masks: what the arithmetic of an attention's mask proves, and what it doesn't."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

import sparsecc
from examples.models import llama_stack
from sparsecc.capture import capture
from sparsecc.ir.program import Program
from sparsecc.passes import PIPELINE
from sparsecc.passes.attention import SDPA, is_causal, mask_of
from sparsecc.passes.context import Context
from sparsecc.passes.manager import run_passes


class Masked(nn.Module):
    """Attention of [B, S, 8] with a mask of S."""

    def __init__(self, mask: Callable[[int, Tensor], Tensor]) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads, self.mask(x.shape[1], x))


def places(S: int) -> tuple[Tensor, Tensor]:
    return torch.arange(S)[:, None], torch.arange(S)[None, :]


def packed(S: int, x: Tensor) -> Tensor:
    """As transformers makes it: causal, within one sequence of a row."""
    position = torch.arange(S).unsqueeze(0)
    sequence = (torch.diff(position, prepend=position[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    rows, columns = (torch.arange(S) + 0)[None, None, :, None], (torch.arange(S) + 0)[None, None, None, :]
    first = torch.arange(1)[:, None, None, None]
    same = sequence[first, rows] == sequence[first, columns]
    return (x.new_ones((), dtype=torch.bool) & same & (columns <= rows)).expand(x.shape[0], -1, S, S)


def after(program: Program) -> list[Any]:
    """Of every attention, whether it is causal and whether it has a mask."""
    found = run_passes(program, PIPELINE, Context(), stop_after="masks").program
    return [(is_causal(node), mask_of(node) is not None) for node in found.graph.nodes if node.target is SDPA]


CAUSAL, ALL, KEPT = (True, False), (False, False), (False, True)
CASES: dict[str, tuple[Callable[[int, Tensor], Tensor], tuple[bool, bool]]] = {
    "le": (lambda S, x: places(S)[1] <= places(S)[0], CAUSAL),
    "gt": (lambda S, x: places(S)[0] + 1 > places(S)[1], CAUSAL),
    "packed": (packed, CAUSAL),
    "everything": (lambda S, x: places(S)[1] - places(S)[0] < S, ALL),
    "the other way": (lambda S, x: places(S)[1] >= places(S)[0], KEPT),
    "the next one, too": (lambda S, x: places(S)[1] <= places(S)[0] + 1, KEPT),
    "a window": (lambda S, x: (places(S)[1] <= places(S)[0]) & (places(S)[0] - places(S)[1] < 4), KEPT),
    "a prefix": (lambda S, x: (places(S)[1] <= places(S)[0]) | (places(S)[1] < 3), KEPT),
    "every other": (lambda S, x: 2 * places(S)[1] <= places(S)[0], KEPT),
    "of the input": (lambda S, x: (places(S)[1] <= places(S)[0]) & (x[:, None, None, :, 0] > -9), KEPT),
    "counted from the end": (lambda S, x: torch.arange(S)[places(S)[0] - S] >= places(S)[1], KEPT),
    "added": (lambda S, x: torch.zeros(S, S).masked_fill(places(S)[1] > places(S)[0], -torch.inf), KEPT),
}


@pytest.mark.parametrize("name", CASES)
def test_only_what_is_proved_changes(name: str) -> None:
    mask, wanted = CASES[name]
    model, x = Masked(mask).eval(), torch.randn(2, 9, 8)
    assert after(capture(model, (x,)).program) == [wanted]
    compiled = sparsecc.compile(model, example_inputs=x, remainder="eager")
    for S in (9, 2, 31):
        x = torch.randn(2, S, 8)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-6)


def test_prompts_of_a_language_model_are_causal() -> None:
    model, ids = llama_stack(32, 96, 2, heads=4, kv_heads=2, vocab=64), torch.randint(0, 64, (2, 12))
    for more, wanted in (({}, CAUSAL), ({"attention_mask": torch.ones(2, 12, dtype=torch.long)}, KEPT)):
        assert after(capture(model, (), {"input_ids": ids, "use_cache": False, **more}).program) == [wanted] * 2


def test_a_token_after_a_prompt_sees_everything() -> None:
    model, ids = llama_stack(32, 96, 2, heads=4, kv_heads=2, vocab=64), torch.randint(0, 64, (1, 12))
    compiled = torch.compile(model, backend="sparsecc", options={"remainder": "eager"})
    caches = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for part in (ids[:, :8], ids[:, 8:9], ids[:, 9:10], ids[:, 10:12]):
        both = zip((compiled, model), caches, strict=True)
        found, wanted = (run(part, past_key_values=cache, use_cache=True).logits for run, cache in both)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
