"""Calling the kernels that choose the tokens of a block. What they don't take runs as the ops' dense meaning."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from sparsecc.codegen.tvm.backend import TvmBackend
from sparsecc.codegen.tvm.routing import BINS, PAD, keep_source, received_source, route_source
from sparsecc.ir import route_ops
from sparsecc.ir.policy import parse_policy
from sparsecc.runtime.between import number
from sparsecc.runtime.few import DTYPES

COMPARES = {"threshold": ">", "atleast": ">="}
"""Policies that judge every token by itself."""


class ReceivedKernel:
    """fn(q [B, H, S, D], k [B, G, S, D], mask, count i32[B], scale) -> f32[B, S], without a mask, and with keys whose features, or a
    feature's tokens, lie side by side."""

    def __init__(self, backend: TvmBackend) -> None:
        self.backend = backend
        lanes = backend.isa.lanes
        self.code = lru_cache(lambda D, by_token, counted, dtype: backend.load(received_source(D, by_token, counted, dtype, lanes)))

    def source(self, tokens: int = 0) -> str:
        """The kernel's text for heads of 64 features."""
        return received_source(64, True, False, "f32", self.backend.isa.lanes)

    def __call__(self, q: Tensor, k: Tensor, mask: Tensor | None, count: Tensor | None, scale: float | None) -> Tensor:
        B, H, S, D = q.shape
        by_token = k.stride(3) == 1 or D == 1
        if mask is not None or q.dtype not in DTYPES or k.dtype != q.dtype or not q.numel() or not (by_token or k.stride(2) == 1):
            return route_ops.received(q, k, mask, count, scale)
        pitch = -(-S // PAD) * PAD
        work, out = torch.empty(B * (H + 1) * pitch), torch.empty(B, S)
        counts = out if count is None else count.contiguous()
        addresses = [c_void_p(t.data_ptr()) for t in (q, k, counts)]
        addresses += [number(D**-0.5 if scale is None else scale), c_void_p(work.data_ptr()), c_void_p(out.data_ptr())]
        steps = (*q.stride(), k.stride(0), k.stride(1), k.stride(2) if by_token else k.stride(3))
        self.code(D, by_token, count is not None, DTYPES[q.dtype])(*addresses, B, S, H, H // k.shape[1], *steps, pitch)
        return out


class RouteKernel:
    """fn(importance f32[B, S], mask, required, [fc1 f32[n, 4], bias, fc2 [1 or 2, n], bias]) -> scores f32[B, S]."""

    def __init__(self, backend: TvmBackend) -> None:
        self.backend = backend
        self.code = lru_cache(lambda hidden, outputs: backend.load(route_source(hidden, outputs, backend.isa.lanes)))

    def source(self, tokens: int = 0) -> str:
        """The kernel's text for a router of 64 hidden units and one output."""
        return route_source(64, 1, self.backend.isa.lanes)

    def __call__(self, importance: Tensor, mask: Tensor | None, required: float, weights: list[Tensor]) -> Tensor:
        if not importance.numel():
            return torch.empty_like(importance)
        if mask is not None:
            real = route_ops.real_tokens(mask, *importance.shape, importance.device)  # type: ignore[call-arg]
            importance = torch.where(real, importance, -torch.inf)
        importance, (B, S) = importance.contiguous(), importance.shape
        pitch = -(-S // PAD) * PAD
        ints, room = torch.empty(B * (4 * pitch + BINS), dtype=torch.int32), torch.empty(B * 4 * pitch)
        out, outputs = torch.empty(B, S), weights[2].shape[0]
        addresses = [c_void_p(importance.data_ptr()), number(required)]
        addresses += [c_void_p(t.data_ptr()) for t in (*(w.contiguous() for w in weights), ints, room, out)]
        self.code(weights[0].shape[0], outputs)(*addresses, B, S, pitch)
        return out


class KeepKernel:
    """fn(scores f32[B, S], policy) -> as `route_ops.listed`, for policies that judge every token by itself."""

    def __init__(self, backend: TvmBackend, policy: str) -> None:
        rule = parse_policy(policy)
        self.backend, self.compare, self.level = backend, COMPARES[rule.name], number(float(rule.value or 0))
        self.code: Callable[..., object] | None = None

    def source(self, tokens: int = 0) -> str:
        """The kernel's text."""
        return keep_source(self.compare)

    def __call__(self, scores: Tensor, policy: str) -> tuple[Tensor, Tensor, int, list[int] | None]:
        self.code = self.code or self.backend.load(self.source())
        scores, (B, S) = scores.contiguous(), scores.shape
        idx, found = torch.empty(B, S, dtype=torch.int32), torch.empty(B, 3, dtype=torch.int32)
        self.code(*(c_void_p(t.data_ptr()) for t in (scores,)), self.level, c_void_p(idx.data_ptr()), c_void_p(found.data_ptr()), B, S)
        rows = found.tolist()
        bad = next(([row, bad - 1] for row, (_, _, bad) in enumerate(rows) if bad), None)
        return idx, found[:, 0].contiguous(), sum(real for _, real, _ in rows), bad
