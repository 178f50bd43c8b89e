"""Convolutional nets with 30 % of their channels dead: sparsecc against the smaller dense net, built by hand.

    python -m benchmarks.slices_nets [--nets mobilenet_v1,mobilenet_v2] [--batch 1,16] [--threads 1,2] [--out FILE]

Random channels are dead: in MobileNetV1 of every convolution's output, in MobileNetV2 of what each block expands to, since its residual
stream is one. Their batch norms are zero; the masked net keeps its shapes, the small one is cut with torch's own operations. Both run in
one interleaved run, the small one in every form of torch.compile that is fast for such nets.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparsecc
from benchmarks.cpu import COMMA, ROOT, stamp
from benchmarks.slices import bytes_of, counted, program_bytes
from examples import convnets
from sparsecc.autotune.measure import interleaved
from sparsecc.ir.flops import flops

DEAD = 0.30


def stages(model: Any) -> list[list[nn.Sequential]]:
    """Chains of convolution blocks in each of which dead channels may be chosen for every output but the last one's."""
    if isinstance(model, convnets.MobileNetV1):
        return [list(model.features)]
    return [list(layer.layers) for layer in model.features if isinstance(layer, convnets.InvertedResidual)]


def mask(model: Any, seed: int = 0) -> list[list[list[int]]]:
    """Zero the batch norms of dead channels, in place; returns the channels that are left, per chain and block."""
    rng, left = random.Random(seed), []
    for chain in stages(model):
        alive: list[list[int]] = []
        for n, block in enumerate(chain):
            conv, norm = block[0], block[1]
            if conv.groups > 1:
                kept = alive[-1] if alive else list(range(conv.out_channels))
            elif n == len(chain) - 1 and not isinstance(model, convnets.MobileNetV1):
                kept = list(range(conv.out_channels))
            else:
                kept = sorted(rng.sample(range(conv.out_channels), round((1 - DEAD) * conv.out_channels)))
            dead = [c for c in range(conv.out_channels) if c not in set(kept)]
            norm.weight.data[dead] = 0
            norm.bias.data[dead] = 0
            alive.append(kept)
        left.append(alive)
    return left


def cut(model: Any, left: list[list[list[int]]]) -> Any:
    """The dense net of what is left of a masked one."""
    model = copy.deepcopy(model)
    for chain, alive in zip(stages(model), left, strict=True):
        read = list(range(chain[0][0].in_channels))
        for block, kept in zip(chain, alive, strict=True):
            conv, norm = block[0], block[1]
            depthwise = conv.groups > 1
            weight = conv.weight.data[kept] if depthwise else conv.weight.data[kept][:, read]
            groups = len(kept) if depthwise else 1
            made = nn.Conv2d(len(read), len(kept), conv.kernel_size, conv.stride, conv.padding, groups=groups, bias=False)
            made.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
            block[0] = made
            less = nn.BatchNorm2d(len(kept), eps=norm.eps)
            less.load_state_dict({k: v[kept] if v.ndim else v for k, v in norm.state_dict().items()})
            block[1] = less
            read = kept
    if isinstance(model, convnets.MobileNetV1):
        fc = nn.Linear(len(left[0][-1]), model.fc.out_features)
        fc.weight, fc.bias = nn.Parameter(model.fc.weight.data[:, left[0][-1]].contiguous()), model.fc.bias
        model.fc = fc
    return model.eval().requires_grad_(False)


def measure(net: str, batch: int, threads: int, seconds: float) -> dict[str, Any]:
    """Sizes, FLOPs, the error, and times of one call."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    torch._dynamo.config.recompile_limit = 64
    dense, x = convnets.NETS[net](), convnets.images(batch)
    masked = copy.deepcopy(dense)
    less = cut(masked, mask(masked))
    compiled = sparsecc.compile(masked, sparsity="detect", example_inputs=x, dynamic_shapes=None)
    wanted = masked(x)
    program = compiled.graphs[0].history.program
    error = lambda out: float((out - wanted).abs().max() / wanted.abs().max())  # noqa: E731
    row: dict[str, Any] = {"net": net, "batch": batch, "threads": threads, "error": error(compiled(x)), "small_error": error(less(x))}
    row["flops"] = {"dense": counted(dense, x=x), "ideal": counted(less, x=x), "sparsecc": flops(program)}
    row["bytes"] = {"dense": bytes_of(dense.parameters()), "ideal": bytes_of(less.parameters()), "sparsecc": program_bytes(program)}
    last = x.contiguous(memory_format=torch.channels_last)
    runs: dict[str, Callable[[], Any]] = {"sparsecc": lambda: compiled(x)}
    frozen = {"freezing": True}
    for name, of, options in (("small", less, {}), ("small freezing", less, frozen), ("dense freezing", masked, frozen)):
        for lay, given in (("", x), (", channels last", last)):
            fn: Any = torch.compile(copy.deepcopy(of).to(memory_format=torch.channels_last) if lay else of, options=options)
            fn(given)
            runs[name + lay] = lambda fn=fn, given=given: fn(given)
    timings = interleaved(runs, seconds, 9)
    row["ms"] = {name: 1e3 * t.median for name, t in timings.items()}
    small = min((name for name in runs if name.startswith("small")), key=lambda name: timings[name].median)
    row |= {"best small": small, "of the small net": timings[small].median / timings["sparsecc"].median}
    return row


def main() -> None:
    """A worker process per row."""
    listed = lambda kind: lambda text: [kind(part) for part in COMMA.split(text) if part]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", type=listed(str), default=["mobilenet_v1", "mobilenet_v2"])
    parser.add_argument("--batch", type=listed(int), default=[1, 16])
    parser.add_argument("--threads", type=listed(int), default=[1, 2])
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/cpu-slices-nets.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.nets[0], args.batch[0], args.threads[0], args.seconds)))
        return
    rows = []
    for net in args.nets:
        for batch in args.batch:
            for threads in args.threads:
                options = ["--nets", net, "--batch", str(batch), "--threads", str(threads), "--seconds", str(args.seconds)]
                command = [sys.executable, "-m", "benchmarks.slices_nets", "--worker", *options]
                done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                row = rows[-1]
                of, size = row["flops"], row["bytes"]
                print(f"{net} {batch} x {threads} threads: {row['ms']['sparsecc']:.1f} ms, {row['of the small net']:.2f}x the speed of the "
                      f"small net ({row['best small']}); FLOPs / ideal {of['sparsecc'] / of['ideal']:.3f}, bytes / ideal "
                      f"{size['sparsecc'] / size['ideal']:.3f}, error {row['error']:.0e}", flush=True)  # fmt: skip
    args.out.write_text(json.dumps({"stamp": stamp(False), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
