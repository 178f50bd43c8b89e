"""A causal language model with its KV cache, as the benchmarks call it: one token on a full prompt, and greedy text.

    python -m benchmarks.cpu_decode [--models smollm2,llama] [--patterns "unstructured(0.5),nm(2, 4)"] [--dtypes fp32,bf16] [--threads 2]
        [--peer llama_cpp=PYTHON]

times that token: sparsecc, and torch on the same masked weights in the same dtype, eager and compiled, in turns. Every linear layer is
sparse, the one that gives the logits too, be it tied to the embedding. A model's weights are larger than the caches, so nothing is
in them when its turn comes. llama.cpp takes part with the Llama-shaped stack, on the same weights in each of its types.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import sparsecc
from benchmarks.cpu import COMMA, ROOT, stamp
from benchmarks.peer_llama import DECODERS, export
from benchmarks.peers import CALLS, REST, Child, Peer
from examples import models
from sparsecc.autotune.measure import timings

PROMPT = 64
NEW = 64
LLAMA_PROMPT = 128
LLAMA_STACK = {"heads": 16, "kv_heads": 16, "vocab": 512}
"""411 M weights in layers of 2048 features, and next to none in the logits."""
ROUNDS = 9
TUNE = 600.0
"""Seconds that tuning may take: no layer is to stay dense for want of time."""
CALIBRATION = (8, 128)
"""Rows and tokens of text that Wanda's statistics are taken on."""


class Decoder:
    """A prompt of PROMPT tokens of real text. `bind` gives one decode step, `check` compares NEW greedy tokens."""

    def __init__(self, model: Any, tokenizer: Any, prompt: int = PROMPT) -> None:
        """Without a tokenizer the prompt is random: enough to time a step."""
        self.model, self.tokens = model, f"1 after {prompt}"
        if tokenizer is None:
            vocabulary, random = model.config.vocab_size, torch.Generator().manual_seed(0)
            self._prompt = torch.randint(0, vocabulary, (1, prompt), generator=random)
            return
        text = tokenizer(" ".join(models.sentences(400)), return_tensors="pt")["input_ids"]
        self._prompt, self._text = text[:, :prompt], text[:, prompt:]

    def calibration(self) -> list[dict[str, Any]]:
        """Text that is not in the prompt."""
        rows, length = CALIBRATION
        return [{"input_ids": self._text[:, i * length : (i + 1) * length], "use_cache": False} for i in range(rows)]

    def bind(self, call: Callable[..., Any], eager: Any) -> Callable[[], Tensor]:
        """One token's logits [1, 1, vocabulary]. Every call starts from the same cache, filled by the eager model."""
        cache: Any = DynamicCache(config=self.model.config)
        token = eager(input_ids=self._prompt, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        self.prompt, self.token = self._prompt[0].tolist(), int(token)
        full = [(layer.keys, layer.values) for layer in cache.layers]

        def step() -> Tensor:
            for layer, (keys, values) in zip(cache.layers, full, strict=True):
                layer.keys, layer.values = keys, values
            return call(input_ids=token, past_key_values=cache, use_cache=True).logits

        return step

    def first(self, compiled: Callable[..., Any]) -> None:
        """What a user waits for: the prompt and a token, which are two programs."""
        self.greedy(compiled, 2)

    def check(self, compiled: Callable[..., Any], quick: bool) -> dict[str, Any]:
        """Whether the greedy tokens are those of the dense model, and how many of them differ from each other."""
        count = 8 if quick else NEW
        ours, theirs = self.greedy(compiled, count), self.greedy(self.model, count)
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), count)
        return {"greedy": {"tokens": count, "same": same, "distinct": len(set(theirs))}}

    def greedy(self, call: Callable[..., Any], count: int) -> list[int]:
        """`count` tokens after the prompt, each the most likely."""
        cache, ids = DynamicCache(config=self.model.config), self._prompt
        found: list[int] = []
        for _ in range(count):
            ids = call(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            found.append(int(ids))
        return found


def measure(model: str, pattern: str, dtype: str, threads: int, seconds: float, peer: str = "") -> dict[str, Any]:
    """One row: milliseconds a token, `speedup` over each contestant (medians of ratios between neighbours in time), largest error as a
    fraction of the largest logit."""
    torch.set_num_threads(threads)
    torch._dynamo.config.recompile_limit = 64
    dense = models.smollm2() if model == "smollm2" else models.llama_stack(**LLAMA_STACK)
    case = Decoder(dense, None, PROMPT if model == "smollm2" else LLAMA_PROMPT)
    spec = {"*": pattern, "lm_head": pattern}
    sparsecc.prune(dense, spec, exclude=())
    if dtype == "bf16":
        case.model = dense = dense.bfloat16()
    ours = case.bind(sparsecc.compile(dense, sparsity=spec, tune_seconds=TUNE), dense)
    steps = {"sparsecc": ours, "eager": case.bind(dense, dense), "compile": case.bind(torch.compile(dense), dense)}
    outputs = {name: (step(), step())[1].float() for name, step in steps.items()}
    wanted = outputs["eager"]
    row: dict[str, Any] = {"model": model, "pattern": pattern, "dtype": dtype, "threads": threads, "tokens": case.tokens,
                           "error": float((outputs["sparsecc"] - wanted).abs().max() / wanted.abs().max())}  # fmt: skip
    turns = {name: lambda step=step: own_turn(step) for name, step in steps.items()}
    with tempfile.TemporaryDirectory() as folder:
        rivals = llama_cpp(case, wanted, peer, Path(folder), threads) if peer and model == "llama" else []
        row["llama.cpp"] = [{"engine": child.engine, **child.ask("load", folder=folder)} for child in rivals]
        turns |= {child.engine: lambda child=child: child.ask("time", folder=folder, calls=CALLS)["seconds"] for child in rivals}
        times = timings(take_turns(turns, seconds * len(turns)))
        for child in rivals:
            child.close()
    speedup = {name: t.ratio for name, t in times.items() if name != "sparsecc"}
    ms = {"ms": {name: 1e3 * t.median for name, t in times.items()}, "best_ms": {name: 1e3 * t.best for name, t in times.items()}}
    return {**row, **ms, "speedup": speedup, "vs_torch": min(speedup["eager"], speedup["compile"])}


def own_turn(step: Callable[[], Tensor]) -> list[float]:
    """Seconds of CALLS calls, after one that does not count, as workers take theirs."""
    step()
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


def take_turns(turns: dict[str, Callable[[], list[float]]], seconds: float) -> dict[str, list[float]]:
    """The median call of every turn, for about `seconds` in all. Threads that spin for more work get time to give up."""
    found: dict[str, list[float]] = {name: [] for name in turns}
    end = time.perf_counter() + seconds
    while len(found["sparsecc"]) < ROUNDS or time.perf_counter() < end:
        for name, turn in turns.items():
            time.sleep(REST)
            found[name].append(median(turn()))
    return found


def llama_cpp(case: Decoder, logits: Tensor, peer: str, folder: Path, threads: int) -> list[Child]:
    """A worker for each of its types of weights. Raises PeerError where the interpreter has none."""
    found = Peer.parse(peer)
    found.require()
    export(case.model, case.prompt, case.token, logits.flatten(), folder)
    return [Child(name, threads, [found.python, "-m", "benchmarks.peer_worker"]) for name in DECODERS]


def main() -> None:
    """A process for every row, since thread pools keep their size."""
    listed = lambda text: [part for part in COMMA.split(text) if part]  # noqa: E731
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", type=listed, default=["smollm2", "llama"])
    parser.add_argument("--patterns", type=listed, default=["unstructured(0.5)", "unstructured(0.75)", "nm(2, 4)"])
    parser.add_argument("--dtypes", type=listed, default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing, per contestant")
    parser.add_argument("--peer", default="", help="llama_cpp=PYTHON, an interpreter that has it and gguf")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "cpu-decode.json")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        with torch.no_grad():
            print(json.dumps(measure(*json.loads(args.row))))
        return
    result = {**stamp(False), "decode": []}
    for job in [(m, p, d, args.threads, args.seconds, args.peer) for m in args.models for p in args.patterns for d in args.dtypes]:
        done = subprocess.run([sys.executable, "-m", "benchmarks.cpu_decode", "--row", json.dumps(job)], stdout=subprocess.PIPE, text=True)
        lines = done.stdout.splitlines()
        result["decode"].append(json.loads(lines[-1]) if not done.returncode and lines else {"job": job, "failed": done.returncode})
        print(json.dumps(result["decode"][-1]), flush=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
