"""One model with one pattern, compiled and timed against dense torch: the worker process of `benchmarks/cpu.py models`.

    python -m benchmarks.cpu_models '{"task": "measure", "model": "minilm", "pattern": "block(4, 1, 0.9)", "threads": 1}' OUT.jsonl

Encoders run a batch of full rows. The decoder runs one token on a KV cache that holds a prompt, or, as "smollm2 prefill", a prompt
without a cache up to the logits of its last token.
"""

from __future__ import annotations

import copy
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor
from torch import Tensor, nn

import sparsecc
from benchmarks.cpu_decode import Decoder
from examples import models
from sparsecc.autotune.measure import Timing, interleaved
from sparsecc.explain import is_sparse

FP32 = ("eager fp32", "compile fp32", "freezing fp32")
BF16 = ("eager bf16", "compile bf16")
OURS_BF16 = "sparsecc bf16"
"""sparsecc on the model in bf16, against the same."""
CALLS = 3
"""Calls per sample: a model that runs alone finds its own weights in the shared cache, one that takes turns with five others does not."""
ROUNDS = 7
LONG = 0.2
"""Seconds: what takes longer is called once per sample."""


@dataclass(frozen=True)
class Job:
    """What a worker does. task: "compile" (seconds until the first output) or "measure". seconds: per contestant."""

    task: str
    model: str
    pattern: str
    threads: int
    batch: int = 1
    seq: int = 128
    seconds: float = 4.0
    quick: bool = False


class Encoder:
    """A BERT: `bind` gives the timed call, `check` compares on sentences of other lengths and batches, padded."""

    def __init__(self, model: nn.Module, job: Job) -> None:
        self.model, self.tokens = model, f"{job.batch} x {job.seq}"
        self._inputs = models.minilm_inputs(job.batch, job.seq)

    def bind(self, call: Callable[..., Any], eager: nn.Module) -> Callable[[], Tensor]:
        """One forward pass: f32 or bf16 [batch, seq, hidden]."""
        return lambda: call(**self._inputs).last_hidden_state

    def first(self, compiled: Callable[..., Any]) -> None:
        """What a user waits for."""
        self.bind(compiled, self.model)()

    def check(self, compiled: Callable[..., Any], quick: bool) -> dict[str, Any]:
        """{"errors": {batch: largest error as a fraction of the largest output}}."""
        errors = {}
        for batch in (1,) if quick else (1, 16):
            inputs = models.minilm_inputs(batch)
            errors[f"{batch} x {inputs['input_ids'].shape[1]}"] = error(compiled(**inputs)[0], self.model(**inputs)[0])
        return {"errors": errors}


class Prefill:
    """A Llama decoder that reads a batch of full rows of real text and gives the logits of the last token of each."""

    def __init__(self, model: Any, tokenizer: Any, job: Job) -> None:
        self.model, self.tokens = model, f"{job.batch} x {job.seq}"
        text = tokenizer(" ".join(models.sentences(400)), return_tensors="pt")["input_ids"]
        self._ids = text[:, : job.batch * job.seq].view(job.batch, job.seq)
        self._call: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1}

    def bind(self, call: Callable[..., Any], eager: nn.Module) -> Callable[[], Tensor]:
        """f32 or bf16 [batch, 1, vocabulary]."""
        return lambda: call(input_ids=self._ids, **self._call).logits

    def first(self, compiled: Callable[..., Any]) -> None:
        """What a user waits for."""
        self.bind(compiled, self.model)()

    def check(self, compiled: Callable[..., Any], quick: bool) -> dict[str, Any]:
        """{"errors": {shape: largest error as a fraction of the largest logit}}, with rows padded on the left but for one."""
        errors, S = {}, min(37, self._ids.shape[1])
        for batch in (1,) if quick else (1, 3):
            ids = self._ids[:1, :S].repeat(batch, 1)
            given = {"input_ids": ids, "attention_mask": (torch.arange(S) >= 5 * torch.arange(batch)[:, None]).long(), **self._call}
            errors[f"{batch} x {S}"] = error(compiled(**given).logits, self.model(**given).logits)
        return {"errors": errors}


def error(out: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference, as a fraction of the largest magnitude wanted."""
    return float((out.float() - wanted.float()).abs().max() / wanted.float().abs().max())


def sparsity_of(model: str, pattern: str) -> Any:
    """What `compile` is told: the pattern, or nothing where too few zeros are there for a user to ask for their use."""
    few = re.fullmatch(r"unstructured\((0?\.\d+)\)", pattern)
    if pattern == "dense" or (few and float(few[1]) < 0.5):
        return None
    return {"*": pattern, "lm_head": "dense"} if model == "smollm2 prefill" else pattern


Case = Encoder | Decoder | Prefill


def case_of(job: Job) -> Case:
    """The pruned model and how it is called. By magnitude; the decoder by Wanda, so that it still writes sentences."""
    if job.model == "smollm2":
        decoder = Decoder(models.smollm2(), models.smollm2_tokenizer())
        if job.pattern != "dense":
            sparsecc.prune(decoder.model, job.pattern, criterion="wanda", calibration=decoder.calibration())
        return decoder
    model: Any = {"minilm": models.minilm, "bert": models.bert_base, "smollm2 prefill": models.smollm2}[job.model]()
    if job.pattern != "dense":
        sparsecc.prune(model, job.pattern)
    return Prefill(model, models.smollm2_tokenizer(), job) if job.model == "smollm2 prefill" else Encoder(model, job)


def compile_seconds(job: Job) -> dict[str, Any]:
    """From a loaded model to its first output, all that was imported on the way included."""
    case = case_of(job)
    start = time.perf_counter()
    case.first(sparsecc.compile(case.model, sparsity=sparsity_of(job.model, job.pattern)))
    return {"seconds": time.perf_counter() - start}


def measure(job: Job) -> dict[str, Any]:
    """Check, then one interleaved run of every contestant. `speedup` holds medians of ratios between neighbours in time."""
    case = case_of(job)
    compiled = sparsecc.compile(case.model, sparsity=sparsity_of(job.model, job.pattern))
    ours = case.bind(compiled, case.model)
    row: dict[str, Any] = {**asdict(job), "tokens": case.tokens, "sparsity": sparsity_of(job.model, job.pattern)}
    row["error"] = error(ours(), case.bind(case.model, case.model)())
    explained = compiled.explain(len(compiled.graphs) - 1)
    totals = explained.totals()
    row["layers"] = {kind: totals[kind] for kind in ("sparse", "dense")}
    row["dense_because"] = sorted({str(r.reason) for r in explained.regions if not is_sparse(r)})[:5]
    half = copy.deepcopy(case.model).bfloat16()
    contestants, row["failed"] = _contestants(case, half, job.quick)
    if not isinstance(case, Decoder) and not job.quick:  # decode in bf16 is cpu_decode's
        made = case.bind(sparsecc.compile(half, sparsity=sparsity_of(job.model, job.pattern)), half)
        wanted = case.bind(case.model, case.model)()
        row["error_bf16"] = {"sparsecc": error(made(), wanted), "torch": error(case.bind(half, half)(), wanted)}
        contestants[OURS_BF16] = made
    calls = CALLS if _seconds(ours) * CALLS < LONG else 1
    samples = {name: _sample(call, calls) for name, call in {"sparsecc": ours, **contestants}.items()}
    timings = interleaved(samples, job.seconds * len(samples), 2 if job.quick else ROUNDS)
    row |= summary(timings, calls)
    return row | case.check(compiled, job.quick)


def summary(timings: dict[str, Timing], calls: int = CALLS) -> dict[str, Any]:
    """Milliseconds a call, the speed-up over each contestant, and over the best of them (None where none ran)."""
    speedup = {name: t.ratio for name, t in timings.items() if name not in ("sparsecc", OURS_BF16)}
    bf16 = min((speedup[name] for name in BF16 if name in speedup), default=None)
    more = {} if bf16 is None or OURS_BF16 not in timings else {"bf16_vs_bf16": bf16 / timings[OURS_BF16].ratio}
    return more | {
        "ms": {name: 1e3 * t.median / calls for name, t in timings.items()},
        "best_ms": {name: 1e3 * t.best / calls for name, t in timings.items()},
        "speedup": speedup,
        "vs_fp32": min((speedup[name] for name in FP32 if name in speedup), default=None),
        "vs_any": min(speedup.values(), default=None),
    }


def _contestants(case: Case, half: Any, quick: bool) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Dense torch in every form that compiles here, warmed up, and why the others do not run. Forms differ in `options`, since
    Dynamo shares code between models that it cannot tell apart."""
    built: dict[str, Callable[[], Any]] = {}
    failed: dict[str, str] = {}
    for name in FP32[:1] if quick else FP32 + BF16:
        model = half if name.endswith("bf16") else case.model
        freezing = name.startswith("freezing")
        call: Any = model
        if not name.startswith("eager"):
            call = torch.compile(model, options={"freezing": True} if freezing else None)
        run = case.bind(call, model)
        try:
            # Dynamo asks for `freezing` when it traces: the option alone, which Inductor heeds, comes too late.
            with inductor.patch(freezing=freezing):
                run()
                run()
        except Exception as problem:  # no C++ compiler, a bug of this release: the others still compare
            failed[name] = f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]}"[:300]
        else:
            built[name] = run
    return built, failed


def _sample(run: Callable[[], Any], calls: int) -> Callable[[], None]:
    def sample() -> None:
        for _ in range(calls):
            run()

    return sample


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Run the job of the command line and append its row to the file."""
    job = Job(**json.loads(sys.argv[1]))
    torch.set_num_threads(job.threads)
    torch._dynamo.config.recompile_limit = 64  # six contestants share the model's code
    with torch.no_grad():
        row = (compile_seconds if job.task == "compile" else measure)(job)
    with Path(sys.argv[2]).open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
