"""Whole models on target="cuda" in Triton's interpreter, on CPU tensors, against the masked dense model."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

import sparsecc

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start of the process")


class Block(nn.Module):
    """Three linears of one input, a gated product, a residual: what the passes fuse and batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.softmax(self.query(x) @ self.key(x).transpose(-1, -2), -1) @ self.value(x)
        return mixed + self.down(nn.functional.gelu(self.up(x)))


F32, F16 = torch.float32, torch.float16


@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [("2:4", F16), ("1:5", F32), ("block(16, 16, 0.5)", F16), ("block(4, 1, 0.8)", F32), ("block(1, 16, 0.7)", F32),
     ("unstructured(0.6)", F16)],
)
def test_equals_the_masked_dense_model(pattern: str, dtype: torch.dtype) -> None:
    model = Block(32).eval()
    sparsecc.prune(model, pattern)
    model = model.to(dtype)
    compiled = sparsecc.compile(model, target="cuda", sparsity=pattern, remainder="eager")
    for shape in ((2, 3, 32), (1, 1, 32), *([(2, 3, 32)] if pattern == "2:4" else [])):  # a graph that comes again is no pattern's matter
        x = torch.randn(shape).to(dtype)
        wanted = model.float()(x.float())
        model.to(dtype)
        error = (compiled(x).float() - wanted).abs().max() / wanted.abs().max()
        assert error <= (1e-4 if dtype == torch.float32 else 5e-3)
    regions = compiled.explain().to_dict()["regions"]
    assert all(region["sparse"] for region in regions) and len(regions) == 2  # what shares an input is one


def test_weights_elsewhere_are_refused_by_name() -> None:
    with pytest.raises(sparsecc.TargetError, match=r"0\.weight is on meta"):
        sparsecc.compile(nn.Sequential(nn.Linear(8, 8)).eval().to("meta"), target="cuda")(torch.randn(2, 8, device="meta"))
