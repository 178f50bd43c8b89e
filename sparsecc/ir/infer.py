"""Derives every node's type. The only writer of the type key, apart from the text parser."""
from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from sparsecc.ir.program import TYPE_KEY, Program
from sparsecc.ir.types import TensorType, dim_of, parse_dim, type_of

_FIRST = 30
"""Sizes that a parsed program leaves open are propagated as if they were the primes from this one on: 113, 127, ..."""


def infer(program: Program) -> None:
    """Write each node's TensorType, or "sym[expr]", "float", "bool" for scalars.

    Shapes come from the fake values that capture left; nodes that passes made are propagated with them. A constant's pattern is
    the one that the terms of its consumers state. Where nothing is known the key is absent: a slowdown, never a bug.
    """
    _Propagate(program).run()
    _patterns(program)


def value_of(node: fx.Node) -> Any:
    """The node's fake tensor or symbolic scalar, None if there is none."""
    value = node.meta.get("val")
    return value if value is not None else node.meta.get("example_value")


def type_text(value: Any) -> TensorType | str | None:
    """The type of a fake value."""
    if isinstance(value, torch.Tensor):
        return type_of(value)
    if isinstance(value, torch.SymInt):
        return f"sym[{dim_of(value)}]"
    if isinstance(value, bool | torch.SymBool):
        return "bool"
    if isinstance(value, float | torch.SymFloat):
        return "float"
    return f"sym[{value}]" if isinstance(value, int) else None


class _Propagate:
    """Fills in missing fake values, in order, with the fake mode of the values that are there."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.names: dict[sympy.Symbol, sympy.Expr] = program.symbols
        mode = next((v.fake_mode for node in program.graph.nodes if isinstance(v := value_of(node), FakeTensor)), None)
        self.mode = mode or FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self.symbols: dict[str, Any] = {}
        self.consts: dict[str, Any] = {}

    def run(self) -> None:
        for node in self.program.graph.nodes:
            if node.op == "output":
                continue
            value = value_of(node)
            if value is None and self._worth_it(node):
                value = self._compute(node)
                if value is not None:
                    node.meta["val"] = value
            found = type_text(value)
            if isinstance(found, TensorType) and self.names:
                found = found.with_(shape=tuple(d if isinstance(d, int) else self._rename(d) for d in found.shape))
            elif isinstance(found, str) and found.startswith("sym[") and self.names:
                found = f"sym[{self._rename(sympy.sympify(parse_dim(found[4:-1])))}]"
            if found is not None:
                node.meta[TYPE_KEY] = found

    def _worth_it(self, node: fx.Node) -> bool:
        return node.op in ("placeholder", "get_attr") or all(value_of(i) is not None for i in node.all_input_nodes)

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._stated(node.meta.get(TYPE_KEY))
        if node.op == "get_attr":
            tensor = self.program.const(node)
            return self._fake_const(str(node.target), tensor) if isinstance(tensor, torch.Tensor) else None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)  # type: ignore[arg-type]
        try:
            with self.mode, torch.no_grad():
                if node.op == "call_method":
                    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
                return node.target(*args, **kwargs) if node.op == "call_function" else None  # type: ignore[operator]
        except Exception:  # whatever a torch function raises on values that it can't run without
            return None

    def _fake_const(self, name: str, tensor: torch.Tensor) -> Any:
        if isinstance(tensor, FakeTensor):
            return tensor
        if name not in self.consts:
            with self.mode:
                self.consts[name] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        return self.consts[name]

    def _stated(self, found: Any) -> Any:
        """A fake value of the type that the text states."""
        if isinstance(found, TensorType):
            with self.mode:
                return torch.empty([self._size(d) for d in found.shape], dtype=found.dtype)
        return self._size(sympy.sympify(parse_dim(found[4:-1]))) if isinstance(found, str) and found.startswith("sym[") else None

    def _size(self, dim: Any) -> Any:
        """A SymInt for an expression; fresh symbols of the fake mode stand for the names in the text."""
        if isinstance(dim, int) or dim.is_Integer:
            return int(dim)
        if not dim.is_Symbol:
            value = sympy.lambdify(list(dim.free_symbols), dim, modules=[{"Min": torch.sym_min, "Max": torch.sym_max}, "math"])
            return value(*(self._size(s) for s in dim.free_symbols))
        if dim.name not in self.symbols:
            size = new_size(self.mode, dim.name, int(sympy.prime(len(self.symbols) + _FIRST)))
            self.names[size.node.expr] = dim
            self.symbols[dim.name] = size
        return self.symbols[dim.name]

    def _rename(self, dim: Any) -> Any:
        """The expression in the text's own names."""
        by_name = {str(made): name for made, name in self.names.items()}
        return dim.subs({s: by_name[s.name] for s in dim.free_symbols if s.name in by_name})


def new_size(mode: FakeTensorMode, name: str, hint: int) -> Any:
    """A size of its own, of which only an example is known."""
    env, source = mode.shape_env, ConstantSource(f"sparsecc_{name}")
    assert env is not None
    made = env.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    return env.create_symintnode(made, hint=hint, source=source)  # type: ignore[arg-type]


def _patterns(program: Program) -> None:
    """A weight that stands as one plain term of a linear has that term's pattern."""
    for view in program.linears():
        for term, params in zip(view.terms, view.term_params, strict=True):
            if term.format is None and term.rank is None and (found := program.type(params[0])) is not None:
                params[0].meta[TYPE_KEY] = found.with_(pattern=term.pattern)


def same_shape(a: TensorType | None, b: TensorType | None) -> bool:
    """Whether two types surely have the same shape and dtype."""
    return a is not None and b is not None and a.dtype == b.dtype and a.shape == b.shape
