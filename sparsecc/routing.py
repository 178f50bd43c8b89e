"""Routers of tokens: their weights, read from a checkpoint or a dict, and checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsecc.errors import SpecError
from sparsecc.ir.policy import Policy, parse_policy

FTP_TENSORS = ("router.fc1.weight", "router.fc1.bias", "router.fc2.weight", "router.fc2.bias")
FTP_FEATURES, FTP_HIDDEN = 4, 64
SCHEDULE = "scheduler.sparsity"
POLICIES = ("threshold", "atleast", "knee", "mass", "topk", "ratio", "all")


@dataclass(frozen=True)
class TokenRouter:
    """FTP's learned router, one for all blocks: fc1 f32[64, 4], bias [64], fc2 [1 or 2, 64], bias [1 or 2] in `weights`; `schedule`: the
    fraction that each block is to skip, if the checkpoint has it."""

    weights: tuple[Tensor, ...] = field(compare=False, hash=False)
    schedule: tuple[float, ...] | None = None

    def __str__(self) -> str:
        return f"learned router {FTP_FEATURES}-{FTP_HIDDEN}-{len(self.weights[3])}"


@dataclass(frozen=True)
class DepthRouter:
    """The routers of mixture-of-depths: f32[1 or 2, D] for all blocks, or one for each. reads: the block's input behind its first norm
    ("norm"), or as it is ("stream")."""

    weights: tuple[Tensor, ...] = field(compare=False, hash=False)
    reads: str = "norm"

    def __str__(self) -> str:
        kind = "tied" if len(self.weights) == 1 else "own"
        return f"{kind} routers D-{len(self.weights[0])} on the {self.reads}"


def token_router(source: Any, what: str = "ftp(router=...)") -> TokenRouter:
    """From a safetensors file or a dict of tensors: router.fc1.weight [64, 4], router.fc1.bias [64], router.fc2.weight [1 or 2, 64],
    router.fc2.bias, and perhaps scheduler.sparsity [blocks]. Raises SpecError, naming the tensor."""
    if isinstance(source, TokenRouter):
        return source
    tensors = _tensors(source, what)
    found = [_tensor(tensors, name, what) for name in FTP_TENSORS]
    outputs = found[2].shape[0] if found[2].ndim == 2 else 1
    if outputs not in (1, 2):
        raise SpecError(f"{what}: {FTP_TENSORS[2]} is {list(found[2].shape)}, but a router has 1 or 2 outputs")
    wanted = ((FTP_HIDDEN, FTP_FEATURES), (FTP_HIDDEN,), (outputs, FTP_HIDDEN), (outputs,))
    for name, tensor, shape in zip(FTP_TENSORS, found, wanted, strict=True):
        if tuple(tensor.shape) != shape:
            raise SpecError(f"{what}: {name} is {list(tensor.shape)}, wanted {list(shape)}")
    schedule = None
    if SCHEDULE in tensors:
        values = _tensor(tensors, SCHEDULE, what)
        if values.ndim != 1:
            raise SpecError(f"{what}: {SCHEDULE} is {list(values.shape)}, wanted a number for each block")
        schedule = tuple(round(float(v), 6) for v in values)
    return TokenRouter(tuple(found), schedule)


def depth_router(source: Any, reads: str, what: str = "mixture_of_depths(router=...)") -> DepthRouter:
    """From a tensor, a safetensors file or a dict: *router.weight [1 or 2, D], once, or for each block; equal ones are one.

    Raises SpecError, naming the tensor.
    """
    if reads not in ("norm", "stream"):
        raise SpecError(f"mixture_of_depths(reads={reads!r}): use 'norm' (behind the block's first norm) or 'stream'")
    tensors = {"router.weight": source} if isinstance(source, Tensor) else _tensors(source, what)
    names = [name for name in tensors if name == "weight" or name.endswith("router.weight")]
    if not names:
        raise SpecError(f"{what}: there is no tensor router.weight, the names are {', '.join(list(tensors)[:4]) or 'none'}")
    names.sort(key=lambda name: [int(part) if part.isdecimal() else -1 for part in re.split(r"[.]", name)])
    found = [_tensor(tensors, name, what) for name in names]
    for name, tensor in zip(names, found, strict=True):
        if tensor.ndim != 2 or tensor.shape[0] not in (1, 2) or tensor.shape != found[0].shape:
            raise SpecError(f"{what}: {name} is {list(tensor.shape)}, wanted [1, D] or [2, D], the same for all blocks")
    tied = all(torch.equal(tensor, found[0]) for tensor in found)
    return DepthRouter(tuple(found[:1] if tied else found), reads)


def token_policy(text: str, what: str) -> Policy:
    """A policy that tokens may be kept by. Raises SpecError."""
    policy = parse_policy(text)
    if policy.name not in POLICIES:
        raise SpecError(f"{what}: {policy.name} is no policy for tokens; use {', '.join(POLICIES)}")
    return policy


def _tensors(source: Any, what: str) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return dict(source)
    if not isinstance(source, str | Path):
        raise SpecError(f"{what}: give the path of a safetensors file or a dict of tensors, not {type(source).__name__}")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(source))
    except (OSError, SafetensorError) as error:
        raise SpecError(f"{what}: {source} cannot be read as safetensors ({error})") from error


def _tensor(tensors: Mapping[str, Any], name: str, what: str) -> Tensor:
    if name not in tensors:
        raise SpecError(f"{what}: the tensor {name} is missing, the names are {', '.join(list(tensors)[:6]) or 'none'}")
    found = tensors[name]
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise SpecError(f"{what}: {name} is no tensor of floating-point numbers")
    if not bool(found.isfinite().all()):
        raise SpecError(f"{what}: {name} has NaN or infinite entries")
    return found.detach().float().contiguous()
