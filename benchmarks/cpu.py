"""sparsecc on a CPU against dense torch (models) and against the machine (kernels). Tables on the screen, JSON in a file.

    python -m benchmarks.cpu models [--models minilm,bert,smollm2] [--patterns "block(4, 1, 0.9),unstructured(0.9)"] [--threads 1,2]
    python -m benchmarks.cpu kernels [--shapes bert,llama,512x2048] [--m 1,16,64,128,512] [--sparsity .8,.9,.95] [--threads 1,2]
    python -m benchmarks.cpu all [--quick]
    python -m benchmarks.cpu peers [--models minilm,bert] [--patterns ...] [--threads 1,2] [--batch 1,16]
        --peer onnxruntime --peer deepsparse=PYTHON --peer openvino=PYTHON

Every pattern and number of threads runs in processes of its own, since thread pools keep their size. Compile seconds come from two
more of them: cold has empty caches of sparsecc and Inductor, warm finds what cold left. `peers` times other engines (`benchmarks/peers.py`)
and needs the extra "bench".
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import peers

ROOT = Path(__file__).resolve().parents[1]
PATTERNS = {
    "minilm": ["block(4, 1, 0.9)", "block(4, 1, 0.8)", "unstructured(0.9)", "unstructured(0.8)", "nm(2, 4)", "unstructured(0.3)", "dense"],
    "bert": ["block(4, 1, 0.9)", "unstructured(0.9)"],
    "smollm2": ["unstructured(0.5)", "nm(2, 4)"],
    "smollm2 prefill": ["block(4, 1, 0.9)", "unstructured(0.9)"],
}
SHAPES = {"bert": ["768x768", "3072x768", "768x3072"], "llama": ["4096x4096", "11008x4096"]}
CONTESTANTS = ("eager fp32", "compile fp32", "freezing fp32", "eager bf16", "compile bf16", "sparsecc", "sparsecc bf16")
COMMA = re.compile(r",\s*(?![^()]*\))")
"""Commas outside parentheses."""


def stamp(quick: bool) -> dict[str, Any]:
    """What the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    packages = ("torch", "apache-tvm", "transformers", "numpy")
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return {
        "machine": f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} CPUs",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: installed.get(name, "") for name in packages}},
        "commit": _git("rev-parse", "--short=12", "HEAD") + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else ""),
        "quick": quick,
    }


def worker(module: str, job: dict[str, Any], **env: str) -> list[dict[str, Any]]:
    """The rows of one worker process, and a row with `failed` if it broke off."""
    threads = str(job["threads"])
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **env}
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as out:
        command = [sys.executable, "-m", f"benchmarks.{module}", json.dumps(job), out.name]
        done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True)
        rows = [json.loads(line) for line in Path(out.name).read_text().splitlines()]
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        rows.append({**job, "failed": f"exit code {done.returncode}: {lines[-1] if lines else ''}"[:400]})
    return rows


def run_models(args: argparse.Namespace, console: Console, save: Any) -> None:
    """A row per number of threads, model and pattern."""
    rows: list[dict[str, Any]] = []
    for threads, model, batch in itertools.product(args.threads, args.models or PATTERNS, args.batch):
        for pattern in args.patterns or (PATTERNS[model][:1] if args.quick else PATTERNS[model]):
            job = {"model": model, "pattern": pattern, "threads": threads, "batch": batch, "seq": args.seq, "quick": args.quick}
            rows.append(one_model({**job, "seconds": 0.3 if args.quick else args.seconds}))
            console.print(f"  {threads} threads {model} {pattern}: {_told(rows[-1])}", markup=False)
            save("models", rows)
    console.print(models_table(rows))


def run_peers(args: argparse.Namespace, console: Console, save: Any) -> None:
    """A row per number of threads, model, batch and pattern; the engines' processes live as long as the number of threads does."""
    patterns = args.patterns or (peers.PATTERNS[2:3] if args.quick else peers.PATTERNS)
    seconds, rounds = (0.0, 2) if args.quick else (args.seconds, 9)
    hold = peers.lock(args.lock, args.patience)
    rows: list[dict[str, Any]] = []
    for threads in args.threads:
        workers = peers.children(args.peer, threads, args.engines)
        try:
            product = itertools.product(args.models or peers.MODELS[:1], args.batch, patterns)
            cells = [peers.Cell(model, pattern, threads, batch, args.seq) for model, batch, pattern in product]
            for at in range(0, len(cells), args.group):
                new = peers.measure(cells[at : at + args.group], workers, seconds * len(workers), rounds, hold)
                rows += new
                console.print(peers.table(new), *(row["failed"] for row in new if "failed" in row))
                save("peers", rows)
        finally:
            for child in workers:
                child.close()


def one_model(job: dict[str, Any]) -> dict[str, Any]:
    """Compile cold, compile warm, measure: three processes. The measuring one has sparsecc's cache from the first, and for the dense
    contestants the user's Inductor cache."""
    with tempfile.TemporaryDirectory() as folder:
        ours, inductor = {"SPARSECC_CACHE": f"{folder}/sparsecc"}, {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        seconds: dict[str, Any] = {}
        for state in () if job["quick"] else ("cold", "warm"):
            done = worker("cpu_models", {**job, "task": "compile"}, **ours, **inductor)[-1]
            seconds[state] = done.get("failed", done.get("seconds"))
        return {**worker("cpu_models", {**job, "task": "measure"}, **ours)[-1], "compile_seconds": seconds}


def run_kernels(args: argparse.Namespace, console: Console, save: Any) -> None:
    """A row per number of threads, shape, format, sparsity and number of tokens; the worker prints them as they come."""
    job: dict[str, Any] = {
        "shapes": [shape for name in args.shapes for shape in SHAPES.get(name, [name])], "tokens": args.m, "sparsities": args.sparsity,
    }
    if args.formats:
        job["formats"] = args.formats
    if args.quick:
        job |= {"shapes": job["shapes"][:1], "tokens": [1, 64], "sparsities": [0.9], "seconds": 0.2, "rounds": 5}
        job |= {"formats": args.formats or ["bsr(4, 1)", "csr"]}
    rows: list[dict[str, Any]] = []
    for threads in args.threads:
        for shape in job["shapes"]:
            rows += worker("cpu_kernels", {**job, "shapes": [shape], "threads": threads})
            if "step" not in rows[-1]:
                console.print(f"  {threads} threads {shape}: {rows[-1]['failed']}", markup=False)
            save("kernels", rows)
    console.print(kernels_table(rows))


def models_table(rows: list[dict[str, Any]]) -> Table:
    """Milliseconds, and speed-ups that are medians of paired ratios."""
    table = Table(title="models: ms a call (medians of one interleaved run)")
    for name in ("model", "pattern", "threads"):
        table.add_column(name, no_wrap=True)
    for name in (*CONTESTANTS, "vs best fp32", "vs best", "error", "cold / warm s", "sparse layers", "greedy"):
        table.add_column(name, justify="right")
    for row in rows:
        head = [row["model"], row["pattern"], str(row["threads"])]
        if "ms" not in row:
            table.add_row(*head, "[red]failed")
            continue
        layers, greedy = row["layers"], row.get("greedy")
        worst = max([row["error"], *row.get("errors", {}).values()])
        speed = [f"{row[key]:.2f}x" if row.get(key) else "" for key in ("vs_fp32", "vs_any")]
        compiled = " / ".join(f"{s:.1f}" if isinstance(s, float) else "failed" for s in row["compile_seconds"].values())
        tokens = f"{greedy['same']}/{greedy['tokens']} same" if greedy else ""
        times = [f"{row['ms'][name]:.2f}" if name in row["ms"] else "" for name in CONTESTANTS]
        table.add_row(*head, *times, *speed, f"{worst:.0e}", compiled, f"{layers['sparse']}/{sum(layers.values())}", tokens)
    return table


def kernels_table(rows: list[dict[str, Any]]) -> Table:
    """Fractions of the limit, median and upper quartile."""
    table = Table(title="kernels: fraction of the fp32 FMA peak (M = 1: of the read bandwidth), median (upper quartile)")
    left, numbers = ("N x K", "format"), ("zeros", "M", "threads", "limit G/s", "kernel us", "kernel", "whole call")
    for name in (*left, *numbers, "configuration"):
        table.add_column(name, justify="right" if name in numbers else "left", no_wrap=name != "configuration")
    for row in rows:
        if "step" not in row:
            table.add_row(row.get("shape", ""), row.get("format", ""), "", "", str(row["threads"]), "", "", "[red]failed")
            continue
        shares = [f"{row[k]['fraction']:.2f} ({row[k]['top']:.2f})" for k in ("step", "call")]
        head = [row["shape"], row["format"], f"{row['sparsity']:.0%}", str(row["tokens"]), str(row["threads"])]
        table.add_row(*head, f"{row['limit'] / 1e9:.1f}", f"{1e6 * row['step']['seconds']:.0f}", *shares, row["config"])
    return table


def _told(row: dict[str, Any]) -> str:
    if "ms" not in row:
        return str(row.get("failed"))
    return ", ".join(f"{name} {ms:.1f}" for name, ms in row["ms"].items()) + f" ms; {row['vs_fp32'] or 0:.2f}x the best fp32"


def _git(*args: str) -> str:
    try:
        return subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _parser() -> argparse.ArgumentParser:
    listed = lambda kind: lambda text: [kind(part) for part in COMMA.split(text) if part]  # noqa: E731
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("models", "kernels", "all", "peers"))
    parser.add_argument("--threads", type=listed(int), default=[t for t in (1, 2) if t <= cpus])
    parser.add_argument("--models", type=listed(str), help=", ".join(PATTERNS))
    parser.add_argument("--patterns", type=listed(str), help='for every model: "block(4, 1, 0.9),unstructured(0.9),nm(2, 4),dense"')
    parser.add_argument("--batch", type=listed(int), default=[1])
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing, per contestant")
    parser.add_argument("--shapes", type=listed(str), default=list(SHAPES), help="bert, llama, or NxK")
    parser.add_argument("--formats", type=listed(str), help='"bsr(4, 1),csr"; by default every family')
    parser.add_argument("--m", type=listed(int), default=[1, 16, 64, 128, 512], help="tokens")
    parser.add_argument("--sparsity", type=listed(float), default=[0.8, 0.9, 0.95])
    parser.add_argument("--peer", action="append", default=[], help=f"NAME or NAME=PYTHON, of {', '.join(peers.PACKAGES)}; repeatable")
    parser.add_argument("--engines", type=listed(str), default=[], help=f"peers: of {', '.join(peers.ENGINES)}; by default all there are")
    parser.add_argument("--group", type=int, default=1, help="peers: patterns to load together and time one after the other")
    parser.add_argument("--lock", type=Path, help="peers: a file to flock, shared while preparing and exclusively while timing")
    parser.add_argument("--patience", type=float, default=3600.0, help="seconds to wait for --lock before timing without it")
    parser.add_argument("--quick", action="store_true", help="a look at whether everything runs; its figures mean nothing")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/cpu-WHAT.json, none with --quick")
    return parser


def main() -> None:
    """Run, print, and keep the file up to date after every row."""
    args = _parser().parse_args()
    known = peers.MODELS if args.what == "peers" else tuple(PATTERNS)
    if unknown := set(args.models or ()) - set(known):
        raise SystemExit(f"unknown model {', '.join(unknown)}: known are {', '.join(known)}")
    if unknown := set(args.engines) - set(peers.ENGINES):
        raise SystemExit(f"unknown engine {', '.join(unknown)}: known are {', '.join(peers.ENGINES)}")
    try:
        args.peer = [peers.Peer.parse(text) for text in args.peer]
        for peer in args.peer:
            peer.require()
    except peers.PeerError as error:
        raise SystemExit(str(error)) from None
    path = args.json or (None if args.quick else ROOT / "benchmarks" / "results" / f"cpu-{args.what}.json")
    result = stamp(args.quick)
    console = Console(width=None if sys.stdout.isatty() else 220)
    console.print(f"{result['machine']}  {result['versions']}  {result['commit']}", highlight=False)

    def save(part: str, rows: list[dict[str, Any]]) -> None:
        result[part] = rows
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1) + "\n")

    if args.what in ("kernels", "all"):
        run_kernels(args, console, save)
    if args.what in ("models", "all"):
        run_models(args, console, save)
    if args.what == "peers":
        run_peers(args, console, save)
    if path:
        console.print(f"written: {path}", markup=False)


if __name__ == "__main__":
    main()
