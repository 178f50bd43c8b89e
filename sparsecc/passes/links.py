"""Which slices must go together: constraints between the factors of values, the smallest choice that satisfies all, and its groups.

A mask says, per index of a factor, whether that slice stays. Masks only grow: from what is needed, until every link holds.
"""
from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import Tensor

Key = Any
"""A node, or for a constant the pair (user, constant): each use of a constant may be cut in its own way."""

Place = tuple[Key, int]
"""A factor of a value."""


@dataclass
class Masks:
    """bool [size] per factor of fixed size."""

    of: dict[Place, Tensor] = field(default_factory=dict)

    def grow(self, place: Place, mask: Tensor) -> bool:
        """Keep these too. Whether that changed anything."""
        mine = self.of[place]
        if bool((mask & ~mine).any()):
            self.of[place] = mine | mask
            return True
        return False


@dataclass(frozen=True)
class Span:
    """Entries start:stop of the product of some factors of a value, the last one fastest."""

    key: Key
    factors: tuple[int, ...]
    start: int = 0
    stop: int | None = None

    @property
    def places(self) -> list[Place]:
        """Its factors."""
        return [(self.key, f) for f in self.factors]

    def read(self, masks: Masks) -> Tensor:
        """The entries that stay."""
        if len(self.factors) == 1:
            return masks.of[self.key, self.factors[0]][self.start : self.stop]
        return product([masks.of[place] for place in self.places])[self.start : self.stop]

    def grow(self, masks: Masks, mask: Tensor) -> bool:
        """Keep entries, and with them whatever a product of factors needs."""
        if len(self.factors) == 1 and self.start == 0 and self.stop is None:
            return masks.grow((self.key, self.factors[0]), mask)
        sizes = [len(masks.of[place]) for place in self.places]
        whole = torch.zeros(math.prod(sizes), dtype=torch.bool)
        whole[self.start : self.stop] = mask
        whole = whole.view(sizes)
        changed = False
        for i, place in enumerate(self.places):
            others = [d for d in range(len(sizes)) if d != i]
            changed |= masks.grow(place, whole.any(dim=others) if others else whole)
        return changed


def product(masks: Sequence[Tensor]) -> Tensor:
    """The outer product of masks, flat."""
    result = torch.ones(1, dtype=torch.bool)
    for mask in masks:
        result = (result[:, None] & mask[None, :]).reshape(-1)
    return result


@dataclass(frozen=True)
class Same:
    """Both keep the same entries."""

    a: Span
    b: Span

    @property
    def places(self) -> list[Place]:
        """All factors that it joins."""
        return self.a.places + self.b.places

    def settle(self, masks: Masks) -> bool:
        """Grow until it holds. Whether anything changed."""
        if torch.equal(self.a.read(masks), self.b.read(masks)):
            return False
        changed = self.a.grow(masks, self.b.read(masks))
        return self.b.grow(masks, self.a.read(masks)) or changed


@dataclass(frozen=True)
class Covers:
    """`whole` keeps at least what `part` does, which is gathered from it where it keeps more."""

    part: Span
    whole: Span

    @property
    def places(self) -> list[Place]:
        return self.part.places + self.whole.places

    def settle(self, masks: Masks) -> bool:
        return self.whole.grow(masks, self.part.read(masks))


@dataclass(frozen=True)
class Copies:
    """`copies` holds each entry of `source` `times` times in a row, and may keep some of them."""

    copies: Span
    source: Span
    times: int

    @property
    def places(self) -> list[Place]:
        return self.copies.places + self.source.places

    def settle(self, masks: Masks) -> bool:
        return self.source.grow(masks, self.copies.read(masks).view(-1, self.times).any(1))


@dataclass(frozen=True)
class Blocks:
    """Entries stay or go by `step` at a time."""

    span: Span
    step: int

    @property
    def places(self) -> list[Place]:
        return self.span.places

    def settle(self, masks: Masks) -> bool:
        mask = self.span.read(masks)
        padded = torch.nn.functional.pad(mask, (0, -len(mask) % self.step))
        return self.span.grow(masks, padded.view(-1, self.step).any(1).repeat_interleave(self.step)[: len(mask)])


@dataclass(frozen=True)
class Groups:
    """A grouped convolution: groups of inputs go with groups of outputs, and those that stay have as many entries as each other."""

    inputs: Span
    outputs: Span
    groups: int

    @property
    def places(self) -> list[Place]:
        return self.inputs.places + self.outputs.places

    def settle(self, masks: Masks) -> bool:
        changed = False
        a, b = (span.read(masks).view(self.groups, -1) for span in (self.inputs, self.outputs))
        stays = a.any(1) | b.any(1)
        for span, mask in ((self.inputs, a), (self.outputs, b)):
            wanted = max(1, int(mask.sum(1).max()))
            grown = mask.clone()
            for group in stays.nonzero()[:, 0].tolist():
                spare = (~mask[group]).nonzero()[:, 0][: wanted - int(mask[group].sum())]
                grown[group, spare] = True
            changed |= span.grow(masks, grown.reshape(-1)) if stays.any() else False
        return changed


@dataclass(frozen=True)
class Whole:
    """Everything stays."""

    span: Span

    @property
    def places(self) -> list[Place]:
        return self.span.places

    def settle(self, masks: Masks) -> bool:
        return self.span.grow(masks, torch.ones_like(self.span.read(masks)))


Link = Same | Covers | Copies | Blocks | Groups | Whole


def settle(masks: Masks, links: Sequence[Link]) -> None:
    """The smallest masks that hold what is there and satisfy every link."""
    places = [link.places for link in links]
    users: dict[Place, list[int]] = {}
    for i, joined in enumerate(places):
        for place in joined:
            users.setdefault(place, []).append(i)
    waiting, listed = deque(range(len(links))), [True] * len(links)
    while waiting:
        i = waiting.popleft()
        listed[i] = False
        before = [masks.of[place] for place in places[i]]
        if links[i].settle(masks):
            for place, old in zip(places[i], before, strict=True):
                if masks.of[place] is not old:
                    again = [user for user in users[place] if not listed[user]]
                    waiting.extend(again)
                    for user in again:
                        listed[user] = True


def components(places: Iterable[Place], links: Sequence[Link]) -> Iterator[list[Place]]:
    """The groups of factors that are cut together, in the order of their first place. What is gathered from is not cut with its part."""
    graph: nx.Graph = nx.Graph()
    graph.add_nodes_from(places)
    for link in links:
        if isinstance(link, Covers):
            continue
        first, *others = link.places
        graph.add_edges_from((first, other) for other in others)
    order = {place: i for i, place in enumerate(graph.nodes)}
    for found in nx.connected_components(graph):
        yield sorted(found, key=order.__getitem__)
