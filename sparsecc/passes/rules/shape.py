"""Reshapes, permutations, slices and concatenations: indices move, nothing is computed."""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from sparsecc.passes.dims import Axes, Factor, Facts, Stop, one, regroup, unknown
from sparsecc.passes.links import Copies, Link, Same, Span, Whole
from sparsecc.passes.rules.base import Flow, Need, argument, fixed, moved, name_of, same

if TYPE_CHECKING:
    from sparsecc.passes.propagate import Analysis
    from sparsecc.passes.slice import Cutter

aten = torch.ops.aten


# ---- permutations


def permute(a: Analysis, node: fx.Node) -> Flow:
    """transpose, permute, t, mT"""
    rank = len(a.facts(node, node.all_input_nodes[0]).axes)
    order = list(range(rank))
    if name_of(node) == "permute":
        given = node.args[1:] if isinstance(node.args[1], int) else node.args[1]
        order = [int(d) % rank for d in given]  # type: ignore[union-attr,arg-type]
    else:
        i, j = (0, rank - 1) if len(node.args) < 3 else (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
        order[i], order[j] = order[j], order[i]
    return moved(a, node, list(order))


def unsqueeze(a: Analysis, node: fx.Node) -> Flow:
    """One more axis of size 1."""
    rank = len(a.facts(node, node.all_input_nodes[0]).axes)
    order: list[int | None] = list(range(rank))
    order.insert(int(argument(node, 1, "dim")) % (rank + 1), None)
    return moved(a, node, order)


def squeeze(a: Analysis, node: fx.Node) -> Flow:
    """Without axes of size 1."""
    x = a.facts(node, node.all_input_nodes[0])
    rank, dims = len(x.axes), argument(node, 1, "dim")
    wanted = range(rank) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % rank for d in wanted if not x.axes[d % rank]}
    return moved(a, node, [d for d in range(rank) if d not in gone])


def copy_of(a: Analysis, node: fx.Node) -> Flow:
    """The same entries: contiguous, to, dropout of inference"""
    if name_of(node) == "dropout" and argument(node, 2, "training", argument(node, 2, "train", False)) is not False:
        raise Stop("dropout in training")
    return same(a, node)


# ---- reshapes


@dataclass(frozen=True)
class Reshaped(Flow):
    """`origin`: for each piece of the operand's factors its factor; `pieces`: for each factor of the result its pieces."""

    operand: fx.Node
    origin: tuple[int, ...]
    pieces: tuple[tuple[int, ...], ...]
    sizes: tuple[Any, ...]

    @property
    def rigid(self) -> bool:
        return False

    def _wide(self) -> list[int]:
        """Dimensions of an array of the pieces."""
        wide: list[int] = []
        for factor, pieces in zip(self.facts.factors, self.pieces, strict=True):
            wide += [int(self.sizes[p]) for p in pieces] if factor.tracked else [1] * len(pieces)
        return wide

    def needs(self, need: Tensor) -> Iterator[Need]:
        x = self.a.facts(self.node, self.operand)
        mask = need.reshape(self._wide())
        for place, index in enumerate(self.origin):
            if not x.factors[index].tracked:
                mask = mask.any(place, keepdim=True)
        yield Need(self.operand, mask.reshape(x.known.shape))

    def links(self) -> Iterator[Link]:
        key, x = self.a.key(self.node, self.operand), self.a.facts(self.node, self.operand)
        made: dict[int, list[int]] = {}
        for new, (first, *copies) in enumerate(self.pieces):
            if copies:
                times = math.prod(int(self.sizes[p]) for p in copies)
                yield Copies(Span(self.node, (new,)), Span(key, (self.origin[first],)), times)
                yield Whole(Span(key, (self.origin[copies[0]],)))  # copies are made in full, and gathered from
            else:
                made.setdefault(self.origin[first], []).append(new)
        for old, new in made.items():
            if isinstance(x.factors[old].size, int):
                yield Same(Span(self.node, tuple(new)), Span(key, (old,)))

    def cut(self, c: Cutter) -> None:
        c.constant(self.node, self.operand)
        sizes: list[Any] = []
        takes: list[tuple[int, Tensor]] = []
        for axis in range(len(self.facts.axes)):
            size, chosen = self._axis(c, axis)
            sizes.append(size)
            if chosen is not None:
                takes.append((axis, chosen))
        if any(size is not None for size in sizes):
            shape = _with_sizes(self.a.shape(self.node), _size_arguments(self.node, self.a), sizes)
            _set_sizes(self.node, self.operand, shape)
        for axis, chosen in takes:
            c.after(self.node, axis, chosen)
        if name_of(self.node) == "view" and self.facts.tracked:
            self.node.target = "reshape" if self.node.op == "call_method" else aten.reshape.default  # strides are others now

    def _axis(self, c: Cutter, axis: int) -> tuple[Any, Tensor | None]:
        """(its new size: None if unchanged, -1 if it varies; what is then gathered from it)."""
        places = self.facts.at(axis)
        masks = [c.masks.of.get((self.node, place)) for place in places]
        if all(mask is None or bool(mask.all()) for mask in masks):
            return None, None
        if any(mask is None for mask in masks):
            return -1, None
        joined = [len(self.pieces[place]) > 1 for place in places]
        if not any(joined):
            return math.prod(int(mask.sum()) for mask in masks if mask is not None), None
        if len(places) > 1:
            raise AssertionError("joined copies are an axis of their own")
        old = self.origin[self.pieces[places[0]][0]]
        times = math.prod(int(self.sizes[p]) for p in self.pieces[places[0]][1:])
        source, mask = c.masks.of[self.a.key(self.node, self.operand), old], masks[0]
        assert mask is not None
        have = source.repeat_interleave(times)
        chosen = mask[have].nonzero()[:, 0]
        return int(have.sum()), None if len(chosen) == int(have.sum()) else chosen


def reshape(a: Analysis, node: fx.Node) -> Flow:
    """view, reshape, flatten, unflatten: axes are cut and joined."""
    operand = node.all_input_nodes[0]
    x, shape = a.facts(node, operand), a.shape(node)
    if isinstance(argument(node, 1, "size"), torch.dtype):
        raise Stop("a view of another dtype")
    grouped = regroup(x.factors, shape)
    origin = list(grouped.origin)
    sizes = [factor.size for axis in grouped.axes for factor in axis]
    axes: list[tuple[Factor, ...]] = []
    pieces: list[tuple[int, ...]] = []
    mixed, place = 0, 0
    for axis in grouped.axes:
        at = list(range(place, place + len(axis)))
        place += len(axis)
        new, parts = list(axis), [(p,) for p in at]
        if len(axis) == 2 and axis[0].tracked and axis[1].free and not axis[1].tracked:
            if origin.count(origin[at[0]]) > 1:
                raise Stop("copies are joined with a part of an axis")
            new, parts = [Factor(int(axis[0].size) * int(axis[1].size), True)], [tuple(at)]
        mixed += any(f.tracked for f in new) and not all(isinstance(f.size, int) for f in new)
        axes.append(tuple(new))
        pieces += parts
    given = _size_arguments(node, a)
    free_size = any(g == -1 and not isinstance(size, int) and not any(f.tracked for f in axis)
                    for g, size, axis in zip(given, shape, axes, strict=True))
    if mixed + free_size * bool(mixed) > 1:
        raise Stop("two axes that vary hold entries that are told apart")
    wide: list[int] = []
    for place, index in enumerate(origin):
        wide.append(int(sizes[place]) if x.factors[index].tracked else 1)
    known, value = x.known.reshape(wide), x.value.reshape(wide)
    spread = [int(sizes[p]) if len(part) > 1 else wide[p] for part in pieces for p in part]
    final = [math.prod(spread[p] for p in part) for part in pieces]
    known, value = known.expand(spread).reshape(final), value.expand(spread).reshape(final)
    return Reshaped(a, node, Facts(tuple(axes), known, value), operand, tuple(origin), tuple(pieces), tuple(sizes))


def _size_arguments(node: fx.Node, a: Analysis) -> list[Any]:
    """What a view was told, an int, -1 or a node per axis."""
    name = name_of(node)
    if name in ("flatten", "unflatten"):
        return list(a.shape(node))
    given = argument(node, 1, "size", argument(node, 1, "shape"))
    return list(given) if isinstance(given, list | tuple | torch.Size) else list(node.args[1:])


def _with_sizes(shape: Sequence[Any], given: list[Any], sizes: Sequence[Any]) -> list[Any]:
    """The arguments with new sizes; there may be one -1."""
    for axis, (size, want) in enumerate(zip(sizes, shape, strict=True)):
        if size is not None:
            given[axis] = size
        elif given[axis] == -1 and isinstance(want, int) and -1 in [s for s in sizes if s is not None]:
            given[axis] = want
    return given


def _set_sizes(node: fx.Node, operand: fx.Node, shape: list[Any]) -> None:
    """Flatten and unflatten say only a part of the sizes: a size that varies there is left to torch."""
    name = name_of(node)
    if name == "flatten":
        return
    if name == "unflatten":
        dim = int(argument(node, 1, "dim"))
        count = len(argument(node, 2, "sizes"))
        start = dim if dim >= 0 else len(shape) - count + 1 + dim
        node.args = (operand, dim, list(shape[start : start + count]))
    elif node.op == "call_method" and not isinstance(node.args[1], list | tuple):
        node.args = (operand, *shape)
    else:
        node.args = (operand, shape)
        node.kwargs = {}


# ---- expand


@dataclass(frozen=True)
class Expanded(Flow):
    """`old`: for each factor of the result that of the operand, None for copies."""

    operand: fx.Node
    old: tuple[int | None, ...]

    @property
    def rigid(self) -> bool:
        return False

    def needs(self, need: Tensor) -> Iterator[Need]:
        made = tuple(i for i, old in enumerate(self.old) if old is None)
        yield Need(self.operand, need.any(dim=made) if made else need)

    def links(self) -> Iterator[Link]:
        key = self.a.key(self.node, self.operand)
        for new, old in enumerate(self.old):
            if old is not None and isinstance(self.facts.factors[new].size, int):
                yield Same(Span(self.node, (new,)), Span(key, (old,)))

    def cut(self, c: Cutter) -> None:
        c.constant(self.node, self.operand)
        sizes = [c.count(self.node, self.facts, axis) for axis in range(len(self.facts.axes))]
        if any(size is not None for size in sizes):
            given = _size_arguments(self.node, self.a)
            given = [old if size is None or old == -1 else size for old, size in zip(given, sizes, strict=True)]
            self.node.args = (self.operand, *given) if self.node.op == "call_method" else (self.operand, given)


def expand(a: Analysis, node: fx.Node) -> Flow:
    """Axes of size 1 become copies."""
    operand = node.all_input_nodes[0]
    x, shape = a.facts(node, operand), a.shape(node)
    lead = len(shape) - len(x.axes)
    axes: list[tuple[Factor, ...]] = []
    old: list[int | None] = []
    for axis, size in enumerate(shape):
        mine = x.axes[axis - lead] if axis >= lead else ()
        if mine or one(size):
            old += list(x.at(axis - lead)) if mine else []
            axes.append(mine)
        else:
            old.append(None)
            axes.append((Factor(size, free=isinstance(size, int)),))
    dims = [1 if o is None else x.known.shape[o] for o in old]
    return Expanded(a, node, Facts(tuple(axes), x.known.reshape(dims), x.value.reshape(dims)), operand, tuple(old))


# ---- parts


@dataclass(frozen=True)
class Part(Flow):
    """Entries start:stop of one axis of the operand; `drops`: that axis, of which one entry is left, goes away.

    `whole`: nothing is told apart there, and the node stays as it is."""

    operand: fx.Node
    axis: int
    start: int
    stop: int
    drops: bool
    whole: bool

    def needs(self, need: Tensor) -> Iterator[Need]:
        x = self.a.facts(self.node, self.operand)
        if self.whole:
            yield Need(self.operand, need.reshape(x.known.shape))
            return
        places = x.at(self.axis)
        sizes = [int(x.factors[p].size) for p in places]
        shape = [math.prod(sizes) if i == places[0] else d for i, d in enumerate(x.known.shape) if i not in places[1:]]
        mask = torch.zeros(shape, dtype=torch.bool)
        mask.narrow(places[0], self.start, self.stop - self.start).copy_(need.unsqueeze(places[0]) if self.drops else need)
        mask = mask.reshape([sizes[i - places[0]] if i in places else d for i, d in enumerate(x.known.shape)])
        for place in places:
            if not x.factors[place].tracked:
                mask = mask.any(place, keepdim=True)
        yield Need(self.operand, mask)

    def links(self) -> Iterator[Link]:
        x, key = self.a.facts(self.node, self.operand), self.a.key(self.node, self.operand)
        mine, shift = x.at(self.axis), len(self.facts.factors) - len(x.factors)
        for old, factor in enumerate(x.factors):
            if old not in mine and isinstance(factor.size, int):
                yield Same(Span(self.node, (old if old < mine.start else old + shift,)), Span(key, (old,)))
        if self.drops and not self.whole:
            yield Whole(Span(key, tuple(mine), self.start, self.stop))
        elif not self.whole:
            yield Same(Span(self.node, (mine.start,)), Span(key, tuple(mine), self.start, self.stop))

    def cut(self, c: Cutter) -> None:
        c.constant(self.node, self.operand)
        if self.whole:
            return
        mask = c.mask(self.a.key(self.node, self.operand), self.a.facts(self.node, self.operand), self.axis)
        if mask is None or bool(mask.all()):
            return
        start, stop = int(mask[: self.start].sum()), int(mask[: self.stop].sum())
        if self.drops:
            self.node.target, self.node.args, self.node.kwargs = aten.select.int, (self.operand, self.axis, start), {}
        else:
            self.node.target, self.node.args, self.node.kwargs = aten.slice.Tensor, (self.operand, self.axis, start, stop), {}
        self.node.op = "call_function"


def part(a: Analysis, node: fx.Node, operand: fx.Node, axis: int, start: Any, stop: Any, drops: bool = False) -> Flow:
    """x[..., start:stop, ...], or x[..., start, ...]"""
    x = a.facts(node, operand)
    axis %= len(x.axes)
    places = x.at(axis)
    if not any(x.factors[p].tracked or x.factors[p].free for p in places):
        left: Axes = () if drops else unknown((a.shape(node)[axis],)).axes
        new: Axes = x.axes[:axis] + left + x.axes[axis + 1 :]
        keep = [d for i, d in enumerate(x.known.shape) if i not in places]
        if not drops:
            keep[places.start : places.start] = [1] * len(new[axis])
        return Part(a, node, Facts(new, x.known.reshape(keep), x.value.reshape(keep)), operand, axis, 0, 0, drops, True)
    if any(isinstance(bound, fx.Node) for bound in (start, stop)):
        raise Stop("the bounds of a slice vary")
    size = fixed(x.length(axis), "a sliced axis")
    start, stop, _ = slice(start, stop).indices(size)
    sizes = [int(x.factors[p].size) if p in places else d for p, d in enumerate(x.known.shape)]
    joined = [size if i == places[0] else d for i, d in enumerate(sizes) if i not in places[1:]]
    known, value = (t.expand(sizes).reshape(joined).narrow(places[0], start, stop - start) for t in (x.known, x.value))
    if drops:
        known, value = known.squeeze(places[0]), value.squeeze(places[0])
    elif stop - start == 1:
        raise Stop("a slice of one entry")
    middle: Axes = () if drops else ((Factor(stop - start, True),),)
    return Part(a, node, Facts(x.axes[:axis] + middle + x.axes[axis + 1 :], known, value), operand, axis, start, stop, drops, False)


def slice_(a: Analysis, node: fx.Node) -> Flow:
    """x[start:end] along one dimension"""
    operand: Any = node.args[0]
    if argument(node, 4, "step", 1) != 1:
        return _untold(a, node, operand, int(argument(node, 1, "dim", 0)))
    return part(a, node, operand, int(argument(node, 1, "dim", 0)), argument(node, 2, "start"), argument(node, 3, "end"))


def narrow(a: Analysis, node: fx.Node) -> Flow:
    """x[start:start + length]"""
    operand: Any = node.args[0]
    start, length = argument(node, 2, "start"), argument(node, 3, "length")
    stop = start + length if isinstance(start, int) and isinstance(length, int) and start >= 0 else node
    return part(a, node, operand, int(argument(node, 1, "dim")), start, stop)


def select(a: Analysis, node: fx.Node) -> Flow:
    """x[index] along one dimension"""
    operand: Any = node.args[0]
    return _select(a, node, operand, int(argument(node, 1, "dim")), argument(node, 2, "index"))


def _select(a: Analysis, node: fx.Node, operand: fx.Node, axis: int, index: Any) -> Flow:
    x = a.facts(node, operand)
    axis %= len(x.axes)
    if not x.axes[axis]:
        return moved(a, node, [d for d in range(len(x.axes)) if d != axis])
    if isinstance(index, int) and isinstance(x.length(axis), int):
        index %= int(x.length(axis))
        return part(a, node, operand, axis, index, index + 1, True)
    return part(a, node, operand, axis, node, node, True)


def _untold(a: Analysis, node: fx.Node, operand: fx.Node, axis: int) -> Flow:
    """A slice with steps, of an axis whose entries are not told apart."""
    x = a.facts(node, operand)
    if any(x.factors[p].tracked for p in x.at(axis)):
        raise Stop("a slice with steps")
    return part(a, node, operand, axis, None, None)


# ---- splits: the tuple passes for its operand, its items are parts


@dataclass(frozen=True)
class Split(Flow):
    """`bounds`: where the items begin and end."""

    operand: fx.Node
    axis: int
    bounds: tuple[tuple[int, int], ...]
    drops: bool

    def needs(self, need: Tensor) -> Iterator[Need]:
        yield Need(self.operand, need)

    def links(self) -> Iterator[Link]:
        key = self.a.key(self.node, self.operand)
        for place, factor in enumerate(self.facts.factors):
            if isinstance(factor.size, int):
                yield Same(Span(self.node, (place,)), Span(key, (place,)))


def split(a: Analysis, node: fx.Node) -> Flow:
    """split, chunk, unbind"""
    operand: Any = node.args[0]
    x, name = a.facts(node, operand), name_of(node)
    axis = int(argument(node, 1, "dim", 0) if name == "unbind" else argument(node, 2, "dim", 0)) % len(x.axes)
    size = fixed(x.length(axis), "a split axis")
    given = argument(node, 1, {"chunk": "chunks", "split": "split_size", "split_with_sizes": "split_sizes"}.get(name, "dim"))
    if name == "unbind":
        given = 1
    elif name == "chunk":
        given = -(-size // int(given))
    sizes = list(given) if isinstance(given, list | tuple) else [min(given, size - start) for start in range(0, size, given)]
    if not all(isinstance(s, int) for s in sizes):
        raise Stop("the sizes of a split vary")
    ends = torch.tensor(sizes).cumsum(0).tolist()
    bounds = tuple((end - length, end) for end, length in zip(ends, sizes, strict=True))
    return Split(a, node, x, operand, axis, bounds, name == "unbind")


@dataclass(frozen=True)
class Item(Part):
    """A part of a split's operand: the split itself is left behind where anything is cut."""

    def cut(self, c: Cutter) -> None:
        flow = self.a.flows[self.operand]
        assert isinstance(flow, Split)
        if any(not bool(c.masks.of[place].all()) for place in Span(self.operand, tuple(range(len(flow.facts.factors)))).places
               if place in c.masks.of):
            start, stop = self.start, self.stop
            if (mask := c.mask(self.operand, flow.facts, self.axis)) is not None:
                start, stop = int(mask[:start].sum()), int(mask[:stop].sum())
            self.node.op, self.node.kwargs = "call_function", {}
            if self.drops:
                self.node.target, self.node.args = aten.select.int, (flow.operand, self.axis, start)
            else:
                self.node.target, self.node.args = aten.slice.Tensor, (flow.operand, self.axis, start, stop)


def getitem(a: Analysis, node: fx.Node) -> Flow:
    """An item of a split, or a tensor's x[:, 0, None, ..., 2:5]"""
    operand: Any = node.args[0]
    flow, index = a.flows.get(operand), node.args[1]
    if isinstance(flow, Split):
        start, stop = flow.bounds[int(index)]  # type: ignore[arg-type]
        made = part(a, node, operand, flow.axis, start, stop, flow.drops)
        assert isinstance(made, Part)
        if made.whole:
            made = replace(made, start=start, stop=stop)
        return Item(**{name: getattr(made, name) for name in made.__dataclass_fields__})
    if not a.is_value(operand):
        raise Stop("an item of a tuple")
    return _indexed(a, node, operand, index)


def _indexed(a: Analysis, node: fx.Node, operand: fx.Node, index: Any) -> Flow:
    """At most one axis whose entries are told apart may be indexed, and then alone."""
    x = a.facts(node, operand)
    items = list(index) if isinstance(index, tuple) else [index]
    given = sum(1 for i in items if i is not None and i is not Ellipsis)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (len(x.axes) - given)
    else:
        items += [slice(None)] * (len(x.axes) - given)
    trivial = [i for i in items if i is None or i == slice(None)]
    if len(trivial) == len(items):
        axes = iter(range(len(x.axes)))
        return moved(a, node, [None if i is None else next(axes) for i in items])
    if None in items or len(trivial) != len(items) - 1:
        raise Stop("an index of several axes")
    axis = next(n for n, i in enumerate(items) if i != slice(None))
    chosen = items[axis]
    if isinstance(chosen, slice) and chosen.step in (None, 1):
        return part(a, node, operand, axis, chosen.start, chosen.stop)
    if isinstance(chosen, int):
        return _select(a, node, operand, axis, chosen)
    raise Stop("an index that is a value")


# ---- concatenation


@dataclass(frozen=True)
class Joined(Flow):
    """cat along `axis`; `parts`: operand, where it starts and ends, and what aligns its other axes."""

    axis: int
    parts: tuple[tuple[fx.Node, int, int], ...]

    def needs(self, need: Tensor) -> Iterator[Need]:
        place = self.facts.at(self.axis)[0]
        for operand, start, stop in self.parts:
            x = self.a.facts(self.node, operand)
            mask = need.narrow(place, start, stop - start) if self.facts.factors[place].tracked else need
            sizes = [int(x.factors[p].size) for p in x.at(self.axis)] if self.facts.factors[place].tracked else [1] * len(x.at(self.axis))
            mask = mask.reshape([*mask.shape[:place], *sizes, *mask.shape[place + 1 :]])
            for dim, size in enumerate(x.known.shape):
                if size == 1 and mask.shape[dim] != 1:
                    mask = mask.any(dim, keepdim=True)
            yield Need(operand, mask.expand(x.known.shape))

    def links(self) -> Iterator[Link]:
        place = self.facts.at(self.axis)[0]
        for operand, start, stop in self.parts:
            key, x = self.a.key(self.node, operand), self.a.facts(self.node, operand)
            mine = x.at(self.axis)
            if isinstance(self.facts.factors[place].size, int):
                yield Same(Span(self.node, (place,), start, stop), Span(key, tuple(mine)))
            old = [p for p in range(len(x.factors)) if p not in mine]
            new = [p for p in range(len(self.facts.factors)) if p != place]
            for mine_at, own in zip(old, new, strict=True):
                if isinstance(self.facts.factors[own].size, int):
                    yield Same(Span(self.node, (own,)), Span(key, (mine_at,)))

    def cut(self, c: Cutter) -> None:
        for operand, _, _ in self.parts:
            c.constant(self.node, operand)


def cat(a: Analysis, node: fx.Node) -> Flow:
    """Operands one after the other along an axis; on the others they must be cut alike."""
    listed: Any = node.args[0] if node.args else node.kwargs["tensors"]
    facts = [a.facts(node, x) for x in listed]
    rank = len(facts[0].axes)
    axis = int(argument(node, 1, "dim", 0)) % rank
    if any(not f.axes[axis] for f in facts):
        raise Stop("a part of a single entry")
    for j in range(rank):
        if j != axis and len({tuple(x.size for x in f.axes[j]) for f in facts}) > 1:
            raise Stop("parts are cut differently")
    fixed_size = all(isinstance(f.length(axis), int) for f in facts)
    if not fixed_size and any(f.factors[p].tracked for f in facts for p in f.at(axis)):
        raise Stop("a part of an axis that varies")
    told = fixed_size and any(f.factors[p].tracked for f in facts for p in f.at(axis))
    other = [tuple(Factor(x.size, any(f.axes[j][i].tracked for f in facts)) for i, x in enumerate(facts[0].axes[j])) for j in range(rank)]
    total = a.shape(node)[axis]
    axes = tuple((Factor(total, told),) if j == axis else other[j] for j in range(rank))
    dims = [int(f.size) if f.tracked else 1 for j, x in enumerate(axes) if j != axis for f in x]
    place = sum(len(axes[j]) for j in range(axis))
    pieces: list[tuple[Tensor, Tensor]] = []
    parts: list[tuple[fx.Node, int, int]] = []
    start = 0
    for operand, f in zip(listed, facts, strict=True):
        length = f.length(axis) if fixed_size else 0
        parts.append((operand, start, start + int(length)))  # type: ignore[arg-type]
        start += int(length)  # type: ignore[arg-type]
        mine = f.at(axis)
        wide = [int(f.factors[p].size) if p in mine and told else d for p, d in enumerate(f.known.shape)]
        flat = [*wide[: mine.start], math.prod(wide[mine.start : mine.stop]), *wide[mine.stop :]]
        full = [*dims[:place], flat[place], *dims[place:]]
        pieces.append((f.known.expand(wide).reshape(flat).expand(full), f.value.expand(wide).reshape(flat).expand(full)))
    if told:
        known, value = torch.cat([k for k, _ in pieces], place), torch.cat([v for _, v in pieces], place)
    else:
        known = torch.stack([k for k, _ in pieces]).all(0) & (torch.stack([v for _, v in pieces]) == pieces[0][1]).all(0)
        value = torch.where(known, pieces[0][1], 0.0)
    return Joined(a, node, Facts(axes, known, value), axis, tuple(parts))

