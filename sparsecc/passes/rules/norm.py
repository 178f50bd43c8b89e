"""Statistics over an axis whose dead entries leave: the divisor stays the model's, and constants that leave are added to the sums."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from sparsecc.passes.dims import Axes, Facts, Stop, of_axes, unknown
from sparsecc.passes.links import Groups, Link, Same, Span
from sparsecc.passes.rules.base import Flow, Need, argument, moved, name_of

if TYPE_CHECKING:
    from sparsecc.passes.propagate import Analysis
    from sparsecc.passes.slice import Cutter

aten = torch.ops.aten


@dataclass(frozen=True)
class Reduced(Flow):
    """A sum or mean over `axes` of the operand. `uniform`, `value` [size]: along the one axis that is told apart, if any, its constants."""

    operand: fx.Node
    axes: tuple[int, ...]
    keepdim: bool
    told: int | None
    uniform: Tensor
    value: Tensor

    def _places(self) -> list[int]:
        x = self.a.facts(self.node, self.operand)
        return [place for axis in self.axes for place in x.at(axis)]

    def needs(self, need: Tensor) -> Iterator[Need]:
        x = self.a.facts(self.node, self.operand)
        for place in sorted(self._places()):
            need = need.unsqueeze(place)
        mask = need.expand(x.known.shape)
        yield Need(self.operand, mask)
        if self.told is not None:
            yield Need(self.operand, mask & x.known & ~x.spread(self.told, self.uniform), True, "a constant of its own for every token")

    def links(self) -> Iterator[Link]:
        x, key, gone = self.a.facts(self.node, self.operand), self.a.key(self.node, self.operand), self._places()
        new = 0
        for old, factor in enumerate(x.factors):
            if old not in gone:
                if isinstance(factor.size, int):
                    yield Same(Span(self.node, (new,)), Span(key, (old,)))
                new += 1

    def cut(self, c: Cutter) -> None:
        c.constant(self.node, self.operand)
        mask = None if self.told is None else c.mask(self.a.key(self.node, self.operand), self.a.facts(self.node, self.operand), self.told)
        if mask is None:
            return
        lost, mean = float(self.value[~mask & self.uniform].sum()), name_of(self.node) == "mean"
        y = self.node
        if mean:
            y = c.then(self.node, y, aten.mul.Tensor, int(mask.sum()) / len(mask))
        if lost:
            y = c.then(self.node, y, aten.add.Tensor, lost / len(mask) if mean else lost)


def reduce(a: Analysis, node: fx.Node) -> Flow:
    """mean, sum over some axes, of which one may be told apart"""
    operand: Any = node.args[0]
    x, dims = a.facts(node, operand), argument(node, 1, "dim")
    rank = len(x.axes)
    axes = tuple(sorted(d % rank for d in ([dims] if isinstance(dims, int) else dims or range(rank))))
    told = [axis for axis in axes if any(x.factors[p].tracked for p in x.at(axis))]
    keepdim = bool(argument(node, 2, "keepdim", False))
    if any(x.factors[p].free for axis in axes for p in x.at(axis)) or len(told) > 1 or (told and not isinstance(x.length(told[0]), int)):
        raise Stop("a reduction over several axes")
    gone = [place for axis in axes for place in x.at(axis)]
    new = tuple(() if j in axes else axis for j, axis in enumerate(x.axes) if keepdim or j not in axes)
    uniform, value = x.vector(told[0]) if told else (torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.float64))
    known, entries = x.known, x.value
    if name_of(node) == "sum" and gone:
        known = known & (entries == 0)
    if told:
        known = known & (entries == 0)
    for place in sorted(gone, reverse=True):
        known, entries = known.all(place), entries.select(place, 0)
    return Reduced(a, node, Facts(new, known, torch.where(known, entries, 0.0)), operand, axes, keepdim, told[0] if told else None,
                   uniform, value)


@dataclass(frozen=True)
class LastNorm(Flow):
    """A layer norm, or RMS norm, over the last axis. `uniform`, `value` [N]: its constants; `scale`: where the result is scaled by 0."""

    operand: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float
    centred: bool
    uniform: Tensor
    value: Tensor

    def needs(self, need: Tensor) -> Iterator[Need]:
        x = self.a.facts(self.node, self.operand)
        for place in x.at(-1):
            need = need.any(place, keepdim=True)
        mask = need.expand(x.known.shape)
        yield Need(self.operand, mask)
        yield Need(self.operand, mask & x.known & ~x.spread(-1, self.uniform), True, "a constant of its own for every token")

    def links(self) -> Iterator[Link]:
        key = self.a.key(self.node, self.operand)
        for place, factor in enumerate(self.facts.factors):
            if isinstance(factor.size, int):
                yield Same(Span(self.node, (place,)), Span(key, (place,)))

    def cut(self, c: Cutter) -> None:
        """(x - m) * rsqrt(v + eps) with sums over what stays, the model's N, and the constants C that left:
        m = (sum x + sum C) / N;  v = (sum (x - m)^2 + sum (C - m)^2) / N"""
        mask = c.mask(self.node, self.facts, -1)
        if mask is None:
            return
        constants = self.value[~mask]
        N, n, first, second = len(mask), int(mask.sum()), float(constants.sum()), float((constants**2).sum())
        share, zeros = n / N, (N - n) / N
        if not self.centred and not second and self.weight is not None:
            self._rescale(c, mask, share)
            return
        g, x = c.program.graph, self.operand
        with g.inserting_before(self.node):
            call, dtype = g.call_function, self.a.dtype(self.operand)
            if dtype in (torch.float16, torch.bfloat16):
                x = call(aten.to.dtype, (x, torch.float32))
            mean: Any = None
            if self.centred:
                mean = call(aten.mul.Tensor, (call(aten.mean.dim, (x, [-1], True)), share))
                mean = call(aten.add.Tensor, (mean, first / N)) if first else mean
                x = call(aten.sub.Tensor, (x, mean))
            var = call(aten.mul.Tensor, (call(aten.mean.dim, (call(aten.pow.Tensor_Scalar, (x, 2)), [-1], True)), share))
            var = call(aten.add.Tensor, (var, second / N)) if second else var
            if self.centred:
                var = call(aten.add.Tensor, (var, call(aten.mul.Tensor, (call(aten.mul.Tensor, (mean, mean)), zeros))))
                var = call(aten.sub.Tensor, (var, call(aten.mul.Tensor, (mean, 2 * first / N)))) if first else var
            y = call(aten.mul.Tensor, (x, call(aten.rsqrt.default, (call(aten.add.Tensor, (var, self.eps)),))))
            if self.weight is not None:
                y = call(aten.mul.Tensor, (y, c.indexed(self.weight, {0: mask})))
            if self.bias is not None:
                y = call(aten.add.Tensor, (y, c.indexed(self.bias, {0: mask})))
            if dtype in (torch.float16, torch.bfloat16):
                y = call(aten.to.dtype, (y, dtype))
        c.instead[self.node] = y

    def _rescale(self, c: Cutter, mask: Tensor, share: float) -> None:
        """An RMS norm of n of N features: w / sqrt(n / N) with eps * N / n keeps the model's divisor (as PAT, Liu et al. 2024, does)."""
        assert self.weight is not None
        weight = c.indexed(self.weight, {0: mask}, share**-0.5)
        self.node.args, self.node.kwargs = (self.operand, [int(mask.sum())], weight, self.eps / share), {}


def last_norm(a: Analysis, node: fx.Node) -> Flow:
    """layer_norm, rms_norm"""
    operand: Any = node.args[0]
    centred = name_of(node) == "layer_norm"
    shape, weight = argument(node, 1, "normalized_shape"), argument(node, 2, "weight")
    bias = argument(node, 3, "bias") if centred else None
    eps = argument(node, 4, "eps", 1e-5) if centred else argument(node, 3, "eps")
    dtype = a.dtype(operand)
    eps = torch.finfo(dtype).eps if eps is None else float(eps)
    if len(shape) != 1 or any(not (w is None or a.program.is_const(w)) for w in (weight, bias)):
        raise Stop("a norm over several axes, or with weights that are computed")
    x = a.facts(node, operand)
    made = moved(a, node, list(range(len(x.axes))))
    if not x.tracked:
        return made
    uniform, value = x.vector(-1)
    N = len(uniform)
    scale, shift = (None if w is None else a.program.const(w).detach().cpu().double() for w in (weight, bias))
    known = torch.zeros(N, dtype=torch.bool) if scale is None else scale == 0
    if not centred:
        known = known | (uniform & (value == 0))
    result = torch.zeros(N, dtype=torch.float64) if shift is None else torch.where(known, shift, 0.0)
    sizes = [int(x.factors[p].size) if p in x.at(-1) else 1 for p in range(x.known.ndim)]
    told = all(f.tracked for f in x.axes[-1])
    if not told:
        raise Stop("a norm over an axis of which a part is not told apart")
    facts = Facts(made.facts.axes, known.view(sizes).expand(x.known.shape), result.view(sizes).expand(x.known.shape))
    return LastNorm(a, node, facts, operand, weight, bias, eps, centred, uniform, value)


# ---- per channel


@dataclass(frozen=True)
class PerChannel(Flow):
    """Channels pass, each on its own; `constants`: vectors with an entry per channel."""

    operand: fx.Node
    axis: int
    constants: tuple[fx.Node, ...]

    def needs(self, need: Tensor) -> Iterator[Need]:
        x = self.a.facts(self.node, self.operand)
        for axis, (own, theirs) in enumerate(zip(self.facts.axes, x.axes, strict=True)):
            for place in x.at(axis):  # an axis of size 1, as pooling leaves it, has no factors
                need = need if own else need.unsqueeze(place)
            if own and not theirs:
                need = need.any(x.at(axis).start)
        for place, size in enumerate(x.known.shape):
            if size == 1 and need.shape[place] != 1:
                need = need.any(place, keepdim=True)
        yield Need(self.operand, need.expand(x.known.shape))

    def links(self) -> Iterator[Link]:
        key, x = self.a.key(self.node, self.operand), self.a.facts(self.node, self.operand)
        for place in range(x.at(self.axis).stop):
            if isinstance(x.factors[place].size, int):
                yield Same(Span(self.node, (place,)), Span(key, (place,)))

    def cut(self, c: Cutter) -> None:
        c.constant(self.node, self.operand)
        mask = c.mask(self.node, self.facts, self.axis)
        if mask is not None:
            for constant in dict.fromkeys(self.constants):
                self.node.replace_input_with(constant, c.indexed(constant, {0: mask}))


def batch_norm(a: Analysis, node: fx.Node) -> Flow:
    """In inference: a scale and a shift per channel."""
    operand: Any = node.args[0]
    if isinstance(node.target, torch._ops.OpOverload):
        names = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
    else:
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    weight, bias, mean, var = (given.get(name) for name in ("weight", "bias", "running_mean", "running_var"))
    if given.get("training") or mean is None or not all(a.program.is_const(w) for w in (weight, bias, mean, var) if w is not None):
        raise Stop("a batch norm in training, or with weights that are computed")
    x = a.facts(node, operand)
    made = moved(a, node, list(range(len(x.axes))))
    if not x.axes[1] or len(x.axes[1]) > 1:
        raise Stop("channels that are told apart otherwise")
    get = lambda w, default: torch.tensor(default, dtype=torch.float64) if w is None else a.program.const(w).detach().cpu().double()  # noqa: E731
    scale = get(weight, 1.0) * (get(var, 1.0) + float(given.get("eps", 1e-5))).rsqrt()
    shape = [-1 if p == x.at(1)[0] else 1 for p in range(x.known.ndim)]
    scale, shift = scale.view(shape), (get(bias, 0.0) - get(mean, 0.0) * scale).view(shape)
    axes = (x.axes[0], tuple(replace(f, tracked=isinstance(f.size, int)) for f in x.axes[1]), *x.axes[2:])
    full = of_axes(axes).known.shape
    known, value = (x.known | (scale == 0)).expand(full), (x.value * scale + shift).expand(full)
    return PerChannel(a, node, Facts(axes, known, torch.where(known, value, 0.0)), made.operand, 1,
                      tuple(w for w in (weight, bias, mean, var) if w is not None))


@dataclass(frozen=True)
class GroupNorm(PerChannel):
    """Whole groups pass; within a group dead channels are part of the statistics, and stay."""

    groups: int

    def links(self) -> Iterator[Link]:
        yield from super().links()
        yield Groups(self.span(self.operand, 1), self.own(1), self.groups)

    def needs(self, need: Tensor) -> Iterator[Need]:
        place = self.facts.at(1)[0]
        grouped = need.unflatten(place, (self.groups, -1)).any(place + 1).repeat_interleave(need.shape[place] // self.groups, place)
        yield Need(self.operand, need)
        yield Need(self.operand, grouped, True, "part of a group norm's statistics", True)

    def cut(self, c: Cutter) -> None:
        super().cut(c)
        mask = c.mask(self.node, self.facts, 1)
        if mask is not None:
            args = list(self.node.args)
            args[1] = int(mask.view(self.groups, -1).any(1).sum())
            self.node.args = tuple(args)


def group_norm(a: Analysis, node: fx.Node) -> Flow:
    """Statistics per group of channels, and positions."""
    operand: Any = node.args[0]
    groups, weight, bias = int(argument(node, 1, "num_groups")), argument(node, 2, "weight"), argument(node, 3, "bias")
    if any(not (w is None or a.program.is_const(w)) for w in (weight, bias)):
        raise Stop("a norm with weights that are computed")
    x = a.facts(node, operand)
    made = moved(a, node, list(range(len(x.axes))))
    if not x.tracked:
        return made
    if len(x.axes[1]) != 1 or not x.axes[1][0].tracked or any(f.tracked for p, f in enumerate(x.factors) if p not in x.at(1)):
        raise Stop("channels that are told apart otherwise")
    N = int(x.axes[1][0].size)
    known = torch.zeros(N, dtype=torch.bool)
    value = torch.zeros(N, dtype=torch.float64)
    if weight is not None:
        known = a.program.const(weight).detach().cpu() == 0
        value = torch.where(known, a.program.const(bias).detach().cpu().double(), 0.0) if bias is not None else value
    shape = [-1 if p == x.at(1)[0] else 1 for p in range(x.known.ndim)]
    facts = Facts(x.axes, known.view(shape).expand(x.known.shape), value.view(shape).expand(x.known.shape))
    return GroupNorm(a, node, facts, operand, 1, tuple(w for w in (weight, bias) if w is not None), groups)


@dataclass(frozen=True)
class Pooled(PerChannel):
    """Positions change, channels do not."""


def pool(a: Analysis, node: fx.Node) -> Flow:
    """Pooling and resizing: of a constant they make the same one, unless zeros are padded in."""
    operand: Any = node.args[0]
    x, shape, name = a.facts(node, operand), a.shape(node), name_of(node)
    spatial = next((int(d) for d in "123" if f"{d}d" in name), 2)
    axis = len(x.axes) - spatial - 1
    if any(f.tracked for p, f in enumerate(x.factors) if p >= x.at(axis).stop):
        raise Stop("positions that are told apart")
    axes: Axes = (*x.axes[: axis + 1], *unknown(shape[axis + 1 :]).axes)
    dims = [*x.known.shape[: x.at(axis).stop], *(1 for ax in axes[axis + 1 :] for _ in ax)]
    known, value = x.known.reshape(dims), x.value.reshape(dims)
    if name in ("pad", "constant_pad_nd"):
        known = known & (value == float(argument(node, 2, "value", 0) or 0))
        if len(node.args[1]) > 2 * spatial:  # type: ignore[arg-type]
            raise Stop("padded along channels")
    elif name.startswith("avg_pool") and _padded(node):
        known = known & (value == 0)
    return Pooled(a, node, Facts(axes, known, torch.where(known, value, 0.0)), operand, axis, ())


def _padded(node: fx.Node) -> bool:
    padding: Any = argument(node, 3, "padding", 0)
    return any(padding) if isinstance(padding, list | tuple) else bool(padding)
