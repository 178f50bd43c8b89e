"""Importers: synthetic checkpoints made from the descriptions of published methods, against the method's own arithmetic."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import sparsecc
from examples.models import llama_stack
from sparsecc.errors import CheckpointError
from sparsecc.formats import Cols, Rows
from sparsecc.importers import load
from sparsecc.prune import slicegpt

IDS = torch.arange(12).view(2, 6)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def llama(kv_heads: int = 2) -> Any:
    return llama_stack(16, 24, 2, heads=4, kv_heads=kv_heads, vocab=20)


def test_torch_masks_in_a_module_and_in_a_checkpoint() -> None:
    masked, plain, x = mlp(), mlp(), torch.randn(3, 6)
    torch_prune.ln_structured(masked[0], "weight", 0.25, 2, 0)
    torch_prune.ln_structured(masked[2], "weight", 0.5, 1, 1)
    expected, state = masked(x), masked.state_dict()
    assert "0.weight_orig" in state
    imported = load(plain, state)
    assert imported.convention == "torch-masks" and torch.equal(plain(x), expected)
    assert imported.patterns == {"0": Rows(0.25), "2": Cols(0.5)}
    again = load(masked)
    assert again.convention == "torch-masks" and torch.equal(masked(x), expected) and again.patterns == imported.patterns
    assert not hasattr(masked[0], "weight_orig") and isinstance(masked[0].weight, nn.Parameter)


def test_compressed_tensors_bitmasks() -> None:
    model, x = mlp(), torch.randn(3, 6)
    source = copy.deepcopy(model)
    sparsecc.prune(source, {"0": "unstructured(0.5)", "2": "2:4"})
    state: dict[str, Tensor] = {"0.bias": source[0].bias.detach(), "2.bias": source[2].bias.detach()}
    for name in ("0", "2"):
        weight = source.get_submodule(name).weight.detach()
        assert isinstance(weight, Tensor)
        rows = [[int(v != 0) for v in row] for row in weight.tolist()]
        packed = [[sum(bit << i for i, bit in enumerate(row[at : at + 8])) for at in range(0, len(row), 8)] for row in rows]
        values = weight[weight != 0]
        state |= {f"{name}.weight.shape": torch.tensor(weight.shape), f"{name}.weight.bitmask": torch.tensor(packed, dtype=torch.uint8),
                  f"{name}.weight.compressed": values if name == "0" else values.view(4, -1)}  # fmt: skip
    state["0.weight.row_offsets"] = torch.zeros(8, 1)
    imported = load(model, state)
    assert imported.convention == "compressed-tensors" and torch.equal(model(x), source(x))
    state["0.weight.compressed"] = state["0.weight.compressed"][1:]
    with pytest.raises(CheckpointError, match=r"0.weight: the bitmask keeps 24 values, but 23 are stored"):
        load(model, state)


def test_plain_zeros_sparse_tensors_and_smaller_modules() -> None:
    model, x = mlp(), torch.randn(3, 6)
    with torch.no_grad():
        model[0].weight[[1, 5]] = 0  # WGSEF: exact zero groups
    expected = model(x)
    state = {key: value.to_sparse() if value.ndim == 2 else value for key, value in model.state_dict().items()}
    other = mlp()
    imported = load(other, state)
    assert imported.convention == "plain" and imported.patterns == {"0": Rows(0.25)} and torch.equal(other(x), expected)
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse(), requires_grad=False)
    assert load(model).patterns == {"0": Rows(0.25)} and torch.equal(model(x), expected)
    convs = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))
    with torch.no_grad():
        convs[0].weight[2] = 0  # Beta-Rank: a filter
    assert load(convs).notes == ("0: 1 of 4 filters are zero",)
    small = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))  # torch-pruning: a module that is smaller already
    assert load(small).patterns == {} and load(small, small.state_dict()).convention == "plain"


def test_mask_sparsity_by_name_only() -> None:
    model, x = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval(), torch.randn(1, 2, 5, 5)
    bn = model[1]
    with torch.no_grad():
        bn.weight[:] = torch.tensor([1.0, 0.005, 0.7, -0.004, 0.2, 1.0])
        bn.bias[:] = torch.tensor([0.1, 0.02, 0.3, 0.01, 0.1, -0.1])
    before = copy.deepcopy(model)
    assert load(model).convention == "plain" and torch.equal(model(x), before(x))
    imported = load(model, convention="mask-sparsity")
    y = before[1](before[0](x))
    y[:, [1, 3]] = 0
    assert torch.allclose(model(x), before[3](y.relu()))
    assert imported.notes == ("1: 2 of 6 channels removed; each was at most 0.005 |x| + 0.02",)
    with pytest.raises(CheckpointError, match="none of its channels"):
        load(model, convention="mask-sparsity", threshold=2)
    with pytest.raises(CheckpointError, match="no batch norm"):
        load(mlp(), convention="mask-sparsity")


def test_cfsp_widths_of_their_own() -> None:
    model = llama()
    masked = copy.deepcopy(model)
    state, keep = copy.deepcopy(model.state_dict()), {0: [0, 3, 4, 9], 1: [1, 2, 5, 6, 8, 20]}
    for i, kept in keep.items():
        ffn, gone = masked.model.layers[i].mlp, [c for c in range(24) if c not in kept]
        with torch.no_grad():
            ffn.up_proj.weight[gone] = 0
        for name in ("gate_proj", "up_proj"):
            state[f"model.layers.{i}.mlp.{name}.weight"] = state[f"model.layers.{i}.mlp.{name}.weight"][kept]
        state[f"model.layers.{i}.mlp.down_proj.weight"] = state[f"model.layers.{i}.mlp.down_proj.weight"][:, kept]
    imported = load(model, state)
    assert imported.convention == "narrow" and model.model.layers[1].mlp.up_proj.out_features == 6
    assert torch.allclose(model(IDS).logits, masked(IDS).logits, atol=1e-6)
    wider = {**state, "lm_head.weight": torch.randn(21, 16)}
    with pytest.raises(CheckpointError, match=r"lm_head.weight is \[21, 16\] .* not narrower"):
        load(llama(), wider)


def test_narrow_convolutions() -> None:
    def net(width: int) -> nn.Sequential:
        depthwise = nn.Conv2d(width, width, 3, groups=width)
        return nn.Sequential(nn.Conv2d(2, width, 1), nn.BatchNorm2d(width), depthwise, nn.Conv2d(width, 3, 1))

    small, x = net(5).eval(), torch.randn(1, 2, 4, 4)
    model = net(8).eval()
    assert load(model, small.state_dict()).convention == "narrow" and torch.equal(model(x), small(x))
    assert (model[2].groups, model[2].in_channels, model[1].num_features) == (5, 5, 5)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_compresso_kills_live_queries_and_keys(kv_heads: int) -> None:
    model = llama(kv_heads)
    original = copy.deepcopy(model)
    head_z, inter_z, hidden_z = torch.ones(2, 4), torch.ones(2, 24), torch.ones(16)
    head_z[0, [2, 3]], head_z[1, 1], inter_z[0, :7], hidden_z[3] = 0, 0, 0, 0
    hidden_z[5] = 0.5
    imported = load(model, {**original.state_dict(), "head_z": head_z, "intermediate_z": inter_z, "hidden_z": hidden_z})
    assert imported.convention == "compresso" and imported.notes == ("3 of 8 heads are dead, with their q, k, v rows and o columns",)
    for i, layer in enumerate(original.model.layers):  # the gates where the trainer has them
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a, i=i: (a[0] * head_z[i].repeat_interleave(4),))
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, a, i=i: (a[0] * inter_z[i],))
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.register_forward_hook(lambda m, a, y: y * hidden_z)
    original.model.embed_tokens.register_forward_hook(lambda m, a, y: y * hidden_z)
    assert torch.allclose(model(IDS).logits, original(IDS).logits, atol=1e-6)
    attn = model.model.layers[0].self_attn
    assert bool((attn.q_proj.weight[8:] == 0).all() and (attn.o_proj.weight[:, 8:] == 0).all())
    assert bool((attn.k_proj.weight[attn.k_proj.out_features // 2 :] == 0).all())
    assert imported.patterns["model.layers.0.self_attn.q_proj"] == Rows(0.5)


def test_compresso_already_multiplied_in() -> None:
    model = llama(4)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[4:8] = 0
    before = model(IDS).logits
    load(model, convention="compresso")
    attn = model.model.layers[0].self_attn
    assert torch.equal(model(IDS).logits, before)
    assert bool((attn.q_proj.weight[4:8] == 0).all() and (attn.k_proj.weight[4:8] == 0).all() and (attn.q_proj.weight[:4] != 0).any())
    with pytest.raises(CheckpointError, match=r"head_z is .* this model has 8 in all"):
        load(model, {**model.state_dict(), "head_z": torch.ones(3, 4)})


def test_pat_folds_and_leaves_dead_rows() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.o, self.head = nn.Embedding(9, 8), nn.RMSNorm(8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            return self.head(self.norm(x + self.o(self.norm(x))))

    base = Net()
    state = dict(base.state_dict())
    m = torch.tensor([0.5, -0.5, 0.4, 0.5, 0.0, 0.5, 0.3, 0.5])
    hsm = {}
    for name in ("embed", "o"):
        hsm[name] = (torch.randn(3, 8), torch.randn(8, 3), torch.randn(1, 8))
        for part, value in zip(("inout.0.weight", "inout.1.weight", "scale.weight"), hsm[name], strict=True):
            state[f"{name}.hsm.dimdown_{part}"] = value
    state["mask"] = m.view(1, 1, 8)
    model, ids = Net(), torch.randint(9, (2, 5))
    imported = load(model, state)

    def down(name: str, y: Tensor) -> Tensor:
        U, V, scale = hsm[name]
        return scale * torch.sigmoid(1e6 * m).round() * (y + (y @ U.t()) @ V.t())

    x = down("embed", base.embed(ids))
    expected = base.head(base.norm(x + down("o", base.o(base.norm(x)))))
    assert imported.convention == "pat" and imported.patterns["o"] == Rows(0.25)
    assert torch.allclose(model(ids), expected, atol=1e-5) and imported.notes[0].startswith("6 of 8 channels")
    state["mask"] = -torch.ones(1, 1, 8)
    with pytest.raises(CheckpointError, match="would leave none"):
        load(Net(), state)


def test_pat_merged_corrects_the_divisor() -> None:
    x, weight = torch.randn(4, 8), torch.rand(6)
    x[:, 6:] = 0
    masked = F.rms_norm(x, (8,), torch.cat([weight, torch.zeros(2)]), 0.0)[:, :6]
    model = nn.ModuleDict({"norm": nn.RMSNorm(8, eps=0.0)})
    imported = load(model, {"norm.weight": weight * (8 / 6) ** 0.5})
    assert imported.convention == "narrow" and torch.allclose(model["norm"](x[:, :6]), masked, atol=1e-6)
    inverse = weight * (6 / 8) ** 0.5  # sqrt(sum / 8) = sqrt(sum / 6) sqrt(6 / 8): dividing by less multiplies by sqrt(8 / 6)
    assert not torch.allclose(F.rms_norm(x[:, :6], (6,), inverse, 0.0), masked, atol=1e-2)


def test_slicegpt_checkpoints() -> None:
    source = llama()
    sliced = slicegpt(source, 0.25, [IDS], multiple=4)
    state = {}
    for key, value in sliced.state_dict().items():  # narrow, as the paper's files are
        last = key in ("model.layers.1.mlp_shortcut_Q", "model.layers.1.mlp.down_proj.weight", "lm_head.weight")
        if key.endswith("_shortcut_Q"):
            value = value[:12] if last else value[:12, :12]
        elif not last:
            value = value[:12] if "o_proj" in key or "down_proj" in key else value[:, :12]
        state[key] = value.clone()
    model = llama()
    eps = source.config.rms_norm_eps
    imported = load(model, state, example_inputs=IDS, eps=eps)
    assert imported.convention == "slicegpt" and torch.allclose(model(IDS).logits, sliced(IDS).logits, atol=1e-5)
    assert imported.patterns["model.layers.0.mlp.up_proj"] == Cols(0.25)
    with pytest.raises(CheckpointError, match="needs example_inputs"):
        load(llama(), state)
    del state["model.layers.1.attn_shortcut_Q"]
    with pytest.raises(CheckpointError, match=r"lacks the shortcuts of model.layers.1"):
        load(llama(), state, example_inputs=IDS)


@pytest.mark.parametrize("merge", [False, True])
def test_sora_gates(merge: bool) -> None:
    model, x = mlp(), torch.randn(3, 6)
    A, B, gate = torch.randn(4, 6), torch.randn(8, 4), torch.tensor([[0.5, 0.0, -0.3, 0.0]])
    dead = {"2.lora.lora_A": torch.randn(2, 8), "2.lora.lora_B": torch.randn(4, 2), "2.lora.gate": torch.zeros(1, 2)}
    expected = model[2](F.relu(model[0](x) + 0.25 * ((x @ A.t()) * gate) @ B.t()))
    state = {"0.lora.lora_A": A, "0.lora.lora_B": B, "0.lora.gate": gate, **dead}
    imported = load(model, state, scaling=0.25, merge=merge)
    assert imported.convention == "sora" and torch.allclose(model(x), expected, atol=1e-5) and isinstance(model[2], nn.Linear)
    if not merge:
        assert imported.patterns == {"0.down": Rows(0.5), "0.up": Cols(0.5)}
    with pytest.raises(CheckpointError, match=r"7.lora.gate belongs to 7, which is no linear"):
        load(mlp(), {f"7{key[1:]}": value for key, value in dead.items()})


def test_s2ft_slices() -> None:
    model, x = mlp(), torch.randn(3, 6)
    rows, cols = torch.randn(3, 6), torch.randn(4, 2)
    expected = F.linear(F.relu(model[0](x) + F.pad(x @ rows.t(), (2, 3))), model[2].weight, model[2].bias)
    hidden = F.relu(model[0](x) + F.pad(x @ rows.t(), (2, 3)))
    expected = expected + hidden[:, :2] @ cols.t()
    assert load(model, {"0.s2": rows, "2.s2": cols}, starts={"0": 2}).convention == "s2ft"
    assert torch.allclose(model(x), expected, atol=1e-5)
    with pytest.raises(CheckpointError, match="no slice of"):
        load(model, {"0.s2": torch.randn(9, 6)})


def test_what_nobody_recognises_changes_nothing() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=r"knows what 0.scores means .*known are slicegpt, sora.*convention="):
        load(model, {**before, "0.scores": torch.ones(1), "0.weight": torch.zeros(8, 6)})
    with pytest.raises(CheckpointError, match=r"the checkpoint lacks 2.weight"):
        load(model, {"0.weight": torch.zeros(8, 6), "0.bias": torch.zeros(8), "2.bias": torch.zeros(4)})
    with pytest.raises(CheckpointError, match="convention='gguf' is not known"):
        load(model, before, convention="gguf")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
