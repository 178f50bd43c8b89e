"""What the compiler lends to passes: the user's spec, and a tuner that knows the target."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsecc.formats import Format, Pattern
from sparsecc.spec import SparsitySpec

Kernel = Callable[[Tensor, list[Tensor], Tensor | None, Tensor | None], Tensor]


@dataclass(frozen=True)
class Picture:
    """What a convolution reads: f32[B, channels, *size]; `window` and `pads` as in `sparsecc::patches`."""

    B: int
    channels: int
    size: tuple[int, int]
    window: tuple[int, int, int, int]
    pads: tuple[int, int, int, int]


@dataclass(frozen=True)
class Problem:
    """One linear to store and run: its weight [N, K] with zeros in it, the formats that may hold it, and the call around it.

    `tokens`: M to tune for. `picture`: of what it is a convolution, if it is one: then some format is chosen, its dense code is in
    `formats`, and the dense code to compare with is torch's convolution. `reads` and `layout`: of x, and of y and the residual: "row", or
    "token" where they are token-minor.
    """

    name: str
    weight: Tensor
    formats: tuple[Format, ...]
    tokens: int
    epilogue: str
    residual: bool
    picture: Picture | None = None
    layout: str = "row"
    reads: str = "row"

    @property
    def chained(self) -> bool:
        """Whether it follows another kernel, or is followed by one."""
        return "token" in (self.reads, self.layout)


@dataclass(frozen=True)
class Choice:
    """What won: a format and the text of a configuration, or neither (dense). Times in seconds, by candidate, at `tokens` (those of the
    problem if 0)."""

    format: Format | None
    config: str
    predicted: float | None
    seconds: float | None
    dense_seconds: float | None
    break_even: float | None
    reason: str
    alternatives: dict[str, float] = field(default_factory=dict)
    tokens: int = 0


@dataclass(frozen=True)
class Attention:
    """q [B, H, S, D]; k and v [B, G, Sk, D]. `hides`: what queries may not see, see `AttentionSpec`; `dtype`: torch's own, ours is
    float32."""

    B: int
    H: int
    G: int
    S: int
    Sk: int
    D: int
    hides: str
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class NeuronChoice:
    """Up to which fraction of active neurons a kernel skips the others, why, figures for people, and what will count those seen."""

    limit: float
    reason: str
    figures: dict[str, Any] = field(default_factory=dict)
    seen: Any = None


class NeuronTuner(Protocol):
    """Kernels for feed-forward blocks that skip neurons."""

    def refuses(self, weight: Tensor) -> str | None:
        """Why there is no kernel for a block of such weights, or None."""
        ...

    def bundle(self, up: Tensor | None, down: Tensor) -> Tensor:
        """[F, rows, D]: a neuron's row of up [F, D], if there is one, and its column of down [D, F]."""
        ...

    def sketch(self, gate: Tensor, activation: str, policy: str) -> tuple[Tensor, ...]:
        """What rules out zeros before the gate is read, see `runtime/neurons.sketch`; () where it doesn't apply."""
        ...

    def choose(self, name: str, gate: Tensor | None, bundle: Tensor, activation: str, policy: str, tokens: int) -> NeuronChoice:
        """Measured against torch's dense code. Without a gate: a linear on its active inputs."""
        ...

    def kernel(
        self, name: str, activation: str, policy: str, limit: float, seen: Any, request: bool, weights: Sequence[Tensor],
        biases: Sequence[Any],
    ) -> tuple[str, Any]:
        """The key that stands in the program, and the code behind it, for [gate, bundle, ...], or a bundle alone, and biases of which
        those that are missing are None. `request`: of the neurons that a prompt chose. With `limit` 0 the weights are rows, and the code
        is dense."""
        ...

    def counts(self) -> tuple[str, Any]:
        """Key and code of what counts core neurons: fn(a [..., F], score) -> i32[F], or None for a score it doesn't know."""
        ...


class Tuner(Protocol):
    """The target, as far as passes need it. `between`: its kernels for what stands between linears, None if it has none and takes values
    row by row; `neurons`: those that skip neurons, None if it has none and runs the dense meaning."""

    @property
    def neurons(self) -> NeuronTuner | None: ...

    @property
    def between(self) -> Between | None: ...

    def formats(self, pattern: Pattern, weight: Tensor, codec: str | None, tokens: int, compute: str | None) -> list[Format]:
        """Storage for the weight's zeros that is worth trying, the natural one first; values are rounded only to a codec by name,
        activations only for `compute` by name. Raises TargetError for one that the target lacks."""
        ...

    def choose(self, problem: Problem) -> Choice:
        """The fastest way that was measured, dense included."""
        ...

    def predicted(self, problem: Problem) -> float:
        """Seconds that the fastest way will take, by the cost model alone."""
        ...

    def kernel(
        self, formats: Sequence[Format], epilogue: str, residual: bool, layout: str, shape: tuple[int, int], config: str,
        dtype: torch.dtype = torch.float32, tokens: int = 128,
    ) -> tuple[str, Kernel]:
        """The key that stands in the program, and the code behind it. `dtype`: of the activations; `tokens`: M that `config` is for."""
        ...


class Between(Protocol):
    """Kernels for what stands between linears whose values are token-minor, or, with layout "row", of a few tokens."""

    def norm(self, kind: str, layout: str) -> tuple[str, Any]:
        """Key and code of `sparsecc.norm`."""
        ...

    def norm_rows(self, kind: str) -> tuple[str, Any]:
        """The same for a few tokens."""
        ...

    def gate(self, activation: str, layout: str) -> tuple[str, Any]:
        """Key and code of `sparsecc.gate`."""
        ...

    def rotary(self, layout: str) -> tuple[str, Any]:
        """Key and code of `sparsecc.rotary`."""
        ...

    def attention(self, D: int, hides: str, layout: str) -> tuple[str, Any]:
        """Key and code of `sparsecc.attention`."""
        ...

    def append(self) -> tuple[str, Any]:
        """Key and code of `sparsecc.append`."""
        ...

    def tokens(self) -> tuple[str, Any]:
        """Key and code of `sparsecc.tokens`."""
        ...

    def mask_tiles(self, rows: bool) -> tuple[str, Any]:
        """Key and code of `sparsecc.mask_tiles`."""
        ...

    def window(self, kind: str, window: Sequence[int], epilogue: str) -> tuple[str, Any]:
        """Key and code of `sparsecc.depthwise`, or `sparsecc.patches`."""
        ...

    def direct(self, channels: int, OW: int, window: Sequence[int], epilogue: str) -> tuple[str, Any]:
        """Key and code of `sparsecc.direct`."""
        ...

    def window_times(self, picture: Picture, outputs: int | None, epilogue: str) -> tuple[float | None, float | None]:
        """Microseconds of `sparsecc.direct`, of `sparsecc.depthwise` if `outputs` is None, and of torch's convolution, if they were
        measured."""
        ...

    def pool(self) -> tuple[str, Any]:
        """Key and code of `sparsecc.pool`."""
        ...

    def received(self) -> tuple[str, Any]:
        """Key and code of `sparsecc.received`."""
        ...

    def route(self) -> tuple[str, Any]:
        """Key and code of `sparsecc.route`."""
        ...

    def keep(self, policy: str) -> tuple[str, Any]:
        """Key and code of `sparsecc.keep` for a policy, or ("", None)."""
        ...

    def attention_times(self, problem: Attention) -> tuple[float, float] | None:
        """Seconds of that code and of torch's; None where nothing is measured, and the kernel is trusted."""
        ...


@dataclass
class Context:
    """`tuner` is None for the reference target, which runs the dense meaning of every op."""

    spec: SparsitySpec = field(default_factory=SparsitySpec)
    tuner: Tuner | None = None
    notes: list[str] = field(default_factory=list)
    """What people should know, for the explanation's header."""
    attention: dict[Attention, bool] = field(default_factory=dict)
    """Whether a kernel runs it; it does where this doesn't say."""
    contested: list[Attention] = field(default_factory=list)
    """Attention that a kernel runs although torch's is faster alone."""
