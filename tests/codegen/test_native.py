"""Kernels as shared objects: found again, rebuilt when damaged, and TVM's JIT where nothing can be linked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from ctypes import c_void_p
from pathlib import Path

import pytest
import torch

from sparsecc.codegen.tvm import backend as backend_module
from sparsecc.codegen.tvm import native
from sparsecc.codegen.tvm.backend import TvmBackend
from sparsecc.codegen.tvm.native import Calls, Native
from sparsecc.codegen.tvm.norm import NormSpec
from sparsecc.runtime.between import NormKernel
from sparsecc.runtime.record import Pool, Recorder, Replay


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a process that has loaded nothing."""
    monkeypatch.setenv("SPARSECC_CACHE", str(tmp_path))
    forget(monkeypatch)
    yield tmp_path
    backend_module._mover.cache_clear()


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process would."""
    monkeypatch.setattr(backend_module, "_LOADED", {})
    backend_module._mover.cache_clear()


def normed() -> tuple[object, torch.Tensor]:
    """The code of a norm, and whether it works."""
    kernel = NormKernel(TvmBackend.of(), NormSpec())
    x = torch.randn(3, 20, 24)
    torch.testing.assert_close(kernel(x, torch.ones(24), torch.zeros(24), 1e-5), torch.nn.functional.layer_norm(x, (24,)))
    return kernel.code, x


def stored(folder: Path) -> list[Path]:
    return list(folder.rglob("*.so"))


def test_a_kernel_is_linked_once_and_a_damaged_one_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _ = normed()
    assert isinstance(code, Native) and len(stored(folder)) == 2, "the norm, and the packing of its input"
    path = stored(folder)[0]
    whole = path.read_bytes()
    for damaged in (whole[:1000], whole[:2000] + b"?" + whole[2001:], b""):
        path.unlink()  # a new file: the old one is mapped
        path.write_bytes(damaged)
        forget(monkeypatch)
        assert isinstance(normed()[0], Native)
        assert path.stat().st_size > 2000


def test_without_a_linker_tvm_runs_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    code, _ = normed()
    assert not isinstance(code, Native) and not stored(folder)


@pytest.mark.parametrize("linked", [True, False])
def test_a_replay_of_either_kind(linked: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not linked:
        monkeypatch.setattr(native.shutil, "which", lambda name: None)
    kernel, ones, zeros = NormKernel(TvmBackend.of(), NormSpec(layout="row")), torch.ones(24), torch.zeros(24)
    x = torch.randn(3, 20, 24)
    with Recorder(Pool()) as recorder:
        recorder.result = True
        y = kernel(x, ones, zeros, 1e-5)
    replay = Replay.of(recorder, [x], [y])
    assert replay is not None and isinstance(replay.run, Calls) == linked
    for other in (torch.randn(3, 20, 24), torch.randn(3, 20, 24)):
        (result,) = replay([other])
        torch.testing.assert_close(result, torch.nn.functional.layer_norm(other, (24,)))


def test_wrong_arguments_are_an_error(folder: Path) -> None:
    code, _ = normed()
    assert isinstance(code, Native)
    with pytest.raises(RuntimeError, match="call 1 of 1 refused its arguments"):
        code(c_void_p(0), 3)


def test_a_warm_start_imports_no_tvm(folder: Path) -> None:
    normed()
    text = """
import sys, torch
from sparsecc.codegen.tvm.backend import TvmBackend
from sparsecc.codegen.tvm.norm import NormSpec
from sparsecc.runtime.between import NormKernel
x = torch.randn(3, 20, 24)
y = NormKernel(TvmBackend.of(), NormSpec())(x, torch.ones(24), torch.zeros(24), 1e-5)
torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (24,)))
assert "tvm" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", text], check=True)
