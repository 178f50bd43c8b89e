"""Compresso (Guo et al., 2023) for Llama-like models: `head_z` [layers, heads], `intermediate_z` [layers, F], `hidden_z` [D] beside the
weights, or already multiplied into them, which leaves q and k of dead heads alive: here they are cleared, since nothing reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparsecc.errors import CheckpointError
from sparsecc.importers.base import Convention, State, fill

_GATES = ("head_z", "intermediate_z", "hidden_z")


def load(model: nn.Module, state: State, heads: int | None = None) -> Iterator[str]:
    """`heads`: query heads of each attention, by default what the config says."""
    gates = {key: state.pop(key) for key in _GATES if key in state}
    count = heads or getattr(getattr(model, "config", None), "num_attention_heads", None)
    blocks, ffns = _with(model, "q_proj", "k_proj", "v_proj", "o_proj"), _with(model, "gate_proj", "up_proj", "down_proj")
    if not blocks or not count:
        raise CheckpointError("Compresso's models have q_proj, k_proj, v_proj, o_proj: build such a one; without a config, give heads=")
    _check(gates, blocks, ffns, count)
    if state:
        fill(model, state)
    for i, block in enumerate(blocks):
        if "head_z" in gates:
            _scale(block.o_proj, gates["head_z"][i].reshape(-1).repeat_interleave(_width(block, count)), axis=1)
    for i, ffn in enumerate(ffns):
        if "intermediate_z" in gates:
            _scale(ffn.up_proj, gates["intermediate_z"][i].reshape(-1), axis=0)
    if "hidden_z" in gates:
        z = gates["hidden_z"].reshape(-1)
        for module in (m for m in model.modules() if isinstance(m, nn.Embedding)):
            module.weight *= z.to(module.weight)
        for linear in (*(b.o_proj for b in blocks), *(f.down_proj for f in ffns)):
            _scale(linear, z, axis=0)
    dead = sum(_clear(block, count) for block in blocks)
    yield f"{dead} of {count * len(blocks)} heads are dead, with their q, k, v rows and o columns"


def _with(model: nn.Module, *names: str) -> list[Any]:
    """The modules that have linears of these names."""
    return [m for m in model.modules() if all(isinstance(getattr(m, name, None), nn.Linear) for name in names)]


def _width(block: Any, heads: int) -> int:
    return block.o_proj.in_features // heads


def _check(gates: State, blocks: list[Any], ffns: list[Any], heads: int) -> None:
    wanted = {"head_z": len(blocks) * heads, "intermediate_z": sum(f.up_proj.out_features for f in ffns)}
    for key, size in wanted.items():
        if key in gates and gates[key].numel() != size:
            raise CheckpointError(f"{key} is {list(gates[key].shape)}, this model has {size} in all: build the model it was made of")
    if any(block.o_proj.in_features % heads or block.q_proj.out_features != block.o_proj.in_features for block in blocks):
        raise CheckpointError(f"{heads} heads do not divide {blocks[0].o_proj.in_features} features: give heads=")
    for key, value in gates.items():
        if not bool(value.isfinite().all()) or not bool((value != 0).any()):
            raise CheckpointError(f"{key} holds nothing but zeros, or values that are not finite")


def _scale(linear: Any, z: Tensor, axis: int) -> None:
    z = z.to(linear.weight)
    linear.weight *= z[:, None] if axis == 0 else z
    if axis == 0 and linear.bias is not None:
        linear.bias *= z


def _clear(block: Any, heads: int) -> int:
    """Clears the heads whose v rows, or o columns, are zero. Returns how many."""
    width = _width(block, heads)
    kv = block.v_proj.out_features // width
    owner = torch.arange(heads) // (heads // kv)
    silent = (block.v_proj.weight == 0).view(kv, -1).all(1)
    if block.v_proj.bias is not None:
        silent &= (block.v_proj.bias == 0).view(kv, -1).all(1)
    unread = (block.o_proj.weight == 0).view(-1, heads, width).all(2).all(0)
    dead = silent[owner] | unread
    dead_kv = torch.ones(kv, dtype=torch.bool).index_put_((owner[~dead],), torch.tensor(False))
    block.o_proj.weight[:, dead.repeat_interleave(width)] = 0
    for linear, gone in ((block.q_proj, dead), (block.k_proj, dead_kv), (block.v_proj, dead_kv)):
        rows = gone.repeat_interleave(width)
        linear.weight[rows] = 0
        if linear.bias is not None:
            linear.bias[rows] = 0
    return int(dead.sum())


def recognises(model: nn.Module, state: State) -> bool:
    return any(key in state for key in _GATES)


COMPRESSO = Convention("compresso", recognises, load)
