"""`torch.nn.utils.prune` (ln_structured and others): `weight_orig` and `weight_mask` for `weight`, in a module or in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.utils import prune as torch_prune

from sparsecc.importers.base import Convention, State, ends, fill, take


def recognises(model: nn.Module, state: State) -> bool:
    return bool(ends(state, "_orig", "_mask")) or (not state and any(torch_prune.is_pruned(m) for m in model.modules() if _own(m)))


def _own(module: nn.Module) -> list[str]:
    return [name.removesuffix("_orig") for name in module._parameters if name.endswith("_orig")]


def load(model: nn.Module, state: State) -> Iterator[str]:
    for prefix in ends(state, "_orig", "_mask"):
        orig, mask = take(state, f"{prefix}_orig", f"{prefix}_mask")
        state[prefix] = orig * mask
    masked = [(name, module, own) for name, module in model.named_modules() for own in _own(module)]
    for name, module, own in masked:
        torch_prune.remove(module, own)
        yield f"{name}.{own}: its mask is permanent now"
    if state:
        fill(model, state)


TORCH_MASKS = Convention("torch-masks", recognises, load)
