"""Which storage and kernel run a layer fastest on a GPU: measured where one is at hand, else predicted from its data sheet."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sparsecc.autotune.cache import TuneCache
from sparsecc.autotune.gpu_measure import interleaved_on_gpu
from sparsecc.autotune.roofline import Estimate, dense_estimate, estimate
from sparsecc.autotune.search import OUT_OF_TIME, Candidate, Effort, Result, contest
from sparsecc.codegen.config import from_text, to_text
from sparsecc.codegen.kernel import KernelSpec
from sparsecc.codegen.triton.backend import TritonBackend, source_hash
from sparsecc.codegen.triton.compiler import Binary
from sparsecc.codegen.triton.config import GpuConfig
from sparsecc.codegen.triton.facts import dtype_of, spec_of
from sparsecc.codegen.triton.storage import storage
from sparsecc.errors import TargetError
from sparsecc.formats import Format, Pattern
from sparsecc.formats.grid import kept_blocks
from sparsecc.formats.level import NM
from sparsecc.passes.context import Choice, Problem
from sparsecc.runtime.calls import Call
from sparsecc.runtime.gpu import Elsewhere, GpuLinear
from sparsecc.runtime.gpu_neuron_tuner import GpuNeuronTuner
from sparsecc.runtime.vendor import VendorConfig, VendorLinear, vendors

Mode = Literal["device", "interpreter", "elsewhere"]
"""Where kernels run: on this machine's GPU, in Triton's interpreter on CPU tensors, or not at all (cross-compilation)."""

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest error of a candidate, as a fraction of the largest output: rounding of the result, sums in another order."""

TF32_TOLERANCE = 2e-3
WINS_BY = 0.97
"""A candidate replaces dense code only if it takes at most this fraction of its time."""

STEPS_DOWN = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Sparsities at which a prediction looks for the break-even."""

Config = GpuConfig | VendorConfig


@dataclass
class GpuTuner:
    """Chooses and makes kernels for one device. Equal layers are measured once."""

    backend: TritonBackend
    mode: Mode
    effort: Effort = "quick"
    seconds: float = 45.0
    cache: TuneCache = field(default_factory=TuneCache)
    on_choice: Callable[[str], None] = lambda text: None
    between: None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._deadline = time.monotonic() + self.seconds
        self._kernels: dict[str, Any] = {}
        self.neurons = GpuNeuronTuner(self.backend, self.mode, self.effort, self.cache)
        device = self.backend.device
        self.notes = {"device": device.name if self.mode != "interpreter" else f"{device.name}, kernels interpreted on the CPU"}
        if self.mode != "device":
            self.notes["times"] = "predicted from the data sheet, not measured"

    def formats(self, pattern: Pattern, weight: Tensor, codec: str | None, tokens: int, compute: str | None) -> list[Format]:
        """See `codegen.triton.storage`."""
        if compute:
            raise TargetError(f"compute={compute!r} is an option for CPUs: on a GPU, compile the model in {compute}")
        return storage(pattern, int(weight.count_nonzero()) / max(1, weight.numel()), weight.dtype, codec)

    def choose(self, problem: Problem) -> Choice:
        """The fastest of the candidates and the dense code, from the cache if this was measured before."""
        candidates = self._candidates(problem)
        measured = self.mode == "device" and self.effort != "none"
        choice = (self._measured if measured else self._predicted)(problem, candidates)
        self.on_choice(problem.name)
        return choice

    def predicted(self, problem: Problem) -> float:
        """Seconds by the data sheet, of the best candidate or the dense code."""
        N, K = problem.weight.shape
        dense = dense_estimate(N, K, problem.tokens, dtype_of(problem.weight.dtype), self.backend.device)
        blocks = {fmt: kept_blocks(problem.weight, fmt.block) for fmt, _ in self._candidates(problem).values()}
        found = (self._estimate(problem, fmt, config, blocks[fmt]).seconds for fmt, config in self._candidates(problem).values())
        return min([dense.seconds, *found])

    def kernel(
        self, formats: Sequence[Format], epilogue: str, residual: bool, layout: str, shape: tuple[int, int], config: str,
        dtype: torch.dtype = torch.float32, tokens: int = 128,
    ) -> tuple[str, Any]:
        """The key that stands in the program, and the kernel, one per shape, spec and configuration."""
        chosen: Config = from_text(config, GpuConfig, VendorConfig)
        spec = spec_of(tuple(formats), epilogue, residual, shape, dtype, tokens)
        key = f"{self.backend.device.target} {shape[0]}x{shape[1]} {spec} {config}"
        if key not in self._kernels:
            self._kernels[key] = self._make(spec, chosen, shape)
        return key, self._kernels[key]

    def _make(self, spec: KernelSpec, config: Config, shape: tuple[int, int]) -> Any:
        if self.mode == "elsewhere":
            return Elsewhere(self.backend, spec, config, shape)
        if isinstance(config, VendorConfig):
            return VendorLinear(spec, config, shape)
        return GpuLinear(self.backend, spec, config, shape)

    def _candidates(self, problem: Problem) -> dict[str, tuple[Format, Config]]:
        """By name, the most promising first within each format."""
        found: dict[str, tuple[Format, Config]] = {}
        N, K = problem.weight.shape
        for fmt in problem.formats:
            spec = spec_of((fmt,), problem.epilogue, problem.residual, (N, K), problem.weight.dtype, problem.tokens)
            configs: list[Config] = [] if self.backend.refuses(spec) else list(self.backend.space(spec))
            if self.mode == "device":
                configs += vendors(spec)
            found |= {f"{fmt} {to_text(config)}": (fmt, config) for config in configs}
        return found

    def _estimate(self, problem: Problem, fmt: Format, config: Config, kept: int) -> Estimate:
        N, K = problem.weight.shape
        spec = spec_of((fmt,), problem.epilogue, problem.residual, (N, K), problem.weight.dtype, problem.tokens)
        if isinstance(config, VendorConfig):  # half of dense where it wins at all
            dense = dense_estimate(N, K, problem.tokens, spec.dtype, self.backend.device)
            return replace(dense, seconds=0.6 * dense.seconds)
        return estimate(spec, config, (N, K), {fmt: kept}, problem.tokens, self.backend.device)

    def _measured(self, problem: Problem, candidates: Mapping[str, tuple[Format, Config]]) -> Choice:
        key = self._key(problem, candidates)
        found = self.cache.get(key)
        if found is None:
            try:
                results = self._contest(problem, candidates)
            except torch.OutOfMemoryError as error:  # of what all candidates need: the dense code, the reference, the timing
                return Choice(None, "", None, None, None, None, f"out of memory while tuning: {str(error).strip().partition(chr(10))[0]}")
            finally:
                self._kernels.clear()  # they remember the weights that they ran on
            found = {"results": [vars(r) for r in results]}
            if not any(r.error is not None and (r.error == OUT_OF_TIME or not r.error.startswith("not tried: ")) for r in results):
                self.cache.put(key, found)
        results = [Result(**r) for r in found["results"]]
        dense = next(r for r in results if r.name == "dense")
        times = {r.name: r.seconds for r in results if r.seconds is not None}
        sparse = next((r for r in results if r.name in candidates and r.error is None), None)
        if sparse is None or sparse.seconds is None or dense.seconds is None:
            failed = next((r.error for r in results if r.error is not None), "there are none")
            return Choice(None, "", None, None, dense.seconds, None, f"no kernel could be timed: {failed}", times)
        fmt, config = candidates[sparse.name]
        by, even = dense.seconds / sparse.seconds, self._break_even(problem, fmt, config)
        at = "" if even is None else f"; predicted break-even at {even:.0%} zeros"
        wins = sparse.seconds <= WINS_BY * dense.seconds
        reason = f"{by:.2f}x dense, measured{at}" if wins else f"dense is faster: {fmt} would run at {by:.2f}x of its speed, measured{at}"
        chosen = (fmt, to_text(config)) if wins else (None, "")
        return Choice(*chosen, sparse.predicted, sparse.seconds, dense.seconds, even, reason, times)

    def _contest(self, problem: Problem, candidates: Mapping[str, tuple[Format, Config]]) -> list[Result]:
        call = Call(problem)
        N, K = problem.weight.shape
        entrants = []
        ranks: dict[Format, int] = {}
        for name, (fmt, config) in candidates.items():
            rank = ranks[fmt] = ranks.get(fmt, -1) + 1
            seconds = self._estimate(problem, fmt, config, kept_blocks(problem.weight, fmt.block)).seconds
            build = lambda fmt=fmt, config=config: call.candidate(self, fmt, config)  # noqa: E731
            entrants.append(Candidate(name, seconds * (1 + 0.02 * rank), build))
        dtype = dtype_of(problem.weight.dtype)
        dense = Candidate("dense", dense_estimate(N, K, problem.tokens, dtype, self.backend.device).seconds, call.dense)
        tolerance = TF32_TOLERANCE if dtype == "tf32" else TOLERANCE[problem.weight.dtype]
        return contest(dense, entrants, call.reference, tolerance, self.effort, self._deadline, top=8, race=interleaved_on_gpu)

    def _predicted(self, problem: Problem, candidates: Mapping[str, tuple[Format, Config]]) -> Choice:
        """By the data sheet; a kernel that would spill registers or overflow shared memory gives its place to the next."""
        N, K = problem.weight.shape
        dense = dense_estimate(N, K, problem.tokens, dtype_of(problem.weight.dtype), self.backend.device)
        ranked = []
        for fmt, config in candidates.values():
            ranked.append((self._estimate(problem, fmt, config, kept_blocks(problem.weight, fmt.block)), fmt, config))
        ranked.sort(key=lambda entry: entry[0].seconds)
        times = {f"{fmt} {to_text(config)}": found.seconds for found, fmt, config in ranked} | {"dense": dense.seconds}
        if not ranked:
            return Choice(None, "", None, None, None, None, "no kernel for it", {})
        best, fmt, config = ranked[0]
        binary = None
        if self.mode == "elsewhere":
            best, fmt, config, binary = self._first_clean(problem, ranked)
        by, even = dense.seconds / best.seconds, self._break_even(problem, fmt, config)
        at = "" if even is None else f"; break-even at {even:.0%} zeros"
        what = f"; {best.fraction:.0%} of the roofline{'' if binary is None else f', {binary}'}"
        if self.mode == "interpreter":  # nobody waits for it to be fast: its numbers are what is looked at
            at, by = f"{at}; taken in any case, to check its numbers", max(by, 1 / WINS_BY)
        if by >= 1 / WINS_BY:
            return Choice(fmt, to_text(config), best.seconds, None, None, even, f"{by:.2f}x dense, predicted{at}{what}", times)
        reason = f"dense is faster: {fmt} would run at {by:.2f}x of its speed, predicted{at}{what}"
        return Choice(None, "", best.seconds, None, None, even, reason, times)

    def _first_clean(self, problem: Problem, ranked: Sequence[tuple[Estimate, Format, Config]]) -> tuple[Estimate, Format, Config, Binary]:
        shape = (problem.weight.shape[0], problem.weight.shape[1])
        found = None
        for best, fmt, config in ranked[:4]:
            assert isinstance(config, GpuConfig)
            spec = spec_of((fmt,), problem.epilogue, problem.residual, shape, problem.weight.dtype, problem.tokens)
            binary = self.backend.binary(spec, config)
            found = found or (best, fmt, config, binary)
            if not binary.spills and binary.shared <= self.backend.device.shared:
                return best, fmt, config, binary
        assert found is not None
        return found

    def _break_even(self, problem: Problem, fmt: Format, config: Config) -> float | None:
        """The sparsity from which the prediction is below dense, for the same zeros drawn thinner or thicker; None if none is, or for N:M,
        whose storage and time do not depend on it."""
        if isinstance(fmt.level, NM):
            return None
        N, K = problem.weight.shape
        dense = dense_estimate(N, K, problem.tokens, dtype_of(problem.weight.dtype), self.backend.device)
        blocks = -(-N // fmt.block[0]) * -(-K // fmt.block[1])
        for sparsity in (0.0, 0.1, 0.2, 0.3, 0.4, *STEPS_DOWN):
            if self._estimate(problem, fmt, config, round((1 - sparsity) * blocks)).seconds < dense.seconds:
                return sparsity
        return None

    def _key(self, problem: Problem, candidates: Mapping[str, Any]) -> str:
        """Equal for layers that would be measured alike: shape, candidates, density to 2 %, call, device, versions, code."""
        import triton

        N, K = problem.weight.shape
        density = round(50 * int(problem.weight.count_nonzero()) / max(1, problem.weight.numel()))
        machine = f"{self.backend.device.name} torch {torch.__version__} triton {triton.__version__} {source_hash()}"
        digest = hashlib.sha256(f"{list(candidates)} {machine} {self.effort}".encode()).hexdigest()[:16]
        call = f"{problem.epilogue or '-'}{'+res' if problem.residual else ''}"
        tokens = 1 << (problem.tokens - 1).bit_length() if problem.tokens > 16 else problem.tokens
        return f"{self.backend.device.target} {N}x{K} {dtype_of(problem.weight.dtype)} M={tokens} kept={density / 50:.2f} {call} {digest}"
