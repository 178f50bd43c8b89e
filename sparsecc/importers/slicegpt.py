"""SliceGPT checkpoints: narrow tensors under the model's names, `attn_shortcut_Q` and `mlp_shortcut_Q` in each layer, plain norms.

Everything is put into the rotated, full-size model, with zeros behind the kept components: so the norms divide by the original width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sparsecc.errors import CheckpointError, SpecError
from sparsecc.importers.base import Convention, State, check_names, fill, tensors_of
from sparsecc.prune.slicegpt import find_stream, fold, norms_of, rotate

EPS = 1e-5
"""What the released code's norms add to the mean square, whatever the model's own did."""


def load(model: nn.Module, state: State, example_inputs: Any = None, eps: float | None = EPS) -> Iterator[str]:
    if example_inputs is None:
        raise CheckpointError("a SliceGPT checkpoint needs example_inputs=: the residual stream is found by following the model")
    try:
        stream = find_stream(model, example_inputs)
    except SpecError as error:
        raise CheckpointError(f"the checkpoint is SliceGPT's, but this model has another structure: {error}") from error
    missing = [block for block in stream.blocks for q in ("attn_shortcut_Q", "mlp_shortcut_Q") if f"{block}.{q}" not in state]
    if missing:
        raise CheckpointError(f"the checkpoint lacks the shortcuts of {missing[0]}: it is not whole")
    norms = [name for name, _ in norms_of(stream)]
    unread = [f"{name}.{part}" for name in norms for part in ("weight", "bias")]
    heads = [f"{name}.weight" for name in stream.heads]
    check_names(model, {k: v for k, v in state.items() if not k.endswith("_shortcut_Q")}, (*unread, *heads))
    known = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    for key, value in state.items():
        full = known.get(key, torch.Size([stream.width] * 2) if key.endswith("_shortcut_Q") else value.shape)
        if value.ndim != len(full) or any(a > b for a, b in zip(value.shape, full, strict=True)):
            raise CheckpointError(f"{key} is {list(value.shape)} in the checkpoint, which does not fit into {list(full)}")
    fold(model, stream)
    rotate(model, stream, [torch.eye(stream.width, dtype=torch.float64)] * (2 * len(stream.blocks) + 1))
    own = tensors_of(model)
    for key, value in state.items():
        if key in own and value.shape != own[key].shape:
            state[key] = torch.zeros(own[key].shape, dtype=value.dtype)
            state[key][tuple(slice(0, side) for side in value.shape)] = value
    for module in model.modules():
        if isinstance(module, nn.RMSNorm) and not module.elementwise_affine and eps is not None:
            module.eps = eps
    fill(model, state)
    yield f"{len(stream.blocks)} blocks in bases of their own; zeros stand behind the kept components of {stream.width}"


SLICEGPT = Convention("slicegpt", lambda model, state: any(key.endswith("_shortcut_Q") for key in state), load)
