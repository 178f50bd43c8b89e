"""Linears on the inputs that are large enough, as values of a sparsity dict: what CHESS does to the projections of attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from sparsecc.errors import SpecError
from sparsecc.ir.policy import Policy, parse_policy

KEEPS = ("threshold", "atleast", "topk", "ratio", "nonzero", "all")


@dataclass(frozen=True)
class Inputs:
    """Which inputs of a linear count for a token; the others are zero for it, and for it alone.

    policy: on |x|. levels: thresholds from a calibration, by the name of the linear, f32[1] or f32[K]; where there are any, linears that
    they do not name stay as they are, whatever the glob says.
    """

    policy: Policy
    levels: dict[str, Tensor] = field(default_factory=dict, compare=False, hash=False)

    def __str__(self) -> str:
        return f"inputs({'calibrated' if self.levels else self.policy})"


def inputs(
    threshold: float | None = None, *, policy: str | None = None, levels: Mapping[str, Tensor] | None = None
) -> Inputs:
    """Inputs that linears read, for the values of a sparsity dict, by globs over linears: {"*.[qo]_proj": sparsecc.inputs(0.02)}.

    threshold: those with |x| larger than it; policy: "topk(64)", "ratio(0.5)", "nonzero", ... (`ir/policy.py`), on |x|; levels: thresholds
    by the name of the linear, as `methods/chess.py` sets them. Other linears of the same input read all of it. Raises SpecError.
    """
    if sum(one is not None for one in (threshold, policy, levels)) != 1:
        raise SpecError("inputs() takes one of threshold, policy, levels")
    if threshold is not None and not threshold >= 0:
        raise SpecError(f"inputs(threshold={threshold!r}): thresholds on |x| are 0 or larger")
    if levels is not None and not levels:
        raise SpecError("inputs(levels={}): give the thresholds of at least one linear, by its name")
    chosen = parse_policy(policy) if policy is not None else Policy("threshold", float(threshold or 0.0))
    if chosen.name not in KEEPS:
        raise SpecError(f"inputs(policy={policy!r}): {chosen.name} is no policy for inputs; use {', '.join(KEEPS)}")
    return Inputs(chosen, dict(levels or {}))
