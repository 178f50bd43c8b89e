"""Set-up shared by all tests: no network, two threads at most, a tuning cache of the run's own, modest property tests."""
from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported; models come from installed packages
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is: the threads of two workers share the cores, so none may spin
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # silences a warning, changes no code

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from sparsecc.autotune import Machine

# Kernels compile inside properties: one slow example is no failure, and a few dozen examples say enough. HYPOTHESIS_PROFILE=deep digs.
settings.register_profile("default", deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("deep", parent=settings.get_profile("default"), max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session", autouse=True)
def sparsecc_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SPARSECC_CACHE for the whole run: nothing measured on this machine before may decide a test, and none of it is overwritten.

    Workers of one run share it, so that a kernel is compiled once."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "sparsecc_cache"
    path.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSECC_CACHE", str(path))
        yield path


@pytest.fixture(scope="session", autouse=True)
def fixed_machine() -> Iterator[None]:
    """What autotune="none" predicts with: a choice of format must not depend on what else ran while the peaks were measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Machine, "measured", lambda threads: Machine(1.5e11, 1e10, threads, 5e10 * threads))
        yield


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test draws the same numbers, alone or among others."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
