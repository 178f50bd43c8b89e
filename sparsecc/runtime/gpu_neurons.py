"""Calling the GPU kernels that skip neurons; torch's dense code for more than one token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.codegen.triton.backend import TritonBackend
from sparsecc.codegen.triton.config import GpuConfig
from sparsecc.codegen.triton.neurons import KERNELS, GpuNeuronSpec, neuron_source, space
from sparsecc.errors import TargetError
from sparsecc.ir.policy import Policy, parse_policy
from sparsecc.ir.skip_ops import active
from sparsecc.runtime.neurons import dense_block, levels_of

PROGRAMS = 264
"""That stride over the list in `up`: two for each multiprocessor of the largest device; the others end at once."""
DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass
class GpuNeurons:
    """fn(x [..., D], [gate, bundle], biases, level) -> y [..., D], as `runtime/neurons.NeuronKernel`, for the policies that compare each
    activation alone and, by one call of torch's top-k or of its reductions between kernels, for the others. Of [bundle] alone a linear on
    its active inputs: torch finds those."""

    backend: TritonBackend
    activation: str
    policy: str
    config: GpuConfig = field(default_factory=lambda: space()[0])
    _launches: dict[GpuNeuronSpec, dict[str, Any]] = field(default_factory=dict)
    _levels: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)

    def sources(self, spec: GpuNeuronSpec) -> dict[str, str]:
        """The texts of the kernels, by name."""
        return {name: neuron_source(spec, self.config, name) for name in KERNELS}

    def spec(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> GpuNeuronSpec:
        """What kernels compute for these weights."""
        name = parse_policy(self.policy).name
        alone = {"threshold": "threshold", "atleast": "threshold"}.get(name, "nonzero")
        bias = len(weights) > 1 and biases[0] is not None
        return GpuNeuronSpec(alone, self.activation or "relu", weights[-1].shape[1] == 2, bias, DTYPES[weights[-1].dtype])

    def __call__(self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], level: Tensor | None) -> Tensor:
        gate, bundle = weights[0] if len(weights) > 1 else None, weights[-1]
        neurons, _, D = bundle.shape
        rule = parse_policy(self.policy)
        gated = len(biases) == 3 and biases[1] is not None
        if x.numel() != (neurons if gate is None else D) or gated or rule.name == "all" or x.dtype not in DTYPES:
            return dense_block(x, weights, biases, level, self.activation, rule)
        spec, config = self.spec(weights, biases), self.config
        if spec not in self._launches:
            self._launches[spec] = {name: self.backend.load(text) for name, text in self.sources(spec).items()}
        run, x = self._launches[spec], x.contiguous()
        fresh = lambda n, dtype=torch.float32: torch.empty(n, dtype=dtype, device=x.device)  # noqa: E731
        bias = [] if gate is None or biases[0] is None else [biases[0].float()]
        out = torch.zeros(D, device=x.device) if biases[-1] is None else biases[-1].float()
        a = fresh(neurons)
        if gate is None:
            a = active(x.view(neurons).float(), self.activation, self.policy, level).contiguous()
        elif rule.name in ("nonzero", "threshold", "atleast"):
            run["scores"]((-(-neurons // config.bn), 1), (x, gate, *bias, self._levels_of(rule, level, gate), a), (neurons, D))
        else:  # these look at the whole row
            a = active(F.linear(x.view(1, D), gate, biases[0]).float(), self.activation, self.policy, level)[0].contiguous()
        found, count, h = fresh(neurons, torch.int32), fresh(1, torch.int32), fresh(neurons)
        run["compact"]((1, 1), (a, found, count), (neurons,))
        run["up"]((min(PROGRAMS, -(-neurons // config.bn)), 1), (x, bundle, a, found, count, h), (D,))
        tiles = -(-D // config.bk)
        y, partial = x.new_empty((*x.shape[:-1], D)), fresh(tiles * config.split * config.bk)
        done = torch.zeros(tiles, dtype=torch.int32, device=x.device)
        run["down"]((tiles, config.split), (bundle, h, found, count, out, y, partial, done), (D,))
        return y

    def _levels_of(self, rule: Policy, level: Tensor | None, gate: Tensor) -> Tensor:
        """What the kernel compares with; a threshold of the policy's own is copied to the device once."""
        if level is not None:
            return levels_of(rule, level, len(gate))
        key = len(gate), gate.device
        if key not in self._levels:
            self._levels[key] = levels_of(rule, None, len(gate)).to(gate.device)
        return self._levels[key]


@dataclass
class NeuronsElsewhere:
    """The kernels for a device that isn't here: they can be read, and compiled, not run."""

    kernels: GpuNeurons
    spec: GpuNeuronSpec

    def source(self, tokens: int) -> str:
        """The texts of all of them."""
        return "\n\n".join(self.kernels.sources(self.spec).values())

    def __call__(self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], level: Tensor | None) -> Tensor:
        target = self.kernels.backend.device.target
        raise TargetError(f"this model was compiled for {target}, to be looked at; on that machine use target='cuda'")
