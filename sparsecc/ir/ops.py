"""The dialect: one op, `sparsecc::linear`, with its schema, dense meaning and fake.

y = epilogue(sum_t Term_t(x) + bias) + residual        x [..., K] -> y [..., N]

A term is a weight [N, K] written as its TensorType: stored dense, in a format, or as low-rank factors. Several terms add into
one accumulator, so sparse + low-rank or 2:4 + outliers are arguments, not new ops. Everything that matters is a `str` argument,
because strings are what survives FX tracing, decomposition and saving.

Zeros that are not stored contribute exactly 0, even where the activation is Inf or NaN; the dense meaning multiplies by the zeros
it unpacks, so on such inputs (and only there) a kernel and the dense meaning may differ.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from sparsecc.errors import ShapeError, TextError
from sparsecc.ir.types import TensorType, parse_type, split_top

TOKEN_TILE = 16
"""Kernels read and write this many tokens at a time: one 64-byte line of float32."""

LAYOUTS = ("row", "token")

KERNELS: dict[str, Callable[..., torch.Tensor]] = {}
"""Compiled code by key: fn(tensor and number arguments of the op) -> y. The runtime fills it; an unknown key runs the dense meaning."""


@dataclass(frozen=True)
class Activation:
    """A function that may end a linear: its torch meaning, its formula for kernels, and whether it keeps zero."""

    fn: Callable[[torch.Tensor], torch.Tensor]
    formula: str
    keeps_zero: bool = True


ACTIVATIONS: dict[str, Activation] = {
    "": Activation(lambda y: y, "v"),
    "relu": Activation(F.relu, "max(v, 0)"),
    "gelu": Activation(F.gelu, "0.5*v*(1 + erf(v/sqrt(2)))"),
    "gelu_tanh": Activation(lambda y: F.gelu(y, approximate="tanh"), "0.5*v*(1 + tanh(sqrt(2/pi)*(v + 0.044715*v**3)))"),
    "silu": Activation(F.silu, "v/(1 + exp(-v))"),
    "relu6": Activation(F.relu6, "min(max(v, 0), 6)"),
    "hardswish": Activation(F.hardswish, "v*min(max(v + 3, 0), 6)/6"),
}


@lru_cache(maxsize=4096)
def parse_terms(text: str) -> tuple[TensorType, ...]:
    """`f32[8, 4] % nm(2, 4) + f32[8, 4] % lowrank(2)` -> the types of the terms. Raises TextError."""
    if not text.strip():
        raise TextError("a linear has at least one term")
    return tuple(parse_type(part.strip()) for _, part in split_top(text, " + "))


def print_terms(terms: Sequence[TensorType]) -> str:
    """Inverse of `parse_terms`."""
    return " + ".join(str(t) for t in terms)


def params_of(term: TensorType) -> int:
    """How many tensors of `params` the term takes: its format's components, two low-rank factors, or the weight itself."""
    if term.rank is not None:
        return 2
    return 1 if term.format is None else len(term.format.components())


def split_params(terms: Sequence[TensorType], params: Sequence[Any]) -> list[list[Any]]:
    """`params` cut into the tensors (or nodes) of each term. Raises ShapeError if the counts disagree."""
    want = sum(params_of(t) for t in terms)
    if want != len(params):
        raise ShapeError(f"terms {print_terms(terms)!r} take {want} tensors, got {len(params)}")
    cuts, at = [], 0
    for term in terms:
        cuts.append(list(params[at : at + params_of(term)]))
        at += params_of(term)
    return cuts


def term_weight(term: TensorType, params: Sequence[torch.Tensor]) -> torch.Tensor:
    """The term as a dense matrix [N, K] in the dtype that `params` store (float32 for formats)."""
    if term.rank is not None:
        return params[0] @ params[1]
    if term.format is None:
        return params[0]
    rows, cols = term.shape
    return term.format.unpack(dict(zip(term.format.components(), params, strict=True)), (int(rows), int(cols)))


def dense_meaning(
    x: torch.Tensor, params: Sequence[torch.Tensor], bias: torch.Tensor | None, residual: torch.Tensor | None, terms: str, epilogue: str
) -> torch.Tensor:
    """What the op computes, by torch's dense linears, in float32 (float64 for float64 inputs), returned in x's dtype.

    Shapes: x [..., K], bias [N], residual [..., N]; result [..., N], fresh memory. Raises ShapeError on a wrong number of params.
    """
    types = parse_terms(terms)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    xc, y = x.to(compute), None
    for term, parts in zip(types, split_params(types, params), strict=True):
        b = None if bias is None or y is not None else bias.to(compute)
        if term.rank is not None:
            part = F.linear(F.linear(xc, parts[1].to(compute)), parts[0].to(compute), b)
        else:
            part = F.linear(xc, term_weight(term, parts).to(compute), b)
        y = part if y is None else y + part
    assert y is not None  # parse_terms gives at least one term
    y = ACTIVATIONS[epilogue].fn(y)
    if residual is not None:
        y = y + residual.to(compute)
    return y.to(x.dtype)


def token_row(tokens: Any) -> Any:
    """L, the distance between features of a token-minor value with sequences of S tokens, for an int or a SymInt.

    A whole number of 64-byte lines, and an odd one: the rows of one tile then spread over all sets of the caches.
    """
    return (tokens + 2 * TOKEN_TILE - 1) // (2 * TOKEN_TILE) * (2 * TOKEN_TILE) + TOKEN_TILE


def token_storage(lead: Sequence[Any], features: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(shape of the storage [..., N, L], strides of the view [*lead, N]) of a token-minor value with lead = [..., S]."""
    length = token_row(lead[-1] if lead else 1)
    strides: list[Any] = [1, length]
    step = features * length
    for size in reversed(lead[:-1]):
        strides.insert(0, step)
        step = step * size
    return (*lead[:-1], features, length), tuple(strides[1:] if not lead else strides)


def empty_output(x: torch.Tensor, features: int, layout: str) -> torch.Tensor:
    """An uninitialised y [..., N] for x [..., K]: contiguous for "row", a view of a fresh [..., N, L] buffer for "token"."""
    lead = x.shape[:-1]
    if layout == "row":
        return x.new_empty((*lead, features))
    shape, strides = token_storage(lead, features)
    return x.new_empty(shape).as_strided((*lead, features), strides)


def linear(
    x: torch.Tensor, params: list[torch.Tensor], bias: torch.Tensor | None, residual: torch.Tensor | None,
    terms: str, epilogue: str, layout: str, kernel: str,
) -> torch.Tensor:
    """The implementation on every device: the kernel if it is known, else the dense meaning."""
    fn = KERNELS.get(kernel)
    if fn is not None:
        return fn(x, params, bias, residual)
    y = dense_meaning(x, params, bias, residual, terms, epilogue)
    return empty_output(x, y.shape[-1], layout).copy_(y) if layout == "token" else y.contiguous()


def linear_fake(
    x: torch.Tensor, params: list[torch.Tensor], bias: torch.Tensor | None, residual: torch.Tensor | None,
    terms: str, epilogue: str, layout: str, kernel: str,
) -> torch.Tensor:
    """Shape, dtype and strides of the result."""
    return empty_output(x, int(parse_terms(terms)[0].shape[0]), layout)


LIBRARY = torch.library.Library("sparsecc", "DEF")
# Exact strides: Inductor must hand over activations in the layout that the layout pass planned, not one that it would like better.
LIBRARY.define(
    "linear(Tensor x, Tensor[] params, Tensor? bias, Tensor? residual, str terms, str epilogue, str layout, str kernel) -> Tensor",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)
LIBRARY.impl("linear", linear, "CompositeExplicitAutograd")
torch.library.register_fake("sparsecc::linear", linear_fake, lib=LIBRARY)

LINEAR = torch.ops.sparsecc.linear.default
"""The overload that stands in graphs."""
