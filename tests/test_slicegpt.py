"""SliceGPT: without slicing nothing changes; with it, the output is that of the explicit projections, and the divisor stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples.models import llama_stack
from sparsecc.errors import SpecError
from sparsecc.prune import slicegpt


class Mix(nn.Module):
    """Stands for attention: every token sees the mean over tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.v, self.o = nn.Linear(dim, 12), nn.Linear(12, dim)

    def forward(self, x: Tensor) -> Tensor:
        v = self.v(x)
        return self.o(v + v.mean(1, keepdim=True))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, 20), nn.Linear(20, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Block(nn.Module):
    def __init__(self, dim: int, norm: Any, post: bool = False) -> None:
        super().__init__()
        self.post = post
        self.ln1, self.attn, self.ln2, self.mlp = norm(dim), Mix(dim), norm(dim), Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        y = x + self.mlp(self.ln2(x))
        return y * 1.5 if self.post else y


class Toy(nn.Module):
    def __init__(self, norm: Any, dim: int = 16, post: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, dim)
        self.layers = nn.ModuleList([Block(dim, norm, post) for _ in range(2)])
        self.norm, self.head = norm(dim), nn.Linear(dim, 7)
        for name, p in self.named_parameters():
            nn.init.normal_(p, 1.0 if "ln" in name else 0.0, 0.3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


NORMS = [nn.RMSNorm, nn.LayerNorm]


def batches() -> list[Tensor]:
    return [torch.randint(30, (3, 9)) for _ in range(4)]


@pytest.mark.parametrize("norm", NORMS)
def test_rotation_alone_is_exact(norm: Any) -> None:
    model, ids = Toy(norm).double(), torch.randint(30, (2, 6))
    before = copy.deepcopy(model.state_dict())
    rotated = slicegpt(model, 0.0, batches())
    assert torch.allclose(rotated(ids), model(ids), atol=1e-10)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    Q = rotated.layers[0].attn_shortcut_Q
    assert torch.allclose(Q @ Q.t(), torch.eye(16, dtype=torch.float64), atol=1e-12) and not torch.allclose(Q, torch.eye(16).double())


@pytest.mark.parametrize("norm", NORMS)
def test_slicing_is_projection_onto_principal_components(norm: Any) -> None:
    model, ids, calibration = Toy(norm).double(), torch.randint(30, (2, 6)), batches()
    layer_norm = norm is nn.LayerNorm
    points: list[list[Tensor]] = [[] for _ in range(5)]
    norms = [m for layer in model.layers for m in (layer.ln1, layer.ln2)] + [model.norm]
    hooks = [m.register_forward_pre_hook(lambda m, a, p=p: p.append(a[0].reshape(-1, 16))) for m, p in zip(norms, points, strict=True)]
    for batch in calibration:
        model(batch)
    for hook in hooks:
        hook.remove()

    def centre(x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if layer_norm else x

    projections = []
    for seen in points[:-1]:
        x = centre(torch.cat(seen)).detach()
        U = torch.linalg.svd(x, full_matrices=False).Vh[:8].t()
        projections.append(U @ U.t())

    def plain(m: Any, x: Tensor) -> Tensor:
        """The norm after projection: no mean, divided by the original width."""
        y = x / (x.square().sum(-1, keepdim=True) / 16 + (m.eps or torch.finfo(torch.float64).eps)).sqrt() * m.weight
        return y + m.bias if layer_norm else y

    P = [*projections, torch.eye(16, dtype=torch.float64)]
    x = centre(model.embed(ids)) @ P[0]
    for i, layer in enumerate(model.layers):
        x = (x + centre(layer.attn(plain(layer.ln1, x)))) @ P[2 * i + 1]
        x = (x + centre(layer.mlp(plain(layer.ln2, x)))) @ P[2 * i + 2]
    expected = model.head(plain(model.norm, x))

    sliced = slicegpt(model, 0.5, calibration)
    assert torch.allclose(sliced(ids), expected, atol=1e-9)
    assert not torch.allclose(expected, model(ids), atol=1e-2)
    block = sliced.layers[0]
    assert block.attn.v.weight.shape == (12, 16) and bool((block.attn.v.weight[:, 8:] == 0).all())
    assert bool((block.attn.o.weight[8:] == 0).all() and (block.attn.o.bias[8:] == 0).all() and (sliced.embed.weight[:, 8:] == 0).all())
    assert bool((block.attn_shortcut_Q[8:] == 0).all() and (block.attn_shortcut_Q[:, 8:] == 0).all())
    assert bool((sliced.layers[1].mlp_shortcut_Q[:8, 8:] != 0).any())  # the last stream keeps all


def test_a_narrow_module_computes_the_same() -> None:
    sliced = slicegpt(Toy(nn.RMSNorm), 0.5, batches())
    x = torch.randn(2, 5, 16)
    x[..., 8:] = 0
    block = sliced.layers[0]
    narrow = x[..., :8] @ block.attn_shortcut_Q[:8, :8]
    assert torch.allclose((x @ block.attn_shortcut_Q)[..., :8], narrow, atol=1e-6)
    assert torch.allclose(block.attn(x), torch.cat([block.attn(x)[..., :8], torch.zeros(2, 5, 8)], -1))


def test_llama_with_a_tied_head_and_a_cache() -> None:
    model = llama_stack(32, 48, 2, heads=4, kv_heads=2, vocab=40)
    model.lm_head.weight = model.model.embed_tokens.weight
    calibration = [torch.randint(40, (2, 12)) for _ in range(4)]
    ids = torch.randint(40, (1, 6))
    rotated = slicegpt(model, 0.0, calibration)
    assert torch.allclose(rotated(ids).logits, model(ids).logits, atol=1e-4)
    first = rotated(ids[:, :4], use_cache=True)
    rest = rotated(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    assert torch.allclose(rest.logits, model(ids).logits[:, 4:], atol=1e-4)
    sliced = slicegpt(model, 0.25, calibration)
    assert bool((sliced.model.layers[1].mlp.up_proj.weight[:, 24:] == 0).all())
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("make", "sparsity", "calibration", "message"),
    [
        (lambda: Toy(nn.RMSNorm), 0.9, None, "leaves no multiple of 8"),
        (lambda: Toy(nn.RMSNorm), 1.5, None, "sparsity from 0"),
        (lambda: Toy(nn.RMSNorm), 0.5, [], "this one is empty"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), 0.5, [torch.randn(1, 4)], "names no ModuleList"),
        (lambda: Toy(nn.RMSNorm, post=True), 0.5, None, "rotated, the model computes something else"),
    ],
)
def test_refusals(make: Any, sparsity: float, calibration: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        slicegpt(make(), sparsity, batches() if calibration is None else calibration)
