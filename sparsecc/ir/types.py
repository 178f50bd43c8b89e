"""TensorType: what a value is (dtype, shape), which entries are known to be zero (`%`), how it is stored (`@`)."""
from __future__ import annotations

import ast
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import CeilDiv, FloorDiv, Max, Min, Mod, PythonMod

from sparsecc.errors import SparseccError, TextError
from sparsecc.formats import ANY, Format, Pattern, parse_format, parse_pattern

Dim = int | sympy.Expr

DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
    "f8e4m3": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2,
    "i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8,
    "u64": torch.uint64, "u32": torch.uint32, "u16": torch.uint16, "u8": torch.uint8,
    "b1": torch.bool, "c64": torch.complex64, "c128": torch.complex128,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class LowRank:
    """`lowrank(8)`: a weight [N, K] held as a product of two factors [N, 8] and [8, K]. Says nothing about zeros."""

    rank: int

    def __str__(self) -> str:
        return f"lowrank({self.rank})"


@dataclass(frozen=True)
class TensorType:
    """f16[s0, 4096]                               dense
    f16[4096, 4096] % nm(2, 4)                     stored dense, known to be 2:4
    f16[4096, 4096] @ nm(2, 4).bf16                stored so
    f32[1536, 384] % block(4, 1) @ bsr(4, 1)       both facts
    f32[1536, 384] % lowrank(8)                    two dense factors
    """

    dtype: torch.dtype
    shape: tuple[Dim, ...]
    pattern: Pattern | LowRank = ANY
    format: Format | None = None

    def __str__(self) -> str:
        text = f"{DTYPE_NAMES[self.dtype]}[{', '.join(str(d) for d in self.shape)}]"
        if self.pattern != ANY:
            text += f" % {self.pattern}"
        if self.format is not None:
            text += f" @ {self.format}"
        return text

    @property
    def rank(self) -> int | None:
        """The rank of a low-rank term, None for every other."""
        return self.pattern.rank if isinstance(self.pattern, LowRank) else None

    @property
    def zeros(self) -> Pattern:
        """What is known to be zero; ANY for a low-rank term."""
        return ANY if isinstance(self.pattern, LowRank) else self.pattern

    def with_(self, **fields: Any) -> TensorType:
        """A copy with some fields replaced."""
        return replace(self, **fields)


def type_of(tensor: torch.Tensor) -> TensorType:
    """The dense type of a real or fake tensor; symbolic sizes become their expressions."""
    return TensorType(tensor.dtype, tuple(dim_of(d) for d in tensor.shape))


def dim_of(size: int | torch.SymInt) -> Dim:
    """An int, or the expression of a SymInt, with torch's names."""
    if isinstance(size, torch.SymInt):
        expr = size.node.expr
        return int(expr) if expr.is_Integer else expr
    return int(size)


def split_top(text: str, separator: str) -> list[tuple[int, str]]:
    """Parts of `text` between separators that stand outside brackets, each with its column."""
    parts: list[tuple[int, str]] = []
    depth = start = 0
    for i, char in enumerate(text):
        depth += (char in "([") - (char in ")]")
        if depth == 0 and i >= start and text.startswith(separator, i):
            parts.append((start, text[start:i]))
            start = i + len(separator)
    parts.append((start, text[start:]))
    return parts


_HEAD = re.compile(r"\s*([a-z]+[0-9a-z]*)\[")


@lru_cache(maxsize=4096)
def parse_type(text: str) -> TensorType:
    """The type written as `text`; inverse of `str`. Raises TextError with a caret."""
    head = _HEAD.match(text)
    if head is None:
        raise _error(text, 0, "a type looks like f32[16, 384], then perhaps % pattern, then perhaps @ format")
    if head[1] not in DTYPES:
        raise _error(text, head.start(1), f"unknown dtype {head[1]!r}; known: {', '.join(DTYPES)}")
    close = _closing(text, head.end() - 1)
    shape = tuple(parse_dim(part.strip(), text, head.end() + at) for at, part in split_top(text[head.end() : close], ",") if part.strip())
    rest, pattern, fmt = text[close + 1 :], ANY, None
    at_format = rest.find("@")
    if at_format >= 0:
        fmt = _sub(parse_format, rest[at_format + 1 :].strip(), text, close + 2 + at_format)
        rest = rest[:at_format]
    if rest.strip():
        if not rest.strip().startswith("%"):
            raise _error(text, close + 1, "expected % pattern or @ format here")
        pattern = _sub(_parse_zeros, rest.strip()[1:].strip(), text, close + 1)
    return TensorType(DTYPES[head[1]], shape, pattern, fmt)


def parse_dim(part: str, text: str | None = None, column: int = 0) -> Dim:
    """A dimension: an int, a symbol (s0), or an expression of symbols. Raises TextError."""
    try:
        value = _Dims().visit(ast.parse(part, mode="eval").body)
    except (SyntaxError, ValueError, TypeError, KeyError) as error:
        raise _error(text or part, column, f"not a dimension: {part!r}") from error
    return int(value) if isinstance(value, int) or value.is_Integer else value


def symbol(name: str) -> sympy.Symbol:
    """The symbol torch would make: sizes (s0) are positive, data-dependent ones (u0) only integers."""
    return sympy.Symbol(name, integer=True) if name.startswith("u") else sympy.Symbol(name, integer=True, positive=True)


class _Dims(ast.NodeVisitor):
    """Evaluates the expressions that sympy prints for sizes."""

    CALLS = {"Max": Max, "Min": Min, "Mod": Mod, "PythonMod": PythonMod, "FloorDiv": FloorDiv, "CeilDiv": CeilDiv,  # noqa: RUF012
             "ceiling": sympy.ceiling, "floor": sympy.floor}

    def visit_Constant(self, node: ast.Constant) -> Any:
        if not isinstance(node.value, int):
            raise ValueError(node.value)
        return sympy.Integer(node.value)

    def visit_Name(self, node: ast.Name) -> Any:
        return symbol(node.id)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Any:
        if not isinstance(node.op, ast.USub):
            raise ValueError(node.op)
        return -self.visit(node.operand)

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        left, right = self.visit(node.left), self.visit(node.right)
        match node.op:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
            case ast.Div():
                return left / right
            case ast.FloorDiv():
                return FloorDiv(left, right)
            case ast.Mod():
                return Mod(left, right)
            case ast.Pow():
                return left**right
        raise ValueError(node.op)

    def visit_Call(self, node: ast.Call) -> Any:
        if not isinstance(node.func, ast.Name):
            raise ValueError(node.func)
        return self.CALLS[node.func.id](*(self.visit(a) for a in node.args))

    def generic_visit(self, node: ast.AST) -> Any:
        raise ValueError(type(node).__name__)


def _parse_zeros(text: str) -> Pattern | LowRank:
    low = re.fullmatch(r"lowrank\((\d+)\)", text)
    return LowRank(int(low[1])) if low else parse_pattern(text)


def _sub(parse: Any, part: str, text: str, column: int) -> Any:
    """Parse a piece; its own message stands, the caret moves to the place in the whole text."""
    try:
        return parse(part)
    except SparseccError as error:
        raise _error(text, text.find(part, column), str(error).splitlines()[0]) from error


def _closing(text: str, opening: int) -> int:
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] in "([") - (text[i] in ")]")
        if depth == 0:
            return i
    raise _error(text, opening, "this bracket is never closed")


def _error(text: str, column: int, message: str) -> TextError:
    return TextError(message, source=text, col=max(column, 0))
