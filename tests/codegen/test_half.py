"""Products in bf16: tiles and pairs against float64 on rounded activations, what is refused, what is asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import sparsecc
from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.tvm.backend import CpuConfig, TvmBackend
from sparsecc.codegen.tvm.half import DOTS, dot_of
from sparsecc.codegen.tvm.host import host_isa
from sparsecc.errors import SpecError
from sparsecc.formats import Shared, parse_format
from sparsecc.ir.ops import ACTIVATIONS, empty_output
from sparsecc.passes.pack import formats_for
from sparsecc.runtime.launch import LinearKernel
from sparsecc.runtime.tuner import CpuTuner

TOLERANCE = 2e-6
FORMATS = ["shared(16, 32).bf16", "dense.bf16.panels(32)", "shared(4, 2).bf16"]


def kernel(text: str, shape: tuple[int, int], epilogue: str = "", residual: bool = False, layout: str = "token") -> LinearKernel:
    """Skips where the CPU has no such instruction."""
    fmt, backend = parse_format(text), TvmBackend.of()
    spec = KernelSpec((fmt,), epilogue, residual, layout, ragged=shape[0] % fmt.level.window > 0)
    if not backend.isa.has(DOTS[dot_of(fmt)]):
        pytest.skip(f"no {DOTS[dot_of(fmt)]}")
    assert backend.refuses(spec) is None
    return LinearKernel(backend, spec, replace(backend.space(spec)[0], chunk=64), shape)


def weight(N: int, K: int, kept: float = 0.2) -> Tensor:
    return (torch.randn(N, K) * (torch.rand(N, K) < kept)).bfloat16().float()


def assert_close(y: Tensor, want: Tensor) -> None:
    assert y.shape == want.shape and y.dtype == torch.float32
    assert (y - want).abs().max() <= TOLERANCE * want.abs().max()


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize(("layout", "epilogue", "residual"), [("row", "gelu", True), ("token", "", True)])
def test_products_of_rounded_activations_are_exact(text: str, layout: str, epilogue: str, residual: bool) -> None:
    """Sums are float32, so all that is lost is the activations' rounding. Sizes that no tile divides, poisoned memory."""
    torch.use_deterministic_algorithms(True)
    try:
        N, K = 70, 301
        run, w, bias = kernel(text, (N, K), epilogue, residual, layout), weight(N, K), torch.randn(N)
        params = list(run.spec.formats[0].pack(w).values())
        for lead in ((5,), (2, 33), (3, 70), (112,)):
            x, res = torch.randn(*lead, K), torch.randn(*lead, N) if residual else None
            want = ACTIVATIONS[epilogue].fn(x.bfloat16().double() @ w.double().t() + bias.double())
            want = want if res is None else want + res.double()
            for given in (x, empty_output(x, K, "token").copy_(x)):
                assert_close(run(given, params, bias, res), want)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("text", FORMATS)
def test_empty_groups_and_threads(text: str) -> None:
    N, K = 256, 64
    run, w = kernel(text, (N, K)), weight(N, K)
    w[16:48] = 0
    w[-16:] = 0
    params, before = list(run.spec.formats[0].pack(w).values()), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x = torch.randn(90, K)
            assert_close(run(x, params, None, None), x.bfloat16().double() @ w.double().t())
    finally:
        torch.set_num_threads(before)


def test_one_token_of_a_weight_that_is_stored_for_many() -> None:
    for text in FORMATS[:2]:
        run, w, x = kernel(text, (48, 96)), weight(48, 96), torch.randn(1, 96)
        want = x.double() @ w.double().t()
        error = (run(x, list(run.spec.formats[0].pack(w).values()), None, None) - want).abs().max()
        assert error <= 1e-2 * want.abs().max()


def test_rows_share_columns_padded_to_steps() -> None:
    w = torch.zeros(4, 9)
    w[0, 2], w[1, 7], w[1, 8], w[3, 5] = 1.0, 2.0, 3.0, 4.0
    arrays = parse_format("shared(2, 2)").pack(w)
    assert arrays["ptr"].tolist() == [0, 2, 3]
    assert arrays["idx"].tolist() == [2, 7, 8, 8, 5, 5]
    assert arrays["val"].tolist() == [1, 0, 0, 2, 0, 0, 3, 0, 0, 0, 4, 0]
    assert Shared(2, 2).window == 2


def test_only_where_asked_for_and_where_the_cpu_can() -> None:
    w, pattern = weight(64, 64), sparsecc.block(4, 1)
    assert not any(dot_of(fmt) for fmt in formats_for(pattern, w, "bf16", 128))
    assert not any(dot_of(fmt) for fmt in formats_for(pattern, w, "bf16", 16, "bf16")), "few tokens: bytes decide"
    found = formats_for(pattern, w, None, 128, "bf16")
    assert [str(fmt) for fmt in found if dot_of(fmt)] == ["shared(16, 32).bf16", "dense.bf16.panels(32)", "shared(4, 2).bf16"]
    assert str(found[0]) == "bsr(4, 1)", "what it is without the option stays a candidate"
    narrow = TvmBackend(replace(host_isa(), features=()))
    assert narrow.refuses(KernelSpec((parse_format("shared(4, 2).bf16"),))) == "this CPU, or target, has no avx512bf16"
    assert [config.dot for config in narrow.space(KernelSpec((parse_format("dense.bf16.panels(32)"),)))] == ["fma"] * 3
    assert "in bf16 pairs or tiles" in (TvmBackend.of().refuses(KernelSpec((parse_format("shared(4, 2)"),))) or "")


def test_the_option() -> None:
    rule = sparsecc.options("block(4, 1)", compute="bf16")
    assert (rule.codec, rule.compute, str(rule)) == (None, "bf16", "block(4, 1), bf16 products")
    with pytest.raises(SpecError, match="takes values in bf16, not in f32"):
        sparsecc.options("2:4", codec="f32", compute="bf16")
    with pytest.raises(SpecError, match="unknown compute 'fp8'"):
        sparsecc.options("2:4", compute="fp8")


@pytest.mark.parametrize("isa", ["", "avx2"])
def test_a_model_computes_within_the_documented_tolerance(isa: str) -> None:
    """On a target without such instructions it runs in float32."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.GELU(), torch.nn.Linear(64, 96)).eval()
    sparsecc.prune(model, "block(16, 1, 0.5)")
    x = torch.randn(40, 96)
    spec = {"0": sparsecc.options("block(16, 1)", compute="bf16"), "2": "block(16, 1)"}
    with torch.no_grad():
        compiled = sparsecc.compile(model, target=f"cpu:{isa}" if isa else "cpu", sparsity=spec, example_inputs=(x,), autotune="none")
        want, y = model(x), compiled(x)
        assert (y - want).abs().max() <= 1e-2 * want.abs().max()
        chosen = compiled.explain().regions[0].choice
    lossy = TvmBackend.of(isa).isa.has("amx-bf16")
    assert ("dot='amx'" in chosen) == lossy, chosen


def test_without_amx_the_tuner_keeps_float32() -> None:
    tuner = CpuTuner(TvmBackend(replace(host_isa(), features=())), "none")
    found = tuner.formats(sparsecc.block(4, 1), weight(64, 64), "bf16", 128, "bf16")
    from sparsecc.passes.context import Problem

    candidates = tuner.candidates(Problem("fc", weight(64, 64), tuple(found), 128, "", False))
    assert {config.dot for _, config in candidates.values()} == {"fma"}
    assert CpuConfig().dot == "fma"
