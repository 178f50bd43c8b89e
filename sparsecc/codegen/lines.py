"""Lines of generated source with indentation: what the writers of every target share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


class Lines:
    """Collects lines: `with w.block("for i in range(n):"): w("...")`."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.depth = 0
        self.made = 0

    def __call__(self, line: str) -> None:
        self.lines.append("    " * self.depth + line)

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """An indented block under `head`."""
        self(head)
        self.depth += 1
        yield
        self.depth -= 1

    def block_if(self, condition: bool, head: str) -> AbstractContextManager[None]:
        """A block where the condition holds, else just the lines."""
        return self.block(head) if condition else nullcontext()

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"
