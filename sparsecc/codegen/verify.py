"""Is a kernel right? Cases that kernels get wrong, each run in an order that catches them cheating by accident.

The candidate runs before the reference, on outputs that were poisoned, then again on other inputs in the same memory, and a third time
for equal bits. The reference is float64 over an independent decoder. After robust-kbench (Lange et al., 2025) and the errors listed
with MultiKernelBench.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sparsecc.codegen.decode import decode
from sparsecc.codegen.kernel import DTYPES, ActivationType
from sparsecc.formats import Format
from sparsecc.ir.ops import ACTIVATIONS

Mask = Literal["random", "dense tile", "empty rows", "negative", "empty", "full", "one row"]
MASKS: tuple[Mask, ...] = ("random", "dense tile", "empty rows", "negative", "empty", "full", "one row")

Run = Callable[[Tensor, list[Tensor], Tensor | None, Tensor | None], Tensor]
"""fn(x [M, K], params, bias [N], residual [M, N]) -> y [M, N], params being the arrays of all terms."""

ROUNDING: dict[ActivationType, float] = {"f32": 2e-6, "tf32": 2e-3, "f16": 1e-3, "bf16": 8e-3}
"""Largest error as a fraction of the largest output: of the result's dtype, and of products for TF32."""


@dataclass(frozen=True)
class Case:
    """y[M, N] = epilogue(sum_t W_t x + bias) + residual with zeros drawn by `mask`; `density` of kept blocks."""

    formats: tuple[Format, ...]
    M: int
    N: int
    K: int
    dtype: ActivationType = "f32"
    epilogue: str = ""
    bias: bool = True
    residual: bool = False
    mask: Mask = "random"
    density: float = 0.3
    seed: int = 0

    def __str__(self) -> str:
        terms = " + ".join(map(str, self.formats))
        return f"{terms} {self.M}x{self.N}x{self.K} {self.dtype} {self.epilogue or '-'} {self.mask} seed={self.seed}"


def verify(case: Case, run: Run, device: str = "cpu", again: bool = True) -> str | None:
    """What is wrong with the kernel on this case, in words, or None. `again`: equal inputs have to give equal bits, which says something
    where programs run side by side."""
    random = torch.Generator().manual_seed(case.seed)
    weights = [_weight(case, fmt, random) for fmt in case.formats]
    packed = [fmt.pack(w) for fmt, w in zip(case.formats, weights, strict=True)]
    dense = np.zeros((case.N, case.K))
    for fmt, arrays in zip(case.formats, packed, strict=True):
        dense += decode(fmt, arrays, (case.N, case.K))
    for w, fmt, arrays in zip(weights, case.formats, packed, strict=True):
        stored = w.to(torch.float32) if str(fmt.codec) == "f32" else w.to(arrays["val"].dtype)
        if not np.array_equal(decode(fmt, arrays, (case.N, case.K)), stored.double().numpy()):
            return f"{fmt} does not store the weight"
    params = [array.to(device) for arrays in packed for array in arrays.values()]
    draw = lambda *shape: torch.randn(*shape, generator=random).to(DTYPES[case.dtype]).to(device)  # noqa: E731
    x, other = draw(case.M, case.K), draw(case.M, case.K)
    bias = draw(case.N) if case.bias else None
    residual = draw(case.M, case.N) if case.residual else None
    given = [t.clone() for t in (x, *params)]
    with poisoned():
        first = run(x, params, bias, residual).clone()
        if any(not torch.equal(a, b) for a, b in zip(given, (x, *params), strict=True)):
            return "it writes into its inputs"
        if wrong := _compare(case, first, dense, x, bias, residual):
            return wrong
        if again and not torch.equal(first.nan_to_num(), run(x, params, bias, residual).nan_to_num()):
            return "equal inputs gave other bits"
        x.copy_(other)  # the same memory: what was remembered by address is stale now
        return _compare(case, run(x, params, bias, residual), dense, x, bias, residual)


@contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised tensors come filled with NaN, so that an element that nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _compare(case: Case, y: Tensor, weight: np.ndarray, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> str | None:
    wanted = x.double().cpu() @ torch.from_numpy(weight).T
    size = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0  # before what a residual may hide
    if bias is not None:
        wanted += bias.double().cpu()
    wanted = ACTIVATIONS[case.epilogue].fn(wanted)
    if residual is not None:
        wanted += residual.double().cpu()
    if y.shape != wanted.shape or y.dtype != DTYPES[case.dtype]:
        return f"result {y.dtype} {tuple(y.shape)}, wanted {DTYPES[case.dtype]} {tuple(wanted.shape)}"
    error = (y.double().cpu() - wanted).abs()
    if y.numel() and not bool(error.max() <= ROUNDING[case.dtype] * max(size, float(wanted.abs().max()))):
        where = int(error.nan_to_num(float("inf")).argmax())
        m, n = divmod(where, case.N)
        return f"y[{m}, {n}] is {float(y[m, n]):.6g}, wanted {float(wanted[m, n]):.6g}"
    return None


def _weight(case: Case, fmt: Format, random: torch.Generator) -> Tensor:
    """A weight [N, K] in the codec's dtype with kept blocks as the mask says, within what the format can hold."""
    br, bc = fmt.block
    rows, cols = -(-case.N // br), -(-case.K // bc)
    kept = torch.rand(rows, cols, generator=random)
    keep = _limited(fmt, kept, case)
    match case.mask:
        case "empty rows":
            keep[::2] = False
        case "dense tile":
            tile = torch.zeros_like(keep)
            tile[: max(1, rows // 2), : max(1, cols // 2)] = True
            keep = _limited(fmt, kept, case, 1.0) & tile
        case "one row":
            keep[1:] = False
    values = torch.randn(case.N, case.K, generator=random)
    if case.mask == "negative":
        values = -values.abs() - 0.1
    values = torch.where(values == 0, 1.0, values)
    mask = keep.repeat_interleave(br, 0).repeat_interleave(bc, 1)[: case.N, : case.K]
    return torch.where(mask, values, 0.0).to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[str(fmt.codec)])


def _limited(fmt: Format, scores: Tensor, case: Case, density: float | None = None) -> Tensor:
    """bool[rows, cols]: the best of each group for N:M, else all below the density."""
    density = {"empty": 0.0, "full": 1.0}.get(case.mask, case.density) if density is None else density
    n, m = getattr(fmt.level, "n", None), getattr(fmt.level, "m", None)
    if n is None or m is None:
        return scores < density
    groups = torch.nn.functional.pad(scores, (0, -scores.shape[1] % m), value=-1.0).view(len(scores), -1, m)
    best = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, groups.topk(n, dim=2).indices, True)
    return best.view(len(scores), -1)[:, : scores.shape[1]] & (torch.tensor(case.mask != "empty"))
