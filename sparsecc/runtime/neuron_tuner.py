"""From which fraction of active neurons on a feed-forward block is faster dense: measured here, on the weights in use."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsecc.autotune.cache import TuneCache
from sparsecc.autotune.search import Effort
from sparsecc.codegen.kernel import FEW
from sparsecc.codegen.tvm.backend import TvmBackend, source_hash
from sparsecc.ir.ops import ACTIVATIONS
from sparsecc.passes.context import NeuronChoice
from sparsecc.runtime.cores import CoreCounts
from sparsecc.runtime.neurons import DenseNeurons, NeuronKernel, RequestKernel, Seen, bundle, sketch
from sparsecc.runtime.remainder import undisturbed

SECONDS = 0.3
SKETCHED = 256
"""Features from which on a sketch is worth its own reads."""
FOOTPRINT = 96 << 20
"""Bytes of weights to time on: more than caches hold, as when the other layers ran meanwhile."""


@dataclass
class CpuNeurons:
    """Kernels of `runtime/neurons.py`, and their limits."""

    backend: TvmBackend
    effort: Effort
    cache: TuneCache

    def refuses(self, weight: Tensor) -> str | None:
        """Nothing."""
        return None

    def bundle(self, up: Tensor | None, down: Tensor) -> Tensor:
        """See `runtime/neurons.bundle`."""
        return bundle(up, down)

    def sketch(self, gate: Tensor, activation: str, policy: str) -> tuple[Tensor, ...]:
        """Where ReLU's zeros are skipped, rows are long enough, and one instruction multiplies four bytes by four."""
        known = activation == "relu" and policy == "nonzero" and gate.dtype in (torch.float32, torch.bfloat16)
        return sketch(gate) if known and gate.shape[1] >= SKETCHED and self.backend.isa.has("avx512vnni") else ()

    def kernel(
        self, name: str, activation: str, policy: str, limit: float, seen: Any, request: bool, weights: Sequence[Tensor],
        biases: Sequence[Any],
    ) -> tuple[str, Any]:
        """One for each block, since each counts its own neurons."""
        if limit <= 0 and not request:
            return f"dense neurons {activation} {policy}", DenseNeurons(activation, policy)
        made: Any = NeuronKernel(self.backend, activation, policy, 1.0 if request else limit, len(weights) > 1)
        if request:
            made = RequestKernel(made, made.forget)
        made.seen = seen if isinstance(seen, Seen) else made.seen
        return f"cpu:{self.backend.isa.name} {name} {activation} {policy} {id(made.seen):x}", made

    def counts(self) -> tuple[str, Any]:
        """Of core neurons: one for all blocks."""
        return f"cpu:{self.backend.isa.name} core counts", CoreCounts(self.backend)

    def choose(self, name: str, gate: Tensor | None, bundle: Tensor, activation: str, policy: str, tokens: int) -> NeuronChoice:
        """The kernel's time grows with the active neurons in a straight line: none and all of them are timed, and the dense code."""
        seen = Seen()
        if self.effort == "none" or not 0 < tokens <= FEW or bundle.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return NeuronChoice(1.0, "not measured for this many tokens" if tokens > FEW else "not measured", seen=seen)
        machine = f"{self.backend.isa} {torch.get_num_threads()} threads torch {torch.__version__} {source_hash()}"
        digest = hashlib.sha256(machine.encode()).hexdigest()[:16]
        key = f"{'inputs' if gate is None else 'neurons'} {tuple(bundle.shape)} {bundle.dtype} {activation} M={tokens} {digest}"
        found = self.cache.get(key)
        if found is None:
            started = time.monotonic()
            found = {"us": self._time(gate, bundle, activation, tokens), "seconds": time.monotonic() - started}
            self.cache.put(key, found)
        none, every, dense = (found["us"][part] for part in ("none", "all", "dense"))
        limit = min(1.0, max(0.0, (dense - none) / max(1e-9, every - none)))
        what = "input" if gate is None else "neuron"
        reason = f"{none:.0f} us with no active {what}, {every:.0f} with all; dense {dense:.0f}; pays from {1 - limit:.0%} zeros on"
        return NeuronChoice(limit, reason, {"dense_us": dense, "none_us": none, "all_us": every, "break_even": 1 - limit}, seen)

    def _time(self, gate: Tensor | None, stored: Tensor, activation: str, tokens: int) -> dict[str, float]:
        """Microseconds by name."""
        weights = [stored] if gate is None else [gate, stored]
        size = sum(w.nbytes for w in weights)
        copies = [weights, *([w.clone() for w in weights] for _ in range(FOOTPRINT // size))]
        features = stored.shape[0] if gate is None else gate.shape[1]
        x = torch.randn(tokens, features, generator=torch.Generator().manual_seed(0)).to(stored.dtype)
        biases: list[Tensor | None] = [None] * (len(weights) - 1 + stored.shape[1])
        calls: dict[str, Callable[[], Any]] = {"dense": _in_turn(copies, dense(x, activation))}
        for name, limit in (("none", -1.0), ("all", 1.0)):
            kernel = NeuronKernel(self.backend, activation, "all", limit, gate is not None)
            kernel.dense = lambda x, *rest: x  # type: ignore[method-assign]  # "none": only what comes before the decision
            calls[name] = _in_turn(copies, lambda parts, run=kernel: run(x, parts, biases, None))
        return {name: 1e6 * timing.median for name, timing in undisturbed(calls, SECONDS).items()}


def dense(x: Tensor, activation: str) -> Callable[[list[Tensor]], Tensor]:
    """torch's linears on weights ([gate, bundle], or a bundle alone) as a model has them."""
    act = ACTIVATIONS[activation].fn
    own: dict[int, tuple[Tensor | None, Tensor]] = {}

    def run(weights: list[Tensor]) -> Tensor:
        stored = weights[-1]
        if id(stored) not in own:
            own[id(stored)] = (stored[:, 0].contiguous() if stored.shape[1] == 2 else None, stored[:, -1].t().contiguous())
        up, down = own[id(stored)]
        a = x if len(weights) == 1 else act(torch.nn.functional.linear(x, weights[0]))
        return torch.nn.functional.linear(a if up is None else a * torch.nn.functional.linear(x, up), down)

    return run


def _in_turn(copies: list[list[Tensor]], run: Callable[[list[Tensor]], Any]) -> Callable[[], Any]:
    turn = itertools.cycle(copies)
    return lambda: run(next(turn))
