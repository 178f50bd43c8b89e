"""Whole convolutional nets against the masked dense model in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sparsecc
from examples.convnets import InvertedResidual, block, efficientnet_lite0, images, mobilenet_v1, mobilenet_v2, pointwise
from sparsecc.errors import ShapeError
from sparsecc.ir.image_ops import IMAGE_MEANINGS
from sparsecc.ir.ops import LINEAR
from sparsecc.runtime import bands
from sparsecc.runtime.chain import Chain

TOLERANCE = 2e-5


class Small(nn.Module):
    """The blocks of MobileNetV2. [B, 3, H, W] -> [B, 10], [B, 32, H / 4, W / 4]"""

    def __init__(self) -> None:
        super().__init__()
        blocks = (InvertedResidual(16, 16, 1, 6), InvertedResidual(16, 24, 2, 6), InvertedResidual(24, 24, 1, 6))
        self.features = nn.Sequential(block(3, 16, 3, 2), *blocks, block(24, 32, 3))
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        return self.fc(features.mean((2, 3))), features


def small() -> nn.Module:
    net = Small().eval()
    sparsecc.prune(net, "unstructured(0.8)")
    return net


def agrees(compiled: nn.Module, net: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        wanted, found = net.double()(x.double()), compiled(x)
        net.float()
    if isinstance(wanted, Tensor):
        wanted, found = (wanted,), (found,)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and float((a - b).abs().max()) <= TOLERANCE * float(b.abs().max())


@pytest.mark.parametrize("cut", [False, True])
def test_batches_layouts_and_offsets(cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel after the other on whole pictures, and in bands of a few rows."""
    monkeypatch.setattr(bands, "LARGE", 4 << 10 if cut else 1 << 40)
    monkeypatch.setattr(bands, "BUDGET", 24 << 10)
    monkeypatch.setattr(bands, "TWICE", 10.0)
    net, runs = small(), []
    real = bands.Band.run
    monkeypatch.setattr(bands.Band, "run", lambda band, *rest: (runs.append(band), real(band, *rest))[1])
    compiled = sparsecc.compile(net, example_inputs=(torch.randn(2, 3, 44, 52),), autotune="none", remainder="eager")
    for B in (2, 3):
        x = torch.randn(B, 3, 44, 52)
        agrees(compiled, net, x)
        agrees(compiled, net, x.contiguous(memory_format=torch.channels_last))
        agrees(compiled, net, torch.randn(B, 4, 44, 53)[:, 1:, :, 1:])
        agrees(compiled, net, x)  # replayed
    assert bool(runs) == cut and all(0 < band.rows < band.height for band in runs)


def test_pictures_go_through_one_by_one_up_to_the_linear_behind_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one kernel writes is still in cache when the next reads it."""
    net, parts = small(), []
    real = Chain.part
    monkeypatch.setattr(Chain, "part", lambda chain, tensors, *rest: (parts.append(len(tensors[0])), real(chain, tensors, *rest))[1])
    compiled = sparsecc.compile(net, example_inputs=(torch.randn(2, 3, 96, 96),), autotune="none", remainder="eager")
    agrees(compiled, net, torch.randn(5, 3, 96, 96))
    assert parts == [1] * 5 and "fc" in {region.name for region in compiled.explain().regions if region.format != "dense"}


def test_pictures_that_become_one_pixel_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    net, runs = nn.Sequential(block(3, 16, 3, 2), InvertedResidual(16, 24, 2, 6), InvertedResidual(24, 24, 1, 6)).eval(), []
    sparsecc.prune(net, "unstructured(0.8)")
    real = Chain.run
    monkeypatch.setattr(Chain, "run", lambda chain, *rest: (runs.append(chain), real(chain, *rest))[1])
    x = torch.randn(1, 3, 4, 4)
    compiled = sparsecc.compile(net, example_inputs=(x,), autotune="none", remainder="eager")
    agrees(compiled, net, x)
    recorded = len(runs)
    agrees(compiled, net, torch.randn(1, 3, 4, 4))
    assert len(runs) == recorded > 0


def test_inductor_takes_channels_last() -> None:
    net = small()
    compiled = sparsecc.compile(net, autotune="none")
    for x in (torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)):
        agrees(compiled, net, x)
    agrees(compiled, net, torch.randn(1, 3, 40, 24))  # another size is another capture


def test_a_picture_of_another_size_is_refused() -> None:
    compiled = sparsecc.compile(small(), example_inputs=(torch.randn(2, 3, 32, 32),), autotune="none", remainder="eager")
    with pytest.raises(ShapeError):
        compiled(torch.randn(2, 3, 48, 32))
    with pytest.raises(ShapeError):
        compiled(torch.randn(2, 4, 32, 32))


def test_pictures_of_any_size_stay_torchs_and_say_why() -> None:
    net, size = small(), torch.export.Dim.AUTO
    x = torch.randn(2, 3, 32, 32)
    compiled = sparsecc.compile(net, example_inputs=(x,), dynamic_shapes=({2: size, 3: size},), autotune="none", remainder="eager")
    assert any("size varies: fix it with dynamic_shapes" in note for r in compiled.explain().regions for note in r.notes)
    agrees(compiled, net, torch.randn(2, 3, 48, 40))


@pytest.mark.slow
@pytest.mark.parametrize("make", [mobilenet_v1, mobilenet_v2, efficientnet_lite0])
def test_real_nets(make: object) -> None:
    try:
        net = make()  # type: ignore[operator]
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    sparsecc.prune(net, dict.fromkeys(pointwise(net), "unstructured(0.9)"))
    compiled = sparsecc.compile(net, example_inputs=(images(2),))
    program = compiled.graphs[0].history.program
    ours = [node for node in program.graph.nodes if node.target in IMAGE_MEANINGS or node.target is LINEAR]
    between = {i for node in ours[1:] for i in node.all_input_nodes if i.op == "call_function"}
    assert between <= set(ours)  # no transpose, copy or torch convolution inside
    for x in (images(2), images(3).contiguous(memory_format=torch.channels_last)):
        agrees(compiled, net, x)
