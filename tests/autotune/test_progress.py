"""The bar shows only on a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from sparsecc.autotune import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("terminal", "enabled", "shown"), [(True, True, True), (True, False, False), (False, True, False)])
def test_bar(terminal: bool, enabled: bool, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress(2, enabled) as bar:
        bar.step("query")
        bar.step("key")
    text = stderr.getvalue()
    assert ("query" in text) == ("1/2" in text) == shown
    assert bool(text) == shown
