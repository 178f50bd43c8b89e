"""What must not be cut, or only with care: outputs, ops without a rule, writes, shared weights, norms, padding, groups; what is said."""
from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsecc
from sparsecc.errors import SpecError
from sparsecc.explain import Explanation


class Net(nn.Module):
    """up, something, down."""

    def __init__(self, middle: Any = F.relu, hidden: int = 8) -> None:
        super().__init__()
        self.up, self.down, self.middle = nn.Linear(4, hidden), nn.Linear(hidden, 3), middle

    def forward(self, x: Tensor) -> Any:
        return self.down(self.middle(self.up(x)))


def dead(model: Net, rows: list[int]) -> Net:
    """Rows of `up` that are zero."""
    model.up.weight.data[rows] = 0
    model.up.bias.data[rows] = 0
    return model


def compiled_of(model: nn.Module, *inputs: Tensor) -> Any:
    """Compiled for the reference target, and checked."""
    model.eval().requires_grad_(False)
    compiled = sparsecc.compile(model, "reference", example_inputs=inputs, autotune="none", remainder="eager")
    torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=2e-5, atol=2e-5)
    return compiled


def weights(compiled: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that are left."""
    program = compiled.graphs[0].history.program
    return {program.weight_name(n): tuple(program.const(n).shape) for n in program.graph.nodes
            if n.op == "get_attr" and program.weight_name(n).endswith("weight")}


def test_a_dimension_that_is_an_output_stays_and_says_so() -> None:
    class Both(Net):
        def forward(self, x: Tensor) -> Any:
            h = F.relu(self.up(x))
            return self.down(h), h

    compiled = compiled_of(dead(Both(), [1, 2]), torch.randn(5, 4))
    assert weights(compiled)["up.weight"] == (8, 4)
    assert "up: 0 of 8 dropped, read by down; 2 dead ones stay: the model returns it" in " ".join(str(compiled.explain()).split())


def test_an_op_without_a_rule_stops_and_is_named() -> None:
    compiled = compiled_of(dead(Net(lambda h: torch.flip(h, [-1])), [1]), torch.randn(5, 4))
    assert weights(compiled)["up.weight"] == (8, 4)
    assert "aten.flip.default: there is no rule for it" in str(compiled.explain())


def test_a_layer_that_would_be_empty_keeps_one_entry_or_goes() -> None:
    model = dead(Net(), list(range(8)))
    assert weights(compiled_of(model, torch.randn(5, 4)))["up.weight"] == (1, 4)

    class Residual(Net):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.relu(self.up(x)))

    model = Residual()
    model.down = nn.Linear(8, 4)
    model.down.weight.data.zero_()
    assert not weights(compiled_of(model, torch.randn(5, 4))), "a branch that is constant is no branch"


def test_writes_and_views_of_them_stop() -> None:
    def write(h: Tensor) -> Tensor:
        h = h.clone()
        h[..., 0] = 1.0
        return h

    compiled_of(dead(Net(write), [0, 1]), torch.randn(5, 4))


def test_a_weight_shared_by_layers_of_other_masks_is_cut_for_each() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(12, 3)
            self.shared = nn.Linear(6, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.cat([self.shared(F.relu(self.a(x))), self.shared(F.relu(self.b(x)))], -1))

    model = Shared()
    model.a.weight.data[:2] = model.a.bias.data[:2] = 0
    model.b.weight.data[4] = model.b.bias.data[4] = 0
    compiled = compiled_of(model, torch.randn(5, 4))
    assert {k: v[0] for k, v in weights(compiled).items() if k in ("a.weight", "b.weight")} == {"a.weight": 4, "b.weight": 5}


@pytest.mark.parametrize("constant", [0.0, 2.0])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norms_keep_the_models_divisor(norm: str, constant: float) -> None:
    """Dead features are part of the statistics, as zeros or as constants."""
    made: Any = nn.LayerNorm(8) if norm == "layer" else nn.RMSNorm(8, eps=1e-3)
    model = Net(made)
    model.up.weight.data[[1, 4, 5]] = 0
    model.up.bias.data[[1, 4, 5]] = constant
    model.down.weight.data[:, [1, 4, 5]] = 0
    compiled = compiled_of(model, torch.randn(5, 4))
    assert weights(compiled)["up.weight"] == (5, 4)


def test_group_norms_lose_whole_groups_only() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.norm(self.a(x)))

    model = Grouped()
    model.b.weight.data[:, [0, 1, 4]] = 0
    compiled = compiled_of(model, torch.randn(2, 3, 4, 4))
    assert weights(compiled)["a.weight"] == (6, 3, 1, 1)
    assert "part of a group norm's statistics" in str(compiled.explain())


def test_a_constant_does_not_pass_zero_padding() -> None:
    class Padded(nn.Module):
        def __init__(self, padding: int) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 3, padding=padding)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.gelu(self.a(x)))

    for padding, left in ((0, 4), (1, 6)):
        model = Padded(padding)
        model.a.weight.data[[0, 3]] = 0
        compiled = compiled_of(model, torch.randn(2, 3, 6, 6))
        assert weights(compiled)["a.weight"][0] == left
    assert "a constant that padding interrupts" in str(compiled.explain())


def test_groups_of_a_convolution_stay_equal() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=2), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.relu(self.b(F.relu(self.a(x)))))

    model = Grouped()
    model.c.weight.data[:, [0, 1, 3]] = 0  # two of the first group, one of the second
    compiled = compiled_of(model, torch.randn(2, 3, 6, 6))
    assert weights(compiled)["b.weight"][0] == 4


def test_a_tied_embedding_is_cut_for_both_uses() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.mlp = nn.Embedding(11, 6), Net()
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.emb(ids)))

    model = Tied()
    model.emb.weight.data[:, [2, 3]] = 0
    compiled = compiled_of(model, torch.randint(0, 11, (2, 5)))
    program = compiled.graphs[0].history.program
    assert [tuple(program.const(n).shape) for n in program.graph.nodes if n.op == "get_attr"] == [(11, 4)], "one constant for both"


def test_nothing_dead_changes_nothing() -> None:
    compiled = compiled_of(Net(), torch.randn(5, 4))
    assert compiled.ir("propagate").split("\n", 1)[1] == compiled.ir("select").split("\n", 1)[1]
    assert "slices" not in str(compiled.explain())


def test_explanations_keep_their_groups_when_saved(tmp_path: Any) -> None:
    found = compiled_of(dead(Net(), [1]), torch.randn(5, 4)).explain()
    found.save(tmp_path / "found.json")
    assert list(Explanation.load(tmp_path / "found.json").dims) == list(found.dims)


def test_the_picture_shows_what_was_cut() -> None:
    pytest.importorskip("matplotlib")
    compiled = compiled_of(dead(Net(), [1]), torch.randn(5, 4))
    assert compiled.graph("png").startswith(b"\x89PNG")
    assert b"<svg" in compiled.graph("svg")
    with pytest.raises(SpecError, match="use 'png' or 'svg'"):
        compiled.graph("pdf")
