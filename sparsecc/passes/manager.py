"""Runs passes: everything around a pass that a pass should not have to know."""
from __future__ import annotations

import difflib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sparsecc.errors import SpecError, VerifyError
from sparsecc.ir.infer import infer
from sparsecc.ir.program import Program
from sparsecc.ir.text import print_program
from sparsecc.ir.verify import verify


class Pass(Protocol):
    """A frozen dataclass; its docstring shows `before --> after`."""

    @property
    def name(self) -> str:
        """Also the file's name, the stage of the result, and the knob's value."""
        ...

    @property
    def requires(self) -> tuple[str, ...]:
        """Facts that must hold before."""
        ...

    @property
    def ensures(self) -> tuple[str, ...]:
        """Facts that hold after."""
        ...

    def run(self, program: Program, context: Any) -> None:
        """Change the program, which is the pass's own copy."""
        ...


@dataclass(frozen=True)
class Step:
    """One pass that ran: the program after it and the seconds it took."""

    name: str
    program: Program
    seconds: float

    @property
    def text(self) -> str:
        """The program as text, printed when asked for."""
        return print_program(self.program)


@dataclass
class History:
    """All steps, the captured program first."""

    steps: list[Step] = field(default_factory=list)

    @property
    def program(self) -> Program:
        """The result."""
        return self.steps[-1].program

    def after(self, name: str) -> Step:
        """The step of a pass. Raises SpecError with the closest name."""
        for step in self.steps:
            if step.name == name:
                return step
        raise _unknown("stage", name, [step.name for step in self.steps])


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    context: Any = None,
    *,
    disable: Iterable[str] | None = None,
    stop_after: str | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> History:
    """Run `passes` in order, each on a copy, inferring types and verifying after each.

    `disable` and `stop_after` default to SPARSECC_DISABLE (comma-separated) and SPARSECC_STOP_AFTER. `on_step` sees every step,
    the captured program first. Raises SpecError for unknown names, VerifyError if a pass breaks its stage or lacks a fact it needs.
    """
    disabled = set(_listed("SPARSECC_DISABLE") if disable is None else disable)
    stop_after = stop_after or os.environ.get("SPARSECC_STOP_AFTER") or None
    names = [p.name for p in passes]
    for name in sorted(disabled | ({stop_after} if stop_after else set())):
        if name not in names:
            raise _unknown("pass", name, names)
    infer(program)
    verify(program)
    history, facts = History(), set[str]()
    _record(history, Step(program.stage, program, 0.0), on_step)
    for one in passes:
        if one.name not in disabled:
            if missing := set(one.requires) - facts:
                raise VerifyError(f"pass {one.name} needs {', '.join(sorted(missing))}, which no pass before it ensured (one is disabled?)")
            _record(history, _run_one(one, history.program, context), on_step)
            facts |= set(one.ensures)
        if one.name == stop_after:
            break
    return history


def _run_one(one: Pass, before: Program, context: Any) -> Step:
    started = time.perf_counter()
    program = before.clone()
    one.run(program, context)
    program.finish()
    program.stage = one.name
    infer(program)
    verify(program)
    return Step(one.name, program, time.perf_counter() - started)


def _record(history: History, step: Step, on_step: Callable[[Step], None] | None) -> None:
    history.steps.append(step)
    if on_step is not None:
        on_step(step)


def _listed(variable: str) -> list[str]:
    return [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]


def _unknown(what: str, name: str, known: Sequence[str]) -> SpecError:
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
    return SpecError(f"unknown {what} {name!r}: {hint}")
