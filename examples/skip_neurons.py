"""Neuron skipping in decode: an OPT-shaped ReLU decoder whose activations are mostly zero, one token at a time.

    python -m examples.skip_neurons [--zeros 0.95] [--layers 4]

Weights are random; the biases of fc1 are shifted so that about `zeros` of the activations are zero, as in trained ReLU models (Li et al.,
The Lazy Neuron Phenomenon). The compiled model computes the same logits and reads only the active neurons.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import OPTConfig, OPTForCausalLM

import sparsecc
from sparsecc.autotune.measure import interleaved
from sparsecc.methods.profile import profile


def decoder(layers: int, zeros: float) -> Any:
    """OPT with hidden size 1024 and 4096 neurons per layer, and the activation density that trained ones have."""
    torch.manual_seed(0)
    config = OPTConfig(hidden_size=1024, ffn_dim=4096, num_hidden_layers=layers, num_attention_heads=16, vocab_size=4096,
                       word_embed_proj_dim=1024)  # fmt: skip
    config._attn_implementation = "sdpa"
    model = OPTForCausalLM(config).eval().requires_grad_(False)
    ids = torch.randint(0, 4096, (1, 64))
    layers_of: Any = model.model.decoder.layers
    for layer in layers_of:
        layer.fc1.weight.mul_(8)
        kept: list[torch.Tensor] = []
        hook = layer.fc1.register_forward_hook(lambda module, args, y, kept=kept: kept.append(y))
        model(ids)
        hook.remove()
        layer.fc1.bias.sub_(kept[0].reshape(-1, 4096).quantile(zeros, dim=0))
    return model


def main() -> None:
    """Compile, compare, time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zeros", type=float, default=0.95)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    model = decoder(args.layers, args.zeros)
    prompt = torch.randint(0, 4096, (1, 64))
    found = profile(model, [prompt])
    for name, row in found.items():
        print(f"{name}: {row['active']:.1%} of the neurons are active for a token, {row['union'][8]:.1%} for one of eight")
    token = {"input_ids": prompt[:, :1], "use_cache": False}
    skipping = sparsecc.compile(model, sparsity={"*": sparsecc.neurons()}, example_inputs=token, remainder="eager")
    wanted, logits = model(**token).logits, skipping(**token).logits
    print(f"largest difference of logits: {float((wanted - logits).abs().max() / wanted.abs().max()):.1e}")
    times = interleaved({"torch": lambda: model(**token), "sparsecc": lambda: skipping(**token)}, 3.0)
    print(skipping.explain())
    print(f"{torch.get_num_threads()} threads: {1 / times['sparsecc'].ratio:.2f}x of torch's speed")


if __name__ == "__main__":
    main()
