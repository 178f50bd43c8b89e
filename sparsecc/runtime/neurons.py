"""Calling the kernels that skip neurons; dense code where many are active, and for many tokens."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from ctypes import c_void_p
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.codegen.kernel import FEW
from sparsecc.codegen.tvm.backend import TvmBackend
from sparsecc.codegen.tvm.native import REFUSED, RESULT, Native
from sparsecc.codegen.tvm.neurons import TILES, NeuronSpec, neurons_source
from sparsecc.ir.ops import ACTIVATIONS
from sparsecc.ir.policy import Policy, parse_policy, quantile
from sparsecc.ir.skip_ops import SETS, active, unbundle
from sparsecc.runtime.few import DTYPES, scratch

STREAMS = 4
"""Rows that are read at once: enough cache lines under way for one core, see `codegen/tvm/streams.py`."""

_HEAD = struct.Struct("10q")
_POINTER = 4
WITHOUT = 64
"""Calls without a sketch after one that found more than half of the neurons active."""
BOUND = 256
"""Bound calls that a kernel keeps."""


@dataclass
class Seen:
    """Neurons that were active in the calls so far, of those that there were."""

    active: int = 0
    of: int = 0

    @property
    def kept(self) -> float | None:
        """The fraction, None before the first call of few tokens."""
        return self.active / self.of if self.of else None


class NeuronKernel:
    """fn(x [..., D], [gate, bundle], biases, level) -> y [..., D] for one activation and policy, weights as in `ir/skip_ops.neurons`;
    with `gate=False` fn(x [..., F], [bundle], [bias], level) -> y [..., D], a linear on its active inputs.

    One to FEW tokens go together by TILES, all neurons that one of them keeps being read once. Where more than `limit` of the F neurons are
    active, and for more tokens, torch's dense code runs on views of the same weights. Weights may go on with a `sketch` of the gate, for
    ReLU's zeros; it is left alone for a while after calls that found few of them. Safe to call from several threads.
    """

    def __init__(self, backend: TvmBackend, activation: str, policy: str, limit: float = 1.0, gate: bool = True) -> None:
        self.backend, self.activation, self.policy, self.limit, self.gate = backend, activation, parse_policy(policy), limit, gate
        self.seen = Seen()
        self._plain = 0
        self._bound: dict[tuple[Any, ...], _Bound] = {}
        self._lock = threading.Lock()

    def source(self, tokens: int) -> str:
        """The text of the kernel for so many float32 tokens of a gated block."""
        return neurons_source(self._spec(True, False, "f32"), _tile(tokens), STREAMS, self.backend.isa)

    def load(self, tokens: int, up: bool, bias: bool, dtype: torch.dtype, sketch: bool = False) -> Callable[..., Any]:
        """The kernel, compiled when it is first asked for."""
        return self.backend.load(neurons_source(self._spec(up, bias, DTYPES[dtype], sketch), _tile(tokens), STREAMS, self.backend.isa))

    def _spec(self, up: bool, bias: bool, dtype: str, sketch: bool = False) -> NeuronSpec:
        names = {"ratio": "topk", "atleast": "threshold"}
        return NeuronSpec(names.get(self.policy.name, self.policy.name), self.activation, up, bias, dtype, sketch, self.gate)

    def __call__(self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], level: Tensor | None) -> Tensor:
        stored, wide = weights[self.gate], x.shape[-1]
        D, tokens = stored.shape[-1], x.numel() // wide
        up_bias = len(biases) == 3 and biases[1] is not None
        if not 0 < tokens <= FEW or x.dtype not in DTYPES or up_bias or (self.gate and wide != D):
            return self.dense(x, weights, biases, level)
        x = x if x.is_contiguous() else x.contiguous()
        y = torch.empty((*x.shape[:-1], D), dtype=x.dtype)
        step = TILES[-1]
        sketched = len(weights) == 4 and self._plain == 0
        self._plain = max(0, self._plain - 1)
        for first in range(0, tokens, step):
            count = min(step, tokens - first)
            key = (stored.data_ptr(), count, x.dtype, torch.get_num_threads(), self.limit, sketched)
            bound = self._bound.get(key) or self._bind(key, count, x.dtype, weights[: 4 if sketched else 2], biases, level)
            size = first * x.element_size()
            found = bound(x.data_ptr() + wide * size, y.data_ptr() + D * size)
            self.seen.active += found
            self.seen.of += bound.neurons
            if sketched and 2 * found > bound.neurons:
                self._plain = WITHOUT
            if found > bound.limit:
                return self.dense(x, weights, biases, level)
        return y

    def forget(self) -> None:
        """Drop bound calls, and with them the weights that they hold."""
        with self._lock:
            self._bound.clear()

    def dense(self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], level: Tensor | None) -> Tensor:
        """See `dense_block`."""
        return dense_block(x, weights[:2], biases, level, self.activation, self.policy)

    def _bind(
        self, key: tuple[Any, ...], tokens: int, dtype: torch.dtype, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
        level: Tensor | None,
    ) -> _Bound:
        stored, threads = weights[self.gate], torch.get_num_threads()
        neurons, rows, D = stored.shape
        before = biases[0] if self.gate else None
        code = self.load(tokens, rows == 2, before is not None, dtype, len(weights) == 4)
        bias = torch.zeros(1) if before is None else before.float().contiguous()
        out = torch.zeros(D) if biases[-1] is None else biases[-1].float().contiguous()
        levels = levels_of(self.policy, level, neurons)
        reach, wide = (D // 64 + 2) * 64, (neurons // 64 + 1) * 64
        limit = min(neurons, int(self.limit * neurons))
        keep = self.policy.size(neurons) or 0
        gate = weights[0] if self.gate else stored[:1, 0]  # a kernel without one reads nothing of it
        kept = tuple(t.contiguous() for t in (gate, stored, levels, bias, out, *weights[2:]))
        ints = (tokens, neurons, D, reach, wide, D, threads, limit, keep)
        bound = _Bound(code, kept, ints, _tile(tokens) * (reach + wide + threads * reach), neurons, limit, _tile(tokens) * reach)
        with self._lock:
            while len(self._bound) >= BOUND:
                self._bound.pop(next(iter(self._bound)))
            self._bound[key] = bound
        return bound


class RequestKernel:
    """fn(x [..., D], [gate, bundle], biases, kept i32[K]) -> y [..., D]: the neurons that a prompt chose, gathered once into weights of
    their own, which later tokens read from end to end. Before any prompt `kept` holds -1, and all neurons count.

    `kernel`: what computes all neurons of the weights that it is given; `forget`: called when some of those are no longer used. The set
    is only read where a prompt may have changed it: on a GPU the host would wait for it.
    """

    def __init__(self, kernel: Callable[..., Tensor], forget: Callable[[], None] = lambda: None) -> None:
        self.kernel, self.forget = kernel, forget
        self.seen = Seen()
        self._read: tuple[int, ...] = ()
        self._kept: Tensor | None = None
        self._weights: tuple[list[Tensor], list[Tensor | None]] = ([], [])
        self._lock = threading.Lock()

    def source(self, tokens: int) -> str:
        """The text of the kernel for so many float32 tokens of a gated block."""
        return getattr(self.kernel, "source", lambda _: "torch's linears")(tokens)

    def __call__(self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], kept: Tensor) -> Tensor:
        with self._lock:
            self._look(weights, biases, kept)
            chosen, some = self._weights
        self.seen.active += len(chosen[0])
        self.seen.of += len(weights[0])
        return self.kernel(x, chosen, some, None)

    def _look(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], kept: Tensor) -> None:
        """Gather what the set names, if it is another one."""
        read = (SETS.chosen, kept.data_ptr(), -1 if kept.is_inference() else kept._version)
        if read == self._read:
            return
        if self._kept is None or not torch.equal(self._kept, kept):
            self._kept, rows = kept.clone(), kept.long()
            if int(rows[0]) >= 0:
                some = [b if b is None or i == len(biases) - 1 else b[rows] for i, b in enumerate(biases)]
                self._weights = [w.index_select(0, rows) for w in weights], some
            else:
                self._weights = list(weights), list(biases)
            self.forget()
        self._read = read

class _Bound:
    """A kernel with all arguments but the addresses of x and y; returns how many neurons are active."""

    def __init__(
        self, code: Callable[..., Any], kept: tuple[Tensor, ...], ints: tuple[int, ...], floats: int, neurons: int, limit: int, words: int
    ) -> None:
        self.code, self.kept, self.neurons, self.limit, self.floats, self.words = code, kept, neurons, limit, floats, words
        self.args = (*(c_void_p(t.data_ptr()) for t in kept), *ints)
        self.native = code if isinstance(code, Native) else None
        self.tail = Native.tail(self.args)
        self.count = ctypes.c_int(5 + len(self.args))

    def __call__(self, x: int, y: int) -> int:
        memory = scratch(self.floats + self.words + self.neurons + 1)
        eights = memory + 4 * self.floats
        found = eights + 4 * self.words
        if self.native is not None:
            head = _HEAD.pack(_POINTER, x, _POINTER, y, _POINTER, memory, _POINTER, found, _POINTER, eights)
            if self.native.kernel(None, head + self.tail, self.count, RESULT):
                raise RuntimeError(REFUSED.format(1, 1))
        else:
            self.code(c_void_p(x), c_void_p(y), c_void_p(memory), c_void_p(found), c_void_p(eights), *self.args)
        return ctypes.c_int32.from_address(found + 4 * self.neurons).value


def dense_block(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], level: Tensor | None, activation: str, policy: Policy,
    storage: str = "bundle",
) -> Tensor:
    """torch's linears on all neurons, those that the policy drops times zero, in x's dtype."""
    gate, up, down = unbundle(weights, storage)
    pre = x if gate is None else F.linear(x, gate, biases[0])
    exact = policy.name in ("nonzero", "all")
    a = ACTIVATIONS[activation].fn(pre) if exact else active(pre, activation, str(policy), level)
    if up is not None:
        a = a * F.linear(x, up, biases[1])
    return F.linear(a, down, biases[-1])


@dataclass
class DenseNeurons:
    """torch's linears, called as the kernels are; on weights as the model has them, unless `storage` says otherwise."""

    activation: str
    policy: str
    storage: str = "rows"

    def __call__(self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], level: Tensor | None) -> Tensor:
        return dense_block(x, weights, biases, level, self.activation, parse_policy(self.policy), self.storage)


def bundle(up: Tensor | None, down: Tensor) -> Tensor:
    """[F, rows, D]: a neuron's row of up [F, D], if there is one, and its column of down [D, F] ("LLM in a flash", Alizadeh et al.)."""
    columns = down.t().unsqueeze(1)
    return torch.cat([columns] if up is None else [up.unsqueeze(1), columns], 1).contiguous()


def sketch(gate: Tensor) -> tuple[Tensor, Tensor]:
    """(q + 128 u8[F, D padded to 64], bound f32[F, 3]) of gate [F, D]; bound has scale_i, at least |w_i - scale_i q_i| and the rounding of
    float32 sums, and at least |w_i|.

    Columns lie as the kernels keep x: of bfloat16 weights the even ones of every 32 before the odd ones.
    """
    (count, D), wide = gate.shape, gate.double()
    scale = (wide.abs().amax(1) / 127).float().clamp_min(1e-30).double()
    q = (wide / scale[:, None]).round().clamp(-127, 127)
    size = wide.norm(dim=1)
    rest = (wide - q * scale[:, None]).norm(dim=1) + 4 * (D + 64) * 2.0**-24 * size
    padded = F.pad(q, (0, -D % 64))
    if gate.dtype == torch.bfloat16:
        padded = padded.view(count, -1, 16, 2).transpose(2, 3).reshape(count, -1)
    bound = torch.stack([scale, rest * 1.0001, (size + rest) * 1.0001], 1).float()
    return (padded + 128).to(torch.uint8).contiguous(), bound + torch.tensor([0, 1e-37, 1e-37])


def levels_of(policy: Policy, level: Tensor | None, neurons: int) -> Tensor:
    """What kernels compare |a| with, f32[F]: they keep what is larger. For `stat` the quantile, f32[1]."""
    if policy.name == "stat":
        return torch.tensor([quantile(float(policy.value or 0))])
    if policy.name not in ("threshold", "atleast"):
        return torch.zeros(1)
    found = torch.tensor([float(policy.value or 0)]) if level is None else level.float()
    if policy.name == "atleast":
        found = torch.nextafter(found, torch.tensor(-torch.inf))
    return found.expand(neurons).contiguous()


def _tile(tokens: int) -> int:
    return next((t for t in TILES if t >= tokens), TILES[-1])
