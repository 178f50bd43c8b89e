"""Channels and heads: scores against their definitions, what is coupled goes along, and what cannot be done is refused first."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsecc
from examples.models import bert_base, llama_stack
from sparsecc.errors import SpecError
from sparsecc.formats.pattern import parse_pattern


class Gated(nn.Module):
    """Pre-norm residual block with a gated FFN."""

    def __init__(self, dim: int = 8, ffn: int = 12, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.gate, self.up, self.down = nn.Linear(dim, ffn, bias=bias), nn.Linear(dim, ffn, bias=bias), nn.Linear(ffn, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x_ = self.norm(x)
        return x + self.down(F.silu(self.gate(x_)) * self.up(x_))


class Net(nn.Module):
    def __init__(self, bias: bool = True, ffn: int = 12) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.blocks = nn.ModuleList([Gated(ffn=ffn, bias=bias) for _ in range(3)])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Convs(nn.Module):
    """conv-BN-ReLU, depthwise, residual, a 1x1, pooling, a linear on flattened maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.expand, self.bn1 = nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)
        self.depth, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)
        self.project = nn.Conv2d(16, 8, 1)
        self.last = nn.Conv2d(8, 6, 3, groups=2)
        self.head = nn.Linear(6 * 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        y = F.relu6(self.bn1(self.expand(x)))
        x = x + self.project(F.relu6(self.bn2(self.depth(y))))
        return self.head(F.adaptive_avg_pool2d(self.last(x), 2).flatten(1))


def dead_rows(weight: Tensor) -> list[int]:
    return (weight.flatten(1) == 0).all(1).nonzero()[:, 0].tolist()


def dead_cols(weight: Tensor) -> list[int]:
    return dead_rows(weight.transpose(0, 1))


@pytest.mark.parametrize(("criterion", "power"), [("magnitude", 1), ("l1", 1), ("l2", 2)])
def test_norms_of_a_gated_ffn(criterion: Any, power: int) -> None:
    model = Net()
    before = copy.deepcopy(model)
    report = sparsecc.prune(model, {"blocks.*.up": "channels(0.3)"}, criterion, example_inputs=torch.randn(2, 4, 5))
    for new, old in zip(model.blocks, before.blocks, strict=True):
        assert isinstance(new, Gated) and isinstance(old, Gated)
        score = sum(w.abs().pow(power).sum(1) for w in (old.gate.weight, old.up.weight, old.down.weight.t()))
        gone = sorted(score.argsort()[: 12 - math.floor(12 * 0.7)].tolist())
        assert dead_rows(new.gate.weight) == dead_rows(new.up.weight) == dead_cols(new.down.weight) == gone
        assert bool((new.gate.bias[gone] == 0).all() and (new.up.bias[gone] == 0).all())
        kept = [i for i in range(12) if i not in gone]
        assert torch.equal(new.up.weight[kept], old.up.weight[kept]) and torch.equal(new.down.bias, old.down.bias)
    assert torch.equal(model.head.weight, before.head.weight) and torch.equal(model.embed.weight, before.embed.weight)
    assert {row.name: row.pattern for row in report.rows}["blocks.1.down"] == "channels(0.3) of blocks.1.up"
    assert "blocks.1.down" not in report.skipped
    assert parse_pattern("channels(0.3)").mask_violation(model.blocks[0].up.weight) is None


def test_what_is_coupled_changes_nothing_beyond_the_named_rows() -> None:
    model, x = Net(), torch.randn(2, 4, 5)
    masked = copy.deepcopy(model)
    sparsecc.prune(model, {"blocks.*.up": "channels(0.5)"}, "l2", example_inputs=x)
    with torch.no_grad():
        for old, new in zip(masked.blocks, model.blocks, strict=True):
            gone = dead_rows(new.up.weight)
            old.up.weight[gone] = 0  # the named rows alone
            old.up.bias[gone] = 0
    assert torch.equal(model(x), masked(x))


def test_taylor_is_the_first_order_change_of_the_loss() -> None:
    model = Net().requires_grad_(False)
    batches = [torch.randn(2, 4, 5) for _ in range(3)]
    expected = [torch.zeros(12, dtype=torch.float64) for _ in range(3)]
    for x in batches:
        hidden: list[Tensor] = []


        def see(module: nn.Module, args: tuple[Tensor, ...], hidden: list[Tensor] = hidden) -> None:
            hidden.append(args[0])
            args[0].retain_grad()

        hooks = [b.down.register_forward_pre_hook(see) for b in model.blocks]
        model.requires_grad_(True)(x).square().sum().backward()
        for hook in hooks:
            hook.remove()
        for total, h in zip(expected, hidden, strict=True):
            assert h.grad is not None
            total += (h * h.grad).sum((0, 1)).double() ** 2
    model.zero_grad()
    model.requires_grad_(False)
    report = sparsecc.prune(model, {"blocks.*.up": "channels(0.25)"}, "taylor", batches, loss=lambda y, x: y.square().sum())
    for block, score in zip(model.blocks, expected, strict=True):
        assert dead_rows(block.up.weight) == sorted(score.argsort()[:3].tolist())
    assert len(report.rows) == 9 and not any(p.requires_grad for p in model.parameters())


def test_cfsp_scores_and_widths() -> None:
    model = Net(bias=False, ffn=40)
    with torch.no_grad():
        model.blocks[1].down.weight *= 20  # this block turns its input much more
    before, batches = copy.deepcopy(model), [torch.randn(2, 4, 5), torch.randn(1, 7, 5)]
    sparsecc.prune(model, {"blocks.*.up": "channels"}, "cfsp", batches, budget=sparsecc.flops(0.6, most=0.9))
    angles, acts = [], []
    with torch.no_grad():
        for block in before.blocks:
            seen: list[tuple[Tensor, Tensor]] = []
            h: list[Tensor] = []
            hooks = [block.register_forward_hook(lambda m, a, y, seen=seen: seen.append((a[0], y))),
                     block.down.register_forward_pre_hook(lambda m, a, h=h: h.append(a[0].flatten(0, 1)))]  # fmt: skip
            for x in batches:
                before(x)
            for hook in hooks:
                hook.remove()
            x_in, x_out = (torch.cat([s[i].flatten(0, 1) for s in seen]).double() for i in (0, 1))
            cos = (x_in * x_out).sum(1) / x_in.norm(dim=1) / x_out.norm(dim=1)
            angles.append(float((cos.clamp(-1, 1).arccos() / math.pi).mean()))
            acts.append(torch.cat(h).norm(dim=0))
    widths = [40 - len(dead_rows(b.up.weight)) for b in model.blocks]
    ratios = [1 / (1 + math.exp(-26.2 * (a - sum(angles) / 3))) for a in angles]
    assert sorted(range(3), key=lambda i: widths[i]) == sorted(range(3), key=lambda i: ratios[i])
    assert widths[1] / widths[0] == pytest.approx(min(ratios[1] / ratios[0], 40 / widths[0]), rel=0.15)
    for block, new, act in zip(before.blocks, model.blocks, acts, strict=True):
        g, u, d = (w.abs() for w in (block.gate.weight, block.up.weight, block.down.weight))
        share = (d / d.sum(1, keepdim=True)).mean(0) + (u / u.sum(0)).mean(1) + (g / g.sum(0)).mean(1)
        gone = 40 - (40 - len(dead_rows(new.up.weight)))
        assert dead_rows(new.up.weight) == sorted((share * act).argsort()[:gone].tolist())
    dense = 5 * 8 + 3 * 3 * 8 * 40 + 8 * 3
    assert 0.53 * dense < 5 * 8 + 3 * 8 * sum(widths) + 8 * 3 <= 0.6 * dense


def llama(**config: Any) -> Any:
    return llama_stack(32, 48, 2, heads=4, kv_heads=2, vocab=40, **config)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_query_heads_leave_evenly_from_key_value_groups(attn: str) -> None:
    model, ids = llama(attn=attn), torch.randint(40, (2, 5))
    before = copy.deepcopy(model)
    sparsecc.prune(model, {"*.q_proj": "heads(0.5, 8)"}, "l2", example_inputs=ids)
    for new, old in zip(model.model.layers, before.model.layers, strict=True):
        q, o = old.self_attn.q_proj.weight, old.self_attn.o_proj.weight
        score = q.square().view(4, 8, 32).sum((1, 2)) + o.square().view(32, 4, 8).sum((0, 2))
        gone = [min((0, 1), key=lambda h: score[h]), min((2, 3), key=lambda h: score[h])]
        rows = [8 * h + i for h in gone for i in range(8)]
        assert dead_rows(new.self_attn.q_proj.weight) == rows == dead_cols(new.self_attn.o_proj.weight)
        assert torch.equal(new.self_attn.k_proj.weight, old.self_attn.k_proj.weight)
    with torch.no_grad():
        for layer, pruned in zip(before.model.layers, model.model.layers, strict=True):
            layer.self_attn.o_proj.weight[:, dead_cols(pruned.self_attn.o_proj.weight)] = 0
    assert torch.equal(model(ids).logits, before(ids).logits)  # q rows of such heads compute nothing


def test_key_value_heads_take_their_query_heads_along() -> None:
    model = llama()
    sparsecc.prune(model, {"*.k_proj": "heads(0.5, 8)"}, "l1", example_inputs=torch.randint(40, (1, 5)))
    attn = model.model.layers[0].self_attn
    (first, *_), rows = dead_rows(attn.k_proj.weight), dead_rows(attn.q_proj.weight)
    assert dead_rows(attn.k_proj.weight) == dead_rows(attn.v_proj.weight) == list(range(first, first + 8))
    assert rows == dead_cols(attn.o_proj.weight) == list(range(2 * first, 2 * first + 16))


def test_bert_heads_with_biases() -> None:
    model = bert_base(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24, vocab_size=30)
    inputs = {"input_ids": torch.randint(30, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    for name, p in model.named_parameters():
        nn.init.normal_(p, std=0.1) if name.endswith("bias") else None
    spec = {"*.query": "heads(0.25, 8)", "*.intermediate.dense": "channels(0.25)"}
    sparsecc.prune(model, spec, "l2", example_inputs=inputs)
    layer = model.encoder.layer[0]
    rows = dead_rows(layer.attention.self.query.weight)
    assert bool(layer.attention.output.dense.bias.ne(0).all())
    assert len(rows) == 8 and rows == dead_rows(layer.attention.self.value.weight) == dead_cols(layer.attention.output.dense.weight)
    assert bool((layer.attention.self.value.bias[rows] == 0).all())
    assert dead_rows(layer.intermediate.dense.weight) == dead_cols(layer.output.dense.weight)


def test_convolutions_batch_norms_depthwise_and_residuals() -> None:
    model, x = Convs().eval(), torch.randn(2, 3, 6, 6)
    for bn in (model.bn, model.bn1, model.bn2):
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
        bn.running_mean.normal_()
    sparsecc.prune(model, {"expand": "channels(0.25)", "stem": "channels(0.25)", "project": "channels(0.25)"}, "l2", example_inputs=x)
    gone = dead_rows(model.expand.weight)
    assert len(gone) == 4 and gone == dead_rows(model.depth.weight) == dead_cols(model.project.weight)
    assert bool((model.bn1.bias[gone] == 0).all() and (model.bn2.bias[gone] == 0).all() and (model.bn2.weight[gone] == 0).all())
    stream = dead_rows(model.stem.weight)
    assert len(stream) == 2 and stream == dead_rows(model.project.weight) == dead_cols(model.expand.weight)
    for c in stream:  # a grouped convolution reads channel c in one of its groups
        rows = slice(0, 3) if c < 4 else slice(3, 6)
        assert bool((model.last.weight[rows, c % 4] == 0).all())
    small = nn.Conv2d(3, 6, 3, padding=1)  # the sliced stem computes the same
    kept = [c for c in range(8) if c not in stream]
    small.weight.data, small.bias.data = model.stem.weight.data[kept], model.stem.bias.data[kept]
    assert torch.allclose(model.stem(x)[:, kept], small(x), atol=1e-6)
    assert bool((model.bn(model.stem(x))[:, stream] == 0).all())


def test_flattened_maps_and_the_head_of_a_linear() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 5))
    sparsecc.prune(model, {"0": "channels(0.25)"}, "l1", example_inputs=torch.randn(1, 2, 3, 3))
    (c,) = dead_rows(model[0].weight)
    assert dead_cols(model[3].weight) == list(range(9 * c, 9 * c + 9))


def test_a_budget_is_shared_out_by_score_and_cost() -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    before, x = copy.deepcopy(model), torch.randn(8, 16)
    sparsecc.prune(model, {"0": "channels", "2": "channels"}, "l2", example_inputs=x, budget=sparsecc.flops(0.5, multiple=4))
    a, b = (64 - len(dead_rows(model[i].weight)) for i in (0, 2))
    dense = 16 * 64 + 64 * 64 + 64 * 4
    assert a % 4 == b % 4 == 0 and 16 * a + a * b + b * 4 <= 0.5 * dense
    assert 16 * a + a * b + b * 4 > 0.4 * dense
    calls: list[tuple[int, int, int]] = []

    def cost(N: int, K: int, M: int) -> float:
        calls.append((N, K, M))
        return float(N * (1 + (K == 16)))  # only the first layer's and the second's rows matter

    sparsecc.prune(before, {"0": "channels", "2": "channels"}, "l2", example_inputs=x, budget=sparsecc.latency(0.6, cost=cost))
    assert (64, 64, 8) in calls
    a, b = (64 - len(dead_rows(before[i].weight)) for i in (0, 2))
    assert 2 * a + b + 4 <= 0.6 * (128 + 64 + 4) and 2 * a < b * 2  # rows of the first layer save twice as much


def test_predicted_latency_falls() -> None:
    from sparsecc.autotune.cost import Machine, predict_dense

    machine = Machine(5e10, 1e10, 1, 5e10)
    model, x = nn.Sequential(nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 64)), torch.randn(256, 64)

    def time(n: int, k: int, m: int) -> float:
        return predict_dense(n, k, m, machine)

    sparsecc.prune(model, {"0": "channels"}, "l1", example_inputs=x, budget=sparsecc.latency(0.6, cost=time))
    kept = 2048 - len(dead_rows(model[0].weight))
    share = (time(kept, 64, 256) + time(64, kept, 256)) / (time(2048, 64, 256) + time(64, 2048, 256))
    assert 0.59 < share <= 0.6


def test_groups_by_hand_are_the_groups_that_are_found() -> None:
    one = llama()
    other, ids = copy.deepcopy(one), torch.randint(40, (1, 5))
    spec = {"*.up_proj": "channels(0.25)", "*.q_proj": "heads(0.5, 8)"}
    sparsecc.prune(one, spec, "l2", example_inputs=ids)
    by_hand = [
        sparsecc.Coupled(("*.layers.{}.mlp.gate_proj", "*.layers.{}.mlp.up_proj"), ("*.layers.{}.mlp.down_proj",)),
        sparsecc.Coupled(("*.layers.{}.*.q_proj",), ("*.layers.{}.*.o_proj",), ("*.layers.{}.*.[kv]_proj",)),
    ]
    sparsecc.prune(other, spec, "l2", groups=by_hand)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


class Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).sort(-1).values)


REFUSALS: list[tuple[Any, Any, dict[str, Any], str]] = [
    (Net, {"head": "channels(0.3)"}, {}, "head.weight: its channels stay, because they are an output"),
    (Net, {"blocks.1.down": "channels(0.3)"}, {}, "embed.weight, .*write the same channels: name all"),
    (Net, {"blocks.0.up": "channels(0.99)"}, {}, "would leave none of its 12 channels"),
    (Net, {"blocks.0.up": "channels"}, {}, "channels fixes no sparsity.*budget="),
    (Net, {"blocks.0.up": "channels(0.5)"}, {"budget": sparsecc.flops(0.5)}, "fixes a sparsity and so does"),
    (Net, {"blocks.0.up": "channels"}, {"budget": sparsecc.flops(0.1)}, "out of reach: .*Name more layers"),
    (Net, {"blocks.0.up": "channels(0.5)", "blocks.0.gate": "channels(0.25)"}, {}, "one group of channels but are to be"),
    (Net, {"blocks.0.up": "heads(0.5, 4)"}, {}, "computes no attention heads"),
    (Net, {"blocks.0.up": "channels(0.5)"}, {"criterion": "taylor"}, "needs calibration"),
    (Net, {"blocks.0.up": "channels(0.5)"}, {"criterion": "taylor", "calibration": [torch.randn(1, 2, 5)]}, "needs a loss"),
    (Net, {"blocks.0.up": "channels(0.5)"}, {"criterion": "wanda", "calibration": [torch.randn(1, 2, 5)]}, "compares entries of one"),
    (Net, {"blocks.0.up": "rows(0.5)"}, {"criterion": "taylor"}, "scores channels and heads, not rows"),
    (Net, {"blocks.0.up": "channels(0.5)"}, {"example_inputs": None}, "give example_inputs= or"),
    (Net, {"blocks.0.up": "rows(0.5)"}, {"budget": sparsecc.flops(0.5)}, "the spec names none"),
    (Net, {"blocks.0.up": "channels(0.5)"}, {"groups": [sparsecc.Coupled(("blocks.0.up",), ("head",))]}, "head has 8 channels"),
    (Sorted, {"a": "channels(0.5)"}, {"example_inputs": torch.randn(2, 4)}, "a.weight: its channels stay, because sort has no rule"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "spec", "options", "message"), REFUSALS)
def test_refusals_come_before_any_change(make: Any, spec: Any, options: dict[str, Any], message: str) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SpecError, match=message):
        sparsecc.prune(model, spec, **{"criterion": "l2", "example_inputs": torch.randn(2, 4, 5), **options})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_scores_that_are_not_finite_are_refused_by_name() -> None:
    model = Net()
    with torch.no_grad():
        model.blocks[1].down.weight[2, 5] = torch.nan
    with pytest.raises(SpecError, match=r"blocks.1.up.weight: unit 5 of 12 has the score nan"):
        sparsecc.prune(model, {"blocks.*.up": "channels(0.5)"}, "l1", example_inputs=torch.randn(2, 4, 5))


def test_heads_that_do_not_divide() -> None:
    with pytest.raises(SpecError, match=r"its heads have 8 rows, not 16: name it as heads\(sparsity, 8\)"):
        sparsecc.prune(llama(), {"*.q_proj": "heads(0.5, 16)"}, example_inputs=torch.randint(40, (1, 5)))
    with pytest.raises(SpecError, match="those of attention heads"):
        sparsecc.prune(llama(), {"*.v_proj": "channels(0.5)"}, example_inputs=torch.randint(40, (1, 5)))
    grouped = [sparsecc.Coupled(("*.{}.*.q_proj",), ("*.{}.*.o_proj",), ("*.{}.*.k_proj", "*.{}.*.v_proj"))]
    with pytest.raises(SpecError, match="which do not divide"):
        sparsecc.prune(llama(), {"*.q_proj": "heads(0.5, 12)"}, groups=grouped)


def test_a_bare_pattern_leaves_alone_what_it_cannot_prune() -> None:
    model = Net()
    report = sparsecc.prune(model, "channels(0.25)", "l2", example_inputs=torch.randn(2, 4, 5), exclude=())
    assert {row.name for row in report.rows} >= {"blocks.0.up", "blocks.2.down", "embed"}
    assert report.skipped == {"head": "its channels stay, because they are an output of the model"}


def test_one_weight_of_two_layers_is_pruned_the_same_in_both() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    model[2].weight = model[0].weight
    with pytest.raises(SpecError, match="0 and 2 share one weight"):
        sparsecc.prune(model, {"0": "channels(0.5)", "2": "channels(0.3)"}, example_inputs=torch.randn(1, 6))
    sparsecc.prune(model, {"0": "channels(0.5)"}, example_inputs=torch.randn(1, 6))
    gone = dead_rows(model[0].weight)
    assert len(gone) == 3 and dead_cols(model[4].weight) == gone and set(gone) <= set(dead_cols(model[2].weight))


def test_the_pruned_model_compiles_under_the_same_spec() -> None:
    model, ids = llama(), torch.randint(40, (2, 5))
    spec = {"*.up_proj": "channels(0.25)", "*.q_proj": "heads(0.5, 8)"}
    sparsecc.prune(model, spec, "l2", example_inputs=ids)
    model.config.use_cache = False
    compiled = sparsecc.compile(model, target="reference", sparsity=spec, example_inputs=(ids,), remainder="eager")
    assert torch.allclose(compiled(ids).logits, model(ids).logits, atol=1e-5)
