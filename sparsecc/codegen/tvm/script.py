"""Reads a kernel's TVMScript into TVM's function, statement by statement, through TVM's own IR builder.

TVM's parser takes any program, keeps the source position of every node, and compiles each subexpression on its own with Python's
compiler: half of the time that a kernel took. Kernels use little of the language (`_STATEMENTS`, `_EXPRESSIONS`); of that the result is
the same. Imports TVM: import it where a kernel is compiled.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

from tvm import s_tir, tirx
from tvm.ir import IRModule
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder.base import IRBuilderFrame
from tvm.tirx.script import builder as T

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.LShift: operator.lshift,
}
_COMPARISONS = {ast.Eq: tirx.EQ, ast.NotEq: tirx.NE, ast.Lt: tirx.LT, ast.LtE: tirx.LE, ast.Gt: tirx.GT, ast.GtE: tirx.GE}
_LOGIC = {ast.And: tirx.And, ast.Or: tirx.Or}

Scope = dict[str, Any]
"""Names that the text has bound so far, and what they stand for. A block works on a copy: what it binds is gone after it."""


def read(source: str) -> tirx.PrimFunc:
    """The one function in `source`. Raises SyntaxError for what kernels don't use, and whatever TVM says of an ill-formed program."""
    function = ast.parse(source).body[0]
    if not isinstance(function, ast.FunctionDef):
        raise SyntaxError(f"a kernel is a function, not {ast.unparse(function)[:80]}")
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(function.name)
            scope: Scope = {"T": T}
            for arg in function.args.args:
                kind = _value(arg.annotation, scope)
                named: Any = kind() if isinstance(kind, T.DtypeConstructor) else kind
                scope[arg.arg] = T.arg(arg.arg, named)
            _block(function.body, scope)
    made: Any = builder.get()
    s_tir.analysis.verify_well_formed(IRModule.from_expr(made))
    return made


def _block(body: list[ast.stmt], scope: Scope) -> None:
    for statement in body:
        _STATEMENTS.get(type(statement), _unknown)(statement, scope)


def _assign(node: ast.Assign, scope: Scope) -> None:
    """`buffer[at] = value`, or a name for a buffer."""
    value, target = _value(node.value, scope), node.targets[0]
    if len(node.targets) == 1 and isinstance(target, ast.Subscript):
        T.buffer_store(_value(target.value, scope), value, _value(target.slice, scope))
    elif len(node.targets) == 1 and isinstance(target, ast.Name) and tirx.is_buffer_var(value):
        scope[target.id] = IRBuilder.name(target.id, value)
    else:
        _unknown(node, scope)


def _bind(node: ast.AnnAssign, scope: Scope) -> None:
    """`name: T.let = value`"""
    if not isinstance(node.target, ast.Name) or _value(node.annotation, scope) is not T.let:
        return _unknown(node, scope)
    value = _value(node.value, scope)
    value = value if isinstance(value, tirx.Expr) else tirx.const(value)
    name = tirx.Var(node.target.id, value.ty)
    T.Bind(value, var=name)
    scope[node.target.id] = name


def _call(node: ast.Expr, scope: Scope) -> None:
    """A call for its effect; an attribute holds up to the end of the block."""
    value = _value(node.value, scope)
    if isinstance(value, IRBuilderFrame):
        value.add_callback(lambda: value.__exit__(None, None, None))
        value.__enter__()
    elif isinstance(value, tirx.Expr):
        T.evaluate(value)
    elif value is not None:
        _unknown(node, scope)


def _for(node: ast.For, scope: Scope) -> None:
    loop, target = node.iter, node.target
    if not isinstance(loop, ast.Call) or not isinstance(target, ast.Name):
        return _unknown(node, scope)
    if isinstance(loop.func, ast.Name) and loop.func.id == "range":
        bounds = [_value(arg, scope) for arg in loop.args]
        frame = T.serial(*([0, *bounds] if len(bounds) == 1 else bounds))
    else:
        frame = _value(loop, scope)
    with frame as index:
        _block(node.body, scope | {target.id: IRBuilder.name(target.id, index)})


def _while(node: ast.While, scope: Scope) -> None:
    with T.While(_value(node.test, scope)):
        _block(node.body, dict(scope))


def _if(node: ast.If, scope: Scope) -> None:
    with T.If(_value(node.test, scope)):
        with T.Then():
            _block(node.body, dict(scope))
        if node.orelse:
            with T.Else():
                _block(node.orelse, dict(scope))


def _unknown(node: ast.AST, scope: Scope) -> Any:
    raise SyntaxError(f"kernels don't use {type(node).__name__}: {ast.unparse(node)[:80]}")


def _value(node: ast.AST | None, scope: Scope) -> Any:
    return _EXPRESSIONS.get(type(node), _unknown)(node, scope)


def _name(node: ast.Name, scope: Scope) -> Any:
    if node.id not in scope:
        raise SyntaxError(f"{node.id} is not defined here")
    return scope[node.id]


def _invoke(node: ast.Call, scope: Scope) -> Any:
    function = _value(node.func, scope)
    return function(*[_value(arg, scope) for arg in node.args], **{str(k.arg): _value(k.value, scope) for k in node.keywords})


def _operation(node: ast.BinOp, scope: Scope) -> Any:
    if type(node.op) not in _ARITHMETIC:
        return _unknown(node, scope)
    return _ARITHMETIC[type(node.op)](_value(node.left, scope), _value(node.right, scope))


def _negative(node: ast.UnaryOp, scope: Scope) -> Any:
    return -_value(node.operand, scope) if isinstance(node.op, ast.USub) else _unknown(node, scope)


def _comparison(node: ast.Compare, scope: Scope) -> Any:
    """Nodes as written: Python's operators would fold constants, and `==` would compare the objects."""
    if len(node.ops) != 1:
        return _unknown(node, scope)
    left, right = _value(node.left, scope), _value(node.comparators[0], scope)
    if isinstance(left, int):
        left = tirx.const(left, right.ty.dtype)
    elif isinstance(right, int):
        right = tirx.const(right, left.ty.dtype)
    return _COMPARISONS[type(node.ops[0])](left, right)


def _logic(node: ast.BoolOp, scope: Scope) -> Any:
    first, *rest = (_value(value, scope) for value in node.values)
    for value in rest:
        first = _LOGIC[type(node.op)](first, value)
    return first


_STATEMENTS: dict[type, Callable[[Any, Scope], None]] = {
    ast.Assign: _assign,
    ast.AnnAssign: _bind,
    ast.Expr: _call,
    ast.For: _for,
    ast.While: _while,
    ast.If: _if,
}
_EXPRESSIONS: dict[type, Callable[[Any, Scope], Any]] = {
    ast.Name: _name,
    ast.Constant: lambda node, scope: node.value,
    ast.Call: _invoke,
    ast.Attribute: lambda node, scope: getattr(_value(node.value, scope), node.attr),
    ast.Subscript: lambda node, scope: _value(node.value, scope)[_value(node.slice, scope)],
    ast.BinOp: _operation,
    ast.Compare: _comparison,
    ast.BoolOp: _logic,
    ast.UnaryOp: _negative,
    ast.Tuple: lambda node, scope: tuple(_value(value, scope) for value in node.elts),
    ast.List: lambda node, scope: [_value(value, scope) for value in node.elts],
    ast.Dict: lambda node, scope: {_value(k, scope): _value(v, scope) for k, v in zip(node.keys, node.values, strict=True)},
}
