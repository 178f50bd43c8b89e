"""canonicalize: every linear with a constant weight becomes sparsecc.linear; what does nothing goes away.

    y = aten.linear(x, w, b)                   -->  y = sparsecc.linear(x, [w], b, None, terms="f32[N, K]", ...)
    y = aten.addmm(b, x, w)      (w [K, N])    -->  the same, with w transposed once, now
    w = aten.mul(weight_orig, weight_mask)     -->  w = const("...weight")
    y = aten.dropout(x, 0.1, False)            -->  x
    y = aten.cat([tensor([]), x], -2)          -->  x      a KV cache before its first token
    y = aten.batch_norm(aten.conv2d(x, w))     -->  y = aten.convolution(x, w', b'), see `convolution`
"""
from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from sparsecc.ir.effects import mutates
from sparsecc.ir.infer import same_shape
from sparsecc.ir.program import Program, Rule
from sparsecc.ir.types import type_of
from sparsecc.passes.convolution import conv_rules
from sparsecc.passes.site import return_rows

aten = torch.ops.aten
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TRANSPOSES = {aten.t.default, aten.transpose.int, aten.permute.default, torch.t, torch.transpose, "t", "transpose"}
_FOLD_DEPTH = 16
_END = 2**62  # slices to "the end" carry 2**63 - 1


@dataclass(frozen=True)
class Canonicalize:
    """The pass; see the file's docstring."""

    name: str = "canonicalize"
    requires: tuple[str, ...] = ()
    ensures: tuple[str, ...] = ("linears",)

    def run(self, program: Program, context: Any = None) -> None:
        _modules(program)
        program.rewrite(RULES)


def fold(program: Program, node: Any) -> fx.Node | None:
    """The constant that a node always is, computed now if it is a pure function of constants; None if it varies."""
    if not _foldable(program, node):
        return None
    return node if program.is_const(node) else _evaluate(program, node)


def _foldable(program: Program, node: Any, depth: int = 0) -> bool:
    """Whether only constants lead to the node. The first input that varies ends the search, as does a long chain."""
    if not isinstance(node, fx.Node) or depth > _FOLD_DEPTH:
        return False
    if node.op == "get_attr":
        return program.is_const(node)
    if node.op not in ("call_function", "call_method") or mutates(node) or not node.all_input_nodes or _random(node):
        return False
    return all(_foldable(program, i, depth + 1) for i in node.all_input_nodes)


def _evaluate(program: Program, node: fx.Node) -> fx.Node | None:
    for source in node.all_input_nodes:
        if source.op != "get_attr" and _evaluate(program, source) is None:
            return None
    name = _plain_name(program.weight_name(node.all_input_nodes[0]))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), program.const)  # type: ignore[arg-type]
    with torch.no_grad():
        target: Any = getattr(type(args[0]), str(node.target)) if node.op == "call_method" else node.target
        value = target(*args, **kwargs)
    if not isinstance(value, torch.Tensor):
        return None
    const = program.add_const(name, value, origin=name)
    program.replace(node, const)
    return const


def _random(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or "dropout" in str(node.target) or "rand" in str(node.target)


def _plain_name(name: str) -> str:
    """`fc.weight_orig`, `fc.parametrizations.weight.original0` -> `fc.weight`, the name that specs use."""
    name = re.sub(r"\.?parametrizations\.(\w+)\..*$", r".\1", name).lstrip(".")
    return re.sub(r"_(orig|mask|[gv])$", "", name)


def _linear(program: Program, node: fx.Node, x: Any, w: Any, b: Any) -> fx.Node | None:
    """sparsecc.linear for a weight [N, K], if the weight is a constant matrix of floats of x's dtype."""
    weight, xtype = fold(program, w), program.type(x)
    if weight is None:
        return None
    tensor = program.const(weight)
    if tensor.ndim != 2 or tensor.dtype not in FLOATS or tensor.layout != torch.strided:
        return None
    if xtype is not None and xtype.dtype != tensor.dtype:
        return None
    if b is not None:
        b = fold(program, b) or b
        found = type_of(program.const(b)) if b.op == "get_attr" else program.type(b)
        if found is None or found.shape != (tensor.shape[0],) or found.dtype != tensor.dtype:
            return None
    return program.linear(x, [weight], b, str(type_of(tensor))).node


def _transposed(program: Program, w: Any) -> fx.Node | None:
    """For a weight used as [K, N]: the constant [N, K], which is the source itself where the graph transposes one."""
    if isinstance(w, fx.Node) and w.target in _TRANSPOSES and _swaps_two(program, w):
        return fold(program, w.args[0])
    const = fold(program, w)
    if const is None or (tensor := program.const(const)).ndim != 2 or tensor.dtype not in FLOATS:
        return None
    name = program.weight_name(const)
    return program.add_const(name, tensor.detach().t().contiguous(), origin=name)


def _swaps_two(program: Program, node: fx.Node) -> bool:
    source = fold(program, node.args[0])
    if source is None or program.const(source).ndim != 2:
        return False
    rest = node.args[1:]
    flat = rest[0] if rest and isinstance(rest[0], list | tuple) else rest
    if not flat:
        return not node.kwargs
    return [int(d) % 2 for d in flat] == ([1, 0] if node.target is aten.permute.default else [int(flat[0]) % 2, 1 - int(flat[0]) % 2])  # type: ignore[arg-type,call-overload]


def _from_linear(program: Program, node: fx.Node) -> fx.Node | None:
    """linear(x, w, b)"""
    x, w, b = _arguments(node, ("input", "weight", "bias"))
    return _linear(program, node, x, w, b)


def _from_addmm(program: Program, node: fx.Node) -> fx.Node | None:
    """addmm(b, x, w) with w [K, N]"""
    if any(node.kwargs.get(scale, 1) != 1 for scale in ("beta", "alpha")):
        return None
    b, x, w = _arguments(node, ("input", "mat1", "mat2"))
    bias = fold(program, b)
    if bias is None or program.const(bias).ndim != 1:
        return None
    w = _transposed(program, w)
    return None if w is None else _linear(program, node, x, w, bias)


def _from_matmul(program: Program, node: fx.Node) -> fx.Node | None:
    """x @ w with w [K, N]"""
    x, w = (*node.args, *node.kwargs.values())[:2]
    if program.type(x) is None or _ndim(program, w) != 2 or fold(program, x) is not None:
        return None
    w = _transposed(program, w)
    return None if w is None else _linear(program, node, x, w, None)


def _ndim(program: Program, node: Any) -> int | None:
    found = program.type(node)
    return None if found is None else len(found.shape)


def _arguments(node: fx.Node, names: tuple[str, ...]) -> list[Any]:
    values = list(node.args[: len(names)]) + [None] * (len(names) - len(node.args))
    return [node.kwargs.get(name, value) for name, value in zip(names, values, strict=True)]


def _from_dropout(program: Program, node: fx.Node) -> fx.Node | None:
    """dropout(x, p, training=False) is x"""
    training = node.args[2] if len(node.args) > 2 else node.kwargs.get("train", node.kwargs.get("training", True))
    return node.args[0] if training is False else None  # type: ignore[return-value]


def _from_cast(program: Program, node: fx.Node) -> fx.Node | None:
    """x.to(...), x.float() of a value that already has that dtype is x itself"""
    source = node.args[0]
    if node.kwargs.get("copy") or any(a is True for a in node.args[3:]) or "memory_format" in node.kwargs:
        return None
    devices = [a for a in (*node.args[1:], *node.kwargs.values()) if isinstance(a, torch.device | str | fx.Node)]
    if devices and not all(torch.device(d).type == "cpu" for d in devices if not isinstance(d, fx.Node)):
        return None
    if any(isinstance(d, fx.Node) for d in devices) or not same_shape(program.type(source), program.type(node)):
        return None
    return source  # type: ignore[return-value]


def _from_slice(program: Program, node: fx.Node) -> fx.Node | None:
    """x[0:end] along one dimension is x"""
    x, _, start, end, step = (*node.args, *(None,) * 5)[:5]
    whole = start in (None, 0) and (end is None or (isinstance(end, int) and end > _END)) and step in (None, 1)
    return x if whole and not node.kwargs else None  # type: ignore[return-value]


def _from_getitem(program: Program, node: fx.Node) -> fx.Node | None:
    """x[:, 0:, ...] is x"""
    x, index = node.args
    parts = index if isinstance(index, tuple) else (index,)
    whole = all(p is Ellipsis or (isinstance(p, slice) and p.start in (None, 0) and p.stop is None and p.step in (None, 1)) for p in parts)
    return x if whole and program.type(x) is not None else None  # type: ignore[return-value]


def _from_alias(program: Program, node: fx.Node) -> fx.Node | None:
    return node.args[0]  # type: ignore[return-value]


def _from_cat(program: Program, node: fx.Node) -> fx.Node | None:
    """cat([tensor([]), x]) is x: torch leaves out what has no elements and one dimension. Callers get memory of its own all the same."""
    parts = node.args[0]
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        return None
    empty, x = parts
    const, kind = fold(program, empty), program.type(x)
    if const is None or tuple(program.const(const).shape) != (0,) or kind is None or not isinstance(x, fx.Node) or x.op == "placeholder":
        return None
    if kind.dtype != program.const(const).dtype or len(kind.shape) < 2:
        return None
    if program.graph.output_node() in node.users:
        return_rows(program, node, x)
    return x


def _modules(program: Program) -> None:
    """nn.Linear and eval-mode dropout calls of a symbolically traced module become functions."""
    for node in list(program.graph.nodes):
        if node.op != "call_module":
            continue
        module = program.gm.get_submodule(str(node.target))
        if isinstance(module, nn.modules.dropout._DropoutNd) and not module.training:
            program.replace(node, node.args[0])
        elif type(module) is nn.Linear and not (module._forward_hooks or module._forward_pre_hooks):
            with program.graph.inserting_before(node):
                weight = program.graph.get_attr(f"{node.target}.weight")
                bias = program.graph.get_attr(f"{node.target}.bias") if module.bias is not None else None
                new = program.graph.call_function(F.linear, (node.args[0], weight, bias))
            program.replace(node, new)


RULES: dict[Any, Rule] = {
    **dict.fromkeys((aten.linear.default, F.linear), _from_linear),
    **dict.fromkeys((aten.addmm.default, torch.addmm), _from_addmm),
    **dict.fromkeys((aten.mm.default, aten.matmul.default, torch.mm, torch.matmul, operator.matmul, "matmul", "mm"), _from_matmul),
    **dict.fromkeys((aten.dropout.default, aten.feature_dropout.default, F.dropout, torch.dropout), _from_dropout),
    **dict.fromkeys((aten.to.dtype, aten.to.dtype_layout, aten.to.device, "to", "float", "bfloat16", "half", "type_as"), _from_cast),
    **dict.fromkeys((aten.alias.default, aten.detach.default, aten.detach_.default, "detach"), _from_alias),
    aten.cat.default: _from_cat,
    aten.slice.Tensor: _from_slice,
    operator.getitem: _from_getitem,
    **conv_rules(fold),
}
