"""What `prune` did, as a table and as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class PruneRow:
    """One weight: its density (fraction of nonzeros) before and after; `names` are the modules that share it.

    A weight that was not named but is coupled to one has the pattern "... of" that name.
    """

    names: tuple[str, ...]
    pattern: str
    before: float
    after: float

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class PruneReport:
    """What `prune` did; `skipped` maps a layer that it left alone to the reason."""

    rows: tuple[PruneRow, ...]
    skipped: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {"rows": [{"name": row.name, **asdict(row)} for row in self.rows], "skipped": dict(self.skipped)}

    def __rich__(self) -> Table:
        table = Table("weight", "pattern", "density before", "after", title="pruned")
        for row in self.rows:
            table.add_row(" = ".join(row.names), row.pattern, f"{100 * row.before:.1f} %", f"{100 * row.after:.1f} %")
        for name, reason in self.skipped.items():
            table.add_row(name, f"[dim]left alone: {reason}[/dim]", "", "")
        return table

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as text:
            console.print(self)
        return text.get()
