"""MaskSparsity (Jiang et al., 2022): training drives the scales of chosen batch norms towards, but not to, zero.

Setting them to zero is an approximation, so it is done by name only; the notes bound what each removed channel had left: its normalized
value times |gamma|, plus |beta|.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from sparsecc.errors import CheckpointError
from sparsecc.importers.base import Convention, State, fill


def load(model: nn.Module, state: State, threshold: float = 0.01) -> Iterator[str]:
    """Channels with |gamma| < threshold get gamma = beta = 0: what feeds them is dead."""
    norms = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine]
    small = {name: state.get(f"{name}.weight", m.weight).detach().abs() < threshold for name, m in norms}
    if not any(bool(mask.any()) for mask in small.values()):
        raise CheckpointError(f"no batch norm has a scale below {threshold}: MaskSparsity leaves such; a larger threshold= prunes more")
    if full := [name for name, mask in small.items() if bool(mask.all())]:
        raise CheckpointError(f"{full[0]}: threshold={threshold} would leave none of its channels: ask for a smaller one")
    if state:
        fill(model, state)
    for name, norm in norms:
        mask = small[name]
        if bool(mask.any()):
            gamma, beta = float(norm.weight[mask].abs().max()), float(norm.bias[mask].abs().max())
            norm.weight.masked_fill_(mask, 0)
            norm.bias.masked_fill_(mask, 0)
            yield f"{name}: {int(mask.sum())} of {len(mask)} channels removed; each was at most {gamma:.2g} |x| + {beta:.2g}"


def recognises(model: nn.Module, state: State) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine and bool((m.weight.abs() < 0.01).any()) for m in model.modules())


MASK_SPARSITY = Convention("mask-sparsity", recognises, load, explicit=True)
