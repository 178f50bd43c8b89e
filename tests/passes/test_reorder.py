"""Permutations are found and absorbed: planted blocks and N:M groups come back, outputs stay, and what stops them is said."""
from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsecc
from sparsecc.capture import capture
from sparsecc.errors import PatternViolation
from sparsecc.formats import measure, parse_pattern
from sparsecc.formats.ordering import block_order, nm_order, nm_possible, siblings
from sparsecc.ir.program import Program
from sparsecc.passes import PIPELINE
from sparsecc.passes.context import Context
from sparsecc.passes.dims import Stop
from sparsecc.passes.manager import run_passes
from sparsecc.passes.reorder import Reorder
from sparsecc.passes.wires import Wires
from sparsecc.spec import SparsitySpec
from tests.slices.nets import network


def blocks(rows: int, columns: int, height: int, width: int = 1, density: float = 0.15) -> Tensor:
    """bool [rows, columns]: whole blocks, each kept by chance."""
    return (torch.rand(rows // height, columns // width) < density).repeat_interleave(height, 0).repeat_interleave(width, 1)


def two_of_four(rows: int, columns: int) -> Tensor:
    """bool [rows, columns], exactly 2 in each 4."""
    mask = torch.zeros(rows, columns // 4, 4)
    return mask.scatter_(2, torch.rand(mask.shape).topk(2).indices, 1).view(rows, columns).bool()


class Ffn(nn.Module):
    """up, perhaps gated, down; `chunk`: gate and up are one matrix."""

    def __init__(self, form: str = "plain", width: int = 32, hidden: int = 64) -> None:
        super().__init__()
        self.form = form
        self.up = nn.Linear(width, 2 * hidden if form == "chunk" else hidden)
        self.gate = nn.Linear(width, hidden) if form == "gated" else None
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Any:
        if self.form == "chunk":
            a, b = self.up(x).chunk(2, -1)
            return self.down(F.silu(a) * b)
        h = F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        return (self.down(h), h) if self.form == "returned" else self.down(h)


class Heads(nn.Module):
    """Attention of 4 heads of 16 over 2 of keys and values."""

    def __init__(self, groups: int = 2, rotary: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(32, 64), nn.Linear(32, 16 * groups), nn.Linear(32, 16 * groups), nn.Linear(64, 32)
        self.rotary = rotary

    def forward(self, x: Tensor) -> Tensor:
        B, S, _ = x.shape
        q, k, v = (m(x).view(B, S, -1, 16).transpose(1, 2) for m in (self.q, self.k, self.v))
        if self.rotary:
            angle = torch.arange(S)[:, None] * torch.linspace(1, 0.1, 8).repeat(2)
            q, k = ((t * angle.cos() + torch.cat([-t[..., 8:], t[..., :8]], -1) * angle.sin()) for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != 4)
        return self.o(y.transpose(1, 2).reshape(B, S, 64))


def masked(layer: nn.Module, mask: Tensor) -> None:
    """Zeros in place; a convolution's window is a column each."""
    weight: Tensor = layer.weight.data  # type: ignore[assignment]
    weight *= mask.view(weight.shape) if mask.numel() == weight.numel() else mask[:, :, None, None]


def compiled_of(model: nn.Module, *inputs: Tensor, sparsity: Any = None) -> Any:
    """Compiled for the reference target, and checked."""
    model.eval().requires_grad_(False)
    compiled = sparsecc.compile(model, "reference", sparsity, example_inputs=inputs, autotune="none", remainder="eager")
    for got, want in zip(*((r,) if isinstance(r, Tensor) else r for r in (compiled(*inputs), model(*inputs))), strict=False):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    return compiled


def patterns(compiled: Any) -> dict[str, str]:
    return {r.name: r.pattern for r in compiled.explain().regions}


def said(compiled: Any) -> str:
    return " ".join(str(compiled.explain()).split())


@pytest.mark.parametrize("height", [4, 8, 16])
@pytest.mark.parametrize("form", ["plain", "gated", "chunk"])
def test_blocks_of_shuffled_neurons_are_found(form: str, height: int) -> None:
    torch.manual_seed(height)
    model, order = Ffn(form), torch.randperm(64)
    masked(model.up, torch.cat([blocks(64, 32, height)[order] for _ in range(2 if form == "chunk" else 1)]))
    if model.gate is not None:
        masked(model.gate, blocks(64, 32, height)[order])
    found = compiled_of(model, torch.randn(5, 32))
    name = next(name for name in patterns(found) if "up" in name)
    assert patterns(found)[name] == f"block({height}, 1)"
    assert f"block({height}, 1) after reordering 64 neurons or channels" in said(found)


def test_blocks_with_a_few_zeros_of_their_own_are_found() -> None:
    torch.manual_seed(0)
    model = Ffn(width=64, hidden=128)
    masked(model.up, blocks(128, 64, 4)[torch.randperm(128)] & (torch.rand(128, 64) < 0.96))
    assert patterns(compiled_of(model, torch.randn(5, 64)))["up"] == "block(4, 1)"


def test_square_blocks_are_found_one_side_at_a_time() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
    masked(model[2], blocks(64, 64, 4, 4)[torch.randperm(64)][:, torch.randperm(64)])
    assert patterns(compiled_of(model, torch.randn(5, 16)))["2"] == "block(4, 4)"


def test_a_required_pattern_may_hold_up_to_an_order() -> None:
    torch.manual_seed(0)
    model, mask = Ffn(), two_of_four(32, 64)[:, torch.randperm(64)]
    masked(model.down, mask)
    found = compiled_of(model, torch.randn(5, 32), sparsity={"down": "2:4"})
    assert "nm(2, 4) after reordering 64 neurons" in said(found)
    model.down.weight.data[0, mask[0].logical_not().nonzero()[:1, 0]] = 1.0
    with pytest.raises(PatternViolation, match=r"down.weight must be nm\(2, 4\)"):
        compiled_of(model, torch.randn(5, 32), sparsity={"down": "2:4"})


@pytest.mark.parametrize("groups", [4, 2])
def test_features_of_a_head_move_within_it(groups: int) -> None:
    torch.manual_seed(0)
    model = Heads(groups)
    inside = torch.cat([16 * g + torch.randperm(16) for g in range(groups)])
    masked(model.v, blocks(16 * groups, 32, 4)[inside])
    assert patterns(compiled_of(model, torch.randn(2, 5, 32)))["v"] == "block(4, 1)"
    model = Heads(groups)
    masked(model.k, blocks(16 * groups, 32, 4)[inside])
    assert patterns(compiled_of(model, torch.randn(2, 5, 32)))["k"] == "block(4, 1)", "queries follow their keys"


def test_rotary_features_stay_and_say_so() -> None:
    torch.manual_seed(0)
    model = Heads(4, rotary=True)
    masked(model.k, blocks(64, 32, 4)[torch.cat([16 * g + torch.randperm(16) for g in range(4)])])
    found = compiled_of(model, torch.randn(2, 5, 32))
    assert patterns(found)["k"] == "unstructured"
    assert "alike rows stay where they are: it meets a value whose entries are not told apart" in said(found)


class Convs(nn.Module):
    """conv, batch norm, depthwise, 1 x 1, flatten, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(8, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.each, self.out, self.head = nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 16, 1), nn.Linear(16 * 4, 5)
        self.bn.running_mean.normal_()  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.each(F.relu(self.bn(self.first(x)))))
        return self.head(F.adaptive_avg_pool2d(F.relu(self.out(x)), 2).flatten(1))


def test_channels_move_through_norms_depthwise_filters_and_flattening() -> None:
    torch.manual_seed(0)
    model = Convs()
    masked(model.first, blocks(32, 72, 4)[torch.randperm(32)])
    masked(model.out, blocks(16, 32, 4)[torch.randperm(16)])
    found = patterns(compiled_of(model, torch.randn(2, 8, 6, 6)))
    assert found["first"] == "block(4, 1)" and found["out"] == "block(4, 1)"


def test_outputs_of_the_model_stay_and_say_so() -> None:
    torch.manual_seed(0)
    model = Ffn("returned")
    masked(model.up, blocks(64, 32, 4)[torch.randperm(64)])
    found = compiled_of(model, torch.randn(5, 32))
    assert patterns(found)["up"] == "unstructured"
    assert "alike rows stay where they are: the model returns it" in said(found)


def test_tied_weights_move_together_or_not_at_all() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mix, self.head = nn.Embedding(32, 64), nn.Linear(64, 64), nn.Linear(64, 32, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.relu(self.mix(self.table(ids))))

    torch.manual_seed(0)
    model = Tied()
    masked(model.mix, blocks(64, 64, 4)[torch.randperm(64)])
    found = compiled_of(model, torch.randint(0, 32, (2, 5)))
    program: Program = found.graphs[0].history.program
    tables = [n for n in program.graph.nodes if n.op == "get_attr" and program.const(n).shape == (32, 64)]
    assert patterns(found)["mix"] == "block(4, 1)" and len(tables) == 1, "the table is stored once, in the order of both"


def test_a_residual_stream_with_a_reader_that_cannot_follow_stays() -> None:
    class Stream(nn.Module):
        def __init__(self, last: Any) -> None:
            super().__init__()
            self.start, self.a, self.b, self.last = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 8), last

        def forward(self, x: Tensor) -> Tensor:
            x = self.start(x)
            return self.last(F.layer_norm(x + torch.relu(self.a(x)), (64,))), self.b(x)  # type: ignore[return-value]

    torch.manual_seed(0)
    mask = blocks(64, 64, 4)[torch.randperm(64)]
    for last, want in ((nn.Linear(64, 3), "block(4, 1)"), (lambda x: torch.flip(x, [-1]), "unstructured")):
        model = Stream(last)
        masked(model.a, mask)
        found = compiled_of(model, torch.randn(5, 8))
        assert patterns(found)["a"] == want
    assert "aten.flip.default: there is no rule for it" in said(found)


def test_what_has_an_order_already_or_none_is_left() -> None:
    torch.manual_seed(0)
    for mask in (blocks(64, 32, 4), torch.rand(64, 32) < 0.1):
        model = Ffn().eval().requires_grad_(False)
        masked(model.up, mask)
        program = capture(model, (torch.randn(5, 32),)).program
        history = run_passes(program, PIPELINE, Context(), stop_after="reorder")
        before, after = (history.after(stage).program for stage in ("canonicalize", "reorder"))
        assert [str(n.target) for n in before.graph.nodes] == [str(n.target) for n in after.graph.nodes]


@pytest.mark.parametrize("seed", range(14))
def test_any_choice_within_the_cells_leaves_the_network_as_it_was(seed: int) -> None:
    """Not only orders that pay: everything that may change places does, at random, in networks with heads, norms, gates, convolutions."""
    model, _, x = network(seed)
    program = run_passes(capture(model, (x,)).program, PIPELINE, Context(), stop_after="canonicalize").program
    wires = Wires(program)
    found, target = wires.found(), torch.arange(wires.count)
    label = found.label.unique()
    for cell in found.cell[label].unique().tolist():
        members = label[found.cell[label] == cell]
        if cell >= 0 and len(members) > 1:
            target[members] = members[torch.randperm(len(members))]
    try:
        orders = wires.moved(found, target)
    except Stop:
        pytest.fail("cells allow what the program does not")
    before, moved = program.run(x), 0
    for use, order in zip(wires.uses, orders, strict=True):
        tensor = program.const(use.const)
        for axis, index in enumerate(order):
            assert index.sort().values.equal(torch.arange(len(index))), "a pure permutation"
            moved += not index.equal(torch.arange(len(index)))
            tensor = tensor.index_select(axis, index)
        with_order = program.add_const("moved", tensor)
        use.user.replace_input_with(use.const, with_order)
    program.gm.recompile()
    torch.testing.assert_close(program.run(x), before, rtol=2e-5, atol=2e-5)
    assert moved, "nothing moved"


def test_a_wrong_choice_is_refused() -> None:
    program = run_passes(capture(Heads(4).eval().requires_grad_(False), (torch.randn(2, 5, 32),)).program, PIPELINE, Context(),
                         stop_after="canonicalize").program
    wires = Wires(program)
    found, target = wires.found(), torch.arange(wires.count)
    value = next(use for use in wires.uses if wires.program.weight_name(use.const) == "v.weight")
    a, b = found.label[value.ends[0]][[0, 16]].tolist()  # of two heads
    target[[a, b]] = torch.tensor([b, a])
    with pytest.raises(Stop):
        wires.moved(found, target)


def test_skipping_by_neuron_keeps_their_numbers() -> None:
    torch.manual_seed(0)
    model = Ffn()
    masked(model.up, blocks(64, 32, 4)[torch.randperm(64)])
    program = capture(model.eval().requires_grad_(False), (torch.randn(5, 32),)).program
    program = run_passes(program, PIPELINE, Context(SparsitySpec.parse({"*": sparsecc.neurons()})), stop_after="canonicalize").program
    text = str(program.graph)
    Reorder().run(program, Context(SparsitySpec.parse({"*": sparsecc.neurons()})))
    assert str(program.graph) == text


def test_orders_of_masks() -> None:
    torch.manual_seed(0)
    for rows in range(1, 19):
        assert sorted(block_order(torch.rand(rows, 9) < 0.3).tolist()) == list(range(rows))
    mask = blocks(128, 96, 8)[torch.randperm(128)]
    assert str(measure(mask[block_order(mask)].float()).explain()) == "block(8, 1)"
    assert sorted(block_order(mask).tolist()) == list(range(128))
    assert siblings(mask.float()) == 1 and siblings((torch.rand(128, 96) < 0.1).float()) < 0.1
    pairs = two_of_four(96, 64)[:, torch.randperm(64)]
    order = nm_order(pairs, 2, 4)
    assert order is not None and parse_pattern("2:4").mask_violation(pairs[:, order].float()) is None
    random = torch.zeros(96, 64).scatter_(1, torch.rand(96, 64).topk(32).indices, 1)
    assert nm_order(random.bool(), 2, 4) is None and not nm_possible(random, 2, 4) and nm_possible(pairs.float(), 2, 4)
