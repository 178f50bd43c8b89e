"""SPARSECC_DUMP: every stage, diffs, kernels, weights, and a repro that runs alone."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import sparsecc
from sparsecc.ir.text import parse_program
from sparsecc.passes import PIPELINE

SPEC = {"up": "block(4, 1, 0.9)", "down": sparsecc.options("unstructured(0.9)", codec="f32")}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(256, 512), nn.Linear(512, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


@pytest.fixture
def dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What compiling a small model leaves."""
    monkeypatch.setenv("SPARSECC_DUMP", str(tmp_path / "dump"))
    torch.manual_seed(0)
    model = Mlp().eval().requires_grad_(False)
    sparsecc.prune(model, {"up": "block(4, 1, 0.9)", "down": "unstructured(0.9)"})
    module = sparsecc.compile(model, sparsity=SPEC, autotune="none", remainder="eager")
    x = torch.randn(16, 256)
    torch.testing.assert_close(module(x), model(x), rtol=0, atol=1e-4)
    return tmp_path / "dump"


def test_files(dump: Path) -> None:
    stages = ["capture", *(one.name for one in PIPELINE)]
    assert sorted(p.name for p in dump.glob("[0-9]*.py")) == [f"{i:02d}_{name}.py" for i, name in enumerate(stages)]
    assert len(list(dump.glob("*.diff"))) == len(PIPELINE)
    select = (dump / "04_select.diff").read_text()
    assert "% block(4, 1" in select
    assert select.startswith("--- 03_reorder.py\n+++ 04_select.py\n")
    kernels = [p.read_text() for p in (dump / "kernels").glob("*.py")]
    assert kernels
    assert all("T.prim_func" in text for text in kernels)
    text = (dump / "00_capture.py").read_text()
    program = parse_program(text, load_file(dump / "weights.safetensors"))
    assert tuple(program.run(torch.randn(3, 256))[0].shape) == (3, 256)


def test_repro_runs_alone(dump: Path) -> None:
    text = (dump / "repro.py").read_text()
    assert "'up': 'block(4, 1, 0.9)'" in text
    assert "options('unstructured(0.9)', codec='f32')" in text
    environment = {name: value for name, value in os.environ.items() if name != "SPARSECC_DUMP"}
    environment["PYTHONPATH"] = str(Path(sparsecc.__file__).parents[1])
    ran = subprocess.run([sys.executable, dump / "repro.py"], env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    said = ran.stdout.split()
    assert said[:2] == ["max", "error"]
    assert float(said[2].rstrip(",")) < 1e-4


def test_each_compile_has_a_directory(dump: Path) -> None:
    sparsecc.compile(Mlp().eval(), example_inputs=torch.randn(3, 256), target="reference", remainder="eager")
    assert (dump / "2" / "repro.py").exists()
