"""The CPU kernels that skip neurons, against the masked dense block in float64: poisoned outputs, odd sizes, unions, NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsecc.codegen.tvm.backend import TvmBackend
from sparsecc.ir.policy import parse_policy
from sparsecc.ir.skip_ops import masked_dense
from sparsecc.runtime.neurons import NeuronKernel, bundle, levels_of, sketch

BACKEND = TvmBackend.of()


def block(D: int, F: int, up: bool, dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], list[Tensor | None]]:
    """[gate, (up,) down] and biases; of fc1 and fc2 only."""
    g = torch.Generator().manual_seed(seed)
    gate, second = (torch.randn(F, D, generator=g) / D**0.5 for _ in range(2))
    down = torch.randn(D, F, generator=g) / F**0.5
    biases: list[Tensor | None] = [None] * 3 if up else [torch.randn(F, generator=g).to(dtype) * 0.1, torch.randn(D, generator=g).to(dtype)]
    return [w.to(dtype) for w in ((gate, second, down) if up else (gate, down))], biases


def check(kernel: NeuronKernel, policy: str, x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> None:
    stored = [weights[0], bundle(weights[1] if len(weights) == 3 else None, weights[-1])]
    wide = [w.double() for w in weights], [None if b is None else b.double() for b in biases]
    wanted = masked_dense(x.double(), *wide, None, "rows", kernel.activation, policy)
    for _ in range(2):  # the second call is a bound one
        y = kernel(x, stored, biases, None)
        tolerance = 2e-5 if x.dtype == torch.float32 else 1e-2
        assert float((y.double() - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


CASES = [
    ("relu", "nonzero", True, 1, torch.float32), ("relu", "nonzero", False, 1, torch.bfloat16),
    ("silu", "ratio(0.25)", True, 3, torch.float32), ("relu", "stat(0.2)", True, 1, torch.float32),
    ("gelu", "threshold(0.2)", False, 3, torch.float32), ("relu", "nonzero", True, 3, torch.bfloat16),
]


@pytest.mark.parametrize(("activation", "policy", "up", "tokens", "dtype"), CASES)
@pytest.mark.parametrize(("D", "F"), [(64, 200), (77, 133)])
def test_kernels_compute_the_masked_dense_block(
    activation: str, policy: str, up: bool, tokens: int, dtype: torch.dtype, D: int, F: int
) -> None:
    weights, biases = block(D, F, up, dtype)
    x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(3)).to(dtype)
    check(NeuronKernel(BACKEND, activation, policy), policy, x, weights, biases)


@pytest.mark.parametrize(("policy", "tokens", "dtype", "bias"), [
    ("threshold(0.5)", 1, torch.float32, True), ("atleast(0.0)", 3, torch.bfloat16, False), ("ratio(0.25)", 11, torch.float32, False),
    ("nonzero", 1, torch.bfloat16, True),
])
@pytest.mark.parametrize(("K", "N"), [(133, 77), (64, 200)])
def test_linears_read_their_active_inputs(policy: str, tokens: int, dtype: torch.dtype, bias: bool, K: int, N: int) -> None:
    weight, x = torch.randn(N, K).to(dtype), torch.randn(2 * tokens, K)[::2].to(dtype)
    x[:, ::3] = 0
    biases = [torch.randn(N).to(dtype) if bias else None]
    wanted = masked_dense(x.double(), [weight.double()], [b if b is None else b.double() for b in biases], None, "rows", "", policy)
    kernel = NeuronKernel(BACKEND, "", policy, gate=False)
    for limit in (1.0, 0.1):  # beyond which the dense code runs
        kernel.limit = limit
        y = kernel(x, [bundle(None, weight)], biases, None)
        tolerance = 2e-5 if dtype == torch.float32 else 1e-2
        assert y.shape == (tokens, N) and float((y.double() - wanted).abs().max()) <= tolerance * float(wanted.abs().max())
    assert 0 < kernel.seen.active <= kernel.seen.of
    x[0, 1] = torch.nan
    assert bool(kernel(x, [bundle(None, weight)], biases, None)[0].isnan().all())


@pytest.mark.skipif(not BACKEND.isa.has("avx512vnni"), reason="sketches need byte products")
@pytest.mark.parametrize(("up", "tokens", "dtype"), [
    (True, 1, torch.float32), pytest.param(False, 3, torch.bfloat16, marks=pytest.mark.slow),
])
def test_a_sketch_rules_out_only_zeros(up: bool, tokens: int, dtype: torch.dtype) -> None:
    weights, biases = block(333, 200, up, dtype)
    kernel, plain = NeuronKernel(BACKEND, "relu", "nonzero"), NeuronKernel(BACKEND, "relu", "nonzero")
    stored = [weights[0], bundle(weights[1] if up else None, weights[-1])]
    for scale in (1.0, 1e-20, 1e15):  # also where nothing or everything is close to zero
        x = (scale * torch.randn(tokens, 333)).to(dtype)
        kernel._plain = 0
        assert torch.equal(kernel(x, [*stored, *sketch(weights[0])], biases, None), plain(x, stored, biases, None))
    assert (kernel.seen.active, kernel.seen.of) == (plain.seen.active, plain.seen.of)
    x[0, 3] = torch.nan
    kernel._plain = 0
    assert bool(kernel(x, [*stored, *sketch(weights[0])], biases, None)[0].isnan().all())


def test_the_sketch_bounds_what_it_leaves_out() -> None:
    gate = torch.randn(50, 333)
    gate[7] = 0
    q, bound = sketch(gate)
    rough = (q.double()[:, :333] - 128) * bound[:, :1].double()
    assert bool(((gate.double() - rough).norm(dim=1) <= bound[:, 1].double()).all())
    assert bool((gate.double().norm(dim=1) <= bound[:, 2].double()).all())


def test_views_that_are_not_aligned_and_two_threads() -> None:
    weights, biases = block(77, 133, True, torch.float32)
    x = torch.randn(1 + 77)[1:].view(1, 77)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        check(NeuronKernel(BACKEND, "relu", "nonzero"), "nonzero", x, weights, biases)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_more_tokens_than_a_tile_and_more_than_few() -> None:
    weights, biases = block(64, 96, True, torch.float32)
    kernel = NeuronKernel(BACKEND, "relu", "nonzero")
    for tokens in (11, 40):
        check(kernel, "nonzero", torch.randn(tokens, 64), weights, biases)


def test_no_active_neuron_gives_the_bias() -> None:
    weights, biases = block(64, 200, False, torch.bfloat16)
    biases[0] = torch.full((200,), -100.0, dtype=torch.bfloat16)
    kernel = NeuronKernel(BACKEND, "relu", "nonzero")
    y = kernel(torch.randn(1, 64).bfloat16(), [weights[0], bundle(None, weights[1])], biases, None)
    assert biases[-1] is not None and torch.equal(y[0], biases[-1]) and kernel.seen.kept == 0.0


def test_beyond_its_limit_the_dense_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, biases = block(64, 200, True, torch.float32)
    kernel = NeuronKernel(BACKEND, "relu", "nonzero", limit=0.3)
    calls = []
    plain = kernel.dense
    monkeypatch.setattr(kernel, "dense", lambda *args: calls.append(1) or plain(*args))
    check(kernel, "nonzero", torch.randn(1, 64), weights, biases)
    assert len(calls) == 2
    weights[0] = weights[0].abs() * (torch.arange(200) % 5 == 0).float().mul(2).sub(1)[:, None]  # a fifth is active where x > 0
    check(kernel, "nonzero", torch.rand(1, 64) + 0.1, weights, biases)
    assert len(calls) == 2


def test_nan_reaches_the_result() -> None:
    weights, biases = block(64, 200, True, torch.float32)
    x = torch.randn(1, 64)
    x[0, 5] = torch.nan
    stored = [weights[0], bundle(weights[1], weights[2])]
    assert bool(NeuronKernel(BACKEND, "relu", "nonzero")(x, stored, biases, None).isnan().all())


def test_ties_of_a_top_k_go_to_the_first_neurons() -> None:
    weights, biases = block(64, 200, True, torch.float32)
    weights[0] = weights[0][:1].expand(200, 64).contiguous()  # all activations are equal
    check(NeuronKernel(BACKEND, "silu", "ratio(0.25)"), "ratio(0.25)", torch.randn(3, 64), weights, biases)


def test_thresholds_are_kept_at_and_above_as_their_policy_says() -> None:
    assert float(levels_of(parse_policy("threshold(0.5)"), None, 3)[0]) == 0.5
    below = levels_of(parse_policy("atleast(0.5)"), None, 3)
    assert float(below[0]) < 0.5 and bool((torch.tensor(0.5) > below).all())
