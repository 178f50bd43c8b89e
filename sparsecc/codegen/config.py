"""Tuning configurations: dataclasses whose fields carry their ranges, and their text."""

from __future__ import annotations

import ast
import itertools
import re
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any, TypeVar

from sparsecc.errors import TextError

T = TypeVar("T")

_CHOICES = "choices"


def tunable(*choices: Any, default: Any = None) -> Any:
    """A dataclass field that the tuner may set to any of `choices`; the default is the first of them unless given.

        @dataclass(frozen=True)
        class Spmm:
            vectors: int = tunable(1, 2, 4, default=2)

            def valid(self) -> bool: ...       # optional: which combinations make sense

    Choices are what a Python literal can say (numbers, strings, booleans, tuples of those). Raises ValueError for a bad range.
    """
    default = choices[0] if default is None and choices else default
    if default not in choices or len(set(choices)) < len(choices):
        raise ValueError(f"tunable: choices must be distinct and hold the default, got {choices} with default {default!r}")
    return field(default=default, metadata={_CHOICES: choices})


def space_of(cls: type[T], **fixed: Any) -> list[T]:
    """Every `cls` that passes its `valid()`: the defaults first, then in the order of the choices.

    `fixed` gives the fields that are no tunables, and pins those that are, to a value outside their range if need be.
    Raises TypeError for a name that is no field.
    """
    ranges = {f.name: _default_first(f) for f in _fields(cls) if _CHOICES in f.metadata and f.name not in fixed}
    combinations = (cls(**fixed, **dict(zip(ranges, values, strict=True))) for values in itertools.product(*ranges.values()))
    return [config for config in combinations if _valid(config)]


def to_text(config: Any) -> str:
    """`spmm(vectors=2, unroll=2)`: the class's name in snake case without a final `Config`, and every field."""
    return f"{_name(type(config))}({', '.join(f'{f.name}={getattr(config, f.name)!r}' for f in _fields(type(config)))})"


def from_text(text: str, *classes: type[T]) -> T:
    """The inverse of `to_text`, for a config of one of `classes`.

    Raises TextError for text that names none of them or fields that they lack, and for a combination that is no longer valid:
    a cache may be older than the code.
    """
    head, keywords = _call(text)
    known = {_name(cls): cls for cls in classes}
    if head not in known:
        raise TextError(f"unknown configuration {head!r}, known: {', '.join(known)}", text)
    cls = known[head]
    required = {f.name: f.default is MISSING and f.default_factory is MISSING for f in _fields(cls)}
    values: dict[str, Any] = {}
    for keyword in keywords:
        if keyword.arg is None or keyword.arg not in required:
            raise TextError(f"{head} has no such field, its fields: {', '.join(required)}", text, keyword.col_offset)
        try:
            values[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError):
            raise TextError("expected a literal here", text, keyword.value.col_offset) from None
    if missing := [name for name, needed in required.items() if needed and name not in values]:
        raise TextError(f"{head} needs {', '.join(missing)}", text)
    config = cls(**values)
    if not _valid(config):
        raise TextError("this combination is not valid", text)
    return config


def _call(text: str) -> tuple[str, list[ast.keyword]]:
    """Name and arguments of the text, which is a call of a plain name with keyword arguments only."""
    try:
        call = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise TextError("not a configuration", text, (getattr(error, "offset", None) or 1) - 1) from None
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
        raise TextError("expected name(field=value, ...)", text)
    if call.args:
        raise TextError("expected field=value here", text, call.args[0].col_offset)
    return call.func.id, call.keywords


def _fields(cls: Any) -> tuple[Any, ...]:
    """The fields that the constructor takes."""
    if not is_dataclass(cls):
        raise TypeError(f"a configuration is a dataclass, got {cls!r}")
    return tuple(f for f in fields(cls) if f.init)


def _default_first(f: Any) -> list[Any]:
    return sorted(f.metadata[_CHOICES], key=lambda choice: choice != f.default)


def _valid(config: Any) -> bool:
    return getattr(config, "valid", lambda: True)()


def _name(cls: type) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__.removesuffix("Config")).lower()
