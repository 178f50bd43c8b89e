"""What a code generator offers: four methods, and no knowledge of graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from sparsecc.codegen.kernel import KernelSpec


class Backend(Protocol):
    """One target. `source` is a pure function of its arguments, so sources can be read, diffed and cached without the device."""

    name: str

    def refuses(self, spec: KernelSpec) -> str | None:
        """Why no kernel for this spec can be made here, or None."""
        ...

    def space(self, spec: KernelSpec) -> Sequence[Any]:
        """The configurations worth trying, the most promising first."""
        ...

    def source(self, spec: KernelSpec, config: Any) -> str:
        """The kernel as text."""
        ...

    def load(self, source: str) -> Callable[..., Any]:
        """Compile text; the same text gives the same function."""
        ...
