"""Partial sums and counters for kernels that split a row of tiles: one pair per device and stream, whose kernels take turns with it."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


class Scratch:
    """Partial sums (float32, uninitialised) and counters of finished parts (int32, zero before and after every launch).

    Kernels on other streams may run side by side, so they have their own. A pair that became too small stays alive: a launch with its
    addresses may be under way.
    """

    def __init__(self) -> None:
        self._pairs: dict[tuple[torch.device, int], list[Pair]] = {}
        self._lock = threading.Lock()

    def on(self, device: torch.device, stream: int, floats: int, tiles: int) -> Pair:
        """For kernels on the current stream of `device`, whose handle is `stream`."""
        with self._lock:
            pairs = self._pairs.setdefault((device, stream), [])
            if not pairs or pairs[-1][0].numel() < floats or pairs[-1][1].numel() < tiles:
                before = (pairs[-1][0].numel(), pairs[-1][1].numel()) if pairs else (0, 0)
                pairs.append(fresh(device, *(max(2 * a, b) for a, b in zip(before, (floats, tiles), strict=True))))
            return pairs[-1]


def fresh(device: torch.device, floats: int, tiles: int) -> Pair:
    """A pair of its own: for a launch that is recorded into a graph, which is replayed on any stream."""
    return torch.empty(floats, dtype=torch.float32, device=device), torch.zeros(tiles, dtype=torch.int32, device=device)


SCRATCH = Scratch()
"""Of the process."""
