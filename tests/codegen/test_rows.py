"""Numerics of the kernels for a few tokens against float64, in every dtype, at odd sizes and any strides, with memory poisoned."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.codegen.tvm.backend import TvmBackend
from sparsecc.ir import token_ops
from sparsecc.runtime.rows import AppendRows, AttentionRows, GateRows, NormRows, RotaryRows

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = list(ROUNDING)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN: what is behind a row must not matter."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def close(y: Tensor, want: Tensor) -> None:
    assert y.shape == want.shape
    assert float((y.double() - want).abs().max()) <= 2 * ROUNDING[y.dtype] * float(want.abs().max())


def heads(B: int, H: int, S: int, D: int, dtype: torch.dtype, room: int = 0) -> Tensor:
    """[B, H, S, D] as a linear's rows give them, `room` features between tokens."""
    return torch.randn(B, S, H * D + room).to(dtype)[..., : H * D].view(B, S, H, D).transpose(1, 2)



@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm(kind: str, dtype: torch.dtype) -> None:
    kernel = NormRows(TvmBackend.of(), kind)
    for B, S, N in ((1, 1, 96), (2, 3, 33), (5, 1, 7)):
        weight, bias = torch.randn(N).to(dtype), torch.randn(N).to(dtype)
        wide_rows, more_tokens = torch.randn(B, S, 2 * N).to(dtype)[..., :N], torch.randn(B, 4, N).to(dtype)[:, :S]
        for x in (3 * torch.randn(B, S, N).to(dtype) + 1, wide_rows, more_tokens):
            wide = (x.double(), (N,), weight.double())
            want = F.layer_norm(*wide, bias.double(), 1e-5) if kind == "layer" else F.rms_norm(*wide, 1e-5)
            y = kernel(x, weight, bias if kind == "layer" else None, 1e-5)
            close(y, want)
            assert y.is_contiguous()
            if kind == "rms":  # rounded where the models round
                exact = token_ops.norm(x, weight, None, 1e-5, kind, "row", "")
                torch.testing.assert_close(y, exact, rtol=ROUNDING[dtype], atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate(dtype: torch.dtype) -> None:
    for activation in ("silu", "") if dtype == torch.float32 else ("silu",):
        kernel = GateRows(TvmBackend.of(), activation)
        for B, S, N in ((1, 1, 50), (2, 3, 32)):
            both = torch.randn(B, S, 2 * N).to(dtype)
            a, b = both[..., :N], both[..., N:]
            act = {"silu": F.silu, "gelu": F.gelu, "": lambda t: t}[activation]
            close(kernel(a, b), act(a.double()) * b.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [2, 40])
def test_rotary(D: int, dtype: torch.dtype) -> None:
    kernel = RotaryRows(TvmBackend.of())
    for B, H, S, n in ((1, 3, 1, 1), (2, 2, 5, 2), (2, 1, 4, 1)):
        x, angle = heads(B, H, S, D, dtype, room=3), torch.randn(n, 1, S, D)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        y = kernel(x, cos, sin)
        close(y, token_ops.rotary(x.double(), cos.double(), sin.double(), "row", ""))
        assert y.stride() == token_ops.rotary_fake(x, cos, sin, "row", "").stride()


@pytest.mark.parametrize("dtype", DTYPES)
def test_append(dtype: torch.dtype) -> None:
    kernel = AppendRows(TvmBackend.of())
    for B, G, past, S, D in ((1, 3, 7, 1, 20), (2, 2, 0, 3, 16), (3, 1, 5, 2, 33), (1, 2, 700, 1, 64)):
        cache, x = torch.randn(B, G, past, D).to(dtype), heads(B, G, S, D, dtype, room=1)
        for given in (cache, cache.transpose(0, 1).contiguous().transpose(0, 1)):
            y = kernel(given, x)
            assert torch.equal(y, torch.cat([cache, x], -2)) and y.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hides", ["", "causal", "mask"])
def test_attention(hides: str, dtype: torch.dtype) -> None:
    shapes = {20: ((2, 4, 2, 3, 70), (1, 2, 2, 2, 2)), 64: ((1, 3, 1, 1, 65), (1, 9, 3, 1, 600)), 7: ((2, 2, 2, 2, 2),)}
    wanted = {torch.float32: (7, 20, 64), torch.bfloat16: (64,), torch.float16: (20,)}[dtype]
    for D, B, H, G, S, Sk in ((size, *shape) for size in wanted for shape in shapes[size]):
        kernel = AttentionRows(TvmBackend.of(), D, hides)
        q, k, v = heads(B, H, S, D, dtype), torch.randn(B, G, Sk, D).to(dtype), heads(B, G, Sk, D, dtype, room=2)
        for lead, rows in (((B, 1), S), ((1, H), 1), ((), S)) if hides == "mask" else (((), 0),):
            mask = torch.randn(*lead, rows, Sk).masked_fill(torch.rand(*lead, rows, Sk) < 0.4, -torch.inf) if rows else None
            if mask is not None:
                mask[..., 0, :] = -torch.inf  # a query that sees nothing gives 0
            wide = None if mask is None else mask.double()
            want = F.scaled_dot_product_attention(
                q.double(), k.double(), v.double(), wide, is_causal=hides == "causal", scale=0.3, enable_gqa=True
            ).nan_to_num(0)
            y = kernel(q, k, v, mask, None, 0.3)
            close(y, want)
            assert y.stride() == token_ops.attention_fake(q, k, v, mask, None, 0.3, False, "row", "").stride()


def test_scores_beyond_the_range_of_exp() -> None:
    q, k = 40 * torch.randn(1, 2, 1, 32), 40 * torch.randn(1, 2, 130, 32)
    v = torch.randn(1, 2, 130, 32)
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=1.0)
    close(AttentionRows(TvmBackend.of(), 32, "")(q, k, v, None, None, 1.0), want)


def test_nan_stays_nan() -> None:
    q, k, v = (torch.randn(1, 1, n, 16) for n in (1, 4, 4))
    v[0, 0, 2, 5] = torch.nan
    y = AttentionRows(TvmBackend.of(), 16, "")(q, k, v, None, None, 1.0)
    assert y.isnan().nonzero().tolist() == [[0, 0, 0, 5]]


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_narrow_vectors(isa: str) -> None:
    narrow = TvmBackend.of(isa)
    x, angle = heads(1, 3, 2, 20, torch.bfloat16), torch.randn(1, 1, 2, 20)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    close(RotaryRows(narrow)(x, cos, sin), token_ops.rotary(x.double(), cos.double(), sin.double(), "row", ""))
    q, k = heads(1, 2, 1, 20, torch.float32), torch.randn(1, 2, 70, 20)
    want = F.scaled_dot_product_attention(q.double(), k.double(), k.double(), scale=0.3)
    close(AttentionRows(narrow, 20, "")(q, k, k, None, None, 0.3), want)
    x, weight = torch.randn(2, 3, 33), torch.randn(33)
    close(NormRows(narrow, "rms")(x, weight, None, 1e-5), F.rms_norm(x.double(), (33,), weight.double(), 1e-5))
    close(GateRows(narrow, "silu")(x, x), F.silu(x.double()) * x.double())
