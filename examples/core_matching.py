"""CoreMatching on a small LLaVA-style model with random weights: image tokens that matter are planted, found, and the others leave.

    python -m examples.core_matching [--layers 8] [--hidden 1024] [--ffn 2816] [--grid 24] [--tokens 16] [--png FILE]

The projector is made so that the patches of a disc land near the text's embeddings, as those of what a question is about do in trained
models. Prints what was compiled, how many image tokens stay, and the times of prompt and tokens; saves the picture with the others dimmed.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import sparsecc
from sparsecc.autotune.measure import interleaved
from sparsecc.methods.core_matching import CoreMatching

IMAGE_ID, PATCH, PREFIX = 100, 8, 6


def llava(hidden: int = 64, ffn: int = 256, layers: int = 4, heads: int = 4, kv_heads: int = 2, grid: int = 7, seed: int = 0) -> Any:
    """transformers' LLaVA with random weights, for pictures of grid x grid patches; token id 100 stands for a patch."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=grid * PATCH,
                              patch_size=PATCH)  # fmt: skip
    text = LlamaConfig(hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
                       num_key_value_heads=kv_heads, vocab_size=128)  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_ID, image_seq_length=grid * grid)
    config._attn_implementation = "sdpa"
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    _plant(model, grid)
    return model


def disc(grid: int) -> Tensor:
    """bool[grid, grid]: patches about the middle, five at least."""
    at = torch.arange(grid) - (grid - 1) / 2
    return at[:, None] ** 2 + at[None] ** 2 < max(1.5, 0.02 * grid * grid)


def picture(grid: int, seed: int = 0) -> Tensor:
    """f32[1, 3, P, P], P = 8 grid: a bright disc on noise."""
    noise = torch.randn(1, 3, grid * PATCH, grid * PATCH, generator=torch.Generator().manual_seed(seed))
    bright = disc(grid).repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)
    return torch.where(bright, 2 + 0.1 * noise, 0.3 * noise)


def vlm_inputs(model: Any, text: int, seed: int = 0) -> dict[str, Tensor]:
    """A prompt: PREFIX tokens, the picture's, `text` more."""
    grid = model.config.vision_config.image_size // PATCH
    words = torch.randint(0, IMAGE_ID, (1, PREFIX + text), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat([words[:, :PREFIX], torch.full((1, grid * grid), IMAGE_ID), words[:, PREFIX:]], 1)
    return {"input_ids": ids, "pixel_values": picture(grid, seed)}


def _plant(model: Any, grid: int) -> None:
    """Text lies about one direction; of the picture's features only the disc's have a large part along it."""
    random = torch.Generator().manual_seed(0)
    table, second = model.get_input_embeddings().weight, model.model.multi_modal_projector.linear_2
    base = torch.randn(table.shape[1], generator=random)
    base /= base.norm()
    unit = table.shape[1] ** 0.5  # the norm of a row whose entries are about one
    table.copy_(torch.randn(table.shape, generator=random) + 4 * unit * base)
    hidden: list[Tensor] = []
    hook = second.register_forward_hook(lambda module, args, y: hidden.append(args[0].flatten(0, -2)))
    model.model.get_image_features(pixel_values=picture(grid), return_dict=True)
    hook.remove()
    h, bright, along = hidden[0].double(), disc(grid).flatten(), base.double()
    middle = h[~bright].mean(0)  # what all other patches share would be a direction of its own
    lead = h[bright].mean(0) - middle
    lead /= lead.norm()
    weight = second.weight.double() - torch.outer(along, along @ second.weight.double())
    weight -= torch.outer(weight @ lead, lead)
    weight *= 3 * unit / ((h[~bright] - middle) @ weight.t()).norm(dim=1).mean()
    square = (h - middle).t() @ (h - middle)
    fit = torch.linalg.solve(square + 1e-3 * square.diagonal().mean() * torch.eye(len(square)).double(), (h - middle).t() @ bright.double())
    weight += 4 * unit * torch.outer(along, fit)
    second.weight.copy_(weight)
    second.bias.copy_(-weight @ middle)


def save(path: Path, image: Tensor, kept: Tensor) -> None:
    """The picture [3, P, P] as PNG, patches that are not kept (bool[grid, grid]) dimmed."""
    from matplotlib.image import imsave

    shown = ((image - image.min()) / (image.max() - image.min())).permute(1, 2, 0)
    mask = kept.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)[..., None]
    imsave(path, torch.where(mask, shown, 0.25 * shown).clamp(0, 1).numpy())


def kept_patches(places: Tensor, ids: Tensor, grid: int) -> Tensor:
    """bool[grid, grid]: the image tokens among the places i64[n] that stay in a prompt i64[1, M]."""
    image = ids[0] == IMAGE_ID
    return torch.zeros(image.shape, dtype=torch.bool).index_fill_(0, places, True)[image].view(grid, grid)


def main() -> None:
    """Compile both, compare, time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 8), ("hidden", 1024), ("ffn", 2816), ("grid", 24), ("tokens", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--png", type=Path, default=Path("core_tokens.png"))
    args = parser.parse_args()
    model = llava(args.hidden, args.ffn, args.layers, heads=16, kv_heads=4, grid=args.grid)
    inputs, rule = vlm_inputs(model, 40), sparsecc.core_matching(rho=0.2, beta=0.4, layer=2)
    made = {name: CoreMatching(model, one, inputs, autotune="none", remainder="eager") for name, one in (("dense", None), ("core", rule))}
    states = {name: one.prefill(**inputs) for name, one in made.items()}
    print(made["core"].prompt.explain())
    print(made["core"].token.explain())
    places = rule.seen.latest
    assert places is not None
    patches = kept_patches(places, inputs["input_ids"], args.grid)
    wanted = disc(args.grid)
    print(f"{int(patches.sum())} of {patches.numel()} image tokens stay, {int((patches & wanted).sum())} of the disc's {int(wanted.sum())}")
    save(args.png, inputs["pixel_values"][0], patches)
    token = torch.zeros(1, 1, dtype=torch.long)
    for what, calls in {
        "prompt": {name: lambda one=one: one.prefill(**inputs) for name, one in made.items()},
        "token": {name: lambda one=one, state=states[name]: one.step(token, state) for name, one in made.items()},
    }.items():
        times = interleaved(calls, 5.0)
        took = {name: f"{1e3 * timing.median:.1f} ms" for name, timing in times.items()}
        print(f"{what}, {torch.get_num_threads()} threads: {took}, {1 / times['core'].ratio:.2f}x")


if __name__ == "__main__":
    main()
