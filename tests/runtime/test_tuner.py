"""The tuner: real contests on tiny layers, and what it remembers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.autotune import search
from sparsecc.autotune.cache import TuneCache
from sparsecc.autotune.measure import Timing
from sparsecc.codegen.config import from_text
from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.tvm.backend import CpuConfig, TvmBackend
from sparsecc.formats import Format, parse_format
from sparsecc.passes.context import Choice, Problem
from sparsecc.runtime import tuner as tuner_module
from sparsecc.runtime.tuner import CpuTuner

CSR = parse_format("csr")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Contests whose outcome doesn't hang on a second core being free."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def contests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the candidates of each contest that is really held."""
    held: list[str] = []
    real = tuner_module.contest

    def counted(dense: Any, candidates: Any, *rest: Any, **more: Any) -> Any:
        held.append(" ".join(c.name for c in candidates))
        return real(dense, candidates, *rest, **more)

    monkeypatch.setattr(tuner_module, "contest", counted)
    return held


def make(tmp_path: Path, **fields: Any) -> CpuTuner:
    return CpuTuner(TvmBackend.of(), **({"cache": TuneCache(tmp_path), "seconds": 60.0} | fields))


def problem(w: Tensor, tokens: int = 32, formats: tuple[Format, ...] = (CSR,), epilogue: str = "", residual: bool = False) -> Problem:
    return Problem("fc", w, formats, tokens, epilogue, residual)


def sparse(N: int, K: int, kept: float) -> Tensor:
    """Exactly the fraction `kept` of nonzeros: the cache's key counts them."""
    mask = torch.zeros(N * K)
    mask[torch.randperm(N * K)[: round(kept * N * K)]] = 1
    return torch.randn(N, K) * mask.view(N, K)


def check(tuner: CpuTuner, w: Tensor, choice: Choice) -> None:
    """The chosen kernel computes what the dense code computes."""
    assert choice.format is not None
    _, kernel = tuner.kernel((choice.format,), "", False, "row", (w.shape[0], w.shape[1]), choice.config)
    for tokens in (1, 32):
        x = torch.randn(tokens, w.shape[1])
        y = kernel(x, list(choice.format.pack(w).values()), None, None)
        torch.testing.assert_close(y, F.linear(x, w), rtol=1e-4, atol=1e-4)


def stopwatch(monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    """Candidates take `ratio` of the dense time: what is chosen must not depend on how busy the machine is."""

    def interleaved(fns: dict[str, Any], seconds: float, min_rounds: int = 5) -> dict[str, Timing]:
        for fn in fns.values():
            fn()
        return {name: Timing(1e-3 * r, 1e-3 * r, r) for i, name in enumerate(fns) for r in [1.0 if i == 0 else ratio]}

    monkeypatch.setattr(search, "interleaved", interleaved)


def test_dense_wins_on_a_dense_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopwatch(monkeypatch, 2.0)
    choice = make(tmp_path).choose(problem(sparse(384, 384, 0.95), tokens=128))
    assert (choice.format, choice.config) == (None, "")
    assert choice.reason.startswith("dense is faster: csr would run at 0.")
    assert choice.seconds and choice.dense_seconds and choice.seconds > choice.dense_seconds
    assert choice.break_even is not None and "break-even at" in choice.reason
    assert "dense" in choice.alternatives


def test_sparse_wins_on_an_almost_empty_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopwatch(monkeypatch, 0.5)
    tuner, w = make(tmp_path), sparse(512, 512, 0.005)
    choice = tuner.choose(problem(w))
    assert choice.format == CSR
    assert isinstance(from_text(choice.config, CpuConfig), CpuConfig)
    assert "x dense, measured" in choice.reason
    check(tuner, w, choice)


def test_equal_layers_are_measured_once(tmp_path: Path, contests: list[str]) -> None:
    tuner = make(tmp_path)
    first = tuner.choose(problem(sparse(64, 64, 0.25)))
    assert tuner.choose(problem(sparse(64, 64, 0.25))).config == first.config
    assert len(contests) == 1
    again = make(tmp_path).choose(problem(sparse(64, 64, 0.25)))  # another process
    assert (again.config, again.seconds, len(contests)) == (first.config, first.seconds, 1)


def test_what_makes_layers_differ(tmp_path: Path, contests: list[str]) -> None:
    tuner, w = make(tmp_path), sparse(64, 64, 0.25)
    key = lambda p: tuner._key(p, tuner.candidates(p))  # noqa: E731
    base = key(problem(w))
    assert key(problem(w.clone(), tokens=31)) == base, "tokens count to the next power of two"
    assert key(problem(w * 2)) == base, "values don't matter"
    others = [problem(w, tokens=1), problem(w, tokens=64), problem(w.bfloat16()), problem(w, epilogue="gelu"), problem(w, residual=True),
              problem(sparse(64, 64, 0.5)), problem(sparse(64, 65, 0.25)), problem(w, formats=(parse_format("bitmap"),))]
    keys = {key(p) for p in others}
    assert base not in keys and len(keys) == len(others)
    assert not contests


def test_shapes_that_dead_neurons_leave_share_a_contest(tmp_path: Path) -> None:
    tuner = make(tmp_path)
    key = lambda n: tuner._key(problem(sparse(n, 64, 0.25)), {})  # noqa: E731
    assert key(1530) == key(1536) != key(1537)
    assert key(60) != key(64), "of a small layer every row counts"


@pytest.mark.parametrize("tokens", [64, 96, 700])
def test_a_layer_in_a_chain_is_timed_on_its_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Checked against float64 like any other; of many tokens some."""
    stopwatch(monkeypatch, 0.5)
    tuner, w = make(tmp_path), sparse(64, 64, 0.25)
    keys = {tuner._key(problem(w), {})}
    for dtype in (torch.float32, torch.bfloat16):
        for reads, layout in (("token", "token"), ("row", "token"), ("token", "row")):
            one = replace(problem(w.to(dtype), tokens, epilogue="gelu", residual=True), reads=reads, layout=layout)
            choice = tuner.choose(one)
            assert choice.format == CSR and choice.tokens == min(tokens, tuner_module.TIMED)
            keys.add(tuner._key(one, {}))
    assert len(keys) == 7


def test_no_time_at_all_still_gives_a_choice(tmp_path: Path, contests: list[str]) -> None:
    tuner = make(tmp_path, seconds=0.0)
    choice = tuner.choose(problem(sparse(64, 64, 0.25)))
    assert choice.format is None and "out of time" in choice.reason
    assert make(tmp_path).cache.get("anything") is None and not (tmp_path / "tune.jsonl").exists(), "half a contest is not remembered"
    tuner.choose(problem(sparse(64, 64, 0.25)))
    assert len(contests) == 2


def test_effort_none_predicts(tmp_path: Path) -> None:
    tuner, w = make(tmp_path, effort="none"), sparse(512, 512, 0.005)
    choice = tuner.choose(problem(w))
    assert choice.format == CSR and choice.seconds is None and "predicted" in choice.reason
    check(tuner, w, choice)
    assert tuner.choose(problem(sparse(512, 512, 0.95))).format is None


def test_a_wrong_kernel_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first configuration's code forgets the bias."""
    right, first = TvmBackend.source, TvmBackend.of().space(KernelSpec((CSR,)))[0]

    def source(backend: TvmBackend, spec: KernelSpec, config: CpuConfig) -> str:
        text = right(backend, spec, config)
        return re.sub(r"bias\[\w+ \+ 0\]", "T.float32(0)", text) if config == first else text

    monkeypatch.setattr(TvmBackend, "source", source)
    stopwatch(monkeypatch, 0.5)
    tuner, w = make(tmp_path), sparse(512, 512, 0.005)
    with pytest.warns(RuntimeWarning, match="is wrong and was dropped"):
        choice = tuner.choose(problem(w))
    assert choice.format == CSR and from_text(choice.config, CpuConfig) != first
    monkeypatch.undo()
    check(tuner, w, choice)


def test_a_kernel_that_does_not_compile_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TvmBackend, "load", lambda *_: (_ for _ in ()).throw(RuntimeError("no registers left")))
    choice = make(tmp_path).choose(problem(sparse(64, 64, 0.01)))
    assert choice.format is None
    assert choice.reason.startswith("no candidate ran: ") and "RuntimeError: no registers left" in choice.reason


def test_no_format_to_try(tmp_path: Path) -> None:
    choice = make(tmp_path).choose(problem(sparse(64, 64, 0.5), formats=(parse_format("bsr(128, 1)"),)))
    assert choice.format is None and choice.reason.startswith("no candidate ran")


def test_kernels_are_shared_and_named(tmp_path: Path) -> None:
    tuner = make(tmp_path)
    fmt, config = parse_format("bsr(4, 1)"), "cpu(vectors=2, unroll=2, chunk=64)"
    key, kernel = tuner.kernel((fmt,), "gelu", True, "token", (30, 70000), config)
    assert key == f"cpu:{TvmBackend.of().isa.name} 30x70000 linear(bsr(4, 1)) gelu +residual -> token, many, ragged, wide {config}"
    assert tuner.kernel((fmt,), "gelu", True, "token", (30, 70000), config) == (key, kernel)
    assert tuner.kernel((fmt,), "", True, "token", (30, 70000), config)[1] is not kernel


def test_progress_is_told_of_every_layer(tmp_path: Path) -> None:
    told: list[str] = []
    tuner = make(tmp_path, seconds=0.0, on_choice=told.append)
    for name in ("a", "b"):
        tuner.choose(Problem(name, sparse(16, 16, 0.5), (CSR,), 4, "", False))
    assert told == ["a", "b"]
