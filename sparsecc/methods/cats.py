"""CATS and CHESS: thresholds on the gate's activation, set on calibration data.

CATS (Lee et al. 2024): one threshold per block, the `sparsity` quantile of |a|, a = act(gate x).
CHESS (He et al. 2024): one per neuron. A neuron matters by a^2 E[up^2]; with tau the `sparsity` quantile of that over tokens and neurons,
neuron j is kept iff |a_j| > sqrt(tau / E[up_j^2]). Thresholds on the inputs of attention: `methods/chess.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsecc.errors import SpecError
from sparsecc.methods.profile import activations
from sparsecc.skipping import Neurons, neurons

SAMPLES = 1 << 20
"""Values that a quantile is taken of, per block: more change its third digit."""


def calibrate(
    model: nn.Module, data: Iterable[Any], sparsity: float = 0.5, per: Literal["block", "neuron"] = "neuron"
) -> Neurons:
    """Thresholds at which `sparsity` of the neurons are skipped on `data`, as a value for a sparsity dict.

    per: "block" is CATS, "neuron" CHESS. `data` yields inputs of the model. Raises SpecError for a sparsity outside [0, 1), NaN
    activations, a model without recognised blocks.
    """
    if not 0 <= sparsity < 1:
        raise SpecError(f"calibrate(sparsity={sparsity}): the fraction to skip lies in [0, 1)")
    if per not in ("block", "neuron"):
        raise SpecError(f"calibrate(per={per!r}): use 'block' (CATS) or 'neuron' (CHESS)")
    sizes: dict[str, list[Tensor]] = {}
    squares: dict[str, tuple[Tensor, int]] = {}
    for batch in activations(model, data):
        if bool(batch.a.isnan().any()):
            raise SpecError(f"{batch.name}: the calibration data gives NaN activations")
        sizes.setdefault(batch.name, []).append(batch.a.detach().abs().float())
        if batch.up is not None:
            total, count = squares.get(batch.name, (torch.zeros(batch.up.shape[1], dtype=torch.float64), 0))
            squares[batch.name] = total + batch.up.double().pow(2).sum(0), count + batch.up.shape[0]
    levels = {}
    for name, parts in sizes.items():
        energy = None
        if per == "neuron" and name in squares:
            energy = (squares[name][0] / squares[name][1]).float()
        levels[name] = thresholds(torch.cat(parts), energy, sparsity)
    return neurons(levels=levels)


def thresholds(sizes: Tensor, energy: Tensor | None, sparsity: float) -> Tensor:
    """Of |a| [M, F], and E[up^2] [F] or None for one threshold: f32[F] or f32[1]. Below the smallest value nothing is skipped."""
    if sparsity == 0:
        return torch.full((1,), -1.0)
    importance = sizes if energy is None else sizes.pow(2) * energy
    flat = importance.flatten()
    if flat.numel() > SAMPLES:
        at = torch.randint(flat.numel(), (SAMPLES,), generator=torch.Generator().manual_seed(0))
        flat = flat[at]
    tau = flat.kthvalue(max(1, round(sparsity * flat.numel()))).values
    if energy is None:
        return tau.view(1)
    return torch.where(energy > 0, torch.sqrt(tau / energy), torch.inf)  # a neuron whose up is always 0 is never needed
