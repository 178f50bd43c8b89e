"""CoreMatching end to end (Wang et al., ICML 2025): prefill and decode of a decoder, or a vision-language model, with a cache of its own.

    core = CoreMatching(model, sparsecc.core_matching(rho=0.2, beta=0.4, layer=2), {"input_ids": ids, "pixel_values": picture})
    state = core.prefill(input_ids=ids, pixel_values=picture)      # chooses core neurons and core tokens
    state = core.step(state.logits.argmax(-1), state)              # one token: core neurons alone, on the kept tokens' keys
    tokens = core.generate(32, input_ids=ids, pixel_values=picture)

Blocks up to the cut keep keys of all M tokens, those behind it of the kept ones; positions go on from M.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparsecc.cores import Cores
from sparsecc.errors import SelectionError, SpecError
from sparsecc.methods.cached import Cached


class CoreMatching(Cached):
    """A model whose prompts and tokens run by a `core_matching` rule; `rule=None` runs the same two graphs densely.

    example_inputs: of a prompt, input_ids i64[1, M]; for the rest see `Cached`. Raises SpecError, SelectionError, CaptureError.
    """

    def __init__(
        self, model: nn.Module, rule: Cores | None, example_inputs: Mapping[str, Tensor], target: str = "cpu", glob: str = "*",
        **options: Any,
    ) -> None:
        if rule is not None and rule.positions != "original":
            raise SpecError("CoreMatching: tokens after a prompt go on from its length; compact positions are for prompts without a cache")
        self.rule = rule
        super().__init__(model, None if rule is None else {glob: rule}, example_inputs, target, **options)

    def _checked(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One prompt at a time. Raises as `Cached`, and SelectionError for a batch."""
        found = super()._checked(inputs)
        if (count := found["input_ids"].shape[0]) != 1:
            raise SelectionError(f"input_ids is a batch of {count} prompts, of which each keeps another number: give one at a time")
        return found
