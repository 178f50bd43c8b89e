"""A language model with 30 % of its FFN channels and 25 % of its heads dead: sparsecc against the smaller dense model, built by hand.

    python -m benchmarks.slices [--threads 1,2] [--seq 128] [--seconds 30] [--out benchmarks/results/cpu-slices.json]

The masked model keeps its shapes: zeros stand in the weights, for every other dead channel on another side of it, and the queries and
keys of dead heads stay alive, as Compresso leaves them. The small one has per layer the widths that are left; where heads of one group
are left in different numbers it gathers keys and values. Both are timed in one interleaved run, prefill to the logits of the last token.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface

import sparsecc
from benchmarks.cpu import ROOT, stamp
from examples import models
from sparsecc.autotune.measure import interleaved
from sparsecc.ir.flops import flops
from sparsecc.ir.program import Program

CHANNELS, HEADS = 0.30, 0.25
LIMIT = 0.97


def dead_slices(config: Any, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Per layer (FFN channels, heads) that are dead: 30 % of each layer's channels, 25 % of all heads."""
    rng, layers, heads = random.Random(seed), config.num_hidden_layers, config.num_attention_heads
    count, total = round(CHANNELS * config.intermediate_size), round(HEADS * heads * layers)
    per_layer = [total // layers + (i < total % layers) for i in range(layers)]
    rng.shuffle(per_layer)
    return [(sorted(rng.sample(range(config.intermediate_size), count)), sorted(rng.sample(range(heads), n))) for n in per_layer]


def masked(model: Any, dead: list[tuple[list[int], list[int]]]) -> Any:
    """A copy in which these slices are zero on one side."""
    model = copy.deepcopy(model)
    D = head_size(model)
    for layer, (channels, heads) in zip(model.model.layers, dead, strict=True):
        mlp = layer.mlp
        mlp.down_proj.weight.data[:, channels[0::3]] = 0
        mlp.up_proj.weight.data[channels[1::3]] = 0
        mlp.gate_proj.weight.data[channels[2::3]] = 0
        for head in heads:
            layer.self_attn.o_proj.weight.data[:, head * D : head * D + D] = 0
    return model


def small(model: Any, dead: list[tuple[list[int], list[int]]]) -> Any:
    """The dense model of what is left."""
    model = copy.deepcopy(model)
    D, times = head_size(model), model.config.num_attention_heads // model.config.num_key_value_heads
    for layer, (channels, heads) in zip(model.model.layers, dead, strict=True):
        mlp, attention = layer.mlp, layer.self_attn
        left = [c for c in range(mlp.up_proj.out_features) if c not in set(channels)]
        mlp.up_proj, mlp.gate_proj, mlp.down_proj = _cut(mlp.up_proj, left, 0), _cut(mlp.gate_proj, left, 0), _cut(mlp.down_proj, left, 1)
        alive = [h for h in range(model.config.num_attention_heads) if h not in heads]
        groups = sorted({h // times for h in alive})
        rows, kv_rows = ([i for h in of for i in range(h * D, h * D + D)] for of in (alive, groups))
        attention.q_proj, attention.o_proj = _cut(attention.q_proj, rows, 0), _cut(attention.o_proj, rows, 1)
        attention.k_proj, attention.v_proj = _cut(attention.k_proj, kv_rows, 0), _cut(attention.v_proj, kv_rows, 0)
        attention.register_buffer("kv_of", torch.tensor([groups.index(h // times) for h in alive]), persistent=False)
    AttentionInterface.register("gathered", _gathered)
    model.config._attn_implementation = "gathered"
    return model


def _gathered(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None, **_: Any) -> Any:
    """Attention whose queries find their keys by index."""
    k, v = k[:, module.kv_of], v[:, module.kv_of]
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scaling, is_causal=mask is None and q.shape[2] > 1)
    return out.transpose(1, 2).contiguous(), None


def head_size(model: Any) -> int:
    """Features of a head."""
    return model.model.layers[0].self_attn.head_dim


def _cut(linear: nn.Linear, index: list[int], dim: int) -> nn.Linear:
    weight = linear.weight.data.index_select(dim, torch.tensor(index)).contiguous()
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made


def bytes_of(tensors: Any) -> int:
    """Of distinct tensors."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def program_bytes(program: Program) -> int:
    """Of a program's constants of floats."""
    consts = [program.const(node) for node in program.graph.nodes if node.op == "get_attr"]
    return bytes_of(t for t in consts if isinstance(t, Tensor) and t.dtype.is_floating_point)


def counted(model: nn.Module, **call: Any) -> int:
    """FLOPs by torch's counter."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(**call)
    return counter.get_total_flops()


def measure(threads: int, seq: int, seconds: float, contestants: int = 3, seed: int = 0) -> dict[str, Any]:
    """Sizes, FLOPs, the error, and times of one prefill."""
    torch.set_num_threads(threads)
    torch._dynamo.config.recompile_limit = 64
    model, tokenizer = models.smollm2(), models.smollm2_tokenizer()
    ids = tokenizer(" ".join(models.sentences(200)), return_tensors="pt")["input_ids"][:, :seq]
    call: dict[str, Any] = {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}
    dead = dead_slices(model.config, seed)
    zeros, less = masked(model, dead), small(model, dead)
    compiled = sparsecc.compile(zeros, sparsity="detect", example_inputs=call, dynamic_shapes=None)
    program = compiled.graphs[0].history.program
    row: dict[str, Any] = {"threads": threads, "seq": seq, "seed": seed, "error": _error(compiled(**call).logits, zeros(**call).logits)}
    row["small_error"] = _error(less(**call).logits, zeros(**call).logits)
    dense_flops, ideal = counted(model, **call), counted(less, **call)
    row["flops"] = {"dense": dense_flops, "ideal": ideal, "sparsecc": flops(program)}
    row["bytes"] = {"dense": bytes_of(model.parameters()), "ideal": bytes_of(less.parameters()), "sparsecc": program_bytes(program)}
    runs = {"sparsecc": lambda: compiled(**call)}
    others = (("small compile", less, False), ("dense compile", zeros, False), ("small freezing", less, True))
    for name, of, freezing in others[:contestants]:
        fn = torch.compile(of, options={"freezing": True} if freezing else None)
        with inductor.patch(freezing=freezing), torch.no_grad():
            fn(**call)
            fn(**call)
        runs[name] = lambda fn=fn: fn(**call)
    with torch.no_grad():
        timings = interleaved(runs, seconds, 9)
    row["ms"] = {name: 1e3 * t.median for name, t in timings.items()}
    row["best_ms"] = {name: 1e3 * t.best for name, t in timings.items()}
    row["speed_of"] = {name: t.ratio for name, t in timings.items()}
    return row


def _error(out: Tensor, wanted: Tensor) -> float:
    return float((out - wanted).abs().max() / wanted.abs().max())


def main() -> None:
    """A worker process per number of threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--contestants", type=int, default=3, help="of: small compile, dense compile, small freezing")
    parser.add_argument("--out", default=str(ROOT / "benchmarks/results/cpu-slices.json"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(int(args.threads), args.seq, args.seconds, args.contestants)))
        return
    rows = []
    for threads in args.threads.split(","):
        options = ["--threads", threads, "--seq", str(args.seq), "--seconds", str(args.seconds), "--contestants", str(args.contestants)]
        command = [sys.executable, "-m", "benchmarks.slices", "--worker", *options]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        row = rows[-1]
        of, size = row["flops"], row["bytes"]
        print(f"{threads} threads, {args.seq} tokens: {row['ms']['sparsecc']:.1f} ms; times of others / ours "
              f"{row['speed_of']}; FLOPs / ideal {of['sparsecc'] / of['ideal']:.4f}, bytes / ideal "
              f"{size['sparsecc'] / size['ideal']:.4f}, error {row['error']:.1e}")
    Path(args.out).write_text(json.dumps({"stamp": stamp(False), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
