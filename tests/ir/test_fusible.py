"""What Inductor sees of the ops that move tokens: equal to what they mean, and fused."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

import sparsecc
from examples.models import llama_stack
from sparsecc.ir.fusible import FUSIBLE, scattered
from sparsecc.ir.route_ops import SCATTER_KEPT
from sparsecc.ir.skip_ops import SCATTER

SLOW = pytest.mark.slow


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 9), st.booleans(), st.booleans())
def test_scattering_read_the_other_way_round(seed: int, B: int, S: int, features: bool, half: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    K = int(torch.randint(1, S + 1, (1,), generator=g))
    counts = torch.randint(0, K + 1, (B,), generator=g)
    places = torch.stack([torch.randperm(S, generator=g)[:K] for _ in range(B)])
    idx = torch.full((B, K), -1, dtype=torch.int32)
    for row, count in enumerate(counts.tolist()):
        idx[row, :count] = places[row, :count].sort().values
    shape = (5,) if features else ()
    x, y = torch.randn(B, S, *shape, generator=g), torch.randn(B, K, *shape, generator=g)
    x = x.bfloat16() if half else x
    assert torch.equal(scattered(x, idx, y), SCATTER_KEPT(x, idx, y))
    if features:
        full, y = places.sort(-1).values.int(), y.to(x.dtype)
        assert torch.equal(scattered(x, full, y), SCATTER(x, full, y))


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("rule", "batch"),
    [(sparsecc.mixture_of_depths(torch.randn(1, 32), "threshold(0.5)"), 2), pytest.param(sparsecc.ftp([0.3, 0.5]), 1, marks=SLOW),
     pytest.param(sparsecc.ftp([0.3, 0.5]), 2, marks=SLOW)],
)
def test_gathers_and_scatters_are_fused(rule: sparsecc.Tokens, batch: int) -> None:
    model = llama_stack(32, 96, 2, heads=4, kv_heads=2, vocab=64)
    inputs = {"input_ids": torch.randint(0, 64, (batch, 37)), "use_cache": False}
    fused, plain = (sparsecc.compile(model, "cpu", {"layers.*": rule}, dict(inputs), autotune="none", remainder=how)
                    for how in ("inductor", "eager"))  # fmt: skip
    wanted = plain(**inputs).logits
    torch.testing.assert_close(fused(**inputs).logits, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
    for compiled, expected in ((fused, False), (plain, True)):
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            compiled(**inputs)
        ran = {event.key for event in seen.key_averages()} & {op.name() for op in FUSIBLE}
        assert bool(ran) == expected, ran
