"""Random networks with dead slices: the compiled one computes the same, with the FLOPs of a network that was built without them."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sparsecc
from sparsecc.ir.flops import flops
from tests.slices.nets import network


def counted(call: object, *inputs: Tensor) -> tuple[int, Tensor]:
    """FLOPs by torch's own counter, and the result."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        result = call(*inputs)  # type: ignore[operator]
    return counter.get_total_flops(), result


@sdpa_kernel(SDPBackend.MATH)  # the only one that the counter looks into; what it returns lies otherwise than the captured one's
def check(seed: int) -> None:
    model, ideal, x = network(seed)
    compiled = sparsecc.compile(model, "reference", example_inputs=(x,), dynamic_shapes=None, autotune="none", remainder="eager")
    count, got = counted(compiled, x)
    torch.testing.assert_close(got, model(x), rtol=2e-5, atol=2e-5, msg=lambda text: f"network {seed}: {text}")
    assert count == counted(ideal, x)[0], f"network {seed} does more than it must"
    assert flops(compiled.graphs[0].history.program) == count


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_networks_shrink_to_their_ideal(first: int) -> None:
    for seed in range(first, first + 20):
        check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(200, 320, 20))
def test_more_networks_shrink_to_their_ideal(first: int) -> None:
    for seed in range(first, first + 20):
        check(seed)


def test_the_count_notices_a_dead_slice_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECC_DISABLE", "propagate")
    failed = 0
    for seed in range(4):
        try:
            check(seed)
        except AssertionError:
            failed += 1
    assert failed
