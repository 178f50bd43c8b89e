"""Pictures in the dialect: sequences of H x W tokens, row by row, so that a 1 x 1 convolution is a linear.

    depthwise(x, weight, bias)     a window of its own for every channel       x [B, H * W, C] -> [B, OH * OW, C]
    direct(x, weight, bias)        a window over all channels, which are few   x [B, H * W, C] -> [B, OH * OW, N]
    patches(x)                     all pixels that a window sees, as features  x [B, H * W, C] -> [B, OH * OW, C * kh * kw]
    pool(x)                        the mean over the pixels                    x [B, S, C] -> [B, C]

`size` is (H, W); `window` (kh, kw, vertical stride, horizontal stride); `pads` zeros (above, left of, below, right of) the picture. Results
are token-minor but for those of pool. `kernel` is a key of `KERNELS`, as in `sparsecc::linear`.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sparsecc.ir.ops import ACTIVATIONS, KERNELS, empty_output
from sparsecc.ir.token_ops import define


def out_size(size: Sequence[int], window: Sequence[int], pads: Sequence[int]) -> tuple[int, int]:
    """(OH, OW)."""
    high, wide = ((size[i] + pads[i] + pads[i + 2] - window[i]) // window[2 + i] + 1 for i in (0, 1))
    return high, wide


def padded_picture(x: Tensor, size: Sequence[int], pads: Sequence[int]) -> Tensor:
    """[B, C, H + .., W + ..] of [B, H * W, C]."""
    picture = x.transpose(1, 2).unflatten(2, tuple(size))
    return F.pad(picture, (pads[1], pads[3], pads[0], pads[2]))


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None,
    size: Sequence[int], window: Sequence[int], pads: Sequence[int], epilogue: str, kernel: str,
) -> Tensor:
    """weight [C, kh, kw], bias [C]; `epilogue` is a key of `ACTIVATIONS`."""
    fn: Any = KERNELS.get(kernel)
    if fn is not None:
        return fn(x, weight, bias, size, window, pads)
    return direct(x, weight[:, None], bias, size, window, pads, epilogue, "")


def direct(
    x: Tensor, weight: Tensor, bias: Tensor | None,
    size: Sequence[int], window: Sequence[int], pads: Sequence[int], epilogue: str, kernel: str,
) -> Tensor:
    """weight [N, C, kh, kw], bias [N]; `epilogue` is a key of `ACTIVATIONS`."""
    fn: Any = KERNELS.get(kernel)
    if fn is not None:
        return fn(x, weight, bias, size, window, pads)
    y = F.conv2d(padded_picture(x, size, pads), weight, bias, window[2:], groups=x.shape[-1] // weight.shape[1])
    y = ACTIVATIONS[epilogue].fn(y).flatten(2).transpose(1, 2)
    return empty_output(y, y.shape[-1], "token").copy_(y)


def weighted_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None,
    size: Sequence[int], window: Sequence[int], pads: Sequence[int], epilogue: str, kernel: str,
) -> Tensor:
    """Shape, dtype and strides of either's result."""
    OH, OW = out_size(size, window, pads)
    return empty_output(x.new_empty((x.shape[0], OH * OW, 1)), weight.shape[0], "token")


def patches(x: Tensor, size: Sequence[int], window: Sequence[int], pads: Sequence[int], kernel: str) -> Tensor:
    """Features in the order of a convolution's weight: channel, row, column."""
    fn: Any = KERNELS.get(kernel)
    if fn is not None:
        return fn(x, size, window, pads)
    y = F.unfold(padded_picture(x, size, pads), tuple(window[:2]), 1, 0, tuple(window[2:])).transpose(1, 2)
    return empty_output(y, y.shape[-1], "token").copy_(y)


def patches_fake(x: Tensor, size: Sequence[int], window: Sequence[int], pads: Sequence[int], kernel: str) -> Tensor:
    """Shape, dtype and strides of the result."""
    OH, OW = out_size(size, window, pads)
    return empty_output(x.new_empty((x.shape[0], OH * OW, 1)), x.shape[-1] * window[0] * window[1], "token")


def pool(x: Tensor, kernel: str) -> Tensor:
    """Rows of features."""
    fn: Any = KERNELS.get(kernel)
    return fn(x) if fn is not None else x.mean(1)


def pool_fake(x: Tensor, kernel: str) -> Tensor:
    """Shape, dtype and strides of the result."""
    return x.new_empty((x.shape[0], x.shape[2]))


_WHERE = "SymInt[] size, int[] window, int[] pads"
DEPTHWISE = define("depthwise", f"Tensor x, Tensor weight, Tensor? bias, {_WHERE}, str epilogue", depthwise, weighted_fake)
DIRECT = define("direct", f"Tensor x, Tensor weight, Tensor? bias, {_WHERE}, str epilogue", direct, weighted_fake)
PATCHES = define("patches", f"Tensor x, {_WHERE}", patches, patches_fake)
POOL = define("pool", "Tensor x", pool, pool_fake)
"""The overloads that stand in graphs."""

WEIGHTED = (DEPTHWISE, DIRECT)
"""Those with a weight of their own; their arguments are the same."""

IMAGE_MEANINGS: dict[Any, Any] = {DEPTHWISE: depthwise, DIRECT: direct, PATCHES: patches, POOL: pool}
"""What to call without the dispatcher."""
