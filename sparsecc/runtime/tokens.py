"""Activations as the kernels see them: sequences of tokens with three strides, and moving between layouts."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from ctypes import c_void_p
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from sparsecc.codegen.tvm.backend import TvmBackend
from sparsecc.codegen.tvm.tiles import SPAN
from sparsecc.ir.ops import TOKEN_TILE, token_storage
from sparsecc.runtime.record import call, empty, given_output, output, set_span, span_of, spanned


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tensor [..., S, F] as B sequences of S tokens, by its strides, without a view being made. by_span: between spans of tokens
    (see codegen/tvm/tiles.py), None if the strides are all there is."""

    tensor: Tensor
    B: int
    S: int
    by_batch: int
    by_token: int
    by_feature: int
    by_span: int | None = None

    @property
    def steps(self) -> tuple[int, int, int]:
        """As kernels take them."""
        return self.by_feature, self.by_span or SPAN, self.by_batch

    def in_place(self, features: int) -> bool:
        """Token-minor and readable up to the next full vector of tokens: a kernel may use it where it is."""
        if self.by_span is not None:
            return True
        padded = -(-self.S // TOKEN_TILE) * TOKEN_TILE
        if self.by_token != 1 or self.by_feature % TOKEN_TILE or self.by_feature < padded or self.by_batch % TOKEN_TILE:
            return False
        end = self.tensor.storage_offset() + (self.B - 1) * self.by_batch + (features - 1) * self.by_feature + padded
        return self.tensor.data_ptr() % 64 == 0 and 4 * end <= self.tensor.untyped_storage().nbytes()


def sequences(tensor: Tensor) -> Tokens:
    """Copies only if the dimensions before the last two cannot be walked with one stride."""
    shape, strides = tensor.shape, tensor.stride()
    B = math.prod(shape[:-2])
    by_batch = walk(shape[:-2], strides[:-2])
    if by_batch is None:
        return sequences(tensor.contiguous())
    S, by_token = (shape[-2], strides[-2]) if len(shape) > 1 else (1, 1)
    span = span_of(tensor)
    if span is not None:
        return Tokens(tensor, B, S, by_batch if B > 1 else 0, 1, strides[-1], span)
    return Tokens(tensor, B, S, by_batch if B > 1 else 0, by_token if S > 1 else 1, strides[-1] if shape[-1] > 1 else 1)


def rows(tensor: Tensor) -> Tokens:
    """All tokens as one sequence. Copies if they cannot be walked with one stride."""
    shape, strides = tensor.shape, tensor.stride()
    step = walk(shape[:-1], strides[:-1])
    if step is None:
        return rows(tensor.contiguous())
    tokens = math.prod(shape[:-1])
    return Tokens(tensor, 1, tokens, 0, step if tokens > 1 else shape[-1], strides[-1] if shape[-1] > 1 else 1)


def walk(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """The one stride that visits all of `shape` in order, if there is one."""
    step, expected = 1, -1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if expected == -1:
            step = stride
        elif stride != expected:
            return None
        expected = stride * size
    return step


def token_output(features: int, lead: Sequence[int]) -> Tensor:
    """A fresh token-minor [*lead, N], or the memory that was given for it."""
    into = given_output()
    if into is not None:
        return into
    if spanned():
        made = in_spans(math.prod(lead[:-1]), lead[-1] if lead else 1, features)
        set_span(made.tensor, features * made.by_feature)
        batches = list(accumulate(reversed(lead[1:-1]), operator.mul, initial=1))[::-1] if len(lead) > 1 else []
        return made.tensor.as_strided((*lead, features), (*(b * made.by_batch for b in batches), *([1] if lead else []), made.by_feature))
    shape, strides = token_storage(lead, features)
    return output(*shape).as_strided((*lead, features), strides)


def in_spans(B: int, S: int, features: int) -> Tokens:
    """Memory for B sequences of S tokens."""
    width = min(SPAN, -(-S // TOKEN_TILE) * TOKEN_TILE)
    span = features * width
    return Tokens(empty(B * -(-S // SPAN) * span), B, S, -(-S // SPAN) * span, 1, width, span)


def token_minor(backend: TvmBackend, value: Tensor | Tokens, padded: int = 0) -> Tokens:
    """Usable by a kernel as token-minor vectors of at least `padded` features: as it is, or a copy."""
    tokens = value if isinstance(value, Tokens) else sequences(value)
    features = tokens.tensor.shape[-1]
    if padded <= features and tokens.in_place(features):
        return tokens
    made = in_spans(tokens.B, tokens.S, max(padded, features))
    move(backend, tokens, made, features)
    return made


def rounded(backend: TvmBackend, tokens: Tokens, features: int, padded: int, pairs: bool) -> Tokens:
    """Token-minor tokens of `features` as bf16 (u16) of `padded`, in an order of `codegen.tvm.rounding`."""
    spans = -(-tokens.S // SPAN)
    made = empty(tokens.B * spans * padded * SPAN, dtype=torch.uint16)
    addresses = c_void_p(tokens.tensor.data_ptr()), c_void_p(made.data_ptr())
    call(backend.round_tokens(pairs), *addresses, tokens.B, tokens.S, features, padded, *tokens.steps)
    return Tokens(made, tokens.B, tokens.S, spans * padded * SPAN, 1, SPAN, padded * SPAN)


def move(backend: TvmBackend, x: Tokens, to: Tokens, features: int) -> None:
    """Write x as token-minor vectors, with zeros for the features that x lacks."""
    if x.by_feature != 1 and x.by_token != 1:
        x = sequences(x.tensor.contiguous().view(x.B, x.S, features))
    by_rows = x.by_feature == 1 and x.by_span is None
    code = backend.pack_rows() if by_rows else backend.pack_tokens()
    stride = x.by_token if by_rows else x.by_feature
    padded = features if to.by_span is None else to.by_span // to.by_feature
    addresses = c_void_p(x.tensor.data_ptr()), c_void_p(to.tensor.data_ptr())
    call(code, *addresses, x.B, x.S, features, padded, stride, x.by_span or SPAN, x.by_batch, *to.steps)
