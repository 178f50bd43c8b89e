"""Convolutions in the graph: batch norms folded, sparse nets on sequences of pixels, and back where torch is faster."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import sparsecc
from sparsecc.capture import capture
from sparsecc.errors import PatternViolation, SpecError
from sparsecc.ir.image_ops import DEPTHWISE, DIRECT, IMAGE_MEANINGS, PATCHES, POOL
from sparsecc.ir.ops import LINEAR
from sparsecc.ir.program import Program
from sparsecc.ir.text import parse_program, print_program, tensors_of
from sparsecc.passes import PIPELINE, pictures
from sparsecc.passes.context import Context
from sparsecc.passes.manager import run_passes
from sparsecc.spec import SparsitySpec

aten = torch.ops.aten


def conv(i: int, o: int, kernel: int = 1, **more: Any) -> nn.Sequential:
    norm = nn.BatchNorm2d(o)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
    nn.init.normal_(norm.weight)
    return nn.Sequential(nn.Conv2d(i, o, kernel, **more), norm)


class Net(nn.Module):
    """Every op that pictures may go through; [B, 3, H, W] -> [B, 5], [B, 16, H / 2, W / 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 16, 3, stride=2, padding=1), nn.Hardswish())
        self.block = nn.Sequential(conv(16, 40), nn.ReLU6(), conv(40, 40, 5, padding=2, groups=40), nn.SiLU(), conv(40, 16))
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.down = nn.Sequential(conv(16, 16, 3, stride=2, groups=16, bias=False), nn.ReLU(), conv(16, 24, 3, padding=1))
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        x = x + self.block(x)
        return self.fc(self.down(self.pad(x)).mean((2, 3))), x


def pruned(net: nn.Module, zeros: float = 0.8) -> nn.Module:
    sparsecc.prune(net.eval(), f"unstructured({zeros})")
    return net


def planned(net: nn.Module, x: Tensor, spec: Any = None) -> Program:
    program = capture(net, (x,)).program
    return run_passes(program, PIPELINE, Context(SparsitySpec.parse(spec)), stop_after="layout").program


def targets(program: Program) -> list[Any]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def close(found: Any, wanted: Any) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= 2e-5 * float(b.abs().max())


def exact(net: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        wanted = net.double()(x.double())
        net.float()
    return wanted


def test_batch_norm_folds_into_the_convolution() -> None:
    net, x = pruned(Net()), torch.randn(2, 3, 21, 26)
    program = capture(net, (x,)).program
    steps = run_passes(program, PIPELINE, Context(), stop_after="propagate")
    found = targets(steps.program)
    assert aten.batch_norm.default not in found and aten.conv2d.default not in found
    assert found.count(aten.convolution.default) == 6
    close(steps.program.run(x), exact(net, x))


def test_a_sparse_net_is_one_sequence_of_pixels() -> None:
    net, x = pruned(Net()), torch.randn(2, 3, 21, 26)
    program = planned(net, x)
    found = targets(program)
    assert [found.count(kind) for kind in (LINEAR, DEPTHWISE, DIRECT, PATCHES, POOL)] == [4, 2, 1, 1, 1]
    assert aten.convolution.default not in found and aten.constant_pad_nd.default not in found
    moved = [node for node in program.graph.nodes if node.target in (aten.transpose.int, aten.flatten.using_ints)]
    assert not any(_between(node) for node in moved)  # layouts change on the way in and out alone
    close(program.run(x), exact(net, x))
    text = print_program(program)
    again = parse_program(text, tensors_of(program))
    assert print_program(again) == text
    close(again.run(x), program.run(x))


def _between(node: fx.Node) -> bool:
    reads = any(i.target in IMAGE_MEANINGS or i.target is LINEAR for i in node.all_input_nodes)
    return reads and any(user.target in IMAGE_MEANINGS or user.target is LINEAR for user in node.users)


def test_a_dense_net_stays_torchs() -> None:
    found = targets(planned(Net().eval(), torch.randn(2, 3, 21, 26)))
    assert not set(found) & set(IMAGE_MEANINGS) and found.count(aten.convolution.default) == 6


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(16, 16, 3, groups=4), "a convolution of 4 groups stays dense"),
        (nn.Conv2d(16, 16, 3, dilation=2), "a dilated convolution stays dense"),
        (nn.ConvTranspose2d(16, 16, 3), "a transposed convolution stays dense"),
        (nn.Conv2d(16, 16, 3, stride=3, groups=16), "a depthwise window of horizontal stride 3 stays torch's"),
    ],
)
def test_others_stay_dense_and_say_why(layer: nn.Module, reason: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), layer, nn.ReLU(), nn.Conv2d(16, 8, 1))
    pruned(net)
    x = torch.randn(2, 3, 12, 13)
    compiled = sparsecc.compile(net, target="reference", example_inputs=(x,), remainder="eager")
    regions = {region.name: region for region in compiled.explain().regions}
    assert reason in (regions["2"].reason, *regions["2"].notes)
    with torch.no_grad():
        close([compiled(x)], [exact(net, x)])


def test_one_dimensional_convolutions_stay_dense() -> None:
    net = nn.Sequential(nn.Conv1d(8, 8, 3)).eval()
    compiled = sparsecc.compile(net, target="reference", example_inputs=(torch.randn(2, 8, 20),), remainder="eager")
    assert compiled.explain().regions[0].reason == "a 1-dimensional convolution stays dense"


def test_patterns_count_output_channels() -> None:
    net = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1)).eval()
    x = torch.randn(1, 16, 8, 8)
    report = sparsecc.prune(net, {"*": "block(4, 1, 0.75)", "2": "block(8, 1, 0.5)"})
    assert [row.pattern for row in report.rows] == ["block(4, 1, 0.75)", "block(8, 1, 0.5)"]
    weight = net[0].weight[:, :, 0, 0]
    assert torch.equal(weight.view(8, 4, 16).ne(0).all(1), weight.view(8, 4, 16).ne(0).any(1))
    program = planned(net, x, {"0": "block(4, 1, 0.75)", "2": "block(8, 1)"})
    assert [str(view.terms[0].pattern) for view in program.linears()] == ["block(4, 1, 0.75)", "block(8, 1)"]


def test_a_pattern_for_all_weights_means_no_windows() -> None:
    net = nn.Sequential(nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 16, 3, padding=1)).eval()
    report = sparsecc.prune(net, "unstructured(0.5)")
    assert [row.name for row in report.rows] == ["0"] and set(report.skipped) == {"1", "2"}
    planned(net, torch.randn(1, 16, 8, 8), "unstructured(0.5)")
    with pytest.raises(PatternViolation, match=r"2.weight must be unstructured"):
        planned(net, torch.randn(1, 16, 8, 8), {"2": "unstructured(0.5)"})


def test_globs_are_checked_against_convolutions() -> None:
    net = nn.Sequential(nn.Conv2d(16, 32, 1)).eval()
    with pytest.raises(SpecError, match="'stem'"):
        planned(net, torch.randn(1, 16, 8, 8), {"stem": "unstructured(0.5)"})


def test_wanda_takes_norms_by_channel() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False)).eval()
    nn.init.ones_(net[0].weight)
    x = torch.randn(2, 4, 5, 5) * torch.tensor([1.0, 10.0, 0.1, 5.0]).view(1, 4, 1, 1)
    sparsecc.prune(net, "unstructured(0.5)", criterion="wanda", calibration=[x])
    assert net[0].weight[:, :, 0, 0].ne(0).all(0).tolist() == [False, True, False, True]


def test_what_torch_runs_faster_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_times", lambda *_: (2.0, 1.0))
    net, x = pruned(Net()), torch.randn(2, 3, 21, 26)
    compiled = sparsecc.compile(net, example_inputs=(x,), autotune="none", remainder="eager")
    program = compiled.graphs[0].history.program
    assert not set(targets(program)) & set(IMAGE_MEANINGS) and targets(program).count(LINEAR) == 1  # the last layer, no convolution
    assert targets(program).count(aten.convolution.default) == 6
    assert "torch's convolutions are faster" in compiled.explain().regions[1].reason
    close(compiled(x), exact(net, x))
