"""The main job on a real model: MiniLM-L6 pruned to 4x1 blocks, compiled, checked against the masked dense model, timed.

    python -m examples.demo [--pattern "block(4, 1, 0.9)"] [--threads 1] [--seq 128]

Pruning in one shot breaks the model's embeddings: this shows speed and exactness, not a model to use.
"""
from __future__ import annotations

import argparse
import copy
import time

import torch
from rich.console import Console
from rich.table import Table

import sparsecc
from examples.models import minilm, minilm_inputs, minilm_tokenizer, sentences
from sparsecc.autotune.measure import interleaved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pattern", default="block(4, 1, 0.9)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=8.0, help="of timing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    console = Console()

    console.rule("1. A real model, pruned")
    model = minilm()
    console.print(f"all-MiniLM-L6-v2, linear weights pruned to {args.pattern} by magnitude")
    report = sparsecc.prune(model, args.pattern)
    console.print(f"{len(report.rows)} weights pruned")

    console.rule("2. Compiled")
    inputs = minilm_inputs(1, args.seq)
    started = time.perf_counter()
    compiled = sparsecc.compile(model, target="cpu", sparsity=args.pattern, example_inputs=inputs)
    compiled(**inputs)
    console.print(f"in {time.perf_counter() - started:.0f} s (kernels and timings are cached for the next time)\n")
    print(compiled.explain())

    console.rule("3. Checked against the masked dense model, on real sentences of different lengths")
    worst = check(model, compiled)
    console.print(f"largest difference: {worst:.1e} of the output's scale")
    if not worst <= 1e-4:
        raise SystemExit("the compiled model differs from the masked dense model")

    console.rule("4. Timed, interleaved in one run")
    console.print(timings(model, compiled, inputs, args.seconds))
    console.print("Every stage can be read: compiled.ir(), compiled.ir('lower'), or SPARSECC_DUMP=dir for programs, diffs and kernels.")


def check(model: torch.nn.Module, compiled: torch.nn.Module) -> float:
    """Largest difference over several sentences, as a fraction of the largest output."""
    tokenize, worst = minilm_tokenizer(), 0.0
    for sentence in sentences(8):
        inputs = dict(tokenize(sentence, return_tensors="pt", truncation=True, max_length=128))
        want = model(**inputs).last_hidden_state
        got = compiled(**inputs).last_hidden_state
        worst = max(worst, float((got - want).abs().max() / want.abs().max()))
    return worst


def timings(model: torch.nn.Module, compiled: torch.nn.Module, inputs: dict[str, torch.Tensor], seconds: float) -> Table:
    """Medians side by side: the machine may be shared, so ratios within one run are what counts."""
    inductor = torch.compile(copy.deepcopy(model))
    inductor(**inputs)
    times = interleaved(
        {
            "torch eager, fp32": lambda: model(**inputs),
            "torch.compile, fp32": lambda: inductor(**inputs),
            "sparsecc, fp32": lambda: compiled(**inputs),
        },
        seconds,
    )
    title = f"batch 1, {inputs['input_ids'].shape[1]} tokens, {torch.get_num_threads()} thread(s)"
    table = Table("engine", "median ms", "best ms", "speed against torch eager", title=title)
    for name, timing in times.items():
        table.add_row(name, f"{1e3 * timing.median:.1f}", f"{1e3 * timing.best:.1f}", f"{1 / timing.ratio:.2f}x")
    return table


if __name__ == "__main__":
    main()
