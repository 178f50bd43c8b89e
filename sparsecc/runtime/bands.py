"""Bands: kernels on pictures go through a few rows at a time where whole pictures would not stay in a core's cache.

    patches -> linear -> depthwise -> linear            for the first rows of the result, then for the next ones, ...

What stands between them is then a few rows of every channel. Rows that two neighbouring bands need are computed twice, so that bands know
nothing of each other. The result, and what is read from outside, are whole pictures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_arg

from sparsecc.ir.image_ops import PATCHES, WEIGHTED
from sparsecc.ir.infer import value_of
from sparsecc.ir.ops import KERNELS, LINEAR, TOKEN_TILE
from sparsecc.runtime.record import Recorder
from sparsecc.runtime.tokens import token_output

LARGE = 512 << 10
"""Bytes of one picture's value from which on it is worth cutting: several of those fill a core's second-level cache."""

BUDGET = 768 << 10
"""Bytes of the largest kernel's input and output in a band."""

TWICE = 0.15
"""Share of the work that may be done twice, where bands overlap."""

WINDOWS = (*WEIGHTED, PATCHES)


@dataclass(frozen=True)
class Step:
    """A kernel in a band: what makes rows [first, end) of its result from rows of its input. `width`: pixels of an input row; `height`: its
    rows; `features`: of input and result."""

    node: fx.Node
    height: int
    width: int
    out_width: int
    features: tuple[int, int]

    @property
    def size_at(self) -> int:
        """Where a window's arguments begin."""
        return size_at(self.node)

    @property
    def window(self) -> tuple[int, int, int]:
        """Kernel, stride and upper pad, vertically."""
        if self.node.target is LINEAR:
            return 1, 1, 0
        window, pads = self.node.args[1 + self.size_at], self.node.args[2 + self.size_at]
        return window[0], window[2], pads[0]  # type: ignore[index,return-value]

    def rows(self, first: int, end: int) -> tuple[int, int]:
        """Of the input; they begin where a vector may, which the pads make up for."""
        kernel, stride, top = self.window
        begin = max(0, first * stride - top)
        return begin - begin % whole(self.width), min(self.height, (end - 1) * stride - top + kernel)

    def bytes(self, first: int, end: int) -> int:
        """Of input and result."""
        begin, stop = self.rows(first, end)
        return 4 * ((stop - begin) * self.width * self.features[0] + (end - first) * self.out_width * self.features[1])

    def run(self, x: Tensor, first: int, end: int, args: Sequence[Any], res: Tensor | None) -> Tensor:
        """The kernel; `x` has the rows that `rows` says, `args` are the node's."""
        fn: Any = KERNELS[str(args[-1])]
        if self.node.target is LINEAR:
            return fn(x, args[1], args[2], res)
        begin, stop = self.rows(first, end)
        kernel, stride, top = self.window
        window, (_, left, _, right) = args[1 + self.size_at], args[2 + self.size_at]
        pads = (top - first * stride + begin, left, (end - 1) * stride - top + kernel - stop, right)
        size = (stop - begin, self.width)
        return fn(x, size, window, pads) if self.node.target is PATCHES else fn(x, args[1], args[2], size, window, pads)


def size_at(node: fx.Node) -> int:
    """Where the size stands among the arguments of a window; window and pads follow."""
    return 1 if node.target is PATCHES else 3


def whole(width: int) -> int:
    """Rows that are whole lines of memory together."""
    return TOKEN_TILE // math.gcd(width, TOKEN_TILE)


@dataclass(frozen=True)
class Band:
    """Kernels that are run together, `rows` of the last one's result at a time; each reads the one before it."""

    steps: tuple[Step, ...]
    height: int
    rows: int

    def run(self, env: Mapping[fx.Node, Any], recorder: Recorder | None, result: bool) -> Tensor:
        """The whole result of the last kernel. `env`: values from outside; `result`: whether the chain returns it."""
        last = self.steps[-1]
        source = map_arg(self.steps[0].node.args[0], env.__getitem__)
        B = source.shape[0]  # type: ignore[union-attr]
        if recorder is not None:
            recorder.result = result
        y = token_output(last.features[1], (B, self.height * last.out_width))
        if recorder is not None:
            recorder.result = False
        for first in range(0, self.height, self.rows):
            end = min(first + self.rows, self.height)
            spans = [(first, end)]
            for step in reversed(self.steps[1:]):
                spans.append(step.rows(*spans[-1]))
            x = _rows(source, *self.steps[0].rows(*spans[-1]), self.steps[0].width)
            for step, (start, stop) in zip(self.steps, reversed(spans), strict=True):
                args = map_arg(step.node.args, lambda n, last=step: None if n in inside(self) else env[n])  # type: ignore[misc]
                res = args[3] if step.node.target is LINEAR else None
                if res is not None:
                    res = _rows(res, start, stop, step.out_width)
                if step is last and recorder is not None:
                    recorder.into = _rows(y, first, end, last.out_width)
                x = step.run(x, start, stop, args, res)
        return y


def inside(band: Band) -> set[fx.Node]:
    """Its values but for the last."""
    return {step.node for step in band.steps[:-1]}


def _rows(value: Any, first: int, end: int, width: int) -> Tensor:
    return value[:, first * width : end * width]


def bands(nodes: Iterable[fx.Node], results: set[fx.Node]) -> dict[fx.Node, Band]:
    """By their first node. A band begins with a large value and ends with the next that is not, or that several read."""
    found, taken = {}, set()
    place = {node: i for i, node in enumerate(nodes)}
    for node in place:
        if node in taken or not _cuttable(node) or not _large(node):
            continue
        chain = [node]
        while _large(chain[-1]) and chain[-1] not in results and len(chain[-1].users) == 1:
            user = next(iter(chain[-1].users))
            if not _cuttable(user) or user.args[0] is not chain[-1] or user.args[1:4].count(chain[-1]):
                break
            if any(place[i] > place[node] for i in user.all_input_nodes if i.op == "call_function" and i is not chain[-1]):
                break  # a residual that comes later
            chain.append(user)
        shorter = (_band(chain[:length]) for length in range(len(chain), 1, -1))
        band = next((band for band in shorter if band is not None and _twice(band) <= TWICE), None)
        if band is not None:
            found[node] = band
            taken |= {step.node for step in band.steps}
    return found


def _twice(band: Band) -> float:
    """How much more the bands compute than one picture would: the share of pixels made twice."""
    made = whole = 0
    for first in range(0, band.height, band.rows):
        span = first, min(first + band.rows, band.height)
        for step in reversed(band.steps):
            made += (span[1] - span[0]) * step.out_width * step.features[1]
            span = step.rows(*span)
    for step in band.steps:
        whole += int(value_of(step.node).shape[1]) * step.features[1]
    return made / whole - 1


def _cuttable(node: fx.Node) -> bool:
    if node.target in WINDOWS:
        return node.args[-1] in KERNELS
    return node.target is LINEAR and node.args[6] == "token" and node.args[-1] in KERNELS and value_of(node).ndim == 3


def _large(node: fx.Node) -> bool:
    _, S, F = value_of(node).shape
    return isinstance(S, int) and 4 * S * F > LARGE


def _band(chain: Sequence[fx.Node]) -> Band | None:
    """None where nothing says how wide the rows are, or there would be one band."""
    known = next((i for i, node in enumerate(chain) if node.target in WINDOWS), None)
    if known is None or len(chain) < 2:
        return None
    size: tuple[int, int] = tuple(chain[known].args[size_at(chain[known])])  # type: ignore[assignment]
    steps = []
    for node in chain:
        x, (height, width) = node.args[0], size
        if node.target in WINDOWS:
            pixels = int(value_of(node).shape[1])
            at = size_at(node)
            size = tuple(node.args[at])  # type: ignore[assignment]
            height, width = size
            window, pads = node.args[at + 1], node.args[at + 2]
            high = (height + pads[0] + pads[2] - window[0]) // window[2] + 1  # type: ignore[index,operator]
            size = (high, pixels // high)  # type: ignore[assignment]
        features = int(value_of(x).shape[2]), int(value_of(node).shape[2])  # type: ignore[arg-type]
        steps.append(Step(node, height, width, size[1], features))
    height, step = size[0], whole(size[1])
    band = Band(tuple(steps), height, height)
    count = next((n for n in range(1, height + 1) if _peak(replace(band, rows=_share(height, n, step))) <= BUDGET), height)
    rows = _share(height, count, step)
    return replace(band, rows=rows) if rows < height else None


def _share(height: int, count: int, step: int) -> int:
    """Rows of each of `count` bands, in whole lines."""
    return -(-height // count // step) * step if height // count >= step else step


def _peak(band: Band) -> int:
    """Bytes of the largest kernel's input and result, in the middle of the picture."""
    first = band.height // 2
    span, found = (first, min(band.height, first + band.rows)), 0
    for step in reversed(band.steps):
        found = max(found, step.bytes(*span))
        span = step.rows(*span)
    return found
