"""CoreMatching (Wang et al., ICML 2025) as a value of a sparsity dict: core neurons and core tokens, without training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsecc.errors import SpecError
from sparsecc.ir.policy import Policy, parse_policy, ratio_of

KEEPS = ("knee", "all", "topk", "ratio", "atleast", "threshold")
COMPATS = ("", "release")
RELEASED_IMAGE, RELEASED_LAYERS = (5, 581), (5, 18)
"""LLaVA-1.5's places of image tokens, and the blocks from the first to the last one, as the authors' release has them."""


@dataclass
class Kept:
    """Candidates that stayed in the prompts so far, of those that there were; `latest`: the places i64[n] of all tokens that stayed in the
    latest prompt."""

    active: int = 0
    of: int = 0
    latest: Tensor | None = None

    @property
    def kept(self) -> float | None:
        """The fraction, None before the first prompt."""
        return self.active / self.of if self.of else None

    def __call__(self, latest: Tensor, others: int, of: int) -> None:
        """Counts a prompt: what stayed, and how many of that were no candidates."""
        self.active, self.of, self.latest = self.active + latest.numel() - others, self.of + of, latest


@dataclass(frozen=True)
class Cores:
    """What `core_matching` was given. `sets`: the core neurons i32[K] of the latest prompt by the name of their feed-forward block,
    before the first one -1; `seen`: candidates that prompts kept so far, of how many."""

    rho: float
    beta: float
    layer: int
    candidates: int | tuple[int, int] | None = None
    tokens: str = "knee"
    positions: str = "original"
    compat: str = ""
    layers: tuple[int, int] = RELEASED_LAYERS
    sets: dict[str, Tensor] = field(default_factory=dict, compare=False, hash=False)
    seen: Kept = field(default_factory=Kept, compare=False, hash=False)

    def __str__(self) -> str:
        if self.compat:
            return f"core_matching(compat={self.compat!r}, layers={self.layers}, candidates={self.candidates})"
        where = {} if self.candidates is None else {"candidates": self.candidates}
        tokens = {} if self.tokens == "knee" else {"tokens": self.tokens}
        more = where | tokens | ({} if self.positions == "original" else {"positions": self.positions})
        shown = "".join(f", {name}={value!r}" for name, value in more.items())
        return f"core_matching(rho={self.rho}, beta={self.beta}, layer={self.layer}{shown})"

    @property
    def score(self) -> str:
        """How a prompt ranks neurons, as ops have it."""
        return f"core({self.rho})"

    def size(self, neurons: int) -> int:
        """Core neurons of so many: beta of them, rounded down, and at least one."""
        num, den = ratio_of(self.beta)
        return max(1, neurons * num // den)

    def set_of(self, name: str, neurons: int) -> Tensor:
        """The block's set, the same tensor in every graph of a model."""
        size = self.size(neurons)
        if name not in self.sets or self.sets[name].numel() != size:
            self.sets[name] = torch.full((size,), -1, dtype=torch.int32)
        return self.sets[name]


def core_matching(
    rho: float = 0.2, beta: float = 0.4, layer: int = 2, *, candidates: int | tuple[int, int] | None = None, tokens: str = "knee",
    positions: str = "original", compat: str = "", layers: tuple[int, int] = RELEASED_LAYERS,
) -> Cores:
    """Core neurons for generated tokens, core tokens for a prompt's image (CoreMatching, Wang et al. 2025). A value of a sparsity dict.

    A prompt chooses, per feed-forward block, `beta` of the neurons: those that most tokens have among the largest `rho` of their positive
    activations. Tokens after it compute those alone. At decoder block `layer` (from 0) each image token is scored by how many core
    neurons it activates; those below the knee of the sorted scores leave the prompt, and all blocks behind it run without them.

    candidates: the tokens that may leave: None for those that image features are scattered into, a token id, or a span (start, end). All
    others stay, as does the last one. tokens: the policy on the scores, "knee", "all", "topk(64)", "ratio(0.1)", ... (`ir/policy.py`).
    positions: "original" or "compact", as in `ftp`. One request at a time: a new prompt replaces the sets.

    compat="release" is what the authors' code does instead, to compare with (`passes/release.py`): nothing is skipped, in blocks from
    the first to the last one of `layers` keys and values of image tokens become zero in the cache. rho, beta and layer count for nothing,
    image tokens are at the places of LLaVA-1.5's unless `candidates` says otherwise. Raises SpecError.
    """
    if compat not in COMPATS:
        raise SpecError(f"core_matching(compat={compat!r}): use 'release', or leave it out")
    if compat and (tokens, positions) != ("knee", "original"):
        raise SpecError("core_matching(compat='release') keeps tokens by the knee, at their places: leave tokens= and positions= out")
    if len(layers) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) for v in layers) or not 0 <= layers[0] <= layers[1]:
        raise SpecError(f"core_matching(layers={layers!r}): the first and the last block whose cache changes, from 0 on")
    for name, value in (("rho", rho), ("beta", beta)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise SpecError(f"core_matching({name}={value!r}): a fraction in (0, 1]")
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
        raise SpecError(f"core_matching(layer={layer!r}): the number of a decoder block, from 0 on")
    if (policy := parse_policy(tokens)).name not in KEEPS:
        raise SpecError(f"core_matching(tokens={tokens!r}): use {', '.join(KEEPS)}")
    if positions not in ("original", "compact"):
        raise SpecError(f"core_matching(positions={positions!r}): use 'original' or 'compact'")
    places = RELEASED_IMAGE if compat and candidates is None else _candidates(candidates)
    return Cores(float(rho), float(beta), layer, places, str(Policy(policy.name, policy.value)), positions, compat,
                 (layers[0], layers[1]))  # fmt: skip


def _candidates(value: Any) -> int | tuple[int, int] | None:
    whole = lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0  # noqa: E731
    if value is None or whole(value):
        return value
    if isinstance(value, tuple | list) and len(value) == 2 and all(map(whole, value)) and value[0] < value[1]:
        return int(value[0]), int(value[1])
    raise SpecError(f"core_matching(candidates={value!r}): a token id, a span (start, end) of places, or None for image tokens")
