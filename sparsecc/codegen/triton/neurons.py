"""Family neurons on a GPU: a feed-forward block of one token that reads only the active neurons. Four kernels, no size is read back.

    scores    a = act(gate x + b), what the policy drops set to zero          a program per BN neurons
    compact   list = indices of what is left, ascending; count                one program, a running sum
    up        h[j] = a[list[j]] * (up[list[j]] x)                             programs stride over the list up to count
    down      part[s] = sum of h[j] * down[list[j]], a share of the list      programs over features x shares
              y = bias + the shares, in order                                 the program of a tile that ends last

The bundle [F, rows, D] is that of the CPU's kernels. NaN is active. Rows are read whole, so every load is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsecc.codegen.config import to_text
from sparsecc.codegen.lines import Lines
from sparsecc.codegen.triton.config import GpuConfig
from sparsecc.codegen.triton.linear import ACTIVATION, ELEMENT
from sparsecc.codegen.triton.tile import TL

KERNELS = ("scores", "compact", "up", "down")
COMPACT = 1024
"""Activations that `compact` looks at in one step."""


@dataclass(frozen=True)
class GpuNeuronSpec:
    """policy "nonzero" (a != 0) or "threshold" (|a| > level_i); top-k and statistical policies zero `a` before `compact`. `up`: a gated
    block; `bias` of fc1; dtype of weights, x and y: "f32", "f16", "bf16"."""

    policy: str = "nonzero"
    activation: str = "relu"
    up: bool = True
    bias: bool = False
    dtype: str = "f32"

    @property
    def rows(self) -> int:
        """Rows of D elements that a neuron takes in the bundle."""
        return 2 if self.up else 1


def space() -> list[GpuConfig]:
    """bn: neurons of a step; bk: features of a step; split: shares of the list in `down`."""
    return [GpuConfig(bn=16, bk=128, split=split, warps=4, stages=stages) for split in (8, 4) for stages in (3, 1)]


def neuron_source(spec: GpuNeuronSpec, config: GpuConfig, kernel: str) -> str:
    """The text of one of KERNELS."""
    w = Lines()
    arguments = _arguments(spec)[kernel]
    w(f"# neurons {kernel}: {spec.policy} {spec.activation}{' gated' if spec.up else ''} {spec.dtype}")
    w(f"# {to_text(config)}")
    w(f"# {', '.join(f'{name}: {kind}' for name, kind in arguments.items())}")
    w("@triton.jit")
    with w.block(f"def {kernel}({', '.join(arguments)}):"):
        {"scores": _scores, "compact": _compact, "up": _up, "down": _down}[kernel](w, spec, config)
    return w.text


def _arguments(spec: GpuNeuronSpec) -> dict[str, dict[str, str]]:
    own = f"*{ELEMENT[spec.dtype]}"
    bias = {"bias": "*fp32"} if spec.bias else {}
    return {
        "scores": {"x": own, "gate": own, **bias, "level": "*fp32", "a": "*fp32", "F": "i32", "D": "i32"},
        "compact": {"a": "*fp32", "list": "*i32", "count": "*i32", "F": "i32"},
        "up": {"x": own, "bundle": own, "a": "*fp32", "list": "*i32", "count": "*i32", "h": "*fp32", "D": "i32"},
        "down": {"bundle": own, "h": "*fp32", "list": "*i32", "count": "*i32", "out": "*fp32", "y": own, "partial": "*fp32", "done": "*i32",
                 "D": "i32"},
    }  # fmt: skip


def _dots(w: Lines, config: GpuConfig, base: str, mask: str) -> None:
    """acc[bn] = rows at `base` + rn (int64) times x."""
    w(f"sums = tl.zeros([{config.bn}, {config.bk}], tl.float32)")
    with w.block(f"for k in range(0, D, {config.bk}):"):
        w(f"rk = k + tl.arange(0, {config.bk})")
        w("xs = tl.load(x + rk, mask=rk < D, other=0.0).to(tl.float32)")
        w(f"rows = tl.load({base} + rk[None, :], mask={mask}[:, None] & (rk < D)[None, :], other=0.0).to(tl.float32)")
        w("sums += rows * xs[None, :]")
    w("acc = tl.sum(sums, 1)")


def _scores(w: Lines, spec: GpuNeuronSpec, config: GpuConfig) -> None:
    w(f"rn = tl.program_id(0) * {config.bn} + tl.arange(0, {config.bn})")
    _dots(w, config, "gate + rn.to(tl.int64)[:, None] * D", "(rn < F)")
    if spec.bias:
        w("acc += tl.load(bias + rn, mask=rn < F, other=0.0)")
    w(f"acc = {ACTIVATION[spec.activation]}")
    if spec.policy == "threshold":
        w("levels = tl.load(level + rn, mask=rn < F, other=0.0)")
        w("acc = tl.where(tl.abs(acc) <= levels, 0.0, acc)")
    w("tl.store(a + rn, acc, mask=rn < F)")


def _compact(w: Lines, spec: GpuNeuronSpec, config: GpuConfig) -> None:
    w("total = 0")
    with w.block(f"for first in range(0, F, {COMPACT}):"):
        w(f"at = first + tl.arange(0, {COMPACT})")
        w("value = tl.load(a + at, mask=at < F, other=0.0)")
        w("kept = ((value != 0.0) & (at < F)).to(tl.int32)")
        w("tl.store(list + total + tl.cumsum(kept, 0) - kept, at, mask=kept == 1)")
        w("total += tl.sum(kept, 0)")
    w("tl.store(count, total)")


def _up(w: Lines, spec: GpuNeuronSpec, config: GpuConfig) -> None:
    w("n = tl.load(count)")
    with w.block(f"for first in range(tl.program_id(0) * {config.bn}, n, tl.num_programs(0) * {config.bn}):"):
        w(f"at = first + tl.arange(0, {config.bn})")
        w("neuron = tl.load(list + at, mask=at < n, other=0)")
        w("value = tl.load(a + neuron, mask=at < n, other=0.0)")
        if spec.up:
            _dots(w, config, f"bundle + neuron.to(tl.int64)[:, None] * {spec.rows} * D", "(at < n)")
            w("value = value * acc")
        w("tl.store(h + at, value, mask=at < n)")


def _down(w: Lines, spec: GpuNeuronSpec, config: GpuConfig) -> None:
    split = config.split
    w("n = tl.load(count)")
    w("tile = tl.program_id(0)")
    w("share = tl.program_id(1)")
    w(f"rk = tile * {config.bk} + tl.arange(0, {config.bk})")
    w(f"sums = tl.zeros([{config.bn}, {config.bk}], tl.float32)")
    with w.block(f"for first in range(n * share // {split}, n * (share + 1) // {split}, {config.bn}):"):
        w(f"at = first + tl.arange(0, {config.bn})")
        w(f"own = at < n * (share + 1) // {split}")
        w("neuron = tl.load(list + at, mask=own, other=0)")
        w("value = tl.load(h + at, mask=own, other=0.0)")
        w(f"rows = bundle + (neuron.to(tl.int64)[:, None] * {spec.rows} + {spec.rows - 1}) * D + rk[None, :]")
        w("weight = tl.load(rows, mask=own[:, None] & (rk < D)[None, :], other=0.0).to(tl.float32)")
        w("sums += weight * value[:, None]")
    w(f"mine = partial + tile * {split * config.bk} + tl.arange(0, {config.bk})")
    w(f"tl.store(mine + share * {config.bk}, tl.sum(sums, 0))")
    w("tl.debug_barrier()")  # every thread's stores come before the count
    w('arrived = tl.atomic_add(done + tile, 1, sem="acq_rel")')
    with w.block(f"if arrived == {split - 1}:"):
        w("tl.debug_barrier()")
        w("acc = tl.load(out + rk, mask=rk < D, other=0.0)")
        with w.block(f"for other in range({split}):"):
            w(f'acc += tl.load(mine + other * {config.bk}, cache_modifier=".cg")')
        w("tl.store(done + tile, 0)")
        w(f"tl.store(y + rk, acc.to({TL[spec.dtype]}), mask=rk < D)")
