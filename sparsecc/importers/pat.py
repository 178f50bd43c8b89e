"""PAT before its merge (Liu et al., 2025): behind each writer of the residual stream, y <- scale * mask * (y + V U y).

Next to a linear or embedding P stand `P.dimdown_inout.0.weight` U [r, D], `P.dimdown_inout.1.weight` V [D, r], `P.dimdown_scale.weight`
[1, D] and a `mask` [1, 1, D], shared by all; at inference a channel lives where its mask is above 0. Folding it into P leaves zero rows.
Norms keep dividing by the full width, as the masked model's do. (The merged, narrow model is "narrow": its norm weights carry sqrt(D / d).)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sparsecc.errors import CheckpointError
from sparsecc.importers.base import Convention, State, ends, fill, take

_PARTS = (".dimdown_inout.0.weight", ".dimdown_inout.1.weight", ".dimdown_scale.weight")


def load(model: nn.Module, state: State) -> Iterator[str]:
    shared = [key for key in state if key.rpartition(".")[2] == "mask"]
    masks = {key: (take(state, key)[0].reshape(-1) > 0) for key in shared}
    if not masks:
        raise CheckpointError("the checkpoint has PAT's dimdown tensors but no mask: save it with the module's buffers")
    values = list(masks.values())
    if any(not torch.equal(values[0], other) for other in values[1:]):
        raise CheckpointError(f"PAT shares one mask, but {shared[0]} and another of the {len(shared)} differ")
    alive = values[0]
    if not bool(alive.any()):
        raise CheckpointError(f"{shared[0]} would leave none of the {len(alive)} channels")
    for prefix in ends(state, *_PARTS):
        U, V, scale = take(state, *(prefix + part for part in _PARTS))
        name = prefix if f"{prefix}.weight" in state else prefix.rpartition(".")[0]
        key = f"{name}.weight"
        if key not in state:
            raise CheckpointError(f"{prefix}{_PARTS[0]} stands behind {name}, whose weight the checkpoint lacks")
        one = (scale.reshape(-1) * alive).double().diag() @ (torch.eye(len(alive), dtype=torch.float64) + V.double() @ U.double())
        state[key] = _behind(model, name, state[key], one)
        if f"{name}.bias" in state:
            state[f"{name}.bias"] = (one @ state[f"{name}.bias"].double()).to(state[f"{name}.bias"].dtype)
    fill(model, state)
    yield f"{int(alive.sum())} of {len(alive)} channels of the residual stream are alive"


def _behind(model: nn.Module, name: str, weight: Tensor, one: Tensor) -> Tensor:
    """The map [D, D] behind a linear's rows or an embedding's columns."""
    embedding = isinstance(model.get_submodule(name), nn.Embedding)
    if weight.shape[1 if embedding else 0] != len(one):
        raise CheckpointError(f"{name}.weight is {list(weight.shape)}, which does not write {len(one)} channels")
    wide = weight.double()
    return (wide @ one.t() if embedding else one @ wide).to(weight.dtype)


PAT = Convention("pat", lambda model, state: bool(ends(state, *_PARTS)), load)
