"""Runs tests/interpreted in a process of its own: Triton decides at its import whether it interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = 96
"""Four of every format: the interpreter takes a third of a second for one."""


def interpreted(*arguments: str, cases: int) -> str:
    """What pytest says about tests/interpreted, under the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "SPARSECC_CASES": str(cases)}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/interpreted", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    return done.stdout


def test_gpu_kernels_compute_what_they_should() -> None:
    said = interpreted(cases=CASES)
    assert "skipped" not in said and int(said.rpartition(" passed")[0].split()[-1]) >= CASES


@pytest.mark.slow
def test_many_more_cases() -> None:
    interpreted("-k", "random_case", cases=3000)
