"""Calling the kernels that stand between linears: norms, gates, rotary embeddings and attention on token-minor values."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import addressof, c_float, c_void_p
from functools import cache, cached_property
from typing import Any

from torch import Tensor

from sparsecc.codegen.tvm.attention import AttentionSpec, attention_source
from sparsecc.codegen.tvm.backend import TvmBackend
from sparsecc.codegen.tvm.norm import NormSpec, norm_source
from sparsecc.codegen.tvm.pointwise import GateSpec, gate_source, mask_tiles_source, rotary_source
from sparsecc.codegen.tvm.tiles import SPAN, pack_rows_source
from sparsecc.errors import ShapeError
from sparsecc.ir.ops import TOKEN_TILE
from sparsecc.ir.token_ops import TILE, check_mask
from sparsecc.runtime.record import call, output, span_of
from sparsecc.runtime.tokens import Tokens, move, sequences, token_minor, token_output

VECTORS = 4
"""Vectors of tokens per tile: with 4 keys or features a side they fill half of AVX-512's registers with accumulators."""


class TokenKernel:
    """A kernel by its text, loaded when it is first called."""

    def __init__(self, backend: TvmBackend) -> None:
        self.backend = backend

    @cached_property
    def code(self) -> Callable[..., Any]:
        return self.backend.load(self.source())

    def source(self, tokens: int = 0) -> str:
        """The kernel's text."""
        raise NotImplementedError

    def _per(self, S: int) -> int:
        """Tiles of a sequence."""
        return -(-S // (VECTORS * self.backend.isa.lanes))


class NormKernel(TokenKernel):
    """fn(x [..., N], weight [N], bias [N], eps) -> y [..., N], in float32."""

    def __init__(self, backend: TvmBackend, spec: NormSpec) -> None:
        super().__init__(backend)
        self.spec = spec

    def source(self, tokens: int = 0) -> str:
        return norm_source(self.spec, VECTORS, self.backend.isa.lanes)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        lead, N = x.shape[:-1], x.shape[-1]
        token = self.spec.layout == "token"
        y = token_output(N, lead) if token else output(*x.shape)
        if x.numel() == 0:
            return y
        t = token_minor(self.backend, x)
        per = self._per(t.S)
        steps = sequences(y).steps if token else (N, 0, 0)
        parts = (t.tensor, y, weight, weight if bias is None else bias)
        call(self.code, *(c_void_p(p.data_ptr()) for p in parts), number(eps), t.S, N, t.B * per, per, *t.steps, *steps)
        return y


class GateKernel(TokenKernel):
    """fn(a [..., N], b [..., N]) -> token-minor act(a) * b, in float32."""

    def __init__(self, backend: TvmBackend, spec: GateSpec) -> None:
        super().__init__(backend)
        self.spec = spec

    def source(self, tokens: int = 0) -> str:
        return gate_source(self.spec, VECTORS, self.backend.isa.lanes)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        y = token_output(a.shape[-1], a.shape[:-1])
        if a.numel() == 0:
            return y
        ta, tb = token_minor(self.backend, a), token_minor(self.backend, b)
        per = self._per(ta.S)
        addresses = (c_void_p(t.data_ptr()) for t in (ta.tensor, tb.tensor, y))
        call(self.code, *addresses, ta.S, a.shape[-1], ta.B * per, per, *ta.steps, *tb.steps, *sequences(y).steps)
        return y


class RotaryKernel(TokenKernel):
    """fn(x [B, H, S, D], cos and sin [B or 1, 1, S, D]) -> token-minor [B, H, S, D], in float32, D even."""

    def source(self, tokens: int = 0) -> str:
        return rotary_source(VECTORS, self.backend.isa.lanes)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, H, S, D = x.shape
        y = head_output(B, H, S, D)
        if x.numel() == 0:
            return y
        x = usable_heads(self.backend, x)
        tables = [token_minor(self.backend, table) for table in (cos, sin)]
        steps = [step for t in tables for step in (*t.steps[:2], t.by_batch if t.B > 1 else 0)]
        per = self._per(S)
        addresses = (c_void_p(t.data_ptr()) for t in (x, y, tables[0].tensor, tables[1].tensor))
        call(self.code, *addresses, S, D // 2, H, B * H * per, per, *_head_steps(x), *_head_steps(y), *steps)
        return y


class AttentionKernel(TokenKernel):
    """fn(q [B, H, S, D], k and v [B, G, Sk, D], mask, its tiles, scale) -> token-minor [B, H, S, D], in float32.

    Any strides; what isn't token-minor is copied first, but for a mask of one row. The mask is [(B or 1, H or 1,) S or 1, Sk], see
    `sparsecc.attention`, or None with the tiles.
    """

    def __init__(self, backend: TvmBackend, spec: AttentionSpec) -> None:
        super().__init__(backend)
        self.spec = spec

    def source(self, tokens: int = 0) -> str:
        return attention_source(self.spec, VECTORS, self.backend.isa.lanes)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tiles: Tensor | None, scale: float) -> Tensor:
        (B, H, S, D), (G, Sk) = q.shape, k.shape[1:3]
        y = head_output(B, H, S, D)
        if y.numel() == 0 or Sk == 0:
            return y.zero_()
        q, k, v = (usable_heads(self.backend, value) for value in (q, k, v))
        tensors, steps = [k, v], [*_head_steps(k), *_head_steps(v)]
        if self.spec.hides in ("rows", "keys"):
            if mask is None or tiles is None:
                raise ShapeError("attention: this kernel was made for a mask, but there is none")
            check_mask(mask, S, Sk)
            if self.spec.hides == "rows":
                mask = readable(self.backend, mask)
            tensors += [mask, tiles]
            span = span_of(mask) or SPAN
            steps += [mask.stride(-1), span, *_lead(mask), tiles.stride(-2) if tiles.shape[-2] > 1 else 0, *_lead(tiles)]
        elif mask is not None:
            raise ShapeError("attention: this kernel was made for no mask")
        addresses = [c_void_p(q.data_ptr()), c_void_p(y.data_ptr()), number(scale), *(c_void_p(t.data_ptr()) for t in tensors)]
        per = self._per(S)
        call(self.code, *addresses, S, Sk, H, H // G, B * H * per, per, *_head_steps(q), *_head_steps(y), *steps)
        return y


class TokensKernel(TokenKernel):
    """fn(x [..., S, F]) -> the same, token-minor."""

    def source(self, tokens: int = 0) -> str:
        return pack_rows_source(self.backend.isa.lanes)

    def __call__(self, x: Tensor) -> Tensor:
        made = token_output(x.shape[-1], x.shape[:-1])
        if x.numel():
            move(self.backend, sequences(x), sequences(made), x.shape[-1])
        return made


class TilesKernel(TokenKernel):
    """fn(mask [(B, H,) S or 1, Sk]) -> f32 [(B, H,) S / TILE, Sk / TILE], see `sparsecc.mask_tiles`. `rows`: the mask has a row for every
    query, token-minor."""

    def __init__(self, backend: TvmBackend, rows: bool) -> None:
        super().__init__(backend)
        self.rows = rows

    def source(self, tokens: int = 0) -> str:
        return mask_tiles_source(self.rows, self.backend.isa.lanes)

    def __call__(self, mask: Tensor) -> Tensor:
        S, Sk = mask.shape[-2:]
        B, H = (1, 1, *mask.shape[:-2])[-2:]
        per, across = -(-S // TILE), -(-Sk // TILE)
        y = output(*mask.shape[:-2], per, across)
        if y.numel() == 0:
            return y
        if self.rows:
            mask = readable(self.backend, mask)
        steps = (mask.stride(-1), span_of(mask) or SPAN, *_lead(mask))
        call(self.code, c_void_p(mask.data_ptr()), c_void_p(y.data_ptr()), S, Sk, H, B * H * per, per, across, *steps)
        return y


def head_output(B: int, H: int, S: int, D: int) -> Tensor:
    """A fresh token-minor [B, H, S, D] whose heads lie behind each other, as a linear reads them."""
    return token_output(H * D, (B, S)).view(B, S, H, D).transpose(1, 2)


def usable_heads(backend: TvmBackend, value: Tensor) -> Tensor:
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
    move(backend, sequences(value.contiguous()), sequences(copy), D)
    return copy


def readable(backend: TvmBackend, mask: Tensor) -> Tensor:
    """A mask with rows, token-minor."""
    return mask if sequences(mask).in_place(mask.shape[-1]) else TokensKernel(backend)(mask)


def _head_steps(value: Tensor) -> tuple[int, int, int, int]:
    """Between features, spans, heads and sequences."""
    return value.stride(3), span_of(value) or SPAN, value.stride(1), value.stride(0)


def _lead(value: Tensor) -> tuple[int, int]:
    """Between heads and between sequences of [(B or 1, H or 1,) ...]; 0 where there is one for all."""
    sizes, steps = (1, 1, *value.shape)[-4:-2], (0, 0, *value.stride())[-4:-2]
    by_batch, by_head = (step if size > 1 else 0 for size, step in zip(sizes, steps, strict=True))
    return by_head, by_batch


@cache
def _cell(value: float) -> c_float:
    """A float32 in memory, for good: kernels take pointers and integers."""
    return c_float(value)


def number(value: float) -> c_void_p:
    """The address of a float32, for good."""
    return c_void_p(addressof(_cell(value)))
