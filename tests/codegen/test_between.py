"""Numerics of norm and attention kernels against float64, at odd sizes and any strides, with memory poisoned."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.codegen.tvm.attention import AttentionSpec
from sparsecc.codegen.tvm.backend import TvmBackend
from sparsecc.codegen.tvm.norm import NormSpec
from sparsecc.errors import TargetError
from sparsecc.ir.ops import empty_output
from sparsecc.runtime.between import AttentionKernel, MaskKernel, NormKernel

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN: lanes beyond the tokens must not matter."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def token(x: Tensor) -> Tensor:
    return empty_output(x, x.shape[-1], "token").copy_(x)


def close(y: Tensor, want: Tensor) -> None:
    assert y.shape == want.shape
    assert float((y - want).abs().max()) <= TOLERANCE * float(want.abs().max())


@pytest.mark.parametrize("layout", ["token", "row"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm(kind: str, layout: str) -> None:
    kernel = NormKernel(TvmBackend.of(), NormSpec(kind, layout))
    for lead, features in (((1, 128), 96), ((3, 50), 33), ((2, 17), 130), ((1, 1), 8), ((70,), 64), ((2, 2, 5), 7)):
        x, weight, bias = 3 * torch.randn(*lead, features) + 1, torch.randn(features), torch.randn(features)
        wide = x.double()
        want = F.layer_norm(wide, (features,), weight.double(), bias.double(), 1e-5)
        if kind == "rms":
            want = F.rms_norm(wide, (features,), weight.double(), 1e-5)
        for given in (x, token(x), token(x)[..., :, :]):
            y = kernel(given, weight, bias if kind == "layer" else None, 1e-5)
            close(y, want)
            assert y.stride() == empty_output(x, features, layout).stride()
    assert kernel(torch.empty(2, 0, 8), torch.ones(8), torch.ones(8), 1e-5).shape == (2, 0, 8)


SIZES = [(1, 2, 2, 64, 128), (2, 4, 2, 50, 50), (3, 2, 1, 17, 17), (1, 2, 2, 70, 200), (1, 1, 1, 1, 5), (2, 1, 1, 65, 1), (1, 2, 1, 9, 67)]


@pytest.mark.parametrize("D", [32, 6])
def test_attention(D: int) -> None:
    for masked in (False, True):
        kernel = AttentionKernel(TvmBackend.of(), AttentionSpec(D, masked))
        for B, H, G, S, Sk in SIZES:
            q, k, v = 2 * torch.randn(B, H, S, D), torch.randn(B, G, Sk, D), torch.randn(B, G, Sk, D)
            mask = torch.rand(B, 1, S, Sk) < 0.7
            mask[0, 0, 0] = False  # sees nothing: 0, as in torch
            given = mask if masked else None
            prepared = MaskKernel(TvmBackend.of())(mask.float().log()) if masked else None
            want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), given, scale=0.4, enable_gqa=True)
            assert not masked or not want[0, :, 0].any()
            close(kernel(token(q), token(k), token(v), prepared, 0.4), want)
            close(kernel(q, k, v, prepared, 0.4), want)
            if masked:
                full = torch.randn(B, H, S, Sk)
                want = F.scaled_dot_product_attention(q, k, v, full, scale=0.4, enable_gqa=True)
                close(kernel(q, k, v, MaskKernel(TvmBackend.of())(full), 0.4), want.double())


def test_attention_of_large_scores_and_of_nan() -> None:
    kernel = AttentionKernel(TvmBackend.of(), AttentionSpec(32))
    q, k, v = torch.randn(1, 1, 40, 32), torch.randn(1, 1, 100, 32), torch.randn(1, 1, 100, 32)
    q[0, 0, 3] *= 1e4  # its softmax is one key
    close(kernel(q, k, v, None, 1.0), F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=1.0))
    q[0, 0, 5, 0] = torch.nan
    y = kernel(q, k, v, None, 1.0)
    assert y[0, 0, 5].isnan().all() and not y[0, 0, [4, 6]].isnan().any()


def test_no_tokens_and_no_keys() -> None:
    kernel = AttentionKernel(TvmBackend.of(), AttentionSpec(32))
    q, none = torch.randn(1, 1, 4, 32), torch.randn(1, 1, 0, 32)
    assert kernel(none, q, q, None, 1.0).shape == (1, 1, 0, 32)
    assert not kernel(q, none, none, None, 1.0).any()


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_narrower_vectors(isa: str) -> None:
    try:
        backend = TvmBackend.of(isa)
    except TargetError as error:
        pytest.skip(str(error))
    x, weight = torch.randn(3, 50, 33), torch.randn(33)
    y = NormKernel(backend, NormSpec("layer", "row"))(x, weight, weight, 1e-5)
    close(y, F.layer_norm(x.double(), (33,), weight.double(), weight.double()))
    q, k, v = torch.randn(2, 2, 50, 8), torch.randn(2, 2, 50, 8), torch.randn(2, 2, 50, 8)
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.4)
    close(AttentionKernel(backend, AttentionSpec(8))(q, k, v, None, 0.4), want)
