"""The GPU kernels that skip neurons, in Triton's interpreter, against the masked dense block in float64."""

from __future__ import annotations

import os

import pytest
import torch

from sparsecc.codegen.triton.backend import TritonBackend
from sparsecc.codegen.triton.config import GpuConfig
from sparsecc.codegen.triton.devices import device_of
from sparsecc.ir.skip_ops import masked_dense
from sparsecc.runtime.gpu_neurons import GpuNeurons
from sparsecc.runtime.neurons import bundle

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start of the process")


@pytest.mark.parametrize("policy", ["nonzero", "threshold(0.2)", "atleast(0.2)", "topk(9)", "stat(0.2)"])
@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_kernels_compute_the_masked_dense_block(policy: str, up: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    D, F = (70, 133) if up else (64, 96)
    gate, second = (torch.randn(F, D, generator=g).div(D**0.5).to(dtype) for _ in range(2))
    down = torch.randn(D, F, generator=g).div(F**0.5).to(dtype)
    biases = [None] * 3 if up else [torch.randn(F, generator=g).mul(0.1).to(dtype), torch.randn(D, generator=g).to(dtype)]
    x = torch.randn(1, D, generator=g).to(dtype)
    activation = "relu" if policy in ("nonzero", "stat(0.2)") else "silu"
    kernel = GpuNeurons(TritonBackend(device_of("cuda:sm_90")), activation, policy, GpuConfig(bn=16, bk=32, split=2))
    y = kernel(x, [gate, bundle(second if up else None, down)], biases, None)
    wide = [w.double() for w in ((gate, second, down) if up else (gate, down))]
    wanted = masked_dense(x.double(), wide, [None if b is None else b.double() for b in biases], None, "rows", activation, policy)
    assert float((y.double() - wanted).abs().max()) <= (2e-5 if dtype == torch.float32 else 2e-2) * float(wanted.abs().max())


@pytest.mark.parametrize("policy", ["threshold(0.2)", "topk(9)"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_on_its_active_inputs(policy: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    weight, x, bias = (torch.randn(*shape, generator=g).to(dtype) for shape in ((70, 133), (1, 1, 133), (70,)))
    kernel = GpuNeurons(TritonBackend(device_of("cuda:sm_90")), "", policy, GpuConfig(bn=16, bk=32, split=2))
    y = kernel(x, [bundle(None, weight)], [bias], None)
    wanted = masked_dense(x.double(), [weight.double()], [bias.double()], None, "rows", "", policy)
    assert y.shape == wanted.shape and kernel._launches
    assert float((y.double() - wanted).abs().max()) <= (2e-5 if dtype == torch.float32 else 2e-2) * float(wanted.abs().max())
    several = torch.randn(2, 3, 133, generator=g).to(dtype)
    wanted = masked_dense(several.double(), [weight.double()], [bias.double()], None, "rows", "", policy)
    found = kernel(several, [bundle(None, weight)], [bias], None).double()
    assert float((found - wanted).abs().max()) <= (2e-5 if dtype == torch.float32 else 2e-2) * float(wanted.abs().max())


def test_no_active_neuron_gives_the_bias() -> None:
    gate, down = torch.randn(40, 32), torch.randn(32, 40)
    kernel = GpuNeurons(TritonBackend(device_of("cuda:sm_90")), "relu", "nonzero", GpuConfig(bn=16, bk=32, split=2))
    y = kernel(torch.randn(1, 32), [gate, bundle(None, down)], [torch.full((40,), -1e3), torch.arange(32.0)], None)
    assert torch.equal(y[0], torch.arange(32.0))
