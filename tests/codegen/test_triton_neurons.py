"""The GPU kernels that skip neurons, compiled for devices that aren't there."""

from __future__ import annotations

import pytest

from sparsecc.codegen.triton.compiler import binary
from sparsecc.codegen.triton.devices import device_of
from sparsecc.codegen.triton.neurons import KERNELS, GpuNeuronSpec, neuron_source, space

CASES = (
    ("cuda:sm_90", GpuNeuronSpec("nonzero", "relu", True, False, "bf16")),
    ("cuda:sm_80", GpuNeuronSpec("threshold", "silu", False, True, "f32")),
)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("target", "spec"), CASES, ids=lambda case: str(case))
def test_compiles_without_the_device(kernel: str, target: str, spec: GpuNeuronSpec) -> None:
    made = binary(neuron_source(spec, space()[0], kernel), device_of(target))
    assert made.spills == 0 and made.shared <= made.device.shared and 0 < made.registers <= 255
