"""Which entries of which weights belong to one channel, found by dataflow: torch.export on example inputs, then one walk over the graph.

Every element of every value carries the number of the channel that it belongs to, or -1: an int64 tensor of the value's shape, with stride
0 over batch and positions. Ops that move elements move the numbers in the same way; elementwise ops join the numbers of their
operands; a linear or convolution reads those of its input and makes new ones. What an op does to them is in `rules.py`; where there is
no rule, the channels that get there are `blocked`, with the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from sparsecc.capture import _export, _quiet
from sparsecc.errors import CaptureError
from sparsecc.prune.calibrate import arguments, evaluating

Role = Literal["writes", "reads", "scales"]


@dataclass(frozen=True)
class Const:
    """A parameter, or a part of it: for each element, its place in the flattened parameter, int64."""

    name: str
    index: Tensor
    whole: bool = True


@dataclass(frozen=True)
class Use:
    """What a parameter has to do with channels: for each of its entries the channel, int64 that broadcasts to its shape, -1 for none.

    writes: the entry helps to compute that channel; reads: it multiplies it; scales: one number of a norm, a bias or a position.
    """

    name: str
    role: Role
    ids: Tensor


@dataclass(frozen=True)
class Attention:
    """One attention: the channels of q, k, v and its result, int64 [heads, features]; grouped k and v stand once for every query head."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor


class Channels:
    """Numbered channels, and which of them are one: by a product (one factor at zero is enough) or by anything else."""

    def __init__(self) -> None:
        self._any: list[int] = []
        self._product: list[int] = []

    def new(self, count: int) -> Tensor:
        first = len(self._any)
        self._any.extend(range(first, first + count))
        self._product.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def join(self, a: Tensor, b: Tensor, product: bool = False) -> None:
        """Makes a[i] and b[i] one, for all i where neither is -1."""
        a, b, count = a.reshape(-1), b.reshape(-1), len(self._any)
        pairs = torch.unique((a * count + b)[(a >= 0) & (b >= 0) & (a != b)])
        for x, y in zip((pairs // count).tolist(), (pairs % count).tolist(), strict=True):
            self._union(self._any, x, y)
            if product:
                self._union(self._product, x, y)

    def classes(self, product: bool = False) -> Tensor:
        """Channel -> the number of its class, int64."""
        parents = self._product if product else self._any
        return torch.tensor([self._root(parents, x) for x in range(len(parents))], dtype=torch.int64)

    @staticmethod
    def _root(parents: list[int], x: int) -> int:
        while parents[x] != x:
            parents[x] = parents[parents[x]]
            x = parents[x]
        return x

    def _union(self, parents: list[int], x: int, y: int) -> None:
        x, y = self._root(parents, x), self._root(parents, y)
        parents[max(x, y)] = min(x, y)


@dataclass
class Flow:
    """What the walk over a model finds; `blocked` maps a channel to why it cannot be followed."""

    channels: Channels = field(default_factory=Channels)
    uses: list[Use] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    blocked: dict[int, str] = field(default_factory=dict)
    scores: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    env: dict[fx.Node, Any] = field(default_factory=dict)
    _made: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def made_by(self, const: Const, axis: int) -> Tensor:
        """The channels that a weight makes, one for each index of `axis`: the same at every call of it."""
        places = const.index.movedim(axis, 0).reshape(const.index.shape[axis], -1)[:, 0]
        key = (const.name, *places[:2].tolist())
        if key not in self._made:
            self._made[key] = self.channels.new(const.index.shape[axis])
        return self._made[key]

    def use(self, const: Const, role: Role, ids: Tensor, shapes: Mapping[str, torch.Size]) -> None:
        """Notes the channels `ids` (broadcasting to const's shape) of a parameter's entries."""
        if not const.whole:
            full = torch.full((shapes[const.name].numel(),), -1)
            full[const.index.reshape(-1)] = ids.expand(const.index.shape).reshape(-1)
            ids = full.view(shapes[const.name])
        self.uses.append(Use(const.name, role, ids))

    def block(self, ids: Tensor, reason: str) -> None:
        """These channels are not followed any further, so they cannot be removed."""
        for channel in torch.unique(thin(ids)).tolist():
            if channel >= 0:
                self.blocked.setdefault(channel, reason)


def trace(model: nn.Module, example: Any) -> Flow:
    """The channels of a model, followed from weight to weight. `example` are its inputs: a dict, a tuple or one tensor.

    Raises CaptureError where torch.export cannot go.
    """
    from sparsecc.prune.rules import apply

    args, kwargs = arguments(model, example)
    with _quiet(), torch.no_grad(), evaluating(model):
        exported = _export(model, args, kwargs, None)
    first = _first_names(model)
    signature = exported.graph_signature
    constants = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    flow = Flow()
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            name = first.get(constants.get(node.name, ""))
            flow.env[node] = None if name is None else Const(name, torch.arange(shapes[name].numel()).view(shapes[name]))
        elif node.op == "output":
            for value in node.all_input_nodes:
                for ids in tensors(flow.env[value]):
                    flow.block(ids, "they are an output of the model")
        elif node.op == "call_function":
            flow.env[node] = flow.env[node.args[0]][node.args[1]] if _is_item(flow, node) else apply(flow, node, shapes)
        else:
            raise CaptureError(f"the exported model holds a {node.op} node ({node}): name the coupled layers with groups= instead")
    return flow


def thin(ids: Tensor) -> Tensor:
    """Without the copies along dimensions of stride 0: their size becomes 1."""
    for dim in range(ids.ndim):
        if ids.stride(dim) == 0 and ids.shape[dim] > 1:
            ids = ids.narrow(dim, 0, 1)
    return ids


def folded(ids: Tensor) -> Tensor:
    """The same numbers, with stride 0 along every dimension that only repeats them."""
    shape = ids.shape
    ids = thin(ids)
    for dim in range(ids.ndim - 1):
        if ids.shape[dim] > 1 and torch.equal(ids, ids.narrow(dim, 0, 1).expand(ids.shape)):
            ids = ids.narrow(dim, 0, 1)
    return ids.expand(shape)


def constant_along(ids: Tensor, dims: Sequence[int]) -> Tensor:
    """One number along `dims`, which become 1: that of all elements, or -1 where they differ."""
    ids = thin(ids)
    dims = [d for d in dims if ids.shape[d] > 1]
    if not dims:
        return ids
    low, high = ids.amin(dims, keepdim=True), ids.amax(dims, keepdim=True)
    return torch.where(low == high, low, -1)


def tensors(value: Any) -> Iterator[Tensor]:
    """The channel numbers in a value of the walk: itself, or those of its parts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part)


def _is_item(flow: Flow, node: fx.Node) -> bool:
    return node.target is operator.getitem and isinstance(flow.env[node.all_input_nodes[0]], tuple | list)


def _first_names(model: nn.Module) -> dict[str, str]:
    """Parameter name -> the first name of that tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
