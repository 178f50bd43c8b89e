"""The narrower instruction sets compute the same."""

from __future__ import annotations

import pytest
import torch

from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.tvm.backend import CpuConfig, TvmBackend
from sparsecc.codegen.tvm.host import ISAS, host_isa
from sparsecc.errors import TargetError
from sparsecc.formats import parse_format
from sparsecc.ir.ops import ACTIVATIONS
from sparsecc.runtime.launch import LinearKernel


def _runs(isa: str) -> bool:
    try:
        host_isa(isa)
    except TargetError:
        return False
    return True


NARROW = [isa for isa in ("avx2", "portable") if _runs(isa)]


@pytest.mark.parametrize("isa", NARROW)
@pytest.mark.parametrize(("text", "epilogue", "layout"), [("bsr(4, 1)", "gelu", "row"), ("nm(2, 4)", "silu", "token")])
def test_against_float64(isa: str, text: str, epilogue: str, layout: str) -> None:
    N, K, fmt = 43, 51, parse_format(text)
    kept = (torch.rand(11, K) < 0.4).repeat_interleave(4, 0)[:N] if text.startswith("bsr") else (torch.arange(K) % 4 < 2).expand(N, K)
    w, bias = torch.randn(N, K) * kept, torch.randn(N)
    backend = TvmBackend.of(isa)
    assert backend.isa.lanes == ISAS[isa][1]
    spec = KernelSpec((fmt,), epilogue, True, layout, "many", bool(N % fmt.block[0]))  # type: ignore[arg-type]
    kernel = LinearKernel(backend, spec, CpuConfig(1, 2), (N, K))
    for tokens in (1, 5, 40):
        x, res = torch.randn(tokens, K), torch.randn(tokens, N)
        want = ACTIVATIONS[epilogue].fn(x.double() @ w.double().t() + bias.double()) + res.double()
        for given in (x, x.t().contiguous().t()):
            y = kernel(given, list(fmt.pack(w).values()), bias, res)
            assert (y - want).abs().max() <= 2e-5 * want.abs().max()


def test_the_widest_is_the_default() -> None:
    assert TvmBackend.of().isa == host_isa(next(isa for isa in ISAS if _runs(isa)))
    assert TvmBackend.of() is TvmBackend.of()


def test_unknown_and_missing_instruction_sets_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TargetError, match="known are cpu:avx512, cpu:avx2, cpu:portable"):
        host_isa("sse9")
    from sparsecc.codegen.tvm import host

    monkeypatch.setattr(host, "_cpu_flags", lambda: frozenset({"avx2"}))
    with pytest.raises(TargetError, match='no avx512; its widest is "cpu:avx2"'):
        host_isa.__wrapped__("avx512")
    assert host_isa.__wrapped__("").name == "avx2"
    monkeypatch.setattr(host, "_cpu_flags", frozenset)
    assert host_isa.__wrapped__("").name == "portable"
