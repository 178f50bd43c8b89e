"""Policies: which entries of a row of scores are kept. Their text stands in the `select` argument of ops and parses back.

    topk(64)         the 64 largest
    ratio(0.25)      a quarter of the row, rounded up: the largest
    threshold(0.1)   larger than 0.1
    atleast(0.1)     0.1 or larger
    nonzero          not zero
    knee             down to the knee of the sorted scores, the point farthest from the line between their ends
    mass(0.9)        the fewest that hold 0.9 of the row's sum, the largest first
    stat(0.08)       larger than mean + q * deviation, q the normal distribution's quantile that 8 % of a row exceed
    all              everything

Of equal scores the lower index wins, wherever a number of entries is asked for. `knee` and `threshold` keep or drop equal scores together.
"""
from __future__ import annotations

import math
import re
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from sparsecc.errors import SelectionError, SpecError

_TEXT = re.compile(r"(\w+)(?:\(([^()]*)\))?")
_ARGUMENT = {"topk": int, "ratio": float, "threshold": float, "atleast": float, "mass": float, "stat": float}
_BARE = ("nonzero", "knee", "all")


@dataclass(frozen=True)
class Policy:
    """A policy by name and argument; `str()` is its text. Raises SpecError for an argument out of range."""

    name: str
    value: float | int | None = None

    def __post_init__(self) -> None:
        v = self.value
        if (self.name in _ARGUMENT) != (v is not None):
            raise SpecError(f"policy {self.name!r} takes {'one argument' if self.name in _ARGUMENT else 'no argument'}, got {v!r}")
        if v is None:
            return
        if v != v or (math.isinf(v) and self.name not in ("threshold", "atleast")):
            raise SpecError(f"{self}: the argument must be a finite number")
        if self.name == "topk" and (v < 1 or v != int(v)):
            raise SpecError(f"{self}: k counts what is kept, 1 or more")
        if self.name in ("ratio", "mass") and not 0 < v <= 1:
            raise SpecError(f"{self}: the fraction to keep lies in (0, 1]")
        if self.name == "stat" and not 0 < v < 1:
            raise SpecError(f"{self}: the fraction to keep lies between 0 and 1")

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}({self.value!r})"

    def size(self, n: int) -> int | None:
        """How many of n are kept, where that doesn't depend on the scores."""
        if self.name == "topk":
            return min(int(self.value or 0), n)
        if self.name == "ratio":
            return kept_of(n, float(self.value or 0))
        return n if self.name == "all" else None

    @property
    def fixed(self) -> bool:
        """Whether the number of kept entries follows from the row's length."""
        return self.name in ("topk", "ratio", "all")

    def mask(self, scores: Tensor) -> Tensor:
        """bool[..., n] of scores [..., n] without NaN."""
        n = scores.shape[-1]
        if self.fixed:
            order = _descending(scores).indices[..., : self.size(n)]
            return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
        match self.name:
            case "threshold":
                return scores > float(self.value or 0)
            case "atleast":
                return scores >= float(self.value or 0)
            case "nonzero":
                return scores != 0
            case "knee":
                return scores >= knee(scores).unsqueeze(-1)
            case "mass":
                return _mass(scores, float(self.value or 0))
        return scores > cut(scores, float(self.value or 0)).unsqueeze(-1)


def parse_policy(text: str) -> Policy:
    """Inverse of `str(policy)`. Raises SpecError."""
    found = _TEXT.fullmatch(text.strip())
    if not found or found[1] not in (*_ARGUMENT, *_BARE):
        raise SpecError(f"unknown policy {text!r}: known are {', '.join((*(f'{name}(...)' for name in _ARGUMENT), *_BARE))}")
    if found[2] is None:
        return Policy(found[1])
    try:
        return Policy(found[1], _ARGUMENT.get(found[1], float)(found[2]))
    except ValueError as error:
        raise error if isinstance(error, SpecError) else SpecError(f"policy {text!r}: {found[2]!r} is not a number") from error


def kept_of(n: int, fraction: float) -> int:
    """Entries that a fraction of n are: rounded up, so that any fraction keeps one. Exact for fractions written in decimal."""
    num, den = ratio_of(fraction)
    return -(-n * num // den)


def ratio_of(fraction: float) -> tuple[int, int]:
    """The fraction as integers, to a millionth: 0.7 -> (7, 10)."""
    num = round(fraction * 1_000_000)
    common = math.gcd(num, 1_000_000)
    return num // common, 1_000_000 // common


def quantile(fraction: float) -> float:
    """What that fraction of a normal distribution exceeds, in deviations from its mean."""
    return NormalDist().inv_cdf(1 - fraction)


def cut(scores: Tensor, fraction: float) -> Tensor:
    """The threshold [...] of a statistical top-k (Spark Transformer, You et al. 2025): mean + quantile * deviation, in float32 at least."""
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return wide.mean(-1) + wide.std(-1, unbiased=False) * quantile(fraction)


def knee(scores: Tensor) -> Tensor:
    """The score [...] at the knee: with s_0 >= ... >= s_{n-1}, the s_i whose point (i, s_i) lies farthest from the line through the first
    and the last one (CoreMatching, Wang et al. 2025). Integer scores are compared in int64, without rounding; ties: the first."""
    n = scores.shape[-1]
    order = _descending(scores).values
    exact = order.long() if not order.is_floating_point() else order.double()
    at = torch.arange(n, device=scores.device, dtype=exact.dtype)
    first, last = exact[..., :1], exact[..., -1:]
    distance = ((last - first) * at - (n - 1) * (exact - first)).abs()  # times a constant
    return order.gather(-1, distance.argmax(-1, keepdim=True)).squeeze(-1)


def _mass(scores: Tensor, fraction: float) -> Tensor:
    if bool((scores < 0).any()):
        raise SelectionError("cumulative mass needs scores of 0 or more, such as probabilities")
    order = _descending(scores).indices
    ordered = scores.gather(-1, order).double()
    before = ordered.cumsum(-1) - ordered
    kept = before < fraction * ordered.sum(-1, keepdim=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, kept)


def _descending(scores: Tensor) -> torch.return_types.sort:
    """Equal scores in the order of their indices."""
    return torch.sort(scores, dim=-1, descending=True, stable=True)
