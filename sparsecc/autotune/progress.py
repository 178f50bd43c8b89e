"""A progress bar on stderr, for people only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@dataclass(frozen=True)
class Bar:
    """What `progress` yields."""

    step: Callable[[str], None]
    """step(text): begin the next part, named `text`; the one before is done."""


@contextmanager
def progress(total: int, enabled: bool = True) -> Iterator[Bar]:
    """Show `total` steps while the block runs; nothing if not `enabled` or stderr is no terminal."""
    if not (enabled and sys.stderr.isatty()):
        yield Bar(lambda text: None)
        return
    columns = TextColumn("sparsecc"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    # Drawn at each step only: a thread that redraws would disturb the timing.
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as shown:
        task, begun = shown.add_task("", total=total), 0

        def step(text: str) -> None:
            nonlocal begun
            shown.update(task, description=text, completed=begun, refresh=True)
            begun += 1

        yield Bar(step)
