"""python -m sparsecc: exit status, what is printed, and messages instead of tracebacks."""
from __future__ import annotations

import io
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import sparsecc.passes
from sparsecc.__main__ import main
from sparsecc.explain import Explanation
from sparsecc.ir.program import Region
from sparsecc.passes.canonicalize import Canonicalize
from sparsecc.passes.fuse import Fuse

TEXT = '''# sparsecc program, stage: capture
def program(x: "f32[s0, 4]"):
    w: "f32[8, 4]" = const("w")
    y: "f32[s0, 8]" = aten.linear.default(x, w)
    z: "f32[s0, 8]" = aten.relu.default(y)
    return (z,)
'''
MODEL = '''
import helper_of_the_model
import torch

def make():
    return torch.nn.Linear(4, 8), torch.ones(2, 4)

def wrong():
    return torch.nn.Linear(4, 8)
'''


@pytest.fixture(autouse=True)
def pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsecc.passes, "PIPELINE", (Canonicalize(), Fuse()))


@pytest.fixture
def program(tmp_path: Path) -> str:
    (tmp_path / "p.py").write_text(TEXT)
    return str(tmp_path / "p.py")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model file that imports its neighbour."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "helper_of_the_model.py").write_text("")
    (tmp_path / "m.py").write_text(MODEL)
    return str(tmp_path / "m.py")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `compile` was called with, instead of compiling."""
    given: dict[str, Any] = {}

    def compile_model(model: torch.nn.Module, **kwargs: Any) -> Any:
        given.update(kwargs, model=model, threads=torch.get_num_threads())
        return types.SimpleNamespace(explain=lambda: Explanation([Region("fc", reason="no zeros")], {"target": kwargs["target"]}))

    module = types.ModuleType("sparsecc.compile")
    module.compile = module.compile_program = compile_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sparsecc.compile", module)
    return given


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The message on stderr of a command that exits with 2 and prints nothing else."""
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("sparsecc: ") and "Traceback" not in err
    return err


def test_opt_runs_the_named_passes(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["opt", program, "--passes", "canonicalize"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# sparsecc program, stage: canonicalize\n") and "aten.relu" in text and 'epilogue=""' in text
    assert main(["opt", program, "--passes", "canonicalize, fuse"]) == 0
    assert 'epilogue="relu"' in capsys.readouterr().out


def test_opt_resumes_at_the_stage_of_the_text(program: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path(program).write_text(TEXT.replace("s0", "3"))
    main(["opt", program])
    whole = capsys.readouterr().out
    main(["opt", program, "--passes", "canonicalize"])
    half = capsys.readouterr().out
    for rest in (["--passes", "fuse"], []):
        monkeypatch.setattr(sys, "stdin", io.StringIO(half))
        assert main(["opt", "-", *rest]) == 0
        assert capsys.readouterr().out == whole and "stage: fuse" in whole
    assert "fuse needs linears" in fails(capsys, "opt", program, "--passes", "fuse")


def test_opt_without_passes_to_run_prints_the_program(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["opt", program, "--passes", ""]) == 0
    assert capsys.readouterr().out == TEXT


def test_opt_with_weights(program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "w.safetensors")
    save_file({"w": torch.zeros(8, 4)}, file)
    assert main(["opt", program, "--weights", file]) == 0
    capsys.readouterr()
    save_file({"other": torch.zeros(8, 4)}, file)
    assert "no tensor was given for the constant 'w'" in fails(capsys, "opt", program, "--weights", file)
    Path(file).write_text("nonsense that is long enough")
    assert "is no safetensors file" in fails(capsys, "opt", program, "--weights", file)


def test_opt_refusals(program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no pass 'fuze'; did you mean 'fuse'?" in fails(capsys, "opt", program, "--passes", "canonicalize,fuze")
    assert "No such file" in fails(capsys, "opt", str(tmp_path / "none.py"))
    Path(program).write_text(TEXT.replace("aten.relu", "aten.rely"))
    message = fails(capsys, "opt", program)
    assert "line 5" in message and "no 'rely'" in message and message.rstrip().endswith("^")


def test_explain_compiles(model: str, compiled: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    try:
        assert main(["explain", f"{model}:make", "--sparsity", "block(4, 1)", "--threads", "1", "--autotune", "none"]) == 0
    finally:
        torch.set_num_threads(before)
    assert "no zeros" in capsys.readouterr().out
    assert compiled["sparsity"] == "block(4, 1)" and compiled["threads"] == 1 and compiled["autotune"] == "none"
    assert isinstance(compiled["example_inputs"], tuple) and compiled["example_inputs"][0].shape == (2, 4)


def test_explain_saves_and_reads_json(model: str, compiled: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["explain", f"{model}:make", "--json"])
    saved = tmp_path / "saved.json"
    saved.write_text(capsys.readouterr().out)
    assert json.loads(saved.read_text())["regions"][0]["name"] == "fc"
    assert main(["explain", str(saved)]) == 0
    assert capsys.readouterr().out == str(Explanation.load(saved)) + "\n"


def test_explain_refusals(model: str, compiled: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "m.py has no function 'mak'; did you mean 'make'?" in fails(capsys, "explain", f"{model}:mak")
    assert "returned Linear, not (model, example_inputs)" in fails(capsys, "explain", f"{model}:wrong")
    assert "there is no file" in fails(capsys, "explain", str(tmp_path / "none.py:make"))
    assert "expected MODEL.py:factory" in fails(capsys, "explain", model)
    assert "No such file" in fails(capsys, "explain", str(tmp_path / "none.json"))
    with pytest.raises(SystemExit, match="2"):
        main(["explain", f"{model}:make", "--threads", "0"])
    assert "'0' is not a number of threads" in capsys.readouterr().err


def test_as_a_process(tmp_path: Path) -> None:
    found = subprocess.run([sys.executable, "-m", "sparsecc", "opt", str(tmp_path / "none.py")], capture_output=True, text=True,
                           cwd=Path(__file__).parent.parent)
    assert found.returncode == 2 and found.stdout == "" and found.stderr.startswith("sparsecc: ") and found.stderr.count("\n") == 1
