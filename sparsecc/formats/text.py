"""The one grammar of patterns and formats: calls joined by dots, such as `bsr(4, 1).bf16.panels(128)`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from sparsecc.errors import SparseccError, caret

T = TypeVar("T")
Number = int | float

_NAME = re.compile(r"\s*([A-Za-z_]\w*)\s*")
_ARG = re.compile(r"\s*([^,)]*?)\s*([,)])")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Call:
    """`name` or `name(arg, ...)`, starting at `column` of the text it was read from."""

    name: str
    args: tuple[Number, ...]
    column: int


@dataclass(frozen=True)
class Reader:
    """Reads `text`, raising `error` with a caret under the place that is wrong."""

    text: str
    error: type[SparseccError]

    def fail(self, message: str, column: int) -> SparseccError:
        return self.error(f"{message}\n{caret(self.text, column)}")

    def unknown(self, what: str, call: Call, known: Iterable[str]) -> SparseccError:
        known = list(known)
        close = difflib.get_close_matches(call.name, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
        return self.fail(f"unknown {what} {call.name!r}: {hint}", call.column)

    def calls(self) -> list[Call]:
        """The whole text as calls; at least one."""
        found, at = [], 0
        while True:
            call, at = self._call(at)
            found.append(call)
            if at == len(self.text):
                return found
            if self.text[at] != ".":
                raise self.fail("expected '.' or the end here", at)
            at += 1

    def build(self, call: Call, make: Callable[..., T], arity: tuple[int, ...]) -> T:
        """`make(*call.args)`; a wrong number of arguments (`arity` lists the right ones) or a refused value gets a caret."""
        if len(call.args) not in arity:
            wanted = " or ".join(str(n) for n in arity)
            raise self.fail(f"{call.name} takes {wanted} arguments, not {len(call.args)}", call.column)
        try:
            return make(*call.args)
        except SparseccError as refused:
            raise self.fail(str(refused), call.column) from None

    def _call(self, at: int) -> tuple[Call, int]:
        name = _NAME.match(self.text, at)
        if not name:
            raise self.fail("expected a name here", at)
        column, at, args = name.start(1), name.end(), []
        if self.text[at : at + 1] != "(":
            return Call(name[1], (), column), at
        close = ","
        while close == ",":
            arg = _ARG.match(self.text, at + 1)
            if not arg:
                raise self.fail("expected ')' before the end", len(self.text))
            if not _NUMBER.fullmatch(arg[1]):
                raise self.fail("expected a number here", arg.start(1))
            args.append(int(arg[1]) if arg[1].lstrip("+-").isdigit() else float(arg[1]))
            close, at = arg[2], arg.start(2)
        at += 1
        at += len(self.text[at:]) - len(self.text[at:].lstrip())
        return Call(name[1], tuple(args), column), at
