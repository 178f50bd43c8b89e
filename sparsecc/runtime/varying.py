"""What of a chain's arguments is another in every call, though one recording may serve: the length of KV caches, and how many sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sparsecc.codegen.tvm.tiles import SPAN
from sparsecc.ir import token_ops
from sparsecc.ir.infer import value_of


@dataclass(frozen=True)
class Caches:
    """Which arguments are KV caches [B, G, past, D], and masks of what they become: their length is another in every step, and a replay
    serves all."""

    caches: tuple[int, ...]
    masks: tuple[int, ...]
    new: int
    """Tokens of a step."""

    @staticmethod
    def of(nodes: Sequence[fx.Node], tensors: Sequence[fx.Node]) -> Caches | None:
        """None unless all of them only go into caches, and these only into attention."""
        appends = [node for node in nodes if node.target is token_ops.APPEND]
        if not appends:
            return None
        new = value_of(appends[0].all_input_nodes[1])
        for node in appends:
            if any(user in nodes and (user.target is not token_ops.ATTENTION or node not in user.args[1:3]) for user in node.users):
                return None
        masked = [node for node in nodes if node.target is token_ops.ATTENTION and {*node.all_input_nodes[1:3]} <= {*appends}]
        caches = tuple(i for i, t in enumerate(tensors) if any(a.args[0] is t for a in appends))
        masks = tuple(i for i, t in enumerate(tensors) if any(a.args[3] is t for a in masked))
        known = isinstance(new, Tensor) and isinstance(new.shape[2], int)
        for i in (*caches, *masks):
            users = [user for user in tensors[i].users if user in nodes]
            known = known and all(u in (appends if i in caches else masked) for u in users)
        return Caches(caches, masks, new.shape[2]) if known else None

    def length(self, tensors: Sequence[Tensor]) -> int:
        """Tokens that all of them hold; 0 if they differ, or don't lie as kernels want them for that."""
        caches, masks = [tensors[i] for i in self.caches], [tensors[i] for i in self.masks]
        past, varying = int(caches[0].shape[2]), {*self.caches, *self.masks}
        if any(t.shape[2] != past for t in caches) or any(m.shape[-1] != past + self.new for m in masks):
            return 0
        # Each alone in its memory: a replay finds arguments by the memory that they lie in.
        starts = {t.data_ptr() for t in (*caches, *masks)}
        alone = len(starts) == len(caches) + len(masks) and all(t.storage_offset() == 0 and t.is_contiguous() for t in (*caches, *masks))
        others = (t.untyped_storage().data_ptr() for i, t in enumerate(tensors) if i not in varying)
        return past if alone and not any(start in starts for start in others) else 0

    def key(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """What decides how kernels are called, but for the length."""
        caches = tuple((t.dtype, t.shape[:2], t.shape[3]) for t in (tensors[i] for i in self.caches))
        return caches, tuple((t.dtype, t.shape[:-1]) for t in (tensors[i] for i in self.masks))


@dataclass(frozen=True)
class Batch:
    """Which arguments have the batch as their first dimension, and which sizes are it."""

    tensors: tuple[bool, ...]
    sizes: tuple[bool, ...]

    @staticmethod
    def of(nodes: Sequence[fx.Node], tensors: Sequence[fx.Node], sizes: Sequence[fx.Node]) -> Batch | None:
        """None unless every value of the chain has the symbolic batch first, or is one for all sequences."""
        if not all(isinstance(value_of(node), Tensor) for node in tensors):
            return None  # code that lower has just written
        values = [value_of(node) for node in (*tensors, *nodes)]
        first = [str(t.shape[0]) for t in values[: len(tensors)] if t.ndim > 2 and isinstance(t.shape[0], torch.SymInt)]
        leading = [str(t.shape[0]) if t.ndim > 1 else "" for t in values if isinstance(t, Tensor)]
        texts = [str(value_of(size)) for size in sizes]
        if not first or not all(text in (first[0], "1") for text in leading) or any(first[0] in text != first[0] for text in texts):
            return None
        if any(first[0] in str(size) for t in values[: len(tensors)] for size in t.shape[1:]):
            return None  # captured with as many sequences as something else
        results = [node for node in nodes if any(user not in nodes for user in node.users)]
        if any(str(value_of(node).shape[0]) != first[0] for node in results):
            return None
        return Batch(tuple(str(value_of(t).shape[0]) == first[0] for t in tensors), tuple(text == first[0] for text in texts))

    def size(self, tensors: Sequence[Tensor]) -> int:
        """Sequences."""
        return int(tensors[self.tensors.index(True)].shape[0])

    def step(self, tensors: Sequence[Tensor]) -> int:
        """As few sequences as give every thread two spans: fewer would leave it waiting for weights."""
        tokens = max(int(t.shape[-2]) for t, batched in zip(tensors, self.tensors, strict=True) if batched)  # a mask may have one row
        spans = max(1, -(-tokens // SPAN))
        return -(-2 * torch.get_num_threads() // spans)

    def part(self, tensors: Sequence[Tensor], sizes: Sequence[int], first: int, end: int) -> tuple[list[Tensor], list[int]]:
        """The arguments for some of the sequences."""
        cut = [t[first:end] if batched else t for t, batched in zip(tensors, self.tensors, strict=True)]
        return cut, [end - first if batched else size for size, batched in zip(sizes, self.sizes, strict=True)]
