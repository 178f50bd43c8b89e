"""Costs from measured times: least squares on relative errors, no factor below zero."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsecc.autotune.cost import OVERHEAD, Costs

PRIOR = 0.1
"""Weight of what is assumed of every factor against all measurements together: with few of them a sum can be split in many ways, and a
factor of zero would say that another shape costs nothing."""


def fit(points: Sequence[tuple[tuple[float, float, float], float]]) -> Costs:
    """`points`: the limits of a problem (`cost.limits`) and the seconds that it took. Without other evidence all factors are alike."""
    limits = torch.tensor([one for one, _ in points], dtype=torch.float64)
    seconds = torch.tensor([max(took - OVERHEAD, 0.1 * took) for _, took in points], dtype=torch.float64)
    alike = float((seconds / limits.sum(1)).median())
    strength = (PRIOR * len(points)) ** 0.5
    rows = torch.cat([limits / seconds[:, None], strength / alike * torch.eye(3, dtype=torch.float64)])
    wanted = torch.cat([torch.ones(len(points)), strength * torch.ones(3)]).double()
    a, b, c = non_negative(rows, wanted).tolist()
    return a, b, c


def non_negative(rows: Tensor, wanted: Tensor) -> Tensor:
    """argmin |rows x - wanted| over x >= 0, by trying which of the few x are above zero."""
    count = rows.shape[1]
    best = (float((wanted**2).sum()), torch.zeros(count, dtype=rows.dtype))
    for size in range(1, count + 1):
        for some in itertools.combinations(range(count), size):
            x = torch.zeros(count, dtype=rows.dtype)
            x[list(some)] = torch.linalg.lstsq(rows[:, list(some)], wanted).solution
            error = float(((rows @ x - wanted) ** 2).sum())
            if bool((x >= 0).all()) and error < best[0]:
                best = (error, x)
    return best[1]
