"""Orders of rows or columns under which the zeros of a weight come in blocks, or in N:M groups.

Rows of one block keep the same columns, so alike rows belong side by side; columns of an N:M group are rarely kept together (after
"Channel Permutations for N:M Sparsity", Pool and Yu, NeurIPS 2021). Masks are bool [rows, columns], True where something is kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST = 8192
"""Rows that are compared with each other; of more only those that are alike in everything are found."""
KEPT_IN_BAND = 12
"""Kept entries of a row in one band of columns: few enough that rows that differ somewhere agree in some band."""
BANDS = 4
RARE = 0.1
"""Siblings in one band that are too few to go on."""
TRIES, FEWER = 32, 4
"""Second columns of an N:M group that are tried; fewer where two columns cannot fill it, and so do not say whether it can be filled."""
SAMPLE = 384
"""Rows that decide which columns go together; the others confirm it."""


def siblings(weight: Tensor) -> float:
    """Fraction of the rows that agree with another one in all of some columns, of those that keep something there. Chance makes it near 0.

    Cheap: where the first columns show next to none, no others are read.
    """
    N, K = weight.shape
    density = float((weight[:: max(1, N // 64)] != 0).double().mean())
    if N < 2 or density == 0:
        return 0.0
    width = min(K, math.ceil(KEPT_IN_BAND / density))
    found, alive = torch.zeros(2, N, dtype=torch.bool)
    for start in range(0, min(K - width + 1, BANDS * width), width):
        band = weight[:, start : start + width] != 0
        classes, counts = _classes(band)
        some = band.any(1)
        found |= (counts[classes] > 1) & some
        alive |= some
        if not int(found.sum()) > RARE * int(alive.sum()):
            return 0.0
    return int(found.sum()) / max(1, int(alive.sum()))


def block_order(mask: Tensor) -> Tensor:
    """i64 [rows]: an order in which alike rows stand in fours, alike fours in pairs, and alike pairs of those in pairs; empty rows last."""
    order = torch.cat([torch.zeros(0, dtype=torch.int64), *_fours(mask)])
    for size in (4, 8):
        whole = len(order) - len(order) % size
        groups = order[:whole].view(-1, size)
        pairs = _greedy(mask[order[:whole]].view(len(groups), size, mask.shape[1]).any(1), 2)
        order = torch.cat([groups[[i for pair in pairs for i in pair]].reshape(-1), order[whole:]])
    return order


def _fours(mask: Tensor) -> list[Tensor]:
    """Rows in fours, the last one perhaps shorter: those that are equal first, then those that are alike."""
    classes, counts = _classes(mask)
    groups: list[Tensor] = []
    rest, empty = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    for rows in classes.argsort(stable=True).split(counts.tolist()):
        if not mask[rows[0]].any():
            empty.append(rows)
            continue
        whole = len(rows) - len(rows) % 4
        groups += [rows[i : i + 4] for i in range(0, whole, 4)]
        rest.append(rows[whole:])
    left = torch.cat(rest)
    alike = [left[torch.tensor(group)] for group in _greedy(mask[left], 4)]
    groups += [group for group in alike if len(group) == 4]
    tail = torch.cat([*(group for group in alike if len(group) < 4), *empty])
    return groups + [tail[i : i + 4] for i in range(0, len(tail), 4)]


def _greedy(mask: Tensor, size: int) -> list[list[int]]:
    """Rows in groups of `size`: each takes, of those that are left, the ones most alike (Dice's coefficient) to its first."""
    n = len(mask)
    if n > MOST:
        return [list(range(i, min(i + size, n))) for i in range(0, n, size)]
    kept = mask.float()
    counts = kept.sum(1)
    alike = 2 * (kept @ kept.t()) / (counts[:, None] + counts[None, :]).clamp_min(1)
    alike.fill_diagonal_(-1)
    taken, away = [False] * n, torch.zeros(n)
    groups: list[list[int]] = []
    left = n
    for i in range(n):
        if taken[i]:
            continue
        away[i] = -2
        near = (alike[i] + away).topk(min(size, left) - 1).indices
        away[near] = -2
        group = [i, *near.tolist()]
        for j in group:
            taken[j] = True
        left -= len(group)
        groups.append(group)
    return groups


def nm_possible(weight: Tensor, n: int, m: int) -> bool:
    """Whether its zeros may be N:M under some order of its columns: no row keeps too many, and a first group is found. Cheap."""
    some = weight[_sample(weight)] != 0
    if weight.shape[1] % m or _crowded(some, n, m) or _crowded(weight != 0, n, m):
        return False
    return _group(some, some.float(), some.sum(0), n, m) is not None


def nm_order(mask: Tensor, n: int, m: int) -> Tensor | None:
    """i64 [columns]: an order in which every row keeps at most n of every m columns, None if none was found. Columns that meet in few rows
    go together first; one group that cannot be filled ends the search, so that a mask without such an order is given up at once."""
    if mask.shape[1] % m or _crowded(mask, n, m):
        return None
    order = _nm_order(mask[_sample(mask)], n, m)
    if order is None or bool((mask[:, order].view(len(mask), -1, m).sum(2) <= n).all()):
        return order
    return _nm_order(mask, n, m)


def _sample(weight: Tensor) -> slice:
    return slice(None, None, max(1, len(weight) // SAMPLE))


def _crowded(mask: Tensor, n: int, m: int) -> bool:
    return int(mask.sum(1).max()) * m > n * mask.shape[1]


def _nm_order(mask: Tensor, n: int, m: int) -> Tensor | None:
    kept = mask.float()
    counts = mask.sum(0)
    groups: list[Tensor] = []
    while len(groups) * m < mask.shape[1]:
        group = _group(mask, kept, counts, n, m)
        if group is None:
            return None
        counts[group] = -1
        groups.append(group)
    return torch.cat(groups)


def _group(mask: Tensor, kept: Tensor, counts: Tensor, n: int, m: int) -> Tensor | None:
    """m columns around the fullest of those that are left (counts >= 0). Second ones that leave room for a third are tried, the columns
    that meet the first in the fewest rows before others."""
    first, free = int(counts.argmax()), counts >= 0
    free[first] = False
    meets = torch.where(free, kept[:, first] @ kept, torch.inf)
    seconds = meets.argsort()[: min(TRIES if n < 3 else FEWER, int(free.sum()))]
    if m > 2 and n < 3:
        full = (mask[:, first, None].to(torch.int16) + mask[:, seconds] >= n).float()
        room = (((full.t() @ kept) == 0) & free).sum(1)
        seconds = seconds[room >= m - 2]
    found = (_filled(mask, kept, free, [first, second], n, m) for second in seconds.tolist())
    return next((group for group in found if group is not None), None)


def _filled(mask: Tensor, kept: Tensor, free: Tensor, group: list[int], n: int, m: int) -> Tensor | None:
    """A group of m columns that begins with two: each of the others breaks no row, and meets those before it least."""
    free, group = free.clone(), list(group)
    free[group[1]] = False
    count = mask[:, group].sum(1)
    if int(count.max()) > n:
        return None
    while len(group) < m:
        meets, broken = torch.stack([count.float(), (count >= n).float()]) @ kept
        price = torch.where(free & (broken == 0), meets, torch.inf)
        new = int(price.argmin())
        if price[new] == torch.inf:
            return None
        group.append(new)
        free[new] = False
        count = count + mask[:, new]
    return torch.tensor(sorted(group))


def _classes(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(class of each row, rows of each class): equal rows have one class. Sums of random integers that float64 holds exactly."""
    random = torch.Generator().manual_seed(0)
    bound = 2**50 // max(1, mask.shape[1])
    keys = torch.randint(0, bound, (mask.shape[1], 2), generator=random, dtype=torch.int64).double()
    sums = mask.double() @ keys
    mixed = sums[:, 0].long() * 2654435761 + sums[:, 1].long()
    _, classes, counts = mixed.unique(return_inverse=True, return_counts=True)
    return classes, counts
