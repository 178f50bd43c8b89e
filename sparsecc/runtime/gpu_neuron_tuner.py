"""Whether a feed-forward block's neurons are skipped on a GPU: measured where one is at hand, else predicted from its data sheet."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsecc.autotune.cache import TuneCache
from sparsecc.autotune.gpu_measure import interleaved_on_gpu
from sparsecc.autotune.roofline import BANDWIDTH_SHARE, LAUNCH, dense_estimate
from sparsecc.autotune.search import Effort
from sparsecc.codegen.triton.backend import TritonBackend, source_hash
from sparsecc.codegen.triton.compiler import binary
from sparsecc.codegen.triton.facts import dtype_of
from sparsecc.codegen.triton.neurons import KERNELS
from sparsecc.ir.policy import parse_policy
from sparsecc.passes.context import NeuronChoice
from sparsecc.runtime.gpu_neurons import DTYPES, GpuNeurons, NeuronsElsewhere
from sparsecc.runtime.neuron_tuner import dense
from sparsecc.runtime.neurons import DenseNeurons, RequestKernel, Seen, bundle

SECONDS = 0.3
ALL_ACTIVE = 1.1
"""Times dense code's that kernels may take with all neurons active, where the policy doesn't say how many are."""


@dataclass
class GpuNeuronTuner:
    """Kernels of `runtime/gpu_neurons.py`. How many neurons are active stays on the device: nothing is read back to choose by, so what the
    kernels take with all of them active, which is about what dense code takes, is the price where the zeros are missing."""

    backend: TritonBackend
    mode: str
    effort: Effort
    cache: TuneCache

    def refuses(self, weight: Tensor) -> str | None:
        """What there is no kernel for."""
        return None if weight.dtype in DTYPES else f"no GPU kernel skips neurons in {weight.dtype}: computed in full"

    def bundle(self, up: Tensor | None, down: Tensor) -> Tensor:
        """See `runtime/neurons.bundle`."""
        return bundle(up, down)

    def sketch(self, gate: Tensor, activation: str, policy: str) -> tuple[Tensor, ...]:
        """None: kernels read the gate."""
        return ()

    def kernel(
        self, name: str, activation: str, policy: str, limit: float, seen: Any, request: bool, weights: Sequence[Tensor],
        biases: Sequence[Any],
    ) -> tuple[str, Any]:
        """One for all blocks that compute the same, but for sets that prompts choose: torch's linears on the neurons of one, gathered once,
        read no more than kernels could. `limit` 0: torch's dense code."""
        if request:
            made = RequestKernel(DenseNeurons(activation, policy, "bundle"))
            made.seen = seen if isinstance(seen, Seen) else made.seen
            return f"{self.backend.device.target} {name} {activation} {id(made.seen):x}", made
        if limit <= 0:
            return f"dense neurons {activation} {policy}", DenseNeurons(activation, policy)
        key = f"{self.backend.device.target} neurons {activation} {policy}"
        made = GpuNeurons(self.backend, activation, policy)
        spec = made.spec(weights, biases)
        return f"{key} {spec}", NeuronsElsewhere(made, spec) if self.mode == "elsewhere" else made

    def counts(self) -> tuple[str, None]:
        """Of core neurons: torch's operations serve."""
        return "", None

    def choose(self, name: str, gate: Tensor | None, bundle: Tensor, activation: str, policy: str, tokens: int) -> NeuronChoice:
        """For one token. The kernels' time grows with the active neurons in a straight line."""
        if policy == "all":
            return NeuronChoice(1.0, "the neurons that a prompt chooses are gathered once", seen=Seen())
        if tokens > 1:
            return NeuronChoice(1.0, "one token at a time skips neurons, more are computed in full")
        measures = self.mode == "device" and self.effort != "none"
        none, every, full = self._measured(gate, bundle, activation) if measures else self._predicted(gate, bundle)
        even = 1 - min(1.0, max(0.0, (full - none) / max(1e-9, every - none)))
        kept = parse_policy(policy).size(len(bundle))
        price = none + (every - none) * (1.0 if kept is None else kept / len(bundle))
        how = "measured" if measures else "predicted from the data sheet"
        reason = f"{none:.0f} us with no active {'input' if gate is None else 'neuron'}, {every:.0f} with all; dense {full:.0f}, {how}"
        compiled = ""
        if self.mode == "elsewhere":
            made = GpuNeurons(self.backend, activation, policy)
            weights = [bundle] if gate is None else [gate, bundle]
            sources = made.sources(made.spec(weights, [None])).items()
            compiled = "".join(f"; {part}: {binary(source, self.backend.device)}" for part, source in sources)
        figures = {"dense_us": full, "none_us": none, "all_us": every, "break_even": even}
        if self.mode == "interpreter":  # nobody waits for it to be fast: its numbers are what is looked at
            return NeuronChoice(1.0, f"{reason}; taken in any case, to check its numbers", figures)
        if even >= 1:
            return NeuronChoice(0.0, f"{reason}: dense is faster at any number of zeros{compiled}", figures)
        if price > (full if kept is not None else ALL_ACTIVE * full):
            what = "with that many" if kept is not None else "with few zeros, which nothing here looks at while it runs,"
            return NeuronChoice(0.0, f"{reason}; {what} it loses too much: dense stays{compiled}", figures)
        return NeuronChoice(1.0, f"{reason}; pays from {even:.0%} zeros on{compiled}", figures)

    def _predicted(self, gate: Tensor | None, stored: Tensor) -> tuple[float, float, float]:
        (F, rows, D), device = stored.shape, self.backend.device
        read = lambda nbytes: 1e6 * nbytes / (BANDWIDTH_SHARE * device.bandwidth)  # noqa: E731
        launches = 1e6 * LAUNCH * len(KERNELS)
        none = launches + read(0 if gate is None else gate.nbytes)
        products = [(F, D)] * (rows - (gate is None)) + [(D, F)]
        full = 1e6 * sum(dense_estimate(n, k, 1, dtype_of(stored.dtype), device).seconds for n, k in products)
        return none, none + read(stored.nbytes), full

    def _measured(self, gate: Tensor | None, stored: Tensor, activation: str) -> tuple[float, float, float]:
        machine = f"{self.backend.device.name} torch {torch.__version__} {source_hash()}"
        digest = hashlib.sha256(machine.encode()).hexdigest()[:16]
        what = "inputs" if gate is None else f"neurons {activation}"
        key = f"{self.backend.device.target} {what} {tuple(stored.shape)} {stored.dtype} {digest}"
        found = self.cache.get(key)
        if found is None:
            weights = [stored] if gate is None else [gate, stored]
            x = torch.randn(1, len(stored) if gate is None else gate.shape[1], device=stored.device).to(stored.dtype)
            biases: list[Tensor | None] = [None] * (len(weights) - 1 + stored.shape[1])
            plain = dense(x, activation)
            calls: dict[str, Callable[[], Any]] = {"dense": lambda: plain(weights)}
            for one, kernel in (("none", GpuNeurons(self.backend, activation, "threshold(inf)")),
                                ("all", GpuNeurons(self.backend, "" if gate is None else "silu", "nonzero"))):
                calls[one] = lambda kernel=kernel: kernel(x, weights, biases, None)
            found = {"us": {n: 1e6 * t.median for n, t in interleaved_on_gpu(calls, SECONDS).items()}}
            self.cache.put(key, found)
        return found["us"]["none"], found["us"]["all"], found["us"]["dense"]
