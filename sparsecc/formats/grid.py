"""Counting and choosing over the blocks of a matrix [N, K]: what the patterns are computed with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.errors import ShapeError


def matrix(w: Tensor) -> Tensor:
    """`w` detached. Raises ShapeError if it isn't 2-D."""
    if w.ndim != 2:
        raise ShapeError(f"a pattern describes a matrix [N, K], got a tensor of shape {tuple(w.shape)}")
    return w.detach()


def ranked(score: Tensor) -> Tensor:
    """A score [N, K] as floats that compare: NaN ranks highest."""
    score = matrix(score)
    return (score if score.dtype == torch.float64 else score.float()).nan_to_num(math.inf, math.inf, -math.inf)


def block_sums(x: Tensor, height: int, width: int) -> Tensor:
    """[N, K] -> [ceil(N / height), ceil(K / width)], the sum of each block."""
    if (height, width) == (1, 1):
        return x
    N, K = x.shape
    padded = F.pad(x, (0, -K % width, 0, -N % height))
    if width > 1:
        padded = padded.view(padded.shape[0], -(-K // width), width).sum(2)
    return padded.view(-(-N // height), height, padded.shape[1]).sum(1)


def lengths(side: int, step: int, device: torch.device) -> Tensor:
    """How many of `side` entries fall into each step: long[ceil(side / step)]."""
    starts = torch.arange(0, side, step, device=device)
    return (side - starts).clamp(max=step)


def keep_largest(scores: Tensor, k: int) -> Tensor:
    """[R, C] -> bool[R, C], the k largest of each row, ties to the lower index."""
    if k <= 0 or k >= scores.shape[1] or not scores.numel():
        return torch.full_like(scores, k > 0, dtype=torch.bool)
    least = scores.kthvalue(scores.shape[1] - k + 1, dim=1, keepdim=True).values
    above, tied = scores > least, scores == least
    return above | (tied & (tied.cumsum(1, dtype=torch.int32) <= k - above.sum(1, keepdim=True)))


def span(what: str, first: int, end: int) -> str:
    """`row 3` or `rows 3-5`, in words for a message."""
    return f"{what} {first}" if end - first == 1 else f"{what}s {first}-{end - 1}"


def kept_blocks(w: Tensor, block: tuple[int, int]) -> int:
    """How many blocks of a matrix [N, K] hold a nonzero."""
    return int((block_sums((matrix(w) != 0).float(), *block) > 0).sum())
