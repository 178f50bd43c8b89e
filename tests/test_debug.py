"""Knobs, the dump directory, and the repro that it holds."""
from __future__ import annotations

import runpy
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import fx

from sparsecc.debug import Dumper, Knobs, cache_dir, default_sizes, knobs, max_error, random_inputs
from sparsecc.errors import SpecError
from sparsecc.formats import nm, parse_pattern
from sparsecc.ir.program import Program
from sparsecc.ir.text import parse_program, print_program
from sparsecc.spec import SparsitySpec, options

PASSES = ("canonicalize", "propagate", "fuse")
TEXT = '''# sparsecc program, stage: capture
def program(x: "f32[s0, 4]"):
    w: "f32[8, 4]" = const("w")
    y: "f32[s0, 8]" = aten.linear.default(x, w)
    return (y,)
'''


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DUMP", "STOP_AFTER", "DISABLE"):
        monkeypatch.delenv(f"SPARSECC_{name}", raising=False)


def test_knobs_unset_or_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSECC_CACHE")
    monkeypatch.setenv("SPARSECC_STOP_AFTER", "")
    assert knobs(PASSES) == Knobs()
    assert cache_dir() == Path.home() / ".cache" / "sparsecc"


def test_knobs_are_read_each_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSECC_DISABLE", "fuse, propagate,")
    monkeypatch.setenv("SPARSECC_STOP_AFTER", "fuse")
    monkeypatch.setenv("SPARSECC_DUMP", "~/dump")
    monkeypatch.setenv("SPARSECC_CACHE", str(tmp_path))
    assert knobs(PASSES) == Knobs(Path.home() / "dump", "fuse", frozenset({"fuse", "propagate"}), tmp_path)
    assert cache_dir() == tmp_path
    monkeypatch.delenv("SPARSECC_DISABLE")
    assert knobs(PASSES).disable == frozenset()


@pytest.mark.parametrize("variable", ["SPARSECC_DISABLE", "SPARSECC_STOP_AFTER"])
def test_unknown_pass_names_the_closest(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "cannonicalize")
    with pytest.raises(SpecError, match=rf"{variable}: there is no pass 'cannonicalize'; did you mean 'canonicalize'\?"):
        knobs(PASSES)
    assert knobs()  # without a list of passes, names are not judged
    monkeypatch.setenv(variable, "zzz")
    with pytest.raises(SpecError, match="known: canonicalize, propagate, fuse"):
        knobs(PASSES)


def test_stages_and_diffs(tmp_path: Path) -> None:
    dumper = Dumper(tmp_path / "d")
    dumper.stage(0, "capture", "a\nb\n")
    dumper.stage(1, "fuse", "a\nc\n", "a\nb\n")
    dumper.stage(2, "layout", "a\nc\n", "a\nc\n")
    root = tmp_path / "d"
    assert (root / "00_capture.py").read_text() == "a\nb\n" and not (root / "00_capture.diff").exists()
    assert (root / "01_fuse.diff").read_text() == "--- 00_capture.py\n+++ 01_fuse.py\n@@ -1,2 +1,2 @@\n a\n-b\n+c\n"
    assert (root / "02_layout.diff").read_text() == ""


def test_later_compiles_get_their_own_directory(tmp_path: Path) -> None:
    (tmp_path / "00_capture.py").write_text("not ours\n")
    first, second, third = Dumper(tmp_path), Dumper(tmp_path), Dumper(str(tmp_path))
    assert [d.root for d in (first, second, third)] == [tmp_path, tmp_path / "2", tmp_path / "3"]
    second.stage(0, "capture", "x\n")
    assert (tmp_path / "00_capture.py").read_text() == "not ours\n"


def test_a_dump_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(SpecError, match="is a file; name a directory"):
        Dumper(tmp_path / "f")
    with pytest.raises(SpecError, match="name a directory that can be written"):
        Dumper(tmp_path / "f" / "below")


def test_kernels_by_name(tmp_path: Path) -> None:
    dumper = Dumper(tmp_path)
    path = dumper.kernel("linear(bsr(4, 1)) gelu -> row, many", "k = 1\n")
    assert path == tmp_path / "kernels" / "linear_bsr_4_1_gelu_-_row_many.py"
    assert dumper.kernel("linear(bsr(4, 1)) gelu -> row, many", "k = 1\n") == path
    other = dumper.kernel("linear(bsr(4, 1)) gelu -> row, many", "k = 2\n")
    assert other.stem == path.stem + "_2" and path.read_text() == "k = 1\n"
    assert dumper.kernel("../../x" * 200, "").parent == tmp_path / "kernels"


def test_weights_tied_and_strided(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    tensors = {"a": base, "tied": base, "part": base[1:3], "turned": base.t(), "wide": torch.ones(1).expand(3), "n": torch.tensor(3),
               "none": torch.empty(0, 4), "bf": base.bfloat16(), "mask": base > 0, "idx": torch.arange(3).to(torch.uint16)}
    graph = fx.Graph()
    graph.output(tuple(graph.get_attr(name) for name in tensors))
    path = Dumper(tmp_path).weights(Program(fx.GraphModule(tensors, graph)))
    loaded = load_file(path)
    assert path == tmp_path / "weights.safetensors" and loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype, name


def test_random_inputs_of_types() -> None:
    texts = ["i64[s0, s1]", "f32[s0, 2*s1, 3]", "b1[s1]", "sym[s0 + 1]", "bf16[]"]
    sizes = default_sizes(texts)
    assert sizes == {"s0": 5, "s1": 7}
    ids, x, mask, number, scalar = random_inputs(texts, sizes)
    assert ids.shape == (5, 7) and ids.dtype == torch.int64 and set(ids.unique().tolist()) <= {0, 1}
    assert x.shape == (5, 14, 3) and mask.dtype == torch.bool and number == 6 and scalar.shape == () and scalar.dtype == torch.bfloat16
    assert torch.equal(random_inputs(texts, sizes)[1], x)


def test_max_error() -> None:
    a, inf, nan = torch.tensor([1.0, -4.0]), float("inf"), float("nan")
    assert max_error([a], [a]) == 0 and max_error([], []) == 0 and max_error([3, None], [3, None]) == 0
    assert max_error([a], [a + 1]) == 0.25
    assert max_error([torch.zeros(2)], [torch.full((2,), 0.5)]) == 0.5
    assert max_error([a], [a, a]) == max_error([a], [a[:1]]) == max_error([a], [a.double()]) == max_error([3], [4]) == inf
    holes = torch.tensor([nan, inf, 2.0])
    assert max_error([holes], [holes.clone()]) == 0
    assert max_error([holes], [torch.tensor([nan, -inf, 2.0])]) == max_error([holes], [torch.tensor([nan, 1.0, 2.0])]) == inf
    assert max_error([holes[:1]], [holes[:1]]) == 0


def _stub_compile(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A `compile_program` that changes nothing and remembers what it was given."""
    given: dict[str, object] = {}

    def options_of(given_options: dict[str, object]) -> object:
        given.update(given_options)
        return types.SimpleNamespace(target=given_options["target"])

    def build(program: Program, inputs: list[object], asked: object) -> object:
        return types.SimpleNamespace(run=program.run)

    module = types.ModuleType("sparsecc.compile")
    module.Options, module.build = types.SimpleNamespace(of=options_of), build  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sparsecc.compile", module)
    return given


@pytest.mark.parametrize("staged", [True, False])
@pytest.mark.parametrize("with_weights", [True, False])
def test_repro_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], staged: bool, with_weights: bool
) -> None:
    program, dumper = parse_program(TEXT), Dumper(tmp_path)
    if staged:
        dumper.stage(0, "capture", print_program(program))
    if with_weights:
        dumper.weights(program)
    given = _stub_compile(monkeypatch)
    spec = SparsitySpec.parse({"a.*": options(nm(2, 4), codec="bf16"), "b": "dense", "c": "detect"})
    pattern = parse_pattern("block(4, 1)")
    wanted = {"sparsity": spec, "target": "cpu", "pattern": pattern, "log": object(), "limit": float("inf"), "seq": (1,)}
    path = dumper.repro(print_program(program), [program.type(node) or "" for node in program.inputs], wanted)
    assert ("00_capture.py" if staged else "captured.py") in path.read_text()
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.startswith("max error 0, relative")
    assert "'log' can't be written as text" in path.read_text()
    assert SparsitySpec.parse(given.pop("sparsity")) == spec  # type: ignore[arg-type]
    assert given == {"target": "cpu", "pattern": "block(4, 1)", "limit": float("inf"), "seq": (1,)}
