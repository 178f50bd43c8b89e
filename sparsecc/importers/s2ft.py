"""S2FT (Yang et al., 2024): a trained slice `X.s2` beside the frozen weight of X, added to rows, [n, I], or to columns, [O, n].

Where a slice starts is not in the checkpoint; its permutation puts the selected heads and channels first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from sparsecc.errors import CheckpointError
from sparsecc.importers.base import Convention, State, ends, fill, linear_at, take


def load(model: nn.Module, state: State, starts: int | Mapping[str, int] = 0) -> Iterator[str]:
    """`starts`: where slices begin, for all or by module name."""
    for prefix in ends(state, ".s2"):
        linear = linear_at(model, prefix, f"{prefix}.s2")
        (s2,) = take(state, f"{prefix}.s2")
        at = starts if isinstance(starts, int) else starts.get(prefix, 0)
        N, K = linear.weight.shape
        if s2.ndim == 2 and s2.shape[1] == K and at + s2.shape[0] <= N:
            place = (slice(at, at + s2.shape[0]), slice(None))
        elif s2.ndim == 2 and s2.shape[0] == N and at + s2.shape[1] <= K:
            place = (slice(None), slice(at, at + s2.shape[1]))
        else:
            raise CheckpointError(f"{prefix}.s2 is {list(s2.shape)} and starts at {at}: no slice of [{N}, {K}]; give starts=")
        weight = state.get(f"{prefix}.weight", linear.weight).clone()
        weight[place] += s2.to(weight.dtype)
        state[f"{prefix}.weight"] = weight
        yield f"{prefix}: a slice of {list(s2.shape)} is added"
    fill(model, {**{k: v for k, v in model.state_dict().items() if k not in state}, **state})


S2FT = Convention("s2ft", lambda model, state: bool(ends(state, ".s2")), load)
