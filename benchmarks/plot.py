"""Latency by sparsity, a line per engine: a picture of what `benchmarks/cpu.py peers` measured. Needs matplotlib (the extra "bench").

    python -m benchmarks.plot [RESULTS.json] [--out docs/peers.png] [--model minilm] [--batch 1] [--threads 1,2] [--of cpu_ms]

A panel for each pattern and number of threads. Both axes are logarithmic, zeros by the weights that they leave, so that time in
proportion to the work is a straight line. `--of cpu_ms` draws CPU time, for one thread on a machine that was not idle. Dashed lines
are engines whose outputs are not the masked dense model's to fp32 rounding.
"""
from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peer_engines import ENGINES

ROOT = Path(__file__).resolve().parents[1]
STYLES = {
    "sparsecc": ("#d62728", "o"), "deepsparse": ("#1f5fbf", "s"), "openvino": ("#2a9d5c", "^"), "onnxruntime": ("#8a5fbf", "D"),
    "torch compile": ("#e08a1e", "v"), "torch eager": ("#7f7f7f", "x"),
}
"""Color (legible without red and green apart, by brightness and mark) and mark of each engine, all of its precisions."""
FIGURES = {"ms": "ms a call, median", "cpu_ms": "CPU ms a call, median", "best_ms": "ms a call, best"}
DASHES = {"fp32": "-", "bf16": "--", "int8": ":"}


def kind_and_zeros(pattern: str) -> tuple[str, float]:
    """"block(4, 1, 0.9)" --> ("block(4, 1)", 0.9). Raises ValueError for a pattern that has no share of zeros."""
    found = re.fullmatch(r"(\w+)\((.*?),?\s*(0?\.\d+)\)", pattern)
    if not found:
        raise ValueError(f"{pattern!r} has no share of zeros to plot by; such as unstructured(0.9) or block(4, 1, 0.9) do")
    return (f"{found[1]}({found[2]})" if found[2] else found[1]), float(found[3])


def series(rows: Sequence[dict[str, Any]], of: str = "ms") -> dict[str, list[tuple[float, float]]]:
    """By engine: (share of zeros, what was measured), ascending. Rows without times are left out."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, engine in row.get("engines", {}).items():
            if of in engine:
                lines.setdefault(name, []).append((kind_and_zeros(row["pattern"])[1], engine[of]))
    return {name: sorted(points) for name, points in lines.items()}


def draw(result: dict[str, Any], model: str, batch: int, out: Path, of: str = "ms", only: Sequence[int] = ()) -> None:
    """Write the picture; `of` is a key of `FIGURES`, `only` are numbers of threads. Raises ValueError if the result has no such rows."""
    from matplotlib.figure import Figure

    rows = [row for row in result["peers"] if (row["model"], row["batch"]) == (model, batch) and "engines" in row]
    if not rows:
        raise ValueError(f"no row of {model} with batch {batch}: there are {sorted({(r['model'], r['batch']) for r in result['peers']})}")
    kinds = sorted({kind_and_zeros(row["pattern"])[0] for row in rows})
    threads = sorted({row["threads"] for row in rows if not only or row["threads"] in only})
    off = {name: max(row["engines"].get(name, {}).get("error", 0.0) for row in rows) for name in ENGINES}
    figure = Figure(figsize=(5.2 * len(kinds), 3.9 * len(threads) + 1.2), layout="constrained")
    panels = figure.subplots(len(threads), len(kinds), squeeze=False, sharex=True, sharey="row")
    for i, count in enumerate(threads):
        for j, kind in enumerate(kinds):
            here = [row for row in rows if row["threads"] == count and kind_and_zeros(row["pattern"])[0] == kind]
            panel(panels[i, j], series(here, of), off)
            panels[i, j].set_title(f"{kind}, {count} thread{'s' * (count > 1)}", fontsize=10)
        panels[i, 0].set_ylabel(FIGURES[of])
    zeros = sorted({kind_and_zeros(row["pattern"])[1] for row in rows})
    for ax in panels.flat:  # panels share an axis, and need not have the same points
        ax.set_xlim(1.1 * (1 - zeros[0]), (1 - zeros[-1]) / 1.1)
        ax.set_xticks([1 - share for share in zeros], [f"{share:.0%}" for share in zeros])
        ax.set_xticks([], minor=True)
    for ax in panels[-1]:
        ax.set_xlabel("zeros in the linear weights")
    handles, labels = max((ax.get_legend_handles_labels() for ax in panels.flat), key=lambda both: len(both[1]))
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False, handlelength=2.8)
    busy = "" if all(row.get("alone") is not False for row in rows) else ", busy with other work"
    figure.suptitle(f"{model}, {batch} x {rows[0]['seq']} tokens: {result['machine']}{busy}", fontsize=11)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=85, pil_kwargs={"optimize": True})


def panel(ax: Any, lines: dict[str, list[tuple[float, float]]], off: dict[str, float]) -> None:
    """One pattern, one number of threads. The legend tells how far an inexact engine is off."""
    for name in [name for name in ENGINES if name in lines]:
        kept, ms = [1 - zeros for zeros, _ in lines[name]], [ms for _, ms in lines[name]]
        precision = ENGINES[name].precision
        if name == "floor":
            ax.plot(kept, ms, color="black", linewidth=0.8, label="floor: fp32 multiply-adds left")
            continue
        color, mark = STYLES[name.removesuffix(f" {precision}")]
        label = f"{name.removesuffix(f' {precision}')} {precision}" + ("" if precision == "fp32" else f", off by {off[name]:.0%}")
        width = 2.8 if name == "sparsecc" else 1.3
        ax.plot(kept, ms, DASHES[precision], color=color, marker=mark, markersize=5, linewidth=width, label=label, zorder=width)
    ax.set(xscale="log", yscale="log")
    low, high = ax.get_ylim()
    ticks = [t for t in (0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000, 2000) if low <= t <= high]
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    ax.set_yticks([], minor=True)
    ax.tick_params(labelleft=True)
    ax.grid(alpha=0.25)


def main() -> None:
    """Draw the file of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("json", nargs="?", type=Path, default=ROOT / "benchmarks" / "results" / "cpu-peers.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "peers.png")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=lambda text: [int(part) for part in text.split(",")], default=[])
    parser.add_argument("--of", choices=FIGURES, default="ms")
    args = parser.parse_args()
    draw(json.loads(args.json.read_text()), args.model, args.batch, args.out, args.of, args.threads)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
