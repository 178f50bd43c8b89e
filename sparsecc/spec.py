"""What the user asks for: globs over module names -> pattern and value dtype."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, Union

from .cores import Cores
from .errors import SpecError
from .formats.codec import Raw
from .formats.pattern import Pattern, parse_pattern
from .inputs import Inputs
from .merging import Merge
from .skipping import Neurons, Tokens

Mode = Literal["detect", "require", "dense"]


@dataclass(frozen=True)
class Rule:
    """What holds for one weight.

    detect:  exploit the zeros that are there (pattern None)
    require: the weight must satisfy `pattern`
    dense:   leave it alone
    `codec` ("f32", "bf16", "f16") is the storage of its values, None the compiler's choice. `compute` "bf16" lets values and
    activations be rounded to bf16 where they are multiplied so, which is where that is faster; None is float32.
    """

    pattern: Pattern | None = None
    codec: str | None = None
    dense: bool = False
    compute: str | None = None

    def __post_init__(self) -> None:
        if self.compute not in (None, "bf16"):
            raise SpecError(f'unknown compute {self.compute!r}: known is "bf16"; without it products are float32')
        if self.compute and self.codec not in (None, self.compute):
            raise SpecError(f'compute="bf16" takes values in bf16, not in {self.codec}: leave the codec out, or the compute')
        if self.codec is not None and self.codec not in Raw.DTYPES:
            raise SpecError(f"unknown codec {self.codec!r}: known are {', '.join(Raw.DTYPES)}")

    @property
    def mode(self) -> Mode:
        return "dense" if self.dense else "detect" if self.pattern is None else "require"

    def __str__(self) -> str:
        what = str(self.pattern) if self.mode == "require" else self.mode
        return ", ".join([what, *([f"{self.codec} values"] * bool(self.codec)), *([f"{self.compute} products"] * bool(self.compute))])


DETECT = Rule()

RuleLike = Rule | Pattern | str | None
AtRunTime = Neurons | Inputs | Tokens | Merge | Cores
SpecLike = Union["SparsitySpec", RuleLike, AtRunTime, Mapping[str, RuleLike | AtRunTime]]


def options(pattern: RuleLike = None, codec: str | None = None, compute: str | None = None) -> Rule:
    """A rule with options: `options("block(4, 1)", codec="bf16")`, `options("2:4", compute="bf16")`. Raises SpecError on an unknown
    pattern, codec or compute."""
    rule = _rule(pattern)
    return Rule(rule.pattern, codec or rule.codec, rule.dense, compute or rule.compute)


@dataclass(frozen=True)
class SparsitySpec:
    """Rules by glob (fnmatch over qualified module names, such as "encoder.layer.*.attention.self.query"); the last match wins.

    A module that no glob matches is on "detect". `skips`: what is skipped at run time, by globs over blocks and feed-forward blocks;
    they leave the rules for weights as they are.
    """

    entries: tuple[tuple[str, Rule], ...] = ()
    skips: tuple[tuple[str, AtRunTime], ...] = ()

    @staticmethod
    def parse(sparsity: SpecLike) -> SparsitySpec:
        """Reads what `compile` and `prune` accept: None or "detect", a pattern or its text, "dense", or a dict of globs to those.

        One pattern means {"*": pattern}. Raises SpecError, with a caret for unreadable text and the glob it stood under.
        """
        if isinstance(sparsity, SparsitySpec):
            return sparsity
        if isinstance(sparsity, AtRunTime):
            sparsity = {"*": sparsity}
        if not isinstance(sparsity, Mapping):
            rule = _rule(sparsity)
            return SparsitySpec() if rule == DETECT else SparsitySpec((("*", rule),))
        skips = tuple((str(glob), value) for glob, value in sparsity.items() if isinstance(value, AtRunTime))
        return SparsitySpec(tuple(_entry(g, v) for g, v in sparsity.items() if not isinstance(v, AtRunTime)), skips)

    def rule_for(self, module_name: str) -> Rule:
        """The rule of the last entry whose glob matches."""
        for glob, rule in reversed(self.entries):
            if fnmatchcase(module_name, glob):
                return rule
        return DETECT

    def names(self, module_name: str) -> bool:
        """Whether a glob other than "*" matches: the user means this module, not just all of them."""
        return any(glob != "*" and fnmatchcase(module_name, glob) for glob, _ in self.entries)

    def check_globs(self, names: Iterable[str]) -> None:
        """Raises SpecError if a glob other than "*" matches none of the names, listing the closest ones."""
        names = list(names)
        unknown = [glob for glob, _ in self.entries if glob != "*" and not any(fnmatchcase(name, glob) for name in names)]
        if unknown:
            raise SpecError("\n".join(f"{glob!r} matches no linear weight{_closest(glob, names)}" for glob in unknown))

    def __str__(self) -> str:
        return "; ".join(f"{glob} -> {rule}" for glob, rule in (*self.entries, *self.skips)) or "detect"


def _entry(glob: object, value: RuleLike) -> tuple[str, Rule]:
    if not isinstance(glob, str):
        raise SpecError(f"the keys of a sparsity dict are globs over module names, got {glob!r}")
    try:
        return glob, _rule(value)
    except SpecError as error:
        raise SpecError(f"sparsity[{glob!r}]: {error}") from None


def _rule(value: RuleLike) -> Rule:
    match value:
        case Rule():
            return value
        case None | "detect":
            return DETECT
        case "dense":
            return Rule(dense=True)
        case Pattern():
            return Rule(value)
        case str():
            return Rule(parse_pattern(value))
    raise SpecError(f'a sparsity is a pattern, its text, "detect", "dense" or a dict of globs to those, got {value!r}')


def _closest(glob: str, names: list[str]) -> str:
    close = difflib.get_close_matches(glob, names, 3, cutoff=0.4)
    return f"; closest: {', '.join(close)}" if close else f"; the model has {len(names)}"
