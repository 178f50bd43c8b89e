"""Calling the kernels that stand between linears: norms and attention on token-minor values."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import addressof, c_float, c_void_p
from functools import cache, cached_property
from typing import Any

from torch import Tensor

from sparsecc.codegen.tvm.attention import AttentionSpec, attention_source
from sparsecc.codegen.tvm.backend import TvmBackend
from sparsecc.codegen.tvm.norm import NormSpec, norm_source
from sparsecc.codegen.tvm.tiles import SPAN, pack_rows_source
from sparsecc.errors import ShapeError
from sparsecc.ir.ops import TOKEN_TILE
from sparsecc.runtime.record import call, output, span_of
from sparsecc.runtime.tokens import Tokens, move, sequences, token_minor, token_output

VECTORS = 4
"""Vectors of tokens per tile: with 4 keys or features a side they fill half of AVX-512's registers with accumulators."""


class NormKernel:
    """fn(x [..., N], weight [N], bias [N], eps) -> y [..., N], in float32."""

    def __init__(self, backend: TvmBackend, spec: NormSpec) -> None:
        self.backend, self.spec = backend, spec

    @cached_property
    def code(self) -> Callable[..., Any]:
        return self.backend.load(self.source())

    def source(self, tokens: int = 0) -> str:
        """The kernel's text."""
        return norm_source(self.spec, VECTORS, self.backend.isa.lanes)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        lead, N = x.shape[:-1], x.shape[-1]
        token = self.spec.layout == "token"
        y = token_output(N, lead) if token else output(*x.shape)
        if x.numel() == 0:
            return y
        t = token_minor(self.backend, x)
        per = -(-t.S // (VECTORS * self.backend.isa.lanes))
        steps = sequences(y).steps if token else (N, 0, 0)
        parts = (t.tensor, y, weight, weight if bias is None else bias)
        call(self.code, *(c_void_p(p.data_ptr()) for p in parts), _number(eps), t.S, N, t.B * per, per, *t.steps, *steps)
        return y


class AttentionKernel:
    """fn(q [B, H, S, D], k and v [B, G, Sk, D], mask [B or 1, H or 1, Sk, S] or None, scale) -> token-minor [B, H, S, D], in float32.

    Any strides; what isn't token-minor is copied first.
    """

    def __init__(self, backend: TvmBackend, spec: AttentionSpec) -> None:
        self.backend, self.spec = backend, spec

    @cached_property
    def code(self) -> Callable[..., Any]:
        return self.backend.load(self.source())

    def source(self, tokens: int = 0) -> str:
        """The kernel's text."""
        return attention_source(self.spec, VECTORS, self.backend.isa.lanes)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        B, H, S, D = q.shape
        y = token_output(H * D, (B, S)).view(B, S, H, D).transpose(1, 2)
        if y.numel() == 0 or k.shape[2] == 0:
            return y.zero_()
        q, k, v = (self._usable(value) for value in (q, k, v))
        pointers, mask_steps = [q, k, v, y], (0, 0, 0, 0)
        ints = [step for value in (q, k, v, y) for step in (value.stride(3), span_of(value) or SPAN, value.stride(1), value.stride(0))]
        number = _number(scale)
        addresses = [*(c_void_p(p.data_ptr()) for p in pointers), number]
        if mask is not None:
            if mask.shape[2:] != (k.shape[2], S):
                raise ShapeError(f"attention: the mask is {list(mask.shape)}, wanted keys x queries {[k.shape[2], S]} last: see key_mask")
            addresses.append(c_void_p(mask.data_ptr()))
            by_batch, by_head = (mask.stride(dim) if mask.shape[dim] > 1 else 0 for dim in (0, 1))
            mask_steps = (mask.stride(2), span_of(mask) or SPAN, by_head, by_batch)
        per = -(-S // (VECTORS * self.backend.isa.lanes))
        call(self.code, *addresses, S, k.shape[2], H, H // k.shape[1], B * H * per, per, *ints, *mask_steps)
        return y

    def _usable(self, value: Tensor) -> Tensor:
        """Token-minor [B, H, S, D], readable in whole vectors."""
        if span_of(value) is not None:
            return value
        B, H, S, D = value.shape
        by_batch, by_head, by_token, by_feature = value.stride()
        flat = Tokens(value, 1, S, 0, by_token if S > 1 else 1, by_feature)
        end = (B - 1) * by_batch + (H - 1) * by_head + value.storage_offset() + (D - 1) * by_feature + -(-S // TOKEN_TILE) * TOKEN_TILE
        if flat.in_place(D) and by_head % TOKEN_TILE == 0 == by_batch % TOKEN_TILE and 4 * end <= value.untyped_storage().nbytes():
            return value
        copy = token_output(D, (B, H, S))
        move(self.backend, sequences(value.contiguous()), sequences(copy), D)
        return copy


class MaskKernel:
    """fn(mask [B, H, S, Sk]) -> the same, keys first: token-minor, a query being a token and a key a feature."""

    def __init__(self, backend: TvmBackend) -> None:
        self.backend = backend

    def source(self, tokens: int = 0) -> str:
        """The kernel's text."""
        return pack_rows_source(self.backend.isa.lanes)

    def __call__(self, mask: Tensor) -> Tensor:
        B, H, S, Sk = mask.shape
        made = token_output(Sk, (B, H, S))
        if mask.numel():
            move(self.backend, sequences(mask), sequences(made), Sk)
        return made.transpose(2, 3)


@cache
def _cell(value: float) -> c_float:
    """A float32 in memory, for good: kernels take pointers and integers."""
    return c_float(value)


def _number(value: float) -> c_void_p:
    return c_void_p(addressof(_cell(value)))
