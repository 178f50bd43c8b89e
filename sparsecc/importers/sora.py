"""SoRA (Ding et al., 2023): y = W x + scaling B (g * (A x)), where training has driven entries of the gate g to exact zero.

`X.lora.lora_A` [r, I], `X.lora.lora_B` [O, r], `X.lora.gate` [1, r] stand beside the weight of X.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from sparsecc.errors import CheckpointError
from sparsecc.importers.base import Convention, State, ends, fill, linear_at, take

_PARTS = (".lora.gate", ".lora.lora_A", ".lora.lora_B")


class Adapted(nn.Module):
    """base(x) + up(down(x)): x [..., I] -> [..., O]; the gate and the scaling are in `down`, whose dead ranks are zero rows."""

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(down.shape[1], down.shape[0], bias=False, dtype=down.dtype)
        self.up = nn.Linear(up.shape[1], up.shape[0], bias=False, dtype=up.dtype)
        self.down.weight.copy_(down)
        self.up.weight.copy_(up)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def load(model: nn.Module, state: State, scaling: float = 1.0, merge: bool = False) -> Iterator[str]:
    """`scaling` is alpha / r of the training script. `merge` adds the adapters to the weights instead of keeping them."""
    adapters: dict[str, tuple[Tensor, Tensor]] = {}
    for prefix in ends(state, *_PARTS):
        gate, A, B = take(state, *(prefix + part for part in _PARTS))
        linear = linear_at(model, prefix, f"{prefix}.lora.gate")
        rank = gate.numel()
        if A.shape != (rank, linear.in_features) or B.shape != (linear.out_features, rank):
            raise CheckpointError(f"{prefix}: lora_A is {list(A.shape)}, lora_B {list(B.shape)}: they do not fit a gate of {rank}")
        dead = gate.reshape(-1) == 0
        adapters[prefix] = (scaling * gate.reshape(-1, 1) * A, B.masked_fill(dead, 0))
    fill(model, {**{k: v for k, v in model.state_dict().items() if k not in state}, **state})
    for prefix, (down, up) in adapters.items():
        linear = linear_at(model, prefix, prefix)
        alive = int((down != 0).any(1).sum())
        if merge:
            linear.weight += (up.double() @ down.double()).to(linear.weight.dtype)
        elif alive:
            parent, _, last = prefix.rpartition(".")
            setattr(model.get_submodule(parent), last, Adapted(linear, down.to(linear.weight.dtype), up.to(linear.weight.dtype)))
        yield f"{prefix}: {alive} of {len(down)} ranks are alive" + ("" if alive else ", so its adapter is gone")


SORA = Convention("sora", lambda model, state: bool(ends(state, *_PARTS)), load)

__all__ = ["SORA", "Adapted"]
