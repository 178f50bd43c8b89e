"""Which storage and configuration run a layer fastest here: candidates, the contest, and the memory of its results."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.autotune.cache import TuneCache
from sparsecc.autotune.cost import OVERHEAD, Machine, Work, break_even, costs, limits, predict, predict_dense, work
from sparsecc.autotune.search import OUT_OF_TIME, Candidate, Effort, Result, contest
from sparsecc.codegen.config import from_text, to_text
from sparsecc.codegen.kernel import KernelSpec, Regime
from sparsecc.codegen.tvm.backend import CpuConfig, TvmBackend, source_hash
from sparsecc.codegen.tvm.direct import DirectSpec, direct_tile
from sparsecc.codegen.tvm.half import dot_of
from sparsecc.codegen.tvm.image import WindowSpec
from sparsecc.codegen.tvm.spmv import GROUP
from sparsecc.codegen.tvm.terms import serves_few
from sparsecc.formats import Format, Pattern, Shared
from sparsecc.formats.grid import kept_blocks
from sparsecc.ir.ops import empty_output
from sparsecc.ir.policy import parse_policy
from sparsecc.ir.token_ops import mask_tiles
from sparsecc.passes.context import Attention, Choice, Picture, Problem
from sparsecc.passes.pack import formats_for
from sparsecc.runtime.between import (
    AttentionKernel,
    AttentionSpec,
    GateKernel,
    GateSpec,
    NormKernel,
    NormSpec,
    RotaryKernel,
    TilesKernel,
    TokensKernel,
)  # fmt: skip
from sparsecc.runtime.calls import Call, PictureCall, WindowCall
from sparsecc.runtime.image import DepthwiseKernel, DirectKernel, PatchesKernel, PoolKernel
from sparsecc.runtime.launch import LinearKernel
from sparsecc.runtime.neuron_tuner import CpuNeurons
from sparsecc.runtime.remainder import undisturbed
from sparsecc.runtime.routing import COMPARES, KeepKernel, ReceivedKernel, RouteKernel
from sparsecc.runtime.rows import AppendRows, AttentionRows, GateRows, NormRows, RotaryRows

TOLERANCE = 2e-5
"""Largest error of a candidate, as a fraction of the largest output: float32 accumulation in another order."""

PICTURES_TOP = 6
"""How many candidates a convolution has with "quick" effort: it is tuned as it is run, token-minor, and its dense code is among them."""

WINS_BY = 0.97
"""A candidate replaces dense code only if it takes at most this fraction of its time: below that, noise decides."""


TIMED = 512
"""Tokens of a contest at most: from there on both sides take time in proportion to them, and chains run a few sequences at a time."""


@dataclass
class CpuTuner:
    """Chooses and makes kernels for one backend and number of threads. Equal layers are measured once."""

    backend: TvmBackend
    effort: Effort = "quick"
    seconds: float = 45.0
    cache: TuneCache = field(default_factory=TuneCache)
    on_choice: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        self._deadline = time.monotonic() + self.seconds
        self._kernels: dict[str, LinearKernel] = {}
        self.between = self
        self.neurons = CpuNeurons(self.backend, self.effort, self.cache)
        self.notes: dict[str, str] = {}  # for the explanation's header

    def formats(self, pattern: Pattern, weight: Tensor, codec: str | None, tokens: int, compute: str | None) -> list[Format]:
        """See `passes.pack.formats_for`. Where the CPU has no products in bf16, what was asked for runs in float32."""
        return formats_for(pattern, weight, codec, tokens, compute)

    def choose(self, problem: Problem) -> Choice:
        """The fastest of the candidates and the dense code, from the cache if this was measured before."""
        if problem.picture is None:
            problem = replace(problem, tokens=min(problem.tokens, TIMED))
        candidates = self.candidates(problem)
        key = self._key(problem, candidates)
        found = self.cache.get(key)
        if found is None:
            started = time.monotonic()
            results = self.contest(problem, candidates)
            found = {"results": [vars(r) for r in results], "seconds": time.monotonic() - started}
            # A failure may be this moment's (memory, time, code being changed): such a contest is held again next time.
            if self.effort != "none" and not any(_failed(r) for r in results):
                self.cache.put(key, found)
        self.on_choice(problem.name)
        return replace(self._choice(problem, [Result(**r) for r in found["results"]], candidates), tokens=problem.tokens)

    def predicted(self, problem: Problem) -> float:
        """Seconds by the cost model, of the best candidate or the dense code."""
        machine, (N, K) = Machine.measured(torch.get_num_threads()), problem.weight.shape
        best = predict_dense(N, K, problem.tokens, machine)
        at: dict[Format, tuple[float, float, float]] = {}
        for fmt, config in self.candidates(problem).values():
            if fmt not in at:
                at[fmt] = limits(self._work(problem, fmt), problem.tokens, machine)
            factors = costs(fmt, self.regime(fmt, problem.tokens), to_text(config), config.dot)
            best = min(best, OVERHEAD + sum(cost * limit for cost, limit in zip(factors, at[fmt], strict=True)))
        return best

    def kernel(
        self, formats: Sequence[Format], epilogue: str, residual: bool, layout: str, shape: tuple[int, int], config: str,
        dtype: torch.dtype = torch.float32, tokens: int = 128,
    ) -> tuple[str, LinearKernel]:
        """The key that stands in the program, and the kernel, one per shape, spec and configuration."""
        spec = _spec(tuple(formats), epilogue, residual, layout, shape)
        key = f"cpu:{self.backend.isa.name} {shape[0]}x{shape[1]} {spec} {config}"
        if key not in self._kernels:
            self._kernels[key] = LinearKernel(self.backend, spec, from_text(config, CpuConfig), shape)
        return key, self._kernels[key]

    def norm(self, kind: str, layout: str) -> tuple[str, NormKernel]:
        """The key that stands in the program, and the kernel."""
        spec = NormSpec(kind, layout)
        return self._named(spec), NormKernel(self.backend, spec)

    def norm_rows(self, kind: str) -> tuple[str, NormRows]:
        """The same for a few tokens."""
        return self._named(f"{kind} norm, rows"), NormRows(self.backend, kind)

    def gate(self, activation: str, layout: str) -> tuple[str, GateKernel | GateRows]:
        """The key that stands in the program, and the kernel."""
        spec = GateSpec(activation)
        if layout == "row":
            return self._named(f"{spec}, rows"), GateRows(self.backend, activation)
        return self._named(spec), GateKernel(self.backend, spec)

    def rotary(self, layout: str) -> tuple[str, RotaryKernel | RotaryRows]:
        """The key that stands in the program, and the kernel."""
        if layout == "row":
            return self._named("rotary, rows"), RotaryRows(self.backend)
        return self._named("rotary"), RotaryKernel(self.backend)

    def attention(self, D: int, hides: str, layout: str = "token") -> tuple[str, AttentionKernel | AttentionRows]:
        """The key that stands in the program, and the kernel."""
        spec = AttentionSpec(D, hides)
        if layout == "row":
            return self._named(f"{spec}, rows"), AttentionRows(self.backend, D, "mask" if hides in ("rows", "keys") else hides)
        return self._named(spec), AttentionKernel(self.backend, spec)

    def append(self) -> tuple[str, AppendRows]:
        """The key that stands in the program, and the kernel."""
        return self._named("append, rows"), AppendRows(self.backend)

    def tokens(self) -> tuple[str, TokensKernel]:
        """The key that stands in the program, and the kernel."""
        return self._named("tokens"), TokensKernel(self.backend)

    def mask_tiles(self, rows: bool) -> tuple[str, TilesKernel]:
        """The key that stands in the program, and the kernel."""
        return self._named(f"mask tiles {'rows' if rows else 'keys'}"), TilesKernel(self.backend, rows)

    def window(self, kind: str, window: Sequence[int], epilogue: str) -> tuple[str, DepthwiseKernel | PatchesKernel]:
        """The key that stands in the program, and the kernel, of "depthwise" or "patches"."""
        spec = WindowSpec(kind, (window[0], window[1]), (window[2], window[3]), epilogue)
        return self._named(spec), (DepthwiseKernel if kind == "depthwise" else PatchesKernel)(self.backend, spec)

    def direct(self, channels: int, OW: int, window: Sequence[int], epilogue: str) -> tuple[str, DirectKernel]:
        """The key that stands in the program, and the kernel."""
        tile = direct_tile(OW, self.backend.isa.lanes, self.backend.isa.registers)
        spec = DirectSpec(WindowSpec("direct", (window[0], window[1]), (window[2], window[3]), epilogue), channels, tile)
        return self._named(spec), DirectKernel(self.backend, spec)

    def window_times(self, picture: Picture, outputs: int | None, epilogue: str) -> tuple[float | None, float | None]:
        """Microseconds of the kernel and of torch's, from the cache if this was measured before; None where nothing is."""
        if self.effort == "none":
            return None, None
        machine = f"{self.backend.isa} {torch.get_num_threads()} threads torch {torch.__version__} {source_hash()}"
        key = f"window {picture} {outputs} {epilogue} {hashlib.sha256(machine.encode()).hexdigest()[:16]}"
        found = self.cache.get(key)
        if found is None:
            call = WindowCall(picture, outputs, epilogue)
            entrant = Candidate("planes", 0.0, lambda: call.candidate(self))
            dense = Candidate("dense", 1.0, call.dense)
            results = contest(dense, [entrant], call.reference, TOLERANCE, self.effort, self._deadline, race=undisturbed)
            found = {"results": [vars(r) for r in results]}
            if not any(_failed(r) for r in results):
                self.cache.put(key, found)
        times = {r["name"]: 1e6 * r["seconds"] for r in found["results"] if r["seconds"] is not None}
        return times.get("planes"), times.get("dense")

    def pool(self) -> tuple[str, PoolKernel]:
        """The key that stands in the program, and the kernel."""
        return self._named("pool"), PoolKernel(self.backend)

    def received(self) -> tuple[str, ReceivedKernel]:
        """The key that stands in the program, and the kernel."""
        return self._named("received"), ReceivedKernel(self.backend)

    def route(self) -> tuple[str, RouteKernel]:
        """The key that stands in the program, and the kernel."""
        return self._named("route"), RouteKernel(self.backend)

    def keep(self, policy: str) -> tuple[str, KeepKernel | None]:
        """The key that stands in the program, and the kernel; none for policies that compare a row's tokens."""
        if parse_policy(policy).name not in COMPARES:
            return "", None
        return self._named(f"keep {policy}"), KeepKernel(self.backend, policy)

    def _named(self, what: object) -> str:
        return f"cpu:{self.backend.isa.name} {what}"

    def attention_times(self, problem: Attention) -> tuple[float, float] | None:
        """Seconds of the kernel and of torch's scaled_dot_product_attention, each on the layout and dtype it likes; None without tuning."""
        if self.effort == "none":
            return None
        machine = f"{self.backend.isa} {torch.get_num_threads()} threads torch {torch.__version__} {source_hash()}"
        key = f"{problem} {hashlib.sha256(machine.encode()).hexdigest()[:16]}"
        found = self.cache.get(key)
        if found is None:
            call = AttentionCall(problem)
            kernel = AttentionKernel(self.backend, AttentionSpec(problem.D, problem.hides))
            entrant = Candidate("token-minor", 0.0, lambda: call.candidate(kernel))
            dense = Candidate("dense", 1.0, call.dense)
            results = contest(dense, [entrant], call.reference, TOLERANCE, self.effort, self._deadline, race=undisturbed)
            found = {"results": [vars(r) for r in results]}
            if not any(_failed(r) for r in results):
                self.cache.put(key, found)
        times = {r["name"]: r["seconds"] for r in found["results"] if r["seconds"] is not None}
        return times.get("token-minor", math.inf), times.get("dense", 0.0)

    def candidates(self, problem: Problem) -> dict[str, tuple[Format, CpuConfig]]:
        """By name, the most promising first within each format."""
        found: dict[str, tuple[Format, CpuConfig]] = {}
        for fmt in problem.formats:
            spec = KernelSpec((fmt,), problem.epilogue, problem.residual, regime=self.regime(fmt, problem.tokens))
            slow = dot_of(fmt) == "dpbf16" and self.backend.isa.has("amx-bf16")  # half as fast as float32 where there are tiles
            if self.backend.refuses(spec) is None and not slow:
                for config in self.backend.space(spec):
                    found[f"{fmt} {to_text(config)}"] = (fmt, config)
        return found

    def regime(self, fmt: Format, tokens: int) -> Regime:
        """Which of the kernels of one stored weight serves so many tokens."""
        regime = regime_of(tokens)
        return "many" if regime == "few" and not serves_few(fmt, self.backend.isa) else regime

    def contest(self, problem: Problem, candidates: dict[str, tuple[Format, CpuConfig]]) -> list[Result]:
        call = Call(problem) if problem.picture is None else PictureCall(problem, problem.picture)
        machine = Machine.measured(torch.get_num_threads())
        N, K = problem.weight.shape
        tokens = problem.tokens
        dense_time = predict_dense(N, K, tokens, machine)
        entrants = []
        ranks: dict[Format, int] = {}
        for name, (fmt, config) in candidates.items():
            rank = ranks[fmt] = ranks.get(fmt, -1) + 1
            factors = costs(fmt, self.regime(fmt, tokens), to_text(config), config.dot)
            stored = self._work(problem, fmt)
            # What the model cannot tell apart stays in the backend's order.
            entrants.append(Candidate(name, predict(stored, tokens, machine, factors) * (1 + 1e-3 * rank),
                                      lambda fmt=fmt, config=config: call.candidate(self, fmt, config)))  # fmt: skip
        dense = Candidate("dense", dense_time, call.dense)
        top = PICTURES_TOP if problem.picture and self.effort == "quick" else None
        try:
            return contest(dense, entrants, call.reference, TOLERANCE + call.rounding, self.effort, self._deadline, top, undisturbed)
        finally:
            self._kernels.clear()  # they remember the copies of the weight that they were timed with

    def _work(self, problem: Problem, fmt: Format) -> Work:
        """What a call on the weight in this storage does."""
        shared, (N, K) = fmt.level.rows if isinstance(fmt.level, Shared) else 1, problem.weight.shape
        return work(fmt, N, K, shared * kept_blocks(problem.weight, (shared, 1) if shared > 1 else fmt.block))

    def _choice(self, problem: Problem, results: list[Result], candidates: dict[str, tuple[Format, CpuConfig]]) -> Choice:
        dense = next(r for r in results if r.name == "dense")
        times = {r.name: r.seconds for r in results if r.seconds is not None}
        sparse = next((r for r in results if r.name in candidates and r.error is None), None)
        if sparse is None:
            errors = "; ".join(f"{r.name}: {r.error}" for r in results if r.error)[:300]
            return Choice(None, "", dense.predicted, dense.seconds, dense.seconds, None, f"no candidate ran: {errors}", times)
        fmt, config = candidates[sparse.name]
        zeros = 1 - int(problem.weight.count_nonzero()) / problem.weight.numel()
        even = None
        if sparse.seconds is not None and dense.seconds is not None:
            even = break_even({zeros: sparse.seconds}, dense.seconds)
            wins, by = sparse.seconds <= WINS_BY * dense.seconds, dense.seconds / sparse.seconds
            how = "measured in a chain" if problem.chained else "measured"
        else:
            wins, by, how = sparse.predicted < dense.predicted, dense.predicted / sparse.predicted, "predicted"
        if problem.picture is not None:
            reason = f"{by:.2f}x torch's convolution, {how}"
            return Choice(fmt, to_text(config), sparse.predicted, sparse.seconds, dense.seconds, even, reason, times)
        at = "" if even is None else f"; break-even at {even:.0%} zeros"
        if wins:
            return Choice(fmt, to_text(config), sparse.predicted, sparse.seconds, dense.seconds, even, f"{by:.2f}x dense, {how}{at}", times)
        reason = f"dense is faster: {fmt} would run at {by:.2f}x of its speed, {how}{at}"
        return Choice(None, "", sparse.predicted, sparse.seconds, dense.seconds, even, reason, times)

    def _key(self, problem: Problem, candidates: dict[str, tuple[Format, CpuConfig]]) -> str:
        """Equal for layers that would be measured alike: shape (large ones to whole vectors: dead neurons leave each layer a size of its
        own), candidates, density to 2 %, call, machine, code."""
        N, K = (size if size < 256 else -(-size // 16) * 16 for size in problem.weight.shape)
        density = round(50 * int(problem.weight.count_nonzero()) / max(1, problem.weight.numel()))
        machine = f"{self.backend.isa} {torch.get_num_threads()} threads torch {torch.__version__} {source_hash()}"
        digest = hashlib.sha256(f"{list(candidates)} {machine} {self.effort}".encode()).hexdigest()[:16]
        tokens = problem.tokens if problem.tokens <= 2 else 2 ** math.ceil(math.log2(problem.tokens))
        call = f"{problem.epilogue or '-'}{'+res' if problem.residual else ''}{problem.picture or ''} {problem.reads} {problem.layout}"
        return f"{N}x{K} {problem.weight.dtype} M={tokens} kept={density / 50:.2f} {call} {digest}"


class AttentionCall:
    """The problem with made-up heads: as torch runs it, as a kernel does between packed linears, and in float64.

    What a mask will hide is not known here: with a row for every query it is taken for a causal one, else it hides a tenth at random.
    """

    def __init__(self, p: Attention) -> None:
        random = torch.Generator().manual_seed(0)
        make = lambda heads, tokens: torch.randn(p.B, tokens, heads, p.D, generator=random).transpose(1, 2)  # noqa: E731
        self.q, self.k, self.v = make(p.H, p.S), make(p.G, p.Sk), make(p.G, p.Sk)
        causal = torch.ones(p.B, 1, p.S, p.Sk).tril(max(0, p.Sk - p.S)).bool()
        self.mask = {"rows": causal, "keys": torch.rand(p.B, 1, 1, p.Sk, generator=random) < 0.9}.get(p.hides)
        self.dtype, self.given = p.dtype, {"enable_gqa": p.H != p.G, "is_causal": p.hides == "causal"}

    def dense(self) -> Callable[[], Tensor]:
        """torch's own code."""
        q, k, v = (t.to(self.dtype) for t in (self.q, self.k, self.v))
        return lambda: F.scaled_dot_product_attention(q, k, v, self.mask, **self.given)

    def candidate(self, kernel: AttentionKernel) -> Callable[[], Tensor]:
        """The kernel on token-minor heads."""
        q, k, v = (empty_output(t, t.shape[-1], "token").copy_(t) for t in (self.q, self.k, self.v))
        mask, scale = None if self.mask is None else self.mask.float().log(), q.shape[-1] ** -0.5
        if mask is not None and mask.shape[-2] > 1:
            mask = empty_output(mask, mask.shape[-1], "token").copy_(mask)
        tiles = None if mask is None else mask_tiles(mask, "")
        return lambda: kernel(q, k, v, mask, tiles, scale)

    def reference(self) -> Tensor:
        """float64."""
        return F.scaled_dot_product_attention(self.q.double(), self.k.double(), self.v.double(), self.mask, **self.given)


def regime_of(tokens: int) -> Regime:
    """What decides a call with so many tokens: arithmetic, or reading the weight once for a few, or for one."""
    return "one" if tokens == 1 else "few" if tokens <= GROUP else "many"


def _failed(result: Result) -> bool:
    """Whether a candidate was tried and failed, or there was no time to try it."""
    return result.error is not None and (result.error == OUT_OF_TIME or not result.error.startswith("not tried: "))


def _spec(formats: tuple[Format, ...], epilogue: str, residual: bool, layout: str, shape: tuple[int, int]) -> KernelSpec:
    ragged = any(shape[0] % (fmt.block[0] * fmt.level.window) for fmt in formats)
    wide = any(fmt.grid(*shape)[1] > 65536 for fmt in formats)
    return KernelSpec(formats, epilogue, residual, layout, "many", ragged, wide)
