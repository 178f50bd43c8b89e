"""Norm, attention and masks of the dialect: dense meaning, strides, stages."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparsecc.errors import VerifyError
from sparsecc.ir.infer import infer
from sparsecc.ir.ops import empty_output
from sparsecc.ir.text import parse_program
from sparsecc.ir.token_ops import ATTENTION, GATE, MASK_TILES, NORM, ROTARY, TOKENS
from sparsecc.ir.verify import verify


@pytest.mark.parametrize("layout", ["row", "token"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm(kind: str, layout: str) -> None:
    x, weight, bias = torch.randn(2, 20, 8), torch.randn(8), torch.randn(8)
    y = NORM(x, weight, bias if kind == "layer" else None, 1e-5, kind, layout, "")
    want = F.layer_norm(x, (8,), weight, bias, 1e-5) if kind == "layer" else F.rms_norm(x, (8,), weight, 1e-5)
    torch.testing.assert_close(y, want)
    assert y.stride() == empty_output(x, 8, layout).stride()


def test_gate_and_rotary() -> None:
    a, b = torch.randn(2, 20, 8), torch.randn(2, 20, 8)
    y = GATE(a, b, "silu", "token", "")
    torch.testing.assert_close(y, F.silu(a) * b)
    x, angle = torch.randn(2, 3, 20, 8), torch.randn(1, 1, 20, 4).repeat(1, 1, 1, 2)
    turned = ROTARY(x, angle.cos(), angle.sin(), "token", "")
    pairs = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones(()), angle[..., :4])  # what it is: a turn in the plane
    torch.testing.assert_close(turned, torch.cat([pairs.real, pairs.imag], -1))
    for value in (y, turned):
        assert value.stride() == empty_output(value, 8, "token").stride()


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float", "two dimensions", "one row"])
def test_attention(mask: str) -> None:
    q, k, v = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 30, 8), torch.randn(2, 2, 30, 8)
    seen = torch.rand(2, 1, 20, 30) < 0.6
    seen[0, 0, 3] = False
    given = {"bool": seen, "float": torch.randn(2, 4, 20, 30), "two dimensions": seen[1, 0], "one row": seen[:, :, 5:6]}.get(mask)
    causal = mask == "causal"
    added = given if given is None or given.dtype != torch.bool else given.float().log()
    if added is not None and mask != "one row":
        added = TOKENS(added, "")
        assert added.stride() == empty_output(added, 30, "token").stride()
    y = ATTENTION(q, k, v, added, None if added is None else MASK_TILES(added, ""), 0.3, causal, "token", "")
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, given, is_causal=causal, scale=0.3, enable_gqa=True))
    assert y.stride() == empty_output(q, 8, "token").stride()


WRONG = [("pack", "", "made by layout"), ("layout", "k", "before lower"), ("lower", "", "no kernel")]


@pytest.mark.parametrize(("stage", "kernel", "message"), WRONG)
def test_stages(stage: str, kernel: str, message: str) -> None:
    text = f'''\
# sparsecc program, stage: {stage}
def program(x: "f32[4, 8]"):
    w: "f32[8]" = const("w")
    y = sparsecc.norm(x, w, w, 1e-05, "layer", "row", "{kernel}")
    return (y,)
'''
    program = parse_program(text)
    infer(program)
    with pytest.raises(VerifyError, match=message):
        verify(program)
