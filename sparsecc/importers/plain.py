"""Ordinary weights with exact zeros, whole rows among them or not (Beta-Rank, WGSEF, ECoFLaP, SparseGPT and many more), and torch's sparse
tensors. A module that is already smaller (torch-pruning) needs nothing either."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from sparsecc.importers.base import Convention, State, fill


def load(model: nn.Module, state: State) -> Iterator[str]:
    if state:
        fill(model, {key: value.to_dense() if value.layout != torch.strided else value for key, value in state.items()})
    for name, module in model.named_modules():
        for key, p in list(module._parameters.items()):
            if p is not None and p.layout != torch.strided:
                setattr(module, key, nn.Parameter(p.detach().to_dense(), requires_grad=False))
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and weight is not None:
            filters = int((weight.flatten(1) == 0).all(1).sum())
            if filters:
                yield f"{name}: {filters} of {len(weight)} filters are zero"


PLAIN = Convention("plain", lambda model, state: True, load)
