"""Calling the kernels for pictures: windows over token-minor planes, and their mean."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_void_p
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sparsecc.codegen.tvm.backend import TvmBackend
from sparsecc.codegen.tvm.direct import DirectSpec, direct_source
from sparsecc.codegen.tvm.image import WindowSpec, depthwise_source, patches_source, pool_source
from sparsecc.ir.image_ops import out_size
from sparsecc.ir.ops import token_storage
from sparsecc.runtime.between import TokenKernel
from sparsecc.runtime.record import NotAView, empty, output, span_of, spanned
from sparsecc.runtime.record import call as make_call
from sparsecc.runtime.tokens import Tokens, move, sequences, token_output


class DepthwiseKernel(TokenKernel):
    """fn(x [B, H * W, C], weight [C, kh, kw], bias [C], size, window, pads) -> token-minor [B, OH * OW, C], in float32."""

    def __init__(self, backend: TvmBackend, spec: WindowSpec) -> None:
        super().__init__(backend)
        self.spec = spec

    def source(self, tokens: int = 0) -> str:
        return depthwise_source(self.spec, self.backend.isa.lanes)

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, size: Sequence[int], window: Sequence[int], pads: Sequence[int]
    ) -> Tensor:
        _plain_planes(x)
        (B, _, C), (OH, OW) = x.shape, out_size(size, window, pads)
        y = token_output(C, (B, OH * OW))
        if y.numel() == 0:
            return y
        t, to = planes(self.backend, x), sequences(y)
        bias = _zeros(C) if bias is None else bias
        addresses = (c_void_p(p.data_ptr()) for p in (t.tensor, y, weight, bias))
        make_call(self.code, *addresses, B, C, *size, OH, OW, *pads[:2], t.by_feature, t.by_batch, to.by_feature, to.by_batch)
        return y


class DirectKernel(TokenKernel):
    """fn(x [B, H * W, C], weight [N, C, kh, kw], bias [N], size, window, pads) -> token-minor [B, OH * OW, N], in float32. x may have any
    strides."""

    def __init__(self, backend: TvmBackend, spec: DirectSpec) -> None:
        super().__init__(backend)
        self.spec = spec

    def source(self, tokens: int = 0) -> str:
        return direct_source(self.spec, self.backend.isa.lanes)

    @cached_property
    def by_pixels(self) -> Any:
        """For pictures whose channels are next to each other."""
        spec = replace(self.spec, window=replace(self.spec.window, planes=False))
        return self.backend.load(direct_source(spec, self.backend.isa.lanes))

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, size: Sequence[int], window: Sequence[int], pads: Sequence[int]
    ) -> Tensor:
        _plain_planes(x)
        B, N, (OH, OW) = x.shape[0], len(weight), out_size(size, window, pads)
        y = token_output(N, (B, OH * OW))
        if y.numel() == 0:
            return y
        t, to = sequences(x), sequences(y)
        code = self.code if t.by_token == 1 else self.by_pixels
        addresses = (c_void_p(p.data_ptr()) for p in (t.tensor, y, weight, _zeros(N) if bias is None else bias))
        make_call(code, *addresses, B, N, *size, OH, OW, *pads[:2], t.by_feature, t.by_batch, t.by_token, to.by_feature, to.by_batch)
        return y


class PatchesKernel(TokenKernel):
    """fn(x [B, H * W, C], size, window, pads) -> token-minor [B, OH * OW, C * kh * kw], in float32. x may have any strides."""

    def __init__(self, backend: TvmBackend, spec: WindowSpec) -> None:
        super().__init__(backend)
        self.spec = spec

    def source(self, tokens: int = 0) -> str:
        return patches_source(self.spec, self.backend.isa.lanes)

    @cached_property
    def by_pixels(self) -> Any:
        """For pictures whose channels are next to each other."""
        return self.backend.load(patches_source(replace(self.spec, planes=False), self.backend.isa.lanes))

    def __call__(self, x: Tensor, size: Sequence[int], window: Sequence[int], pads: Sequence[int]) -> Tensor:
        _plain_planes(x)
        (B, _, C), (OH, OW) = x.shape, out_size(size, window, pads)
        y = token_output(C * window[0] * window[1], (B, OH * OW))
        if y.numel() == 0:
            return y
        t, to = sequences(x), sequences(y)
        code = self.code if t.by_token == 1 else self.by_pixels
        steps = t.by_feature, t.by_batch, t.by_token, to.by_feature, to.by_batch
        make_call(code, c_void_p(t.tensor.data_ptr()), c_void_p(y.data_ptr()), B, C, *size, OH, OW, *pads[:2], *steps)
        return y


class PoolKernel(TokenKernel):
    """fn(x [B, S, C]) -> [B, C], the mean over S, in float32."""

    def source(self, tokens: int = 0) -> str:
        return pool_source(self.backend.isa.lanes)

    def __call__(self, x: Tensor) -> Tensor:
        _plain_planes(x)
        B, S, C = x.shape
        y = output(B, C)
        if x.numel() == 0:
            return y.fill_(torch.nan)
        t = planes(self.backend, x)
        make_call(self.code, c_void_p(t.tensor.data_ptr()), c_void_p(y.data_ptr()), B, C, S, t.by_feature, t.by_batch)
        return y


def planes(backend: TvmBackend, x: Tensor) -> Tokens:
    """The sequence of pixels with every channel in one piece: as it is, or a copy."""
    found = sequences(x)
    if found.in_place(x.shape[-1]):
        return found
    shape, strides = token_storage(x.shape[:-1], x.shape[-1])
    made = sequences(empty(*shape).as_strided(x.shape, strides))
    move(backend, found, made, x.shape[-1])
    return made


def _plain_planes(x: Tensor) -> None:
    """A window crosses spans of tokens: the whole chain then keeps its channels as planes. Raises NotAView."""
    if spanned() or span_of(x) is not None:
        raise NotAView("pictures lie in planes")


_ZEROS: dict[int, Tensor] = {}


def _zeros(count: int) -> Tensor:
    """Kept for good: recorded calls know the address."""
    return _ZEROS.setdefault(count, torch.zeros(count))
