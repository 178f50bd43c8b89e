"""Activations as the kernels see them: sequences of tokens with three strides, and moving between layouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from ctypes import c_void_p
from dataclasses import dataclass

from torch import Tensor

from sparsecc.codegen.tvm.backend import TvmBackend
from sparsecc.ir.ops import TOKEN_TILE, token_row, token_storage
from sparsecc.runtime.record import call, empty


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tensor [..., S, F] as B sequences of S tokens, by its strides, without a view being made."""

    tensor: Tensor
    B: int
    S: int
    by_batch: int
    by_token: int
    by_feature: int

    def in_place(self, features: int) -> bool:
        """Token-minor and readable up to the next full vector of tokens: a kernel may use it where it is."""
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
    by_token = strides[-2] if len(shape) > 1 and shape[-2] > 1 else 1
    return Tokens(tensor, B, shape[-2] if len(shape) > 1 else 1, by_batch if B > 1 else 0, by_token, strides[-1] if shape[-1] > 1 else 1)


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
    """A fresh token-minor [*lead, N]."""
    shape, strides = token_storage(lead, features)
    return empty(*shape).as_strided((*lead, features), strides)


def token_minor(backend: TvmBackend, value: Tensor) -> Tokens:
    """Usable by a kernel as token-minor vectors: as it is, or a copy."""
    tokens = sequences(value)
    features = value.shape[-1]
    if tokens.in_place(features):
        return tokens
    length = token_row(tokens.S)
    copy = empty(tokens.B, features, length)
    move(backend, tokens, copy, features, features, (length, 0, features * length, length))
    return Tokens(copy, tokens.B, tokens.S, features * length, 1, length)


def move(backend: TvmBackend, x: Tokens, to: Tensor, features: int, padded: int, place: tuple[int, int, int, int]) -> None:
    """Write x as vectors of tokens; `place`: stride, tile, batch and width of the destination (see codegen/tvm/tiles.py)."""
    if x.by_feature != 1 and x.by_token != 1:
        x = sequences(x.tensor.contiguous().view(x.B, x.S, features))
    by_rows = x.by_feature == 1
    code = backend.pack_rows() if by_rows else backend.pack_tokens()
    stride = x.by_token if by_rows else x.by_feature
    y_stride, y_tile, y_batch, width = place
    addresses = c_void_p(x.tensor.data_ptr()), c_void_p(to.data_ptr())
    call(code, *addresses, x.B, x.S, features, padded, stride, x.by_batch, y_stride, y_tile, y_batch, width)
