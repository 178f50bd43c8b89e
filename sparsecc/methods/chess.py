"""CHESS's selective sparsification of attention (He et al. 2024): thresholds on the inputs of its projections, set on calibration data.

An input x_i of a projection is zero for it unless |x_i| > tau, one tau for each projection: the `sparsity` quantile of |x| over tokens and
features. q and o are sparse, k and v read all of the same x, since what they lose would stay in the KV cache. Thresholds on feed-forward
blocks: `methods/cats.py`. Together:

    {"*.mlp": cats.calibrate(model, data, 0.5), "*.self_attn.*": chess.attention(model, data, 0.5)}
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsecc.errors import SpecError
from sparsecc.inputs import Inputs, inputs
from sparsecc.ir.program import Program
from sparsecc.methods.cats import thresholds
from sparsecc.methods.profile import watched
from sparsecc.passes.inputs import PARTS, attention_linears


def attention(model: nn.Module, data: Iterable[Any], sparsity: float = 0.5, parts: Sequence[str] = ("q", "o")) -> Inputs:
    """Thresholds at which `sparsity` of the inputs are skipped on `data`, as a value for a sparsity dict, under a glob over the linears.

    parts: the projections, of "q", "k", "v", "o"; they are found by dataflow. `data` yields inputs of the model. Raises SpecError for a
    sparsity outside [0, 1), an unknown part, NaN inputs, a model without torch's attention between linears.
    """
    if not 0 <= sparsity < 1:
        raise SpecError(f"attention(sparsity={sparsity}): the fraction to skip lies in [0, 1)")
    if not parts or any(part not in PARTS for part in parts):
        raise SpecError(f"attention(parts={parts!r}): use some of {', '.join(map(repr, PARTS))}")

    def find(program: Program) -> tuple[dict[str, fx.Node], list[fx.Node]]:
        views, missed = attention_linears(program, tuple(parts))
        if not views:
            raise SpecError("no scaled_dot_product_attention between linears was recognised in the model"
                            + "".join(f"\n  {line}" for line in missed[:4]))
        return {name: view.x for name, view in views.items()}, [view.x for view in views.values()]

    sizes: dict[str, list[Tensor]] = {}
    for read, found in watched(model, data, find):
        for name, x in read.items():
            if bool(found[x].isnan().any()):
                raise SpecError(f"{name}: the calibration data gives NaN inputs")
            sizes.setdefault(name, []).append(found[x].detach().abs().float())
    return inputs(levels={name: thresholds(torch.cat(found), None, sparsity) for name, found in sizes.items()})
