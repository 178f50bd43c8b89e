"""Merging tokens that say the same: PiToMe (Tran et al. 2024), between the attention and the feed-forward part of an encoder's block.

    merge_tokens(x, keys, size, r, ...)     r tokens fewer      [B, T, D] -> [B, T - r, D], f32[B, T - r]

`size` counts the tokens that each one stands for. Which of them merge is decided by the attention's keys, averaged over heads: a token's
energy is how close it is to all the others, tokens of much energy lie in a cluster and may merge.

    "pitome"   the 2r tokens of most energy, by rank alternately sources and destinations; each source goes to its nearest destination
    "bsm"      the same with all tokens, of which the r sources that are nearest to a destination go
    "text"     the r tokens of most energy go to the nearest of the next r; energy by a Gaussian kernel of width 1 - margin

Equal energies and similarities: the first token. The result has the `leading` tokens, which never merge, then those that stayed in the
order of their energy ("bsm": sources, by their nearness), then the destinations, in the order of theirs.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.ir.ops import LIBRARY
from sparsecc.ir.token_ops import TAGS

VARIANTS = ("pitome", "bsm", "text")
_ROWS = 1024
"""Tokens whose similarities with all others are in memory at once."""


def energy(metric: Tensor, margin: float, variant: str) -> Tensor:
    """[B, T] of normalised keys [B, T, D]."""
    parts = []
    for some in metric.split(_ROWS, 1):
        near = some @ metric.transpose(-1, -2)
        if variant == "text":
            sigma = 1 - margin
            parts.append((near.sub_(1).div_(sigma).square_().mul_(-0.5)).exp_().mean(-1))
        else:
            parts.append(F.elu(near.sub_(margin), inplace=True).mean(-1))
    return torch.cat(parts, 1)


def matching(metric: Tensor, r: int, margin: float, variant: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tokens that stay, sources, destinations, each source's place among the destinations): i64[B, T - r - n], [B, r], [B, n], [B, r]."""
    order = energy(metric, margin, variant).sort(dim=-1, descending=True, stable=True).indices
    if variant == "text":
        a, b, stay = order[:, :r], order[:, r : 2 * r], order[:, 2 * r :]
    elif variant == "pitome":
        a, b, stay = order[:, : 2 * r : 2], order[:, 1 : 2 * r : 2], order[:, 2 * r :]
    else:
        a, b, stay = order[:, ::2], order[:, 1::2], order[:, :0]
    near = _rows(metric, a) @ _rows(metric, b).transpose(-1, -2)
    to = near.argmax(-1)
    if variant == "bsm":
        nearest = near.gather(-1, to.unsqueeze(-1)).squeeze(-1).sort(dim=-1, descending=True, stable=True).indices
        stay = a.gather(1, nearest[:, r:])
        a, to = a.gather(1, nearest[:, :r]), to.gather(1, nearest[:, :r])
    return stay, a, b, to


def merge_tokens(
    x: Tensor, keys: Tensor, size: Tensor | None, r: int, margin: float, variant: str, leading: int
) -> tuple[Tensor, Tensor]:
    """(x, size) with the r sources merged into destinations: means of x [B, T, D] weighted by size f32[B, T], and their sums.

    keys [B, H, T, E]. r is at most half of the T - leading tokens that may merge.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    if size is None:
        size = x.new_ones(x.shape[:2], dtype=compute)
    metric = F.normalize(keys.to(compute).mean(1)[:, leading:], dim=-1)
    stay, a, b, to = (part + leading if i < 3 else part for i, part in enumerate(matching(metric, r, margin, variant)))
    first = torch.arange(leading, device=x.device).expand(len(x), -1)
    same = torch.cat([first, stay], 1)
    weight = size.to(compute).unsqueeze(-1)
    total = (_rows(x, b) * _rows(weight, b)).scatter_add(1, to.unsqueeze(-1).expand(-1, -1, x.shape[2]), _rows(x, a) * _rows(weight, a))
    count = _rows(weight, b).scatter_add(1, to.unsqueeze(-1), _rows(weight, a))
    return (
        torch.cat([_rows(x, same), (total / count).to(x.dtype)], 1),
        torch.cat([_rows(weight, same), count], 1).squeeze(-1),
    )


def merge_tokens_fake(
    x: Tensor, keys: Tensor, size: Tensor | None, r: int, margin: float, variant: str, leading: int
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of the results."""
    left = x.shape[1] - r
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((x.shape[0], left, x.shape[2])), x.new_empty((x.shape[0], left), dtype=compute)


def _rows(x: Tensor, idx: Tensor) -> Tensor:
    """[B, n, D] of x [B, T, D] at i64[B, n]."""
    return x.gather(1, idx.unsqueeze(-1).expand(-1, -1, x.shape[2]))


LIBRARY.define(
    "merge_tokens(Tensor x, Tensor keys, Tensor? size, int r, float margin, str variant, int leading) -> (Tensor, Tensor)", tags=TAGS
)
LIBRARY.impl("merge_tokens", merge_tokens, "CompositeExplicitAutograd")
torch.library.register_fake("sparsecc::merge_tokens", merge_tokens_fake, lib=LIBRARY)
MERGE = torch.ops.sparsecc.merge_tokens.default
