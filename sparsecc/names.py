"""The names of a model's weights as its user knows them: tied weights have several, and one graph of a model holds only some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from sparsecc.ir.program import Program

_KEY = "sparsecc_names"
LINEARS = (nn.Linear, nn.modules.conv._ConvNd)
"""Modules whose weights a spec may name."""


@dataclass(frozen=True)
class Names:
    """What a program's own constants do not tell.

    linears: every nn.Linear and convolution of the model, in the program or not.
    canonical: weight name -> the first name of that tensor, those in one of them before others.
    tied: canonical name of a weight -> the modules it may be named by, itself first.
    partial: whether the program is a part of a model that cannot be looked at as a whole.
    """

    linears: tuple[str, ...] = ()
    canonical: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    partial: bool = False

    @staticmethod
    def of(model: nn.Module) -> Names:
        """The names of a model's parameters."""
        linears = tuple(name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, LINEARS))
        groups: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        canonical, tied, known = {}, {}, set(linears)
        for names in groups.values():
            read = [name for name in names if name.rpartition(".")[0] in known] or names
            canonical |= dict.fromkeys(names, read[0])
            tied[read[0]] = tuple(dict.fromkeys(name.removesuffix(".weight") for name in read))
        return Names(linears, canonical, tied)

    @staticmethod
    def found(program: Program) -> Names:
        """Those that were put on the program, or none."""
        return program.gm.meta.get(_KEY, Names())

    def put(self, program: Program) -> None:
        """Leave the names on the program, whose constants from now on go by their canonical ones."""
        program.gm.meta[_KEY] = self
        program.origin = {attribute: self.canonical.get(name, name) for attribute, name in program.origin.items()}

    def modules(self, weight: str) -> tuple[str, ...]:
        """The module names that a weight goes by, the canonical one first."""
        return self.tied.get(weight, (weight.removesuffix(".weight"),))
