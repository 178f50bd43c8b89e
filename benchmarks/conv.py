"""Pruned convolutional nets against dense torch and other engines, in one interleaved run, to benchmarks/results/conv.json.

    python -m benchmarks.conv --peer deepsparse=/envs/ds/bin/python --peer onnxruntime --zeros 0.8,0.9 --batch 1,16 --threads 1,2

1 x 1 convolutions are pruned by magnitude, unstructured. The engines take turns, as in `benchmarks.cpu peers`. Exporting for other engines
needs the package onnx.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import peer_worker
from benchmarks.peer_engines import Call, Case, Engine, deepsparse, onnxruntime

RESULTS = Path(__file__).parent / "results" / "conv.json"
WORKER = "worker"


def _torch(case: Case) -> tuple[Any, Any]:
    import torch

    torch.set_grad_enabled(False)
    torch.set_num_threads(case.threads)
    model = torch.load(str(case.folder / "model.pt"), weights_only=False)
    return model, torch.from_numpy(case.inputs()["x"])


def sparsecc(case: Case) -> Call:
    """As a user calls it."""
    import sparsecc as ours

    model, x = _torch(case)
    compiled = ours.compile(model, example_inputs=(x,), tune_seconds=300.0)
    (case.folder / "explain.json").write_text(json.dumps(compiled.explain().to_dict(), default=str))
    return lambda: compiled(x)


def eager(case: Case, last: bool = False) -> Call:
    """Dense, kernel by kernel; `last`: channels-last model and input."""
    import torch

    model, x = _torch(case)
    if last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    return lambda: model(x)


def inductor(case: Case, last: bool = False, freezing: bool = False) -> Call:
    """torch.compile; `freezing`: weights are constants, packed for oneDNN."""
    import torch._inductor.config as config
    from torch import channels_last, compile

    model, x = _torch(case)
    if last:
        model, x = model.to(memory_format=channels_last), x.to(memory_format=channels_last)
    compiled = compile(model, dynamic=False)
    with config.patch(freezing=freezing):
        compiled(x)
        compiled(x)
    return lambda: compiled(x)


ENGINES: dict[str, Engine] = {
    "sparsecc": Engine("", "fp32", True, ("torch", "apache-tvm"), sparsecc),
    "torch eager": Engine("", "fp32", True, ("torch",), eager),
    "torch eager, channels last": Engine("", "fp32", True, ("torch",), lambda case: eager(case, True)),
    "torch compile": Engine("", "fp32", True, ("torch",), inductor),
    "torch compile, channels last": Engine("", "fp32", True, ("torch",), lambda case: inductor(case, True)),
    "torch compile, freezing": Engine("", "fp32", True, ("torch",), lambda case: inductor(case, freezing=True)),
    "torch compile, freezing, channels last": Engine("", "fp32", True, ("torch",), lambda case: inductor(case, True, True)),
    "onnxruntime": Engine("onnxruntime", "fp32", True, ("onnxruntime",), onnxruntime),
    "deepsparse": Engine("deepsparse", "fp32", True, ("deepsparse",), deepsparse),
}


def export(job: Mapping[str, Any], folder: Path, onnx: bool) -> dict[str, Any]:
    """The pruned net as model.pt and model.onnx, its input, and its output in float64; the job with its share of zeros."""
    import copy

    import numpy as np
    import torch

    import sparsecc as ours
    from examples.convnets import NETS, images, pointwise

    torch.set_grad_enabled(False)
    model, x = NETS[job["model"]](), images(job["batch"])
    if job["zeros"]:
        ours.prune(model, dict.fromkeys(pointwise(model), f"unstructured({job['zeros']})"))
    np.savez(folder / "inputs.npz", x=x.numpy())
    np.save(folder / "expected.npy", copy.deepcopy(model).double()(x.double()).numpy())
    torch.save(model, folder / "model.pt")
    (folder / "job.json").write_text(json.dumps(dict(job)))
    if onnx:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the older exporter's age
            torch.onnx.export(
                model, (x,), str(folder / "model.onnx"), input_names=["x"], output_names=["y"], opset_version=13, dynamo=False
            )
    weights = [model.get_submodule(name).weight for name in pointwise(model)]
    return {**job, "share": 1 - sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)}


def cell(job: dict[str, Any], rivals: Sequence[Any], args: argparse.Namespace) -> dict[str, Any]:
    """One net, batch, share of zeros and number of threads."""
    from benchmarks import peers

    python = {"": sys.executable, **{peer.name: peer.python for peer in rivals}}
    names = [n for n, e in ENGINES.items() if e.peer in python and (n == "sparsecc" or not args.engines or n in args.engines)]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        exported = export(job, Path(folder), any(ENGINES[n].peer for n in names))
        workers = []
        for name in names:
            child = peers.Child(name, job["threads"], [python[ENGINES[name].peer], "-m", "benchmarks.conv", WORKER])
            stack.callback(child.close)
            workers.append(child)
        hold = peers.lock(args.lock, args.patience)
        loaded = peers.load(workers, folder, hold)
        with hold(True) as alone:
            ready = [child for child in workers if "failed" not in loaded[child.engine]]
            timed = peers.take_turns(ready, folder, args.seconds, args.rounds)
    engines = {name: {**{k: v for k, v in loaded[name].items() if k in ("error", "failed")}, **timed.get(name, {})} for name in names}
    ratio = {name: engine["ratio"] for name, engine in engines.items() if engine.get("ratio")}
    torchs = {name: ratio[name] for name in ratio if name.startswith("torch")}
    best = min(torchs, key=lambda name: torchs[name], default=None)
    others = {name: ratio[name] for name in ("deepsparse", "onnxruntime") if name in ratio}
    vs = {"torch": torchs.get(best) if best else None, "best torch": best, **others}
    return {**exported, "alone": alone, "vs": vs, "engines": engines}


def stamp() -> dict[str, Any]:
    """The machine and the code."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {"cpu": name, "cpus": os.cpu_count(), "commit": found.stdout.strip(), "versions": peer_worker.versions(("torch", "apache-tvm"))}


def main() -> None:
    """Time every cell, save after each."""
    if WORKER in sys.argv[1:2]:
        return peer_worker.main(ENGINES)
    from benchmarks import peers  # what workers need not have

    listed = lambda kind: lambda text: [kind(part.strip()) for part in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--nets", type=listed(str), default=["mobilenet_v1", "mobilenet_v2", "efficientnet_lite0"])
    parser.add_argument("--zeros", type=listed(float), default=[0.8, 0.9])
    parser.add_argument("--batch", type=listed(int), default=[1, 16])
    parser.add_argument("--threads", type=listed(int), default=[1])
    parser.add_argument("--engines", type=lambda text: text.split(";"), default=[], help=f"of {'; '.join(ENGINES)}; default: all")
    parser.add_argument("--peer", action="append", default=[], help="NAME or NAME=PYTHON; repeatable")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing, per cell")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every engine, at least")
    parser.add_argument("--lock", type=Path, help="a file to flock, shared while preparing and exclusively while timing")
    parser.add_argument("--patience", type=float, default=3600.0, help="seconds to wait for --lock before timing without it")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    rivals = [peers.Peer.parse(text) for text in args.peer]
    for rival in rivals:
        rival.require()
    rows = []
    for net in args.nets:
        for threads, batch, zeros in ((t, b, z) for t in args.threads for b in args.batch for z in args.zeros):
            rows.append(cell({"model": net, "batch": batch, "zeros": zeros, "threads": threads}, rivals, args))
            print(json.dumps({k: rows[-1][k] for k in ("model", "batch", "zeros", "threads", "vs")}), flush=True)
            args.json.write_text(json.dumps({**stamp(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
