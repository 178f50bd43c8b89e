"""Programs as text: a subset of Python, read by `ast`, never executed. `print_program(parse_program(text)) == text`.

    # sparsecc program, stage: fuse
    def program(x: "f32[s0, 384]"):
        w: "f32[1536, 384] % nm(2, 4)" = const("fc.weight")
        y: "f32[s0, 1536]" = sparsecc.linear(x, [w], None, None, terms="f32[1536, 384] % nm(2, 4)", epilogue="", layout="row", kernel="")
        z: "f32[s0, 1536]" = aten.tanh.default(y)
        return (z,)

Values are calls of ATen overloads, of the dialect, of torch functions by their path, or methods of a value (`y.view(-1, 4)`).
"""
from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.node import _get_qualified_name

from sparsecc.errors import SparseccError, TextError
from sparsecc.ir import cache_ops, conditional_ops, core_ops, image_ops, merge_ops, route_ops, skip_ops, token_ops  # noqa: F401  define the other ops of the dialect
from sparsecc.ir.invent import invent
from sparsecc.ir.ops import LINEAR, parse_terms, split_params
from sparsecc.ir.program import TYPE_KEY, LinearView, Program, get_attr, make_module
from sparsecc.ir.types import TensorType, parse_type

_WIDTH = 140
_ROOTS: dict[str, Any] = {"torch": torch, "operator": __import__("operator"), "math": math}
_HEADER = re.compile(r"# sparsecc program, stage: (\w+)")
_NO_TYPE = re.compile(r"sym\[.*\]|float|bool")


# ---- printing


def print_program(program: Program) -> str:
    """The whole program. Constants appear by name and type; `tensors_of` gives their values."""
    lines = [f"# sparsecc program, stage: {program.stage}", *_signature(program)]
    for node in program.graph.nodes:
        if node.op == "output":
            lines.append(f"    return {_literal(tuple(node.args[0]))}")
        elif node.op != "placeholder":
            lines.append(f"    {node.name}{_annotation(node)} = {_call(program, node)}")
    return "\n".join(lines) + "\n"


def tensors_of(program: Program) -> dict[str, torch.Tensor]:
    """Every constant by its attribute: what `parse_program` takes."""
    found = {str(n.target): get_attr(program.gm, str(n.target)) for n in program.graph.nodes if n.op == "get_attr"}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def _signature(program: Program) -> list[str]:
    inputs = [f"{node.name}{_annotation(node)}" for node in program.inputs]
    line = f"def program({', '.join(inputs)}):"
    return [line] if len(line) <= _WIDTH else ["def program(", *(f"    {i}," for i in inputs), "):"]


def _annotation(node: fx.Node) -> str:
    found = node.meta.get(TYPE_KEY)
    return "" if found is None else f': "{found}"'


def _call(program: Program, node: fx.Node) -> str:
    if node.op == "get_attr":
        if not isinstance(get_attr(program.gm, str(node.target)), torch.Tensor):
            return f"submodule({json.dumps(str(node.target))})"
        names = [str(node.target)]
        if program.weight_name(node) != names[0]:
            names.append(program.weight_name(node))
        return f"const({', '.join(map(json.dumps, names))})"
    args = [_literal(a) for a in node.args]
    kwargs = [f"{name}={_literal(value)}" for name, value in node.kwargs.items()]
    if node.op == "call_method":
        return f"{args[0]}.{node.target}({', '.join(args[1:] + kwargs)})"
    if node.op == "call_module":
        return f"submodule({json.dumps(str(node.target))})({', '.join(args + kwargs)})"
    if node.target is LINEAR:
        kwargs = [f"{name}={value}" for name, value in zip(LinearView.FIELDS[4:], args[4:], strict=True)]
        args = args[:4]
    return f"{_path(node.target)}({', '.join(args + kwargs)})"


def _path(target: Any) -> str:
    if target is LINEAR:
        return "sparsecc.linear"
    if isinstance(target, torch._ops.OpOverload):
        path = f"{target.namespace}.{target._opname}.{target._overloadname}"
        if target.namespace == "sparsecc":
            return path.removesuffix(".default")
        return path if target.namespace == "aten" else f"torch.ops.{path}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"torch.ops.higher_order.{target.name()}"
    if target is getattr:
        return "getattr"
    path = _get_qualified_name(target)
    return path.removeprefix("_") if path.startswith("_operator.") else path


def _literal(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, bool) or value is None:
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else f'float("{value}")'
    if isinstance(value, int | torch.SymInt | complex):
        return str(value)
    if isinstance(value, slice):
        return f"slice({_literal(value.start)}, {_literal(value.stop)}, {_literal(value.step)})"
    if value is Ellipsis:
        return "..."
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(k)}: {_literal(v)}' for k, v in value.items())}}}"
    if isinstance(value, torch.device):
        return f'device("{value}")'
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return str(value)
    return f"opaque({json.dumps(repr(value))})"


# ---- parsing


def parse_program(text: str, tensors: Mapping[str, torch.Tensor] | None = None) -> Program:
    """The program that `text` shows; it runs.

    `tensors` gives the constants by attribute. Without it they are made up from their types, always the same for the same name,
    with the zeros that their patterns ask for. Raises TextError with line, column and caret.
    """
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise TextError(error.msg, source=text, line=error.lineno or 1, col=max((error.offset or 1) - 1, 0)) from error
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        raise TextError("a program is one function: def program(...):", source=text)
    header = _HEADER.search(text)
    return _Parser(text, tensors).program(tree.body[0], header[1] if header else "capture")


class _Parser:
    def __init__(self, text: str, tensors: Mapping[str, torch.Tensor] | None) -> None:
        self.text, self.tensors = text, tensors
        self.graph = fx.Graph()
        self.values: dict[str, fx.Node] = {}
        self.origin: dict[str, str] = {}
        self.places: dict[str, ast.AST] = {}

    def program(self, function: ast.FunctionDef, stage: str) -> Program:
        for arg in function.args.args:
            node = self.graph.placeholder(arg.arg)
            self._name(node, arg.arg, arg.annotation, arg)
        for statement in function.body:
            self._statement(statement)
        gm = make_module(self._constants(), self.graph)
        return Program(gm, stage, self.origin)

    def _statement(self, s: ast.stmt) -> None:
        if isinstance(s, ast.Return):
            value = self._value(s.value) if s.value else ()
            self.graph.output(value if isinstance(value, tuple) else (value,))
            return
        target = s.targets[0] if isinstance(s, ast.Assign) else s.target if isinstance(s, ast.AnnAssign) else None
        if not isinstance(target, ast.Name) or not isinstance(s, ast.Assign | ast.AnnAssign):
            raise self._error(s, 'expected `name: "type" = call(...)` or `return (...)`')
        if not isinstance(s.value, ast.Call):
            raise self._error(s.value or s, "expected a call on the right-hand side")
        if target.id in self.values:
            raise self._error(s, f"{target.id!r} is defined twice")
        self._name(self._call(s.value, target.id), target.id, s.annotation if isinstance(s, ast.AnnAssign) else None, s)

    def _name(self, node: fx.Node, name: str, annotation: ast.expr | None, place: ast.AST) -> None:
        """Bind the value; its node keeps exactly the name in the text."""
        if node.name != name:
            node.name = name
        self.values[name] = node
        if annotation is None:
            return
        if not (isinstance(annotation, ast.Constant) and isinstance(annotation.value, str)):
            raise self._error(annotation, "a type is written as a string")
        if _NO_TYPE.fullmatch(annotation.value):
            node.meta[TYPE_KEY] = annotation.value
            return
        try:
            node.meta[TYPE_KEY] = parse_type(annotation.value)
        except SparseccError as error:
            column = getattr(error, "col", 0) + 1
            raise self._error(annotation, str(error).splitlines()[0].split(": ", 1)[-1], column) from error

    def _call(self, call: ast.Call, name: str) -> fx.Node:
        if isinstance(call.func, ast.Name) and call.func.id == "const":
            return self._const(call, name)
        args = tuple(self._value(a) for a in call.args)
        kwargs = {str(k.arg): self._value(k.value) for k in call.keywords}
        path = self._dotted(call.func)
        if path == "sparsecc.linear":
            return self.graph.create_node("call_function", LINEAR, self._linear_args(call, args, kwargs), {}, name)
        head, _, rest = path.partition(".")
        if head in self.values and rest and "." not in rest:
            return self.graph.create_node("call_method", rest, (self.values[head], *args), kwargs, name)
        return self.graph.create_node("call_function", self._target(call.func, path), args, kwargs, name)

    def _linear_args(self, call: ast.Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Four values by position, four texts by name, in the op's order; the terms must parse and fit the params."""
        values = dict(zip(LinearView.FIELDS[:4], args, strict=False)) | kwargs
        if missing := [name for name in LinearView.FIELDS if name not in values]:
            raise self._error(call, f"sparsecc.linear lacks {', '.join(missing)}")
        if len(args) > 4 or set(values) - set(LinearView.FIELDS):
            raise self._error(call, f"sparsecc.linear takes x, params, bias, residual, then by name {', '.join(LinearView.FIELDS[4:])}")
        try:
            split_params(parse_terms(values["terms"]), values["params"])
        except SparseccError as error:
            raise self._error(call, str(error).splitlines()[0]) from error
        return tuple(values[name] for name in LinearView.FIELDS)

    def _target(self, place: ast.expr, path: str) -> Any:
        if path == "getattr":
            return getattr
        head, *rest = path.split(".")
        if head == "sparsecc":
            head, rest = "torch", ["ops", "sparsecc", *rest, "default"]
        found: Any = torch.ops.aten if head == "aten" else _ROOTS.get(head)
        if found is None:
            raise self._error(place, f"unknown function {path!r}: no value's method, and not in aten, sparsecc, torch, operator or math")
        for part in rest:
            try:
                found = getattr(found, part)
            except AttributeError:
                raise self._error(place, f"unknown function {path!r}: no {part!r}") from None
        if not callable(found):
            raise self._error(place, f"{path!r} is not a function")
        return found

    def _const(self, call: ast.Call, name: str) -> fx.Node:
        names = [self._value(a) for a in call.args]
        if not (1 <= len(names) <= 2 and all(isinstance(n, str) for n in names)):
            raise self._error(call, 'expected const("attribute") or const("attribute", "weight name in the model")')
        self.origin[names[0]] = names[-1]
        self.places[names[0]] = call
        return self.graph.create_node("get_attr", names[0], (), {}, name)

    def _constants(self) -> dict[str, torch.Tensor]:
        if self.tensors is None:
            missing = [n for n in self.graph.nodes if n.op == "get_attr" and not isinstance(n.meta.get(TYPE_KEY), TensorType)]
            if missing:
                raise self._error(self.places[missing[0].target], "a constant without a type needs its tensor")
            return invent(self.graph)
        for name, place in self.places.items():
            if name not in self.tensors:
                raise self._error(place, f"no tensor was given for the constant {name!r}")
        return {name: self.tensors[name] for name in self.places}

    def _value(self, e: ast.expr) -> Any:
        match e:
            case ast.Constant():
                return e.value
            case ast.Name():
                if e.id not in self.values:
                    raise self._error(e, f"unknown value {e.id!r}")
                return self.values[e.id]
            case ast.Tuple():
                return tuple(self._value(x) for x in e.elts)
            case ast.List():
                return [self._value(x) for x in e.elts]
            case ast.Dict():
                return {self._value(k): self._value(v) for k, v in zip(e.keys, e.values, strict=True) if k is not None}
            case ast.UnaryOp(op=ast.USub()):
                return -self._value(e.operand)
            case ast.Attribute():
                return self._torch_constant(e)
            case ast.Call():
                return self._literal_call(e)
        raise self._error(e, "not a literal, a value, or a list of them")

    def _torch_constant(self, e: ast.Attribute) -> Any:
        path = self._dotted(e)
        value = getattr(torch, e.attr, None) if path == f"torch.{e.attr}" else None
        if not isinstance(value, torch.dtype | torch.layout | torch.memory_format):
            raise self._error(e, f"{path!r} is no dtype, layout or memory format")
        return value

    def _literal_call(self, e: ast.Call) -> Any:
        name, args = self._dotted(e.func), [self._value(a) for a in e.args]
        makers: dict[str, Any] = {"float": float, "device": torch.device, "slice": slice}
        if name == "opaque":
            raise self._error(e, f"text cannot hold this argument: {args[0] if args else ''}")
        if name not in makers:
            raise self._error(e, "calls do not nest: give the result a name")
        return makers[name](*args)

    def _dotted(self, e: ast.expr) -> str:
        if isinstance(e, ast.Name):
            return e.id if e.id != "submodule" else self._no_submodule(e)
        if isinstance(e, ast.Attribute):
            return f"{self._dotted(e.value)}.{e.attr}"
        if isinstance(e, ast.Call):
            self._dotted(e.func)
        raise self._error(e, "expected a function's name")

    def _no_submodule(self, e: ast.expr) -> str:
        quoted = self.text.splitlines()[e.lineno - 1][e.end_col_offset or 0 :].split(")")[0].lstrip("(")
        raise self._error(e, f"the program calls the submodule {quoted}, which text cannot hold")

    def _error(self, place: Any, message: str, shift: int = 0) -> TextError:
        return TextError(message, source=self.text, line=place.lineno, col=place.col_offset + shift)
