"""Importers: what published methods leave behind, as a module with zeros in place and the patterns that hold.

One file a convention. `load` picks the one that recognises the checkpoint, or the one that is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsecc.errors import CheckpointError
from sparsecc.importers.base import Convention, Imported, patterns_of
from sparsecc.importers.batchnorm import MASK_SPARSITY
from sparsecc.importers.bitmask import COMPRESSED_TENSORS
from sparsecc.importers.compresso import COMPRESSO
from sparsecc.importers.masks import TORCH_MASKS
from sparsecc.importers.narrow import NARROW
from sparsecc.importers.pat import PAT
from sparsecc.importers.plain import PLAIN
from sparsecc.importers.s2ft import S2FT
from sparsecc.importers.slicegpt import SLICEGPT
from sparsecc.importers.sora import SORA

CONVENTIONS: tuple[Convention, ...] = (
    SLICEGPT, SORA, PAT, S2FT, COMPRESSO, TORCH_MASKS, COMPRESSED_TENSORS, MASK_SPARSITY, NARROW, PLAIN,
)  # fmt: skip
"""In the order in which they are tried: the surest marks first."""


def load(model: nn.Module, checkpoint: Mapping[str, Tensor] | None = None, convention: str | None = None, **options: Any) -> Imported:
    """Brings a checkpoint (parameter name -> tensor), or what is in the module itself, into `model`, in place.

    `model` is the architecture that the method started from. `options` are those of the convention. Raises CheckpointError if nothing
    recognises the checkpoint or it does not fit, before anything is changed, and names the way out.
    """
    state = {key: value.detach() for key, value in (checkpoint or {}).items()}
    if convention is not None:
        found = next((one for one in CONVENTIONS if one.name == convention), None)
        if found is None:
            raise CheckpointError(f"convention={convention!r} is not known: use {', '.join(one.name for one in CONVENTIONS)}, or None")
    else:
        found = next(one for one in CONVENTIONS if not one.explicit and one.recognises(model, state))
    with torch.no_grad():
        notes = tuple(found.load(model, state, **options))
    return Imported(model, patterns_of(model), found.name, notes)


__all__ = ["CONVENTIONS", "CheckpointError", "Convention", "Imported", "load"]
