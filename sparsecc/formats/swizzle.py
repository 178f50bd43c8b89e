"""Swizzles: the named, invertible order in which a grid of blocks is handed to the level."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from sparsecc.errors import FormatError

from .level import Size, ceil_div


@dataclass(frozen=True)
class Swizzle:
    """The interface: the grid [Nb, Kb] becomes P parents with C coordinates each, and back."""

    def grid(self, Nb: Size, Kb: Size) -> tuple[Size, Size]:
        """(P, C) for a grid of Nb x Kb blocks."""
        raise NotImplementedError

    def apply(self, occ: Tensor) -> Tensor:
        """bool[Nb, Kb] -> bool[P, C]; what the order adds to fill up is False."""
        raise NotImplementedError

    def locate(self, slots: Tensor, Nb: int) -> tuple[Tensor, Tensor]:
        """slots long[S, 2] with coord >= 0 -> (block row, block column), long[S] each; a column >= Kb is fill."""
        raise NotImplementedError


@dataclass(frozen=True)
class Identity(Swizzle):
    """No text: a parent is a row of blocks."""

    def __str__(self) -> str:
        return ""

    def grid(self, Nb: Size, Kb: Size) -> tuple[Size, Size]:
        return Nb, Kb

    def apply(self, occ: Tensor) -> Tensor:
        return occ

    def locate(self, slots: Tensor, Nb: int) -> tuple[Tensor, Tensor]:
        return slots[:, 0], slots[:, 1]


@dataclass(frozen=True)
class Panels(Swizzle):
    """`panels(width)`: parent = panel * Nb + block row, coord relative to the panel of `width` block columns.

    The part of W that meets one cache-sized strip of x is contiguous.
    """

    width: int

    def __post_init__(self) -> None:
        if not (isinstance(self.width, int) and self.width >= 1):
            raise FormatError(f"panels(width) needs a positive integer, got {self.width}")

    def __str__(self) -> str:
        return f"panels({self.width})"

    def grid(self, Nb: Size, Kb: Size) -> tuple[Size, Size]:
        return ceil_div(Kb, self.width) * Nb, self.width

    def apply(self, occ: Tensor) -> Tensor:
        Nb, Kb = occ.shape
        panels = ceil_div(Kb, self.width)
        strips = F.pad(occ, (0, -Kb % self.width)).view(Nb, panels, self.width)
        return strips.transpose(0, 1).reshape(panels * Nb, self.width)

    def locate(self, slots: Tensor, Nb: int) -> tuple[Tensor, Tensor]:
        parent, coord = slots.unbind(1)
        if not Nb:
            return parent, coord
        return parent % Nb, (parent // Nb) * self.width + coord
