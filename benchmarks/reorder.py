"""What reordering gains: a BERT-base feed-forward block whose 90 % zeros are block(4, 1) up to a permutation of its neurons, as it is, and
reordered offline, against dense torch, in one interleaved run, to benchmarks/results/reorder.json.

    python -m benchmarks.reorder [--tokens 128] [--threads 1] [--seconds 20]
"""
from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsecc
from sparsecc.autotune.measure import interleaved

RESULTS = Path(__file__).with_name("results") / "reorder.json"
WIDTH, HIDDEN, ZEROS = 768, 3072, 0.9


class Ffn(nn.Module):
    """f32[B, S, 768] -> f32[B, S, 768]"""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


def model() -> Ffn:
    """Blocks of four neurons keep the same tenth of their inputs; the neurons stand in no order. Columns of `down` stay in blocks."""
    torch.manual_seed(0)
    made = Ffn().eval().requires_grad_(False)
    made.up.weight *= (torch.rand(HIDDEN // 4, WIDTH) > ZEROS).repeat_interleave(4, 0)[torch.randperm(HIDDEN)]
    made.down.weight *= (torch.rand(WIDTH // 4, HIDDEN) > ZEROS).repeat_interleave(4, 0)
    return made


def built(net: nn.Module, x: Tensor, disable: str) -> tuple[Any, float]:
    """(compiled and checked, seconds of the pass)."""
    os.environ["SPARSECC_DISABLE"] = disable
    compiled = sparsecc.compile(net, "cpu", example_inputs=(x,))
    torch.testing.assert_close(compiled(x), net(x), rtol=2e-5, atol=2e-5)
    steps = {step.name: step.seconds for step in compiled.graphs[0].history.steps}
    return compiled, steps.get("reorder", 0.0)


def main() -> None:
    """Compile both, check, time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    net, x = model(), torch.randn(1, args.tokens, WIDTH)
    found, seconds = built(net, x, "")
    plain, _ = built(net, x, "reorder")
    calls = {"as it is": lambda: plain(x), "reordered": lambda: found(x), "dense torch": lambda: net(x)}
    with torch.no_grad():
        times = interleaved(calls, args.seconds)
    regions = {name: {r.name: [r.pattern, r.choice, r.more.get("measured_us")] for r in one.explain().regions}
               for name, one in (("as it is", plain), ("reordered", found))}
    result = {"tokens": args.tokens, "threads": args.threads, "date": time.strftime("%Y-%m-%d"), "pass_seconds": seconds,
              "ms": {name: {"median": 1e3 * t.median, "best": 1e3 * t.best, "ratio": t.ratio} for name, t in times.items()},
              "layers": regions}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
