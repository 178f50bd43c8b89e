"""The rule of every op that slices pass through, by name: aten.view.default, torch.Tensor.view and "view" are one.

An op that is not here, and is not pointwise, stops them: what it reads stays whole, and `explain` says so.
"""
from __future__ import annotations

from torch import fx

from sparsecc.ir.ops import LINEAR
from sparsecc.passes.rules import attention, linear, norm, shape
from sparsecc.passes.rules.base import RuleOf, metadata, name_of
from sparsecc.passes.rules.pointwise import is_pointwise, pointwise

RULES: dict[str, RuleOf] = {
    **dict.fromkeys(("transpose", "permute", "t", "mT", "swapaxes"), shape.permute),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), shape.reshape),
    **dict.fromkeys(("contiguous", "clone", "detach", "alias", "to", "_to_copy", "type_as", "float", "half", "bfloat16", "dropout"),
                    shape.copy_of),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind"), shape.split),
    "unsqueeze": shape.unsqueeze, "squeeze": shape.squeeze, "expand": shape.expand, "slice": shape.slice_, "narrow": shape.narrow,
    "select": shape.select, "getitem": shape.getitem, "cat": shape.cat, "concat": shape.cat,
    "embedding": linear.embedding,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), linear.conv),
    **dict.fromkeys(("matmul", "bmm"), attention.matmul),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax"), attention.softmax),
    "scaled_dot_product_attention": attention.attention,
    **dict.fromkeys(("mean", "sum"), norm.reduce),
    **dict.fromkeys(("layer_norm", "rms_norm"), norm.last_norm),
    "batch_norm": norm.batch_norm, "group_norm": norm.group_norm,
    **dict.fromkeys((f"{kind}{d}d" for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample_nearest",
                                                "upsample_bilinear") for d in (1, 2, 3)), norm.pool),
    "constant_pad_nd": norm.pool, "pad": norm.pool,
    **dict.fromkeys(("sym_size", "size", "dim"), metadata),
}
SOURCES = frozenset(("embedding", "conv1d", "conv2d", "conv3d", "convolution", "expand", "batch_norm"))
"""What tells entries apart that it did not read so."""


def rule_of(node: fx.Node) -> RuleOf | None:
    """None for an op without a rule."""
    if node.target is LINEAR:
        return linear.linear
    return RULES.get(name_of(node)) or (pointwise if is_pointwise(node) else None)


def is_source(node: fx.Node) -> bool:
    """Whether the node may tell entries apart that its operands do not."""
    return node.target is LINEAR or name_of(node) in SOURCES or is_pointwise(node)
