"""Checkpoints whose tensors are narrower than the model's, each layer its own width (CFSP, PAT and Compresso once trimmed, torch-pruning):
the config holds one number, so widths are read from the tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from sparsecc.errors import CheckpointError
from sparsecc.importers.base import Convention, State, check_names, fill, tensors_of

_WIDTHS: dict[type[nn.Module], tuple[str, str]] = {
    nn.Linear: ("out_features", "in_features"),
    nn.Conv1d: ("out_channels", "in_channels"),
    nn.Conv2d: ("out_channels", "in_channels"),
    nn.Conv3d: ("out_channels", "in_channels"),
}


def load(model: nn.Module, state: State) -> Iterator[str]:
    """Linears, convolutions, embeddings and norms take the checkpoint's shapes, then its values."""
    check_names(model, state)
    own = tensors_of(model)
    narrower = {key: value for key, value in state.items() if key in own and value.shape != own[key].shape}
    for key, value in narrower.items():
        if value.ndim != own[key].ndim or any(a > b for a, b in zip(value.shape, own[key].shape, strict=True)):
            raise CheckpointError(f"{key} is {list(value.shape)} in the checkpoint, which is not narrower than {list(own[key].shape)}")
        groups = getattr(model.get_submodule(key.rpartition(".")[0]), "groups", 1)
        if groups != 1 and value.ndim > 1 and value.shape[1] != 1:
            raise CheckpointError(f"{key}: a convolution in {groups} groups of more than one channel cannot be narrowed")
    for key, value in narrower.items():
        prefix, _, last = key.rpartition(".")
        _resize(model.get_submodule(prefix), last, value)
        yield f"{key}: {list(own[key].shape)} -> {list(value.shape)}"
    fill(model, state)


def _resize(module: Any, name: str, value: Tensor) -> None:
    old = getattr(module, name)
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(value.clone().to(old.device, old.dtype), requires_grad=old.requires_grad))
    else:
        setattr(module, name, value.clone().to(old.device, old.dtype))
    if name != "weight":
        return
    for kind, (out, into) in _WIDTHS.items():
        if isinstance(module, kind):
            groups = int(getattr(module, "groups", 1))
            if groups > 1:
                groups = value.shape[0] * groups // old.shape[0]
                module.groups = groups  # type: ignore[assignment]
            setattr(module, out, value.shape[0])
            setattr(module, into, value.shape[1] * groups)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.num_features = len(value)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(value.shape)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = value.shape


def recognises(model: nn.Module, state: State) -> bool:
    own = tensors_of(model)
    return any(key in own and value.shape != own[key].shape for key, value in state.items()) and all(key in own for key in state)


NARROW = Convention("narrow", recognises, load)
