"""Token skipping (FTP) on SmolLM2-135M: the prefill of a long real text, dense and with a part of the tokens sent past each block.

    python -m examples.skip_tokens [--skipped 0.3] [--tokens 1024] [--search]

Prints the regions, the time of both, and how far the next token's distribution moves. `--search` looks for a schedule instead of skipping
as much in every block (a minute or more).
"""

from __future__ import annotations

import argparse

import torch

import sparsecc
from examples import models
from sparsecc.autotune.measure import interleaved
from sparsecc.methods.ftp import search


def main() -> None:
    """Compile both, compare, time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skipped", type=float, default=0.3)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--search", action="store_true")
    args = parser.parse_args()
    model, tokenizer = models.smollm2(), models.smollm2_tokenizer()
    ids = tokenizer(" ".join(models.sentences(600)), return_tensors="pt")["input_ids"]
    inputs = {"input_ids": ids[:, : args.tokens], "use_cache": False, "logits_to_keep": 1}
    tokens = sparsecc.ftp(args.skipped)
    if args.search:
        data = [{"input_ids": ids[:, -256:], "use_cache": False}]
        found = search(model, data, args.skipped, "model.layers.*", population=6, generations=3)
        tokens = found.tokens
        print(f"schedule {list(tokens.schedule)}: the output moves by {found.error:.3f}, blocks cost {found.cost:.2f} of the dense ones")
    compiled = {
        name: sparsecc.compile(model, sparsity=spec, example_inputs=inputs, autotune="none", remainder="eager")
        for name, spec in (("dense", None), ("skipping", {"model.layers.*": tokens}))
    }
    print("\n".join(line for line in str(compiled["skipping"].explain()).splitlines() if "skips" in line or "ftp" in line))
    dense, skipping = (one(**inputs).logits[0, -1].log_softmax(-1) for one in compiled.values())
    moved = float((dense.exp() * (dense - skipping)).sum())
    words = [tokenizer.decode([int(row.argmax())]) for row in (dense, skipping)]
    print(f"next token: {words[0]!r} dense, {words[1]!r} skipping; Kullback-Leibler divergence {moved:.3f}")
    times = interleaved({name: lambda one=one: one(**inputs) for name, one in compiled.items()}, 10.0)
    took = {name: f"{1e3 * timing.median:.0f} ms" for name, timing in times.items()}
    print(f"{torch.get_num_threads()} threads: {took}, {1 / times['skipping'].ratio:.2f}x")


if __name__ == "__main__":
    main()
