"""GPU kernels, a model and the launch path, measured: JSON into benchmarks/results/ and a table.

    python -m benchmarks.gpu [--smoke] [--all] [--only kernels,model,launch]

Kernels: Llama-3-8B, BERT-base and ViT-L layers at several sparsities and numbers of tokens, against cuBLAS dense and the vendors' sparse
kernels, in one interleaved run with a cold L2; every kernel is checked before it is timed. e is the kept-FLOP efficiency (FLOP/s on
kept weights over cuBLAS's FLOP/s), `bytes` the rate at which the stored weight is read. --smoke runs each kernel once, on small
shapes; with TRITON_INTERPRET=1 that needs no GPU. --all takes every layer; by default the larger ones, within eight minutes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import sparsecc
from sparsecc.autotune.gpu_measure import interleaved_on_gpu
from sparsecc.autotune.measure import interleaved
from sparsecc.autotune.roofline import dense_estimate, estimate
from sparsecc.autotune.search import mismatch
from sparsecc.codegen.config import to_text
from sparsecc.codegen.triton.backend import TritonBackend
from sparsecc.codegen.triton.compiler import interpreting
from sparsecc.codegen.triton.config import GpuConfig
from sparsecc.codegen.triton.devices import device_of, own_device
from sparsecc.codegen.triton.facts import dtype_of, spec_of
from sparsecc.codegen.triton.storage import storage
from sparsecc.formats import Format, parse_pattern
from sparsecc.formats.grid import kept_blocks
from sparsecc.runtime.gpu import GpuLinear
from sparsecc.runtime.gpu_tuner import TOLERANCE
from sparsecc.runtime.vendor import VendorLinear, vendors

RESULTS = Path(__file__).parent / "results"

LAYERS = {
    "llama-3-8b gate+up": (28672, 4096), "llama-3-8b down": (4096, 14336), "bert-base fc1": (3072, 768), "vit-l fc2": (1024, 4096),
    "llama-3-8b qkv": (6144, 4096), "llama-3-8b out": (4096, 4096), "bert-base qkv": (2304, 768), "vit-l fc1": (4096, 1024),
}
LARGER = 4
"""The first so many layers are measured by default."""

TOKENS = (1, 16, 128, 2048, 8192)
PATTERNS = (
    "block(64, 64, 0.5)", "block(64, 64, 0.9)", "block(128, 128, 0.5)", "block(128, 128, 0.9)", "2:4", "unstructured(0.5)",
    "unstructured(0.7)", "unstructured(0.95)", "block(4, 1, 0.9)",
)
CONFIGS = 2
"""Configurations of each format that are tried: compiling takes longer than timing."""

SECONDS = 0.02
"""Of timing, per contestant."""


@dataclass(frozen=True)
class Where:
    """Where kernels run, and how they are timed."""

    backend: TritonBackend
    device: str
    smoke: bool

    def time(self, calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Median microseconds of each; under the interpreter they say nothing."""
        if self.device == "cpu" or self.smoke:
            return dict.fromkeys(calls, float("nan"))
        timings = interleaved_on_gpu(calls, SECONDS * len(calls), 7)
        return {name: 1e6 * timing.median for name, timing in timings.items()}


def weight(N: int, K: int, pattern: str, dtype: torch.dtype) -> torch.Tensor:
    """Random values with the pattern's zeros."""
    layer = nn.Linear(K, N, bias=False)
    sparsecc.prune(layer, pattern)
    return layer.weight.detach().to(dtype)


def problems(smoke: bool, every: bool) -> Iterator[tuple[str, tuple[int, int], int, str]]:
    layers = {"small": (256, 256)} if smoke else dict(list(LAYERS.items())[: None if every else LARGER])
    for pattern in PATTERNS:
        for name, shape in layers.items():
            for tokens in (1, 5, 40) if smoke else TOKENS:
                yield name, shape, tokens, pattern


def kernels(where: Where, every: bool) -> list[dict[str, Any]]:
    """One row per problem and format that a kernel runs."""
    rows: list[dict[str, Any]] = []
    stored: dict[tuple[Any, ...], tuple[torch.Tensor, dict[Format, list[torch.Tensor]]]] = {}
    for name, shape, tokens, pattern in track(list(problems(where.smoke, every)), "kernels"):
        if (key := (shape, pattern)) not in stored:
            stored.clear()  # one weight at a time
            dense = weight(*shape, pattern, torch.bfloat16)
            density = int(dense.count_nonzero()) / dense.numel()
            formats = storage(parse_pattern(pattern), density, dense.dtype, None)
            packed = {fmt: [array.to(where.device) for array in fmt.pack(dense).values()] for fmt in formats if fmt.refuses(dense) is None}
            stored[key] = (dense.to(where.device), packed)
        rows += list(_contest(where, name, tokens, pattern, *stored[key]))
    return rows


def _contest(
    where: Where, name: str, tokens: int, pattern: str, dense: torch.Tensor, packed: dict[Format, list[torch.Tensor]]
) -> Iterator[dict[str, Any]]:
    (N, K), backend = dense.shape, where.backend
    x = torch.randn(tokens, K, device=where.device).to(dense.dtype)
    bias = torch.randn(N, device=where.device).to(dense.dtype)
    wanted = F.linear(x.float(), dense.float(), bias.float()).double()
    calls: dict[str, Callable[[], Any]] = {"dense": lambda: F.linear(x, dense, bias)}
    about: dict[str, tuple[Format, Any]] = {}
    wrong: dict[str, str] = {}
    for fmt, params in packed.items():
        spec = spec_of((fmt,), "", False, (N, K), dense.dtype, tokens)
        if backend.refuses(spec):
            continue
        makers: dict[Any, Any] = {config: GpuLinear(backend, spec, config, (N, K)) for config in backend.space(spec)[:CONFIGS]}
        if where.device != "cpu":
            makers |= {config: VendorLinear(spec, config, (N, K)) for config in vendors(spec)}
        for config, kernel in makers.items():
            label = f"{fmt} {to_text(config)}"
            about[label] = (fmt, config)
            try:
                found = mismatch(kernel(x, params, bias, None), wanted, TOLERANCE[dense.dtype])
            except Exception as error:
                found = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            if found:
                wrong[label] = found
            else:
                calls[label] = lambda kernel=kernel, params=params: kernel(x, params, bias, None)
    times = where.time(calls)
    for label, (fmt, config) in about.items():
        yield _row(where, name, tokens, pattern, dense, fmt, config, times.get(label), times["dense"], wrong.get(label))


def _row(
    where: Where, name: str, tokens: int, pattern: str, dense: torch.Tensor, fmt: Format, config: Any, us: float | None, dense_us: float,
    wrong: str | None,
) -> dict[str, Any]:
    N, K = dense.shape
    kept = int(dense.count_nonzero()) / dense.numel()
    blocks = kept_blocks(dense.cpu(), fmt.block)
    row: dict[str, Any] = {
        "layer": name, "N": N, "K": K, "M": tokens, "pattern": pattern, "format": str(fmt), "config": to_text(config), "zeros": 1 - kept,
        "us": us, "dense_us": dense_us, "error": wrong,
    }
    if isinstance(config, GpuConfig):
        spec = spec_of((fmt,), "", False, (N, K), dense.dtype, tokens)
        row["predicted_us"] = 1e6 * estimate(spec, config, (N, K), {fmt: blocks}, tokens, where.backend.device).seconds
        row["dense_predicted_us"] = 1e6 * dense_estimate(N, K, tokens, dtype_of(dense.dtype), where.backend.device).seconds
    if us and us == us:
        row["speed_up"] = dense_us / us
        row["e"] = kept * dense_us / us
        row["bytes_per_second"] = fmt.nbytes(N, K, blocks) / (1e-6 * us)
        row["break_even"] = max(0.0, 1 - kept * dense_us / us)
    return row


class Ffn(nn.Module):
    """Gated feed-forward layers of Llama-3-8B's sizes."""

    def __init__(self, layers: int, hidden: int, inner: int) -> None:
        super().__init__()
        make = lambda N, K: nn.ModuleList(nn.Linear(K, N, bias=False) for _ in range(layers))  # noqa: E731
        self.gate, self.up, self.down = make(inner, hidden), make(inner, hidden), make(hidden, inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for gate, up, down in zip(self.gate, self.up, self.down, strict=True):
            x = x + down(F.silu(gate(x)) * up(x))
        return x


def model(where: Where) -> list[dict[str, Any]]:
    """A stack of feed-forward layers, compiled, against torch.compile of the masked dense one."""
    rows = []
    layers, hidden, inner = (1, 64, 128) if where.smoke else (4, 4096, 14336)
    for pattern, tokens in (("block(64, 64, 0.9)", 1), ("block(64, 64, 0.9)", 2048), ("2:4", 1), ("unstructured(0.7)", 1)):
        stack = Ffn(layers, hidden, inner).eval()
        sparsecc.prune(stack, pattern)
        stack = stack.to(where.device, torch.bfloat16)
        x = torch.randn(tokens if not where.smoke else min(tokens, 8), hidden, device=where.device).to(torch.bfloat16)
        compiled = sparsecc.compile(stack, target="cuda", sparsity=pattern, example_inputs=(x,), dynamic_shapes=None,
                                    remainder="eager" if where.device == "cpu" else "auto")
        with torch.no_grad():
            error = float((compiled(x).float() - stack(x).float()).abs().max() / stack(x).float().abs().max())
            dense = stack if where.device == "cpu" else torch.compile(stack, mode="max-autotune-no-cudagraphs")
            times = where.time({"dense": partial(dense, x), "sparsecc": partial(compiled, x)})
        rows.append({"pattern": pattern, "M": len(x), "us": times["sparsecc"], "dense_us": times["dense"], "error": error,
                     "explain": compiled.explain().to_dict()["totals"]})
    return rows


def launch(where: Where) -> dict[str, float]:
    """Host microseconds of one uncaptured call of a small kernel, as the program calls it."""
    w = weight(256, 256, "2:4", torch.bfloat16)
    fmt = storage(parse_pattern("2:4"), 0.5, w.dtype, None)[0]
    spec = spec_of((fmt,), "", False, (256, 256), w.dtype, 1)
    kernel = GpuLinear(where.backend, spec, where.backend.space(spec)[0], (256, 256))
    params = [array.to(where.device) for array in fmt.pack(w).values()]
    x, bias = torch.randn(1, 256, device=where.device).to(w.dtype), torch.zeros(256, device=where.device).to(w.dtype)
    kernel(x, params, bias, None)
    if where.device == "cpu":
        return {"host_us": float("nan")}
    torch.cuda.synchronize()
    calls = 500
    timing = interleaved({"call": lambda: [kernel(x, params, bias, None) for _ in range(calls)]}, 0.5)
    torch.cuda.synchronize()
    return {"host_us": 1e6 * timing["call"].best / calls}


def table(rows: list[dict[str, Any]]) -> Table:
    """The best of ours per problem."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = (row["pattern"], row["layer"], row["M"])
        if row["error"] is None and row.get("us") and (key not in best or row["us"] < best[key]["us"]):
            best[key] = row
    shown = Table(*("pattern", "layer", "M", "format", "us", "dense us", "speed-up", "e", "TB/s"))
    for row in best.values():
        numbers = [row["us"], row["dense_us"], row.get("speed_up", 0), row.get("e", 0), row.get("bytes_per_second", 0) / 1e12]
        shown.add_row(row["pattern"], row["layer"], str(row["M"]), row["format"], *(f"{number:.2f}" for number in numbers))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", default="kernels,launch,model")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    device = device_of("cuda:sm_90") if interpreting() else own_device()
    where = Where(TritonBackend(device), "cpu" if interpreting() else "cuda", asked.smoke)
    started = time.perf_counter()
    found: dict[str, Any] = {"device": device.name, "target": device.target, "torch": torch.__version__, "triton": triton.__version__,
                             "interpreted": interpreting(), "smoke": asked.smoke}
    parts = {"kernels": lambda: kernels(where, asked.all), "launch": lambda: launch(where), "model": lambda: model(where)}
    out = asked.out or RESULTS / ("gpu-smoke.json" if asked.smoke else f"gpu-{device.name.replace(' ', '-').lower()}.json")
    for name in asked.only.split(","):
        found[name] = parts[name]()
        found["seconds"] = time.perf_counter() - started
        out.write_text(json.dumps(found, indent=1) + "\n")
    if "kernels" in found:
        Console().print(table(found["kernels"]))
        failed = [row for row in found["kernels"] if row["error"]]
        print(f"{len(found['kernels'])} kernels, {len(failed)} wrong or failed; {found['seconds']:.0f} s; {out}")
        for row in failed:
            print(f"  {row['format']} {row['config']} M={row['M']}: {row['error']}")


if __name__ == "__main__":
    main()
