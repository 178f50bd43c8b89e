"""Numerics of the kernels between linears against float64, at odd sizes and any strides, with memory poisoned."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.codegen.tvm.attention import AttentionSpec
from sparsecc.codegen.tvm.backend import TvmBackend
from sparsecc.codegen.tvm.norm import NormSpec
from sparsecc.codegen.tvm.pointwise import GateSpec
from sparsecc.errors import ShapeError, TargetError
from sparsecc.ir import token_ops
from sparsecc.ir.ops import ACTIVATIONS, empty_output
from sparsecc.ir.token_ops import HIDDEN, MIXED, OPEN
from sparsecc.runtime.between import AttentionKernel, GateKernel, NormKernel, RotaryKernel, TilesKernel, TokensKernel

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


@pytest.mark.parametrize("activation", ["", "silu", "gelu", "gelu_tanh", "relu"])
def test_gate(activation: str) -> None:
    kernel = GateKernel(TvmBackend.of(), GateSpec(activation))
    for lead, features in (((1, 128), 96), ((3, 50), 33), ((2, 17), 130), ((1, 1), 8), ((2, 300), 260)):
        both = 4 * torch.randn(*lead, 2 * features)
        a, b = both[..., :features], both[..., features:]
        want = ACTIVATIONS[activation].fn(a.double()) * b.double()
        for given in (both, token(both)):
            y = kernel(given[..., :features], given[..., features:])
            close(y, want)
            assert y.stride() == empty_output(a, features, "token").stride()
    assert kernel(torch.empty(2, 0, 8), torch.empty(2, 0, 8)).shape == (2, 0, 8)


@pytest.mark.parametrize("D", [2, 24, 64])
def test_rotary(D: int) -> None:
    kernel = RotaryKernel(TvmBackend.of())
    for B, H, S in ((1, 3, 64), (2, 1, 17), (3, 2, 100), (2, 2, 1), (1, 1, 0)):
        x, turns = torch.randn(B, H, S, D), 1000 * torch.rand(B, 1, S, D)
        cos, sin = turns.cos(), turns.sin()  # a half of its own each, as the formula allows
        for n in {1, B}:
            want = token_ops.rotary(x.double(), cos[:n].double(), sin[:n].double(), "token", "")
            for given, tables in ((x, (cos[:n], sin[:n])), (token(x), (token(cos[:n]), token(sin[:n])))):
                if S:
                    close(kernel(given, *tables), want)
                else:
                    assert kernel(given, *tables).shape == x.shape


SIZES = [(1, 2, 2, 64, 128), (2, 4, 2, 50, 50), (3, 2, 1, 17, 17), (1, 2, 2, 70, 200), (1, 1, 1, 1, 5), (2, 1, 1, 65, 1), (1, 2, 1, 9, 67),
         (2, 9, 3, 200, 200), (1, 4, 1, 300, 130)]  # fmt: skip
"""B, H, G, S, Sk."""


def hidden(kind: str, B: int, H: int, S: int, Sk: int) -> Tensor | None:
    """What a mask of this kind lets every query see, as torch takes it."""
    earlier = torch.arange(Sk) <= torch.arange(S)[:, None]
    length = torch.randint(0, Sk + 1, (B, 1, 1, 1))
    match kind:
        case "rows":
            mask = torch.rand(B, 1, S, Sk) < 0.7
            mask[0, 0, 0] = False  # sees nothing: 0, as in torch
            return mask
        case "heads":
            return torch.rand(1, H, S, Sk) < 0.7
        case "causal rows":
            return earlier & (torch.arange(Sk) >= Sk - length)
        case "two dimensions":
            return earlier & (torch.arange(Sk) > torch.arange(S)[:, None] - 70)  # a window: tiles are hidden on both sides
        case "keys":
            return torch.arange(Sk) < length
        case "floats":
            return torch.randn(B, H, S, Sk)
        case "lowest":
            return torch.where(earlier, 0.0, torch.finfo(torch.float32).min).expand(B, 1, S, Sk)
    return None


KINDS = ("", "causal", "rows", "heads", "causal rows", "two dimensions", "keys", "floats", "lowest")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("D", [32, 6])
def test_attention(D: int, kind: str) -> None:
    backend = TvmBackend.of()
    hides = kind if kind in ("", "causal", "keys") else "rows"
    kernel = AttentionKernel(backend, AttentionSpec(D, hides))
    for B, H, G, S, Sk in SIZES:
        q, k, v = 2 * torch.randn(B, H, S, D), torch.randn(B, G, Sk, D), torch.randn(B, G, Sk, D)
        mask = hidden(kind, B, H, S, Sk)
        given = mask.double() if mask is not None and mask.is_floating_point() else mask
        wide, grouped = (q.double(), k.double(), v.double()), {"scale": 0.4, "enable_gqa": True, "is_causal": kind == "causal"}
        want = F.scaled_dot_product_attention(*wide, given, **grouped)
        assert kind != "rows" or not want[0, :, 0].any()
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.float().log()
        prepared = mask if mask is None or hides == "keys" else TokensKernel(backend)(mask)
        tiles = None if mask is None else TilesKernel(backend, hides == "rows")(mask)
        assert tiles is None or torch.equal(tiles, token_ops.mask_tiles(mask, ""))
        close(kernel(token(q), token(k), token(v), prepared, tiles, 0.4), want)
        close(kernel(q, k, v, mask, tiles, 0.4), want)


def test_what_tiles_say() -> None:
    mask = torch.zeros(1, 1, 130, 200)
    mask[..., :64, 64:] = -torch.inf
    mask[..., 129, 199] = torch.nan
    mask[..., 70, 0] = -torch.inf
    wanted = [[OPEN, HIDDEN, HIDDEN, HIDDEN], [MIXED, OPEN, OPEN, OPEN], [OPEN, OPEN, OPEN, MIXED]]
    assert token_ops.mask_tiles(mask, "").tolist() == [[wanted]]
    assert TilesKernel(TvmBackend.of(), True)(mask).tolist() == [[wanted]]
    assert TilesKernel(TvmBackend.of(), False)(mask[..., :1, :]).tolist() == [[wanted[:1]]]


def test_hidden_tiles_are_not_read() -> None:
    """NaN in keys that no query of a tile may see does not reach its results: what is skipped is not computed."""
    q, k, v = torch.randn(1, 2, 192, 16), torch.randn(1, 2, 192, 16), torch.randn(1, 2, 192, 16)
    k[:, :, 128:], v[:, :, 128:] = torch.nan, torch.nan
    mask = (torch.arange(192) <= torch.arange(192)[:, None]).float().log()
    tiles = token_ops.mask_tiles(mask, "")
    for hides, given in (("causal", (None, None)), ("rows", (mask, tiles))):
        y = AttentionKernel(TvmBackend.of(), AttentionSpec(16, hides))(q, k, v, *given, 1.0)
        assert not y[:, :, :128].isnan().any() and y[:, :, 129:].isnan().all()


def test_wrong_masks() -> None:
    q, mask = torch.randn(1, 1, 20, 8), torch.zeros(20, 19)
    with pytest.raises(ShapeError, match="the mask is"):
        AttentionKernel(TvmBackend.of(), AttentionSpec(8, "rows"))(q, q, q, mask, mask, 1.0)
    with pytest.raises(ShapeError, match="there is none"):
        AttentionKernel(TvmBackend.of(), AttentionSpec(8, "keys"))(q, q, q, None, None, 1.0)
    with pytest.raises(ShapeError, match="no mask"):
        AttentionKernel(TvmBackend.of(), AttentionSpec(8))(q, q, q, mask, mask, 1.0)


def test_attention_of_large_scores_and_of_nan() -> None:
    kernel = AttentionKernel(TvmBackend.of(), AttentionSpec(32))
    q, k, v = torch.randn(1, 1, 40, 32), torch.randn(1, 1, 100, 32), torch.randn(1, 1, 100, 32)
    q[0, 0, 3] *= 1e4  # its softmax is one key
    close(kernel(q, k, v, None, None, 1.0), F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=1.0))
    q[0, 0, 5, 0] = torch.nan
    y = kernel(q, k, v, None, None, 1.0)
    assert y[0, 0, 5].isnan().all() and not y[0, 0, [4, 6]].isnan().any()


def test_no_tokens_and_no_keys() -> None:
    kernel = AttentionKernel(TvmBackend.of(), AttentionSpec(32))
    q, none = torch.randn(1, 1, 4, 32), torch.randn(1, 1, 0, 32)
    assert kernel(none, q, q, None, None, 1.0).shape == (1, 1, 0, 32)
    assert not kernel(q, none, none, None, None, 1.0).any()


@pytest.mark.parametrize("isa", ["avx2", pytest.param("portable", marks=pytest.mark.slow)])
def test_narrower_vectors(isa: str) -> None:
    try:
        backend = TvmBackend.of(isa)
    except TargetError as error:
        pytest.skip(str(error))
    x, weight = torch.randn(3, 50, 33), torch.randn(33)
    y = NormKernel(backend, NormSpec("layer", "row"))(x, weight, weight, 1e-5)
    close(y, F.layer_norm(x.double(), (33,), weight.double(), weight.double()))
    q, k, v = torch.randn(2, 2, 50, 4), torch.randn(2, 2, 50, 4), torch.randn(2, 2, 50, 4)
    mask = torch.ones(50, 50).tril().log()
    for hides in ("", "causal", "rows"):
        given = (mask, token_ops.mask_tiles(mask, "")) if hides == "rows" else (None, None)
        want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=hides != "", scale=0.4)
        close(AttentionKernel(backend, AttentionSpec(4, hides))(q, k, v, *given, 0.4), want)
    close(GateKernel(backend, GateSpec())(x, x), F.silu(x.double()) * x.double())
    table = torch.randn(1, 1, 50, 4)
    close(RotaryKernel(backend)(q, table, table), token_ops.rotary(q.double(), table.double(), table.double(), "token", ""))
    assert torch.equal(TilesKernel(backend, True)(mask), token_ops.mask_tiles(mask, ""))
