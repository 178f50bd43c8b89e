"""sparsecc::linear: dense meaning, fake, layouts, kernels by key."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparsecc.errors import ShapeError, TextError
from sparsecc.formats import nm, parse_format
from sparsecc.ir.ops import ACTIVATIONS, KERNELS, LINEAR, dense_meaning, parse_terms, print_terms


@pytest.mark.parametrize("layout", ["row", "token"])
@pytest.mark.parametrize("lead", [(), (1,), (17,), (2, 5), (0, 3)])
def test_single_dense_term_is_torch(lead: tuple[int, ...], layout: str) -> None:
    x, w, b = torch.randn(*lead, 8), torch.randn(12, 8), torch.randn(12)
    y = LINEAR(x, [w], b, None, "f32[12, 8]", "gelu", layout, "")
    torch.testing.assert_close(y, F.gelu(F.linear(x, w, b)), rtol=0, atol=0)


@pytest.mark.parametrize("lead", [(), (5,), (2, 9)])
@pytest.mark.parametrize("layout", ["row", "token"])
def test_fake_has_the_real_strides(lead: tuple[int, ...], layout: str) -> None:
    x, w = torch.randn(*lead, 8), torch.randn(12, 8)
    real = LINEAR(x, [w], None, None, "f32[12, 8]", "", layout, "")
    fake = LINEAR(x.to("meta"), [w.to("meta")], None, None, "f32[12, 8]", "", layout, "")
    assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


@pytest.mark.parametrize(("tokens", "row"), [(1, 48), (7, 48), (32, 48), (33, 80), (128, 144)])
def test_token_layout_is_an_odd_number_of_lines_per_feature(tokens: int, row: int) -> None:
    y = LINEAR(torch.randn(3, tokens, 8), [torch.randn(12, 8)], None, None, "f32[12, 8]", "", "token", "")
    assert y.stride() == (12 * row, 1, row) and y.untyped_storage().nbytes() == 4 * 3 * 12 * row


def test_sum_of_terms_in_formats() -> None:
    x = torch.randn(5, 16)
    sparse = torch.randn(8, 16) * nm(2, 4).topk_mask(torch.rand(8, 16))
    a, b = torch.randn(8, 2), torch.randn(2, 16)
    fmt = parse_format("nm(2, 4)")
    packed = fmt.pack(sparse)
    terms = "f32[8, 16] % nm(2, 4) @ nm(2, 4) + f32[8, 16] % lowrank(2)"
    assert print_terms(parse_terms(terms)) == terms
    params = [*(packed[c] for c in fmt.components()), a, b]
    residual = torch.randn(5, 8)
    y = LINEAR(x, params, None, residual, terms, "relu", "row", "")
    torch.testing.assert_close(y, F.relu(x @ (sparse + a @ b).T) + residual)


def test_bfloat16_accumulates_in_float32() -> None:
    x, w = torch.randn(4, 512).bfloat16(), torch.randn(8, 512).bfloat16()
    y = dense_meaning(x, [w], None, None, "bf16[8, 512]", "")
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, F.linear(x.float(), w.float()).bfloat16())


def test_wrong_number_of_params() -> None:
    with pytest.raises(ShapeError, match="take 1 tensors, got 2"):
        LINEAR(torch.randn(2, 8), [torch.randn(4, 8)] * 2, None, None, "f32[4, 8]", "", "row", "")
    with pytest.raises(TextError):
        parse_terms(" ")


def test_kernel_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "seven", lambda x, params, bias, residual: torch.full((2, 4), 7.0))
    args = (torch.randn(2, 8), [torch.randn(4, 8)], None, None, "f32[4, 8]", "", "row")
    assert (LINEAR(*args, "seven") == 7).all()
    assert torch.equal(LINEAR(*args, "unknown"), LINEAR(*args, ""))


def test_activations_keep_zero_where_they_say_so() -> None:
    zero = torch.zeros(3)
    assert all(torch.equal(a.fn(zero), zero) == a.keeps_zero for a in ACTIVATIONS.values())


def test_compiles_with_dynamic_shapes() -> None:
    w, b = torch.randn(12, 8), torch.randn(12)

    def f(x: torch.Tensor) -> torch.Tensor:
        return LINEAR(x * 2, [w], b, None, "f32[12, 8]", "silu", "token", "") + 1

    compiled = torch.compile(f, backend="aot_eager", dynamic=True, fullgraph=True)
    for tokens in (3, 40):
        x = torch.randn(2, tokens, 8)
        torch.testing.assert_close(compiled(x), f(x))
