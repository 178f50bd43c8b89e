"""compressed-tensors' sparse formats: per weight `shape`, `compressed` (nonzeros, row by row) and `bitmask` (packed bits, lowest first).

"sparse-bitmask" has also `row_offsets`, which repeats what the bits say; "sparse-24-bitmask" keeps two values of four.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sparsecc.errors import CheckpointError
from sparsecc.importers.base import Convention, State, ends, fill, take


def unpack(shape: tuple[int, int], compressed: Tensor, bitmask: Tensor) -> Tensor:
    """-> [N, K] in compressed's dtype. bitmask uint8 [N, ceil(K / 8)]."""
    bits = (bitmask.view(torch.uint8).reshape(shape[0], -1)[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    kept = bits.reshape(shape[0], -1)[:, : shape[1]].bool()
    if int(kept.sum()) != compressed.numel():
        raise CheckpointError(f"the bitmask keeps {int(kept.sum())} values, but {compressed.numel()} are stored")
    return torch.zeros(shape, dtype=compressed.dtype).masked_scatter_(kept, compressed.reshape(-1))


def load(model: nn.Module, state: State) -> Iterator[str]:
    for prefix in ends(state, ".compressed", ".bitmask", ".shape"):
        compressed, bitmask, shape = take(state, *(f"{prefix}.{part}" for part in ("compressed", "bitmask", "shape")))
        state.pop(f"{prefix}.row_offsets", None)
        rows, cols = shape.tolist()
        key = prefix if prefix.endswith("weight") else f"{prefix}.weight"
        try:
            state[key] = unpack((rows, cols), compressed, bitmask)
        except CheckpointError as error:
            raise CheckpointError(f"{key}: {error}: the file is damaged") from None
    fill(model, state)
    return iter(())


COMPRESSED_TENSORS = Convention("compressed-tensors", lambda model, state: bool(ends(state, ".compressed", ".bitmask", ".shape")), load)
