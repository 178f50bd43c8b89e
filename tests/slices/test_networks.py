"""Random networks with dead slices: the compiled one computes the same, with the FLOPs of a network that was built without them."""
from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sparsecc
from sparsecc.ir.flops import flops
from tests.slices.nets import network


def counted(call: object, *inputs: torch.Tensor) -> int:
    """By torch's own counter."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        call(*inputs)  # type: ignore[operator]
    return counter.get_total_flops()


def check(seed: int) -> None:
    model, ideal, x = network(seed)
    compiled = sparsecc.compile(model, "reference", example_inputs=(x,), dynamic_shapes=None, autotune="none", remainder="eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=2e-5, atol=2e-5)
    program = compiled.graphs[0].history.program
    assert counted(program.run, x) == counted(ideal, x), f"network {seed}"
    assert flops(program) == counted(program.run, x)


@pytest.mark.parametrize("first", range(0, 200, 10))
def test_networks_shrink_to_their_ideal(first: int) -> None:
    for seed in range(first, first + 10):
        check(seed)
