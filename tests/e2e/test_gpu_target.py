"""Compiling for a GPU that isn't here: what can be looked at, what is refused, and how."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsecc
from sparsecc.autotune.cache import TuneCache
from sparsecc.autotune.measure import Timing
from sparsecc.codegen.triton.backend import TritonBackend
from sparsecc.codegen.triton.devices import device_of
from sparsecc.formats import parse_pattern
from sparsecc.passes.context import Problem
from sparsecc.runtime.gpu_tuner import GpuTuner


def pruned(pattern: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    model = nn.Sequential(nn.Linear(512, 2048, bias=False), nn.GELU(), nn.Linear(2048, 512, bias=False)).eval()
    sparsecc.prune(model, pattern)
    return model.to(dtype)


@pytest.mark.parametrize(("target", "matrix"), [("cuda:sm_90", "wgmma"), ("cuda:sm_80", "mma"), ("hip:gfx942", "v_mfma")])
def test_explains_what_the_device_would_run(target: str, matrix: str) -> None:
    x = torch.randn(4096, 512, dtype=torch.bfloat16)
    model = pruned("block(64, 64, 0.9)")
    compiled = sparsecc.compile(model, target=target, sparsity="block(64, 64)", example_inputs=(x,), dynamic_shapes=None)
    text = " ".join(str(compiled.explain()).split())
    assert "predicted from the data sheet, not measured" in text
    assert "bsr(64, 64).bf16" in text and "registers, no spills" in text and matrix in text
    region = compiled.explain().to_dict()["regions"][0]
    assert region["predicted_us"] > 0 and region["alternatives"]["dense"] > region["predicted_us"] and "measured_us" not in region
    assert f'kernel="{target} ' in compiled.ir("lower")
    with pytest.raises(sparsecc.TargetError, match=f"compiled for '{target}'"):
        compiled(x)


def test_stays_dense_where_the_prediction_says_so() -> None:
    x = torch.randn(2048, 512, dtype=torch.bfloat16)
    compiled = sparsecc.compile(pruned("unstructured(0.5)"), target="cuda:sm_90", example_inputs=(x,), dynamic_shapes=None)
    assert all(not region["sparse"] and "dense is faster" in region["reason"] for region in compiled.explain().to_dict()["regions"])


def test_sources_and_a_repro_are_dumped(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECC_DUMP", str(tmp_path))
    x = torch.randn(1, 512, dtype=torch.bfloat16)
    sparsecc.compile(pruned("2:4"), target="cuda:sm_90", example_inputs=(x,), dynamic_shapes=None)
    kernels = [file.read_text() for file in tmp_path.rglob("*.py") if "@triton.jit" in file.read_text()]
    assert kernels and all("packed_nm(2, 4).bf16" in text for text in kernels)
    environment = {name: value for name, value in os.environ.items() if name != "SPARSECC_DUMP"}
    environment["PYTHONPATH"] = str(Path(sparsecc.__file__).parents[1])
    without_tvm = f"import runpy, sys; sys.modules['tvm'] = None; runpy.run_path({str(tmp_path / 'repro.py')!r}, run_name='__main__')"
    ran = subprocess.run([sys.executable, "-c", without_tvm], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    said = " ".join(ran.stdout.split())
    assert "target: cuda:sm_90" in said and "registers, no spills" in said and "packed_nm(2, 4).bf16" in said


def test_cuda_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(sparsecc.TargetError, match="needs a GPU"):
        sparsecc.compile(pruned("2:4"), target="cuda")


def test_cuda_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(sparsecc.TargetError, match="needs Triton, which is not installed"):
        sparsecc.compile(pruned("2:4"), target="cuda:sm_90")


@pytest.mark.parametrize("target", ["cuda:sm_13", "hip:gfx1", "gpus", "tpu", "hip"])
def test_unknown_targets_name_the_known_ones(target: str) -> None:
    with pytest.raises(sparsecc.TargetError, match="cuda:sm_90"):
        sparsecc.compile(pruned("2:4"), target=target)


def test_dtypes_that_kernels_lack_stay_dense() -> None:
    x = torch.randn(4, 512, dtype=torch.float64)
    compiled = sparsecc.compile(pruned("2:4", torch.float64), target="cuda:sm_90", example_inputs=(x,))
    assert {region["reason"] for region in compiled.explain().to_dict()["regions"]} == {"weights of torch.float64 are not packed"}


class Scarce:
    """A kernel on a device whose memory is nearly full."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def prepare(self, tokens: int, dtype: torch.dtype | None = None) -> Scarce:
        return self

    def __call__(self, x: torch.Tensor, params: Any, bias: torch.Tensor, residual: None) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.problem.weight, bias)


def contest_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails: Callable[[str], bool], race: Any) -> tuple[Any, list[str]]:
    """What a tuner chooses where kernels run on the CPU, and some of them out of memory."""
    tried: list[str] = []
    model = pruned("unstructured(0.9)", torch.float32)
    weight = model[0].weight.detach()  # type: ignore[union-attr]
    tuner = GpuTuner(TritonBackend(device_of("cuda:sm_90")), "device", cache=TuneCache(tmp_path))
    problem = Problem("layer", weight, tuple(tuner.formats(parse_pattern("unstructured(0.9)"), weight, None, 64, None)), 64, "", False)

    def kernel(formats: Any, epilogue: str, residual: bool, layout: str, shape: Any, config: str, *more: Any) -> tuple[str, Any]:
        tried.append(config)
        if fails(config):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return "", Scarce(problem)

    monkeypatch.setattr(tuner, "kernel", kernel)
    monkeypatch.setattr("sparsecc.runtime.gpu_tuner.interleaved_on_gpu", race)
    monkeypatch.setattr("sparsecc.runtime.gpu_tuner.vendors", lambda spec: [])
    return tuner.choose(problem), tried


def test_a_candidate_without_memory_is_dropped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    times = lambda fns, seconds, rounds: {name: Timing(1.0, 1.0, 1.0 if name == "0" else 0.5) for name in fns}  # noqa: E731
    choice, tried = contest_of(monkeypatch, tmp_path, lambda config: "bm=64" in config, times)
    assert any("bm=64" in config for config in tried) and choice.format is not None and "bm=64" not in choice.config
    assert "2.00x dense, measured" in choice.reason


def test_no_memory_to_measure_in_stays_dense(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def race(fns: Any, seconds: float, rounds: int) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    choice, _ = contest_of(monkeypatch, tmp_path, lambda config: False, race)
    assert choice.format is None and "out of memory while tuning" in choice.reason and "2.00 GiB" in choice.reason


def relu_block(width: int, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width, bias=False), nn.ReLU(), nn.Linear(4 * width, width, bias=False)).eval().to(dtype)


def test_skipping_neurons_is_predicted_and_compiled(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECC_DUMP", str(tmp_path))
    x = torch.randn(1, 4096, dtype=torch.bfloat16)
    how: dict[str, Any] = {"target": "cuda:sm_90", "sparsity": {"*": sparsecc.neurons()}, "dynamic_shapes": None}
    compiled = sparsecc.compile(relu_block(4096), example_inputs=(x,), **how)
    region = next(r for r in compiled.explain().to_dict()["regions"] if "break_even" in r)
    assert 0 < region["break_even"] < 1 and region["none_us"] < region["dense_us"]
    assert "predicted from the data sheet" in region["reason"] and "registers" in region["reason"]
    texts = [file.read_text() for file in tmp_path.rglob("*.py")]
    assert any(all(f"def {name}(" in text for name in ("scores", "compact", "up", "down")) for text in texts)
    with pytest.raises(sparsecc.TargetError, match="compiled for 'cuda:sm_90'"):
        compiled(x)


def test_small_blocks_stay_dense_on_a_gpu() -> None:
    x = torch.randn(1, 64, dtype=torch.bfloat16)
    how: dict[str, Any] = {"target": "cuda:sm_90", "sparsity": {"*": sparsecc.neurons()}, "dynamic_shapes": None}
    compiled = sparsecc.compile(relu_block(64), example_inputs=(x,), **how)
    assert "dense is faster at any number of zeros" in " ".join(str(compiled.explain()).split())
    assert '"dense neurons relu nonzero"' in compiled.ir("lower")
    assert compiled.explain().to_dict()["totals"]["dense"] == 1


def test_a_gpu_takes_what_pays_whatever_is_active() -> None:
    """Nothing switches to dense code at run time: the number of zeros is known, or all neurons active cost little more than dense code."""
    x = torch.randn(1, 2048, dtype=torch.bfloat16)
    sparse = []
    for rule in (sparsecc.neurons(), sparsecc.neurons(top=0.1), sparsecc.neurons(top=0.9)):
        how: dict[str, Any] = {"target": "cuda:sm_90", "sparsity": {"*": rule}, "dynamic_shapes": None}
        sparse.append(sparsecc.compile(relu_block(2048), example_inputs=(x,), **how).explain().to_dict()["totals"]["sparse"])
    assert sparse == [0, 1, 0]


def test_what_no_gpu_kernel_skips_is_said() -> None:
    x = torch.randn(1, 64, dtype=torch.float64)
    how: dict[str, Any] = {"target": "cuda:sm_90", "sparsity": {"*": sparsecc.neurons()}, "dynamic_shapes": None}
    compiled = sparsecc.compile(relu_block(64, torch.float64), example_inputs=(x,), **how)
    assert "no GPU kernel skips neurons in torch.float64: computed in full" in " ".join(str(compiled.explain()).split())
