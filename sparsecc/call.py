"""The model's call <-> a program's flat inputs and outputs: binding, checking, rebuilding the result."""
from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from sparsecc.errors import ShapeError
from sparsecc.ir.types import DTYPE_NAMES, Dim, dim_of

_MISSING = object()
_SEEN_LIMIT = 4096


@dataclass(frozen=True)
class Argument:
    """One argument of the captured call: its tree, and per leaf the constant it had (_MISSING for a tensor)."""

    name: str
    spec: pytree.TreeSpec
    constants: tuple[Any, ...]

    @property
    def single(self) -> bool:
        """A bare tensor: by far the most frequent argument, bound without looking at trees."""
        return self.spec.is_leaf() and self.constants == (_MISSING,)


@dataclass(frozen=True)
class Input:
    """What a flat input must be: name as the caller knows it, dtype, dimensions (ints or expressions)."""

    name: str
    dtype: torch.dtype
    shape: tuple[Dim, ...]


class CallAdapter:
    """Built from an ExportedProgram and the forward's parameters (empty: positional names are the graph's)."""

    def __init__(self, ep: ExportedProgram, parameters: Sequence[inspect.Parameter]) -> None:
        in_spec, out_spec = ep.call_spec.in_spec, ep.call_spec.out_spec
        assert in_spec is not None and out_spec is not None
        self._in_spec, self._out_spec = in_spec, out_spec
        self._defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        self._positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self._star = next((p.name for p in parameters if p.kind == p.VAR_POSITIONAL), None)
        arg_specs, kwarg_specs = in_spec.children()[0], in_spec.children()[1]
        if not parameters:
            self._positional = [f"argument {i}" for i in range(len(arg_specs.children()))]
        names = [self._positional_name(i) for i in range(len(arg_specs.children()))] + list(kwarg_specs.context)
        leaves = _user_leaves(ep)
        self.arguments: list[Argument] = []
        self.inputs: list[Input] = []
        at = 0
        for name, spec in zip(names, [*arg_specs.children(), *kwarg_specs.children()], strict=True):
            here = leaves[at : at + spec.num_leaves]
            at += spec.num_leaves
            self.arguments.append(Argument(name, spec, tuple(_MISSING if isinstance(v, torch.Tensor) else v for v in here)))
            for path, value in zip(_paths(name, spec), here, strict=True):
                if isinstance(value, torch.Tensor):
                    self.inputs.append(Input(path, value.dtype, tuple(dim_of(d) for d in value.shape)))
        self._names = {argument.name for argument in self.arguments}
        self._ranges = {symbol: (bound.lower, bound.upper) for symbol, bound in ep.range_constraints.items()}
        self._guards = [(text, compile(text, "<captured guards>", "eval")) for text in getattr(ep, "_guards_code", None) or []]
        self._seen: set[Any] = set()

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The call's tensors in the program's order. Keyword or positional, in any order, as the model's own signature allows.

        Raises TypeError for a call that the signature forbids, ShapeError where the call has another form than the captured one.
        """
        given: dict[str, Any] = {}
        for i, value in enumerate(args):
            given[self._positional_name(i)] = value
        for name, value in kwargs.items():
            if name in given:
                raise TypeError(f"got multiple values for argument {name!r}")
            given[name] = value
        flat: list[torch.Tensor] = []
        for argument in self.arguments:
            value = given.pop(argument.name, _MISSING)
            if value is _MISSING:
                value = self._defaults.get(argument.name, _MISSING)
                if value is _MISSING:
                    raise TypeError(f"missing argument {argument.name!r}, which the captured call had")
            if argument.single and isinstance(value, torch.Tensor):
                flat.append(value)
            else:
                flat += _leaves(argument, value)
        for name, value in given.items():
            default = self._defaults.get(name, None if self._defaults or not self._positional else _MISSING)
            if value is not default and not _same(value, default):
                raise ShapeError(f"argument {name!r} was not given when the model was captured; compile again with it in example_inputs")
        return flat

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """The model's result, of the type that the model returns."""
        return pytree.tree_unflatten(list(outputs), self._out_spec)

    def check(self, flat: Sequence[torch.Tensor]) -> None:
        """Raise ShapeError unless every tensor has the captured dtype and a shape in the captured range. Cheap when seen before."""
        key = tuple([(t.shape, t.dtype) for t in flat])
        if key in self._seen:
            return
        self._check(flat)
        if len(self._seen) >= _SEEN_LIMIT:
            self._seen.clear()
        self._seen.add(key)

    def _check(self, flat: Sequence[torch.Tensor]) -> None:
        if len(flat) != len(self.inputs):
            raise ShapeError(f"{len(self.inputs)} tensors were captured, got {len(flat)}")
        sizes: dict[Any, tuple[int, str]] = {}
        derived: list[tuple[sympy.Expr, int, str]] = []
        for want, tensor in zip(self.inputs, flat, strict=True):
            if tensor.dtype != want.dtype:
                raise ShapeError(f"{want.name} is {DTYPE_NAMES.get(tensor.dtype, tensor.dtype)}, captured as {DTYPE_NAMES[want.dtype]}")
            if len(tensor.shape) != len(want.shape):
                raise ShapeError(f"{want.name} has {len(tensor.shape)} dimensions {tuple(tensor.shape)}, captured with {len(want.shape)}")
            for d, (size, dim) in enumerate(zip(tensor.shape, want.shape, strict=True)):
                place = f"{want.name}, dimension {d}"
                if isinstance(dim, int):
                    if size != dim:
                        raise ShapeError(f"{place}: size {size}, captured as exactly {dim}; compile for the other size too")
                elif not dim.is_Symbol:
                    derived.append((dim, size, place))
                elif dim in sizes and sizes[dim][0] != size:
                    raise ShapeError(f"{place}: size {size}, must equal {sizes[dim][1]}, which is {sizes[dim][0]}")
                else:
                    sizes[dim] = (size, place)
        self._check_ranges(sizes)
        values: Any = {symbol: size for symbol, (size, _) in sizes.items()}
        for dim, size, place in derived:
            if (expected := dim.subs(values)).is_Integer and int(expected) != size:
                raise ShapeError(f"{place}: size {size}, must be {dim} = {expected}")
        self._check_guards(flat)

    def _check_ranges(self, sizes: Mapping[Any, tuple[int, str]]) -> None:
        for symbol, (size, place) in sizes.items():
            low, high = self._ranges.get(symbol, (0, sympy.oo))
            if not (low <= size <= high):
                top = "" if not getattr(high, "is_Integer", False) else f" to {high}"
                raise ShapeError(f"{place}: size {size} is outside the captured range, {low}{top or ' or more'}")

    def _check_guards(self, flat: Sequence[torch.Tensor]) -> None:
        """Relations between sizes that the model's own code relied on while it was traced."""
        if not self._guards:
            return
        tensors, scope = iter(flat), {}
        for argument in self.arguments:
            leaves = [next(tensors) if constant is _MISSING else constant for constant in argument.constants]
            scope[argument.name] = pytree.tree_unflatten(leaves, argument.spec)
        for text, code in self._guards:
            try:
                held = eval(code, {"L": scope, "torch": torch, "min": min, "max": max})
            except (KeyError, NameError, AttributeError):
                continue  # a guard on something that isn't an argument of the call
            if not held:
                raise ShapeError(f"these sizes break a relation the model was captured with: {text}")

    def _positional_name(self, i: int) -> str:
        if i < len(self._positional):
            return self._positional[i]
        if self._star is None:
            raise TypeError(f"takes {len(self._positional)} positional arguments, got at least {i + 1}")
        return f"{self._star}[{i - len(self._positional)}]"


def _user_leaves(ep: ExportedProgram) -> list[Any]:
    """The fake tensor or constant of every leaf of the call, in order."""
    lifted = len(ep.graph_signature.input_specs) - (ep.call_spec.in_spec.num_leaves if ep.call_spec.in_spec else 0)
    return [node.meta.get("val") for node in ep.graph.nodes if node.op == "placeholder"][lifted:]


def _paths(name: str, spec: pytree.TreeSpec) -> list[str]:
    """A name per leaf: `ids`, `states[0]`, `states['k']`."""
    if spec.is_leaf():
        return [name]
    keys = spec.context if spec.type is dict else range(len(spec.children()))
    return [path for key, child in zip(keys, spec.children(), strict=True) for path in _paths(f"{name}[{key!r}]", child)]


def _leaves(argument: Argument, value: Any) -> list[torch.Tensor]:
    leaves, spec = pytree.tree_flatten(value)
    if spec != argument.spec:
        raise ShapeError(f"argument {argument.name!r} has another structure than when the model was captured: {type(value).__name__}")
    tensors = []
    for leaf, constant in zip(leaves, argument.constants, strict=True):
        if constant is _MISSING and isinstance(leaf, torch.Tensor):
            tensors.append(leaf)
        elif constant is _MISSING or not _same(leaf, constant):
            was = "a tensor" if constant is _MISSING else repr(constant)
            raise ShapeError(f"argument {argument.name!r} was {was} when the model was captured, now it is {_show(leaf)}; compile again")
    return tensors


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor) or b is _MISSING:
        return False
    try:
        return type(a) is type(b) and bool(a == b)
    except Exception:  # an argument with an odd == is simply not the same
        return False


def _show(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
