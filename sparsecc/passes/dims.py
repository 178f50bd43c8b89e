"""Axes as products of factors, so that heads, groups and channels keep their identity through reshapes.

    [B, S, 64]                         axes ((B,), (S,), (64,))
    view to [B, S, 4, 16]              axes ((B,), (S,), (4,), (16,))
    transpose, reshape to [B * 4, S, 16]    axes ((B, 4), (S,), (16,))

`Facts` says, for every index of the factors that are worth telling apart, whether the slice there is one constant for every input.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor

from sparsecc.ir.types import Dim


@dataclass(frozen=True)
class Factor:
    """A part of an axis. tracked: its entries are told apart. free: it holds copies that `expand` made, any number of which will do.

    A factor that is neither is kept whole. Axes of size 1 have no factors.
    """

    size: Dim
    tracked: bool = False
    free: bool = False


Axes = tuple[tuple[Factor, ...], ...]


class Stop(Exception):
    """A rule cannot follow a value here; the text says why."""


@dataclass(frozen=True)
class Facts:
    """`known` bool and `value` f64 have a dimension per factor, of its size if it is tracked, else 1. value is 0 where not known."""

    axes: Axes
    known: Tensor
    value: Tensor

    @property
    def factors(self) -> list[Factor]:
        """Of all axes, in order."""
        return [factor for axis in self.axes for factor in axis]

    @property
    def tracked(self) -> bool:
        """Whether any entries are told apart."""
        return any(factor.tracked for factor in self.factors)

    def at(self, axis: int) -> range:
        """The positions of an axis' factors."""
        axis %= len(self.axes)
        start = sum(len(a) for a in self.axes[:axis])
        return range(start, start + len(self.axes[axis]))

    def length(self, axis: int) -> Dim:
        """The size of an axis."""
        size: Any = 1
        for factor in self.axes[axis]:
            size = size * factor.size
        return size

    def vector(self, axis: int) -> tuple[Tensor, Tensor]:
        """(known, value) [size] along one axis of fixed size: known where it is the same at every other index."""
        places = self.at(axis)
        known, value = self.known, self.value
        for place in range(known.ndim):
            if place not in places:
                known, value = alike(known, value, place)
        sizes = [int(self.factors[p].size) if p in places else 1 for p in range(known.ndim)]
        return known.expand(sizes).reshape(-1), value.expand(sizes).reshape(-1)

    def spread(self, axis: int, mask: Tensor) -> Tensor:
        """bool [size] along one axis as an array like `known`: an entry has it if any index that it stands for has it."""
        places, factors = self.at(axis), self.factors
        mask = mask.reshape([int(factors[p].size) if p in places else 1 for p in range(self.known.ndim)])
        for place in places:
            if not factors[place].tracked:
                mask = mask.any(place, keepdim=True)
        return mask.expand(self.known.shape)


def alike(known: Tensor, value: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The facts that hold at every index of a dimension, which becomes 1."""
    first = value.narrow(dim, 0, 1)
    same = (known & (value == first)).all(dim, keepdim=True)
    return same, torch.where(same, first, 0.0)


def unknown(shape: Sequence[Dim], tracked: Sequence[int] = ()) -> Facts:
    """Nothing known of a value of this shape, whose axes `tracked` are told apart."""
    tracked = [axis % len(shape) for axis in tracked]
    axes = tuple(() if one(size) else (Factor(size, i in tracked and isinstance(size, int)),) for i, size in enumerate(shape))
    return of_axes(axes)


def of_axes(axes: Axes) -> Facts:
    """Nothing known."""
    known = torch.zeros([int(f.size) if f.tracked else 1 for axis in axes for f in axis], dtype=torch.bool)
    return Facts(axes, known, known.double())


def constant(tensor: Tensor) -> Facts:
    """Everything known: each axis is one factor."""
    shape = [size for size in tensor.shape if size != 1]
    axes = tuple(() if size == 1 else (Factor(size, True),) for size in tensor.shape)
    value = tensor.detach().cpu().double().reshape(shape)
    finite = value.isfinite()
    return Facts(axes, finite, torch.where(finite, value, 0.0))


def one(size: Dim) -> bool:
    """Whether a dimension is surely 1."""
    return isinstance(size, int) and size == 1


@dataclass(frozen=True)
class Regrouped:
    """A reshape: the factors after, per axis, and for each of them the factor that it is a part of. Parts of one factor stand in order."""

    axes: tuple[tuple[Factor, ...], ...]
    origin: tuple[int, ...]


def regroup(factors: Sequence[Factor], shape: Sequence[Dim]) -> Regrouped:
    """Cut and join factors so that they make axes of `shape`. Raises Stop where an axis ends inside a factor that does not divide."""
    rest = list(enumerate(factors))[::-1]
    axes: list[tuple[Factor, ...]] = []
    origin: list[int] = []
    for size in shape:
        axis, missing = [], size
        while not one(missing):
            if not rest:
                raise Stop("sizes do not divide")
            index, factor = rest.pop()
            here, missing, left = _take(factor.size, missing)
            if not one(left):
                rest.append((index, replace(factor, size=left)))
            axis.append(replace(factor, size=here))
            origin.append(index)
        axes.append(tuple(axis))
    if rest:
        raise Stop("sizes do not divide")
    return Regrouped(tuple(axes), tuple(origin))


def _take(size: Dim, missing: Dim) -> tuple[Dim, Dim, Dim]:
    """(what a factor gives, what is then still missing, what is left of it)."""
    if (more := _quotient(missing, size)) is not None:
        return size, more, 1
    if (left := _quotient(size, missing)) is not None:
        return missing, 1, left
    raise Stop("an axis ends inside another")


def _quotient(a: Dim, b: Dim) -> Dim | None:
    """a / b where that is a whole number, or a product of symbols with one."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    ratio = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    if sympy.denom(ratio) != 1:
        return None
    return int(ratio) if ratio.is_Integer else ratio


@dataclass(frozen=True)
class Aligned:
    """Values side by side, as broadcasting sees them. `axes`: the result's. `joined[j]`: operands cut axis j differently, it is one factor.

    `parts[i][j]`: operand i's own factors on axis j of the result, () where it is broadcast.
    """

    axes: Axes
    joined: tuple[bool, ...]
    parts: tuple[Axes, ...]

    def lift(self, facts: Facts, operand: int) -> tuple[Tensor, Tensor]:
        """(known, value) of an operand with a dimension per factor of the result, 1 where it is broadcast."""
        known, value, place = facts.known, facts.value, 0
        wide: list[int] = []
        shape: list[int] = []
        for mine, whole, joined in zip(self.parts[operand], self.axes, self.joined, strict=True):
            for i, factor in enumerate(mine):
                if factor.tracked and not joined and not whole[i].tracked:
                    known, value = alike(known, value, place)
                wide.append(int(factor.size) if joined else known.shape[place])
                place += 1
            if not mine:
                shape += [1] * len(whole)
            else:
                taken = wide[len(wide) - len(mine) :]
                shape += [_product(taken)] if joined else taken
        return known.expand(wide).reshape(shape), value.expand(wide).reshape(shape)

    def lower(self, mask: Tensor, facts: Facts, operand: int) -> Tensor:
        """bool with a dimension per factor of the result, as an array like the operand's `known`: set where any that it stands for is."""
        shape: list[int] = []
        place, drop = 0, []
        for mine, whole, joined in zip(self.parts[operand], self.axes, self.joined, strict=True):
            sizes = list(mask.shape[place : place + len(whole)])
            place += len(whole)
            if not mine:
                drop += range(len(shape), len(shape) + len(whole))
                shape += sizes
            else:
                shape += [int(f.size) for f in mine] if joined else sizes
        mask = mask.reshape(shape)
        if drop:
            mask = mask.any(dim=tuple(drop)) if mask.ndim else mask
        for dim, size in enumerate(facts.known.shape):
            if size == 1 and mask.shape[dim] != 1:
                mask = mask.any(dim, keepdim=True)
        return mask.expand(facts.known.shape)


def align(operands: Sequence[Facts], constants: Sequence[bool], shape: Sequence[Dim], skip: Sequence[int] = ()) -> Aligned:
    """Broadcast operands to `shape`; axes in `skip` (of the result) are taken from the first operand as they are.

    Constants, and copies, follow what others tell apart: alone they do so only along a single axis. Raises Stop.
    """
    rank = len(shape)
    parts: list[list[tuple[Factor, ...]]] = [[()] * (rank - len(facts.axes)) + list(facts.axes) for facts in operands]
    alone = not any(facts.tracked for facts, const in zip(operands, constants, strict=True) if not const)
    axes: list[tuple[Factor, ...]] = []
    joined: list[bool] = []
    for j, size in enumerate(shape):
        if j in skip:
            axes.append(parts[0][j])
            joined.append(False)
            continue
        present = [(mine[j], const, facts) for mine, const, facts in zip(parts, constants, operands, strict=True) if mine[j]]
        leads = [_leads(factors, const, facts, alone) for factors, const, facts in present]
        cuts = {tuple(f.size for f in factors) for factors, _, _ in present}
        if len(cuts) <= 1:
            factors = present[0][0] if present else ()
            free = [all(p[0][i].free and not p[0][i].tracked for p in present if not p[1]) and not all(p[1] for p in present)
                    for i in range(len(factors))]
            axes.append(tuple(Factor(f.size, any(lead[i] for lead in leads), free[i] and not any(lead[i] for lead in leads))
                              for i, f in enumerate(factors)))
            joined.append(False)
        elif isinstance(size, int):
            axes.append((Factor(size, True),))
            joined.append(True)
        else:
            raise Stop("operands are cut differently along an axis that varies")
    return Aligned(tuple(axes), tuple(joined), tuple(tuple(mine) for mine in parts))


def _leads(factors: tuple[Factor, ...], const: bool, facts: Facts, alone: bool) -> list[bool]:
    """Which factors of an operand are told apart in the result on its account."""
    if const:
        alone = alone and sum(1 for axis in facts.axes if axis) == 1
        return [factor.tracked and alone for factor in factors]
    return [factor.tracked for factor in factors]


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
