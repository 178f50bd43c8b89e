"""Which nodes do more than return a value: what dead-code elimination and code motion must respect."""
from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

_IN_PLACE_OPERATORS = {
    operator.setitem, operator.delitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
    operator.ipow, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift, operator.imatmul, operator.iconcat,
    setattr, delattr,
}
_SIDE_EFFECTS = {torch._C._set_grad_enabled, torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast}
# Positions of the `inplace` argument where a caller may pass it without its name.
_INPLACE_AT = {
    "relu": 1, "relu6": 1, "silu": 1, "mish": 1, "hardswish": 1, "selu": 1, "elu": 2, "leaky_relu": 2, "hardtanh": 3, "dropout": 3,
}


def mutates(node: fx.Node) -> bool:
    """Whether the node may change a tensor that existed before it."""
    if node.op == "call_method":
        return _in_place_name(str(node.target))
    if node.op == "call_module":
        return True
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    if node.target in _IN_PLACE_OPERATORS or "out" in node.kwargs:
        return True
    name = getattr(node.target, "__name__", "")
    return _in_place_name(name) or bool(_inplace_flag(node, name))


def is_impure(node: fx.Node) -> bool:
    """Whether the node must stay although nobody uses its value."""
    if node.op in ("placeholder", "output", "call_module"):
        return True
    if node.op != "call_function":
        return mutates(node)
    name = getattr(node.target, "__name__", "")
    return mutates(node) or node.target in _SIDE_EFFECTS or "assert" in name or "sym_constrain" in name or "_check" in name


def _in_place_name(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _inplace_flag(node: fx.Node, name: str) -> Any:
    at = _INPLACE_AT.get(name)
    positional = node.args[at] if at is not None and len(node.args) > at else False
    return node.kwargs.get("inplace", positional)
