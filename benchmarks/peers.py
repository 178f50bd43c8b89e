"""sparsecc against other CPU inference engines, on the same pruned weights, in one interleaved run: `benchmarks/cpu.py peers`.

Each engine lives in a process of its own, under an interpreter that has it (`--peer NAME=PATH`), and answers requests to load and to
time (`peer_worker`). The engines take turns, a few calls each, while the others sleep; what an engine burns out of turn is reported.
A cell is a model, a batch, a pattern and a number of threads: its weights are pruned and exported once (`peer_export`).
"""
from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any

from rich.table import Table

from benchmarks.peer_engines import ENGINES

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("minilm", "bert")
PATTERNS = [f"{kind}{zeros})" for kind in ("block(4, 1, ", "unstructured(") for zeros in (0.5, 0.8, 0.9, 0.95)]
PACKAGES = {
    "onnxruntime": "onnxruntime onnx", "openvino": "openvino nncf", "deepsparse": "deepsparse==1.8.0", "llama_cpp": "llama-cpp-python gguf",
}  # fmt: skip
"""What to install for each name that --peer takes."""
CALLS = 3
"""Timed calls of a turn."""
REST = 0.02
"""Seconds between turns: threads that wait for more work by spinning give up before the next engine starts."""


class PeerError(ValueError):
    """A --peer that names no engine, or an interpreter that cannot run it. The message names the way out."""


@dataclass(frozen=True)
class Peer:
    """An engine's family and the interpreter that has it."""

    name: str
    python: str

    @classmethod
    def parse(cls, text: str) -> Peer:
        """"onnxruntime" (in this interpreter) or "deepsparse=/envs/ds/bin/python". Raises PeerError."""
        name, given, path = text.partition("=")
        if name not in PACKAGES:
            raise PeerError(f"--peer {text}: no engine is called {name!r}; known are {', '.join(PACKAGES)}")
        path = os.path.expanduser(path)
        if given and not (os.path.isfile(path) and os.access(path, os.X_OK)):
            raise PeerError(f"--peer {text}: there is no interpreter at {path!r}; {_recipe(name)}")
        return cls(name, os.path.abspath(path) if given else sys.executable)

    def require(self) -> None:
        """Raise PeerError unless the interpreter finds the engine. Asking does not import it."""
        ask = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({self.name!r}) is None)"
        if subprocess.run([self.python, "-c", ask], capture_output=True).returncode:
            raise PeerError(f"--peer {self.name}: {self.python} has no {self.name}; {_recipe(self.name)}")


@dataclass(frozen=True)
class Cell:
    """One comparison."""

    model: str
    pattern: str
    threads: int
    batch: int = 1
    seq: int = 128


class Child:
    """A worker process; see `peer_worker` for what it answers. `command` precedes the engine and the number of threads."""

    def __init__(self, engine: str, threads: int, command: Sequence[str]) -> None:
        self.engine = engine
        count = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **count}
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (close)
        self._process = subprocess.Popen(
            [*command, engine, str(threads)], env=env, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
        )

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """The reply, or {"failed": why} with the last line of the error output where the process died."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return {"failed": f"exit code {code}: {lines[-1] if lines else ''}"[:400]}

    def cpu(self) -> float:
        """Seconds of all threads so far; 0 where /proc does not say."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ask it to stop, and see to it."""
        self.ask("stop")
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(OSError):
                stream.close()


def children(peers: Sequence[Peer], threads: int, only: Sequence[str] = ()) -> list[Child]:
    """One for each engine that this interpreter and the peers have, or for `only` those; sparsecc first, in any case."""
    python = {"": sys.executable, **{peer.name: peer.python for peer in peers}}
    names = [n for n, engine in ENGINES.items() if engine.peer in python and (n == "sparsecc" or not only or n in only)]
    return [Child(name, threads, [python[ENGINES[name].peer], "-m", "benchmarks.peer_worker"]) for name in names]


def load(workers: Sequence[Child], folder: str, hold: Callable[[bool], Any]) -> dict[str, dict[str, Any]]:
    """The replies by engine. The first, sparsecc, times its candidates while it compiles, so the others wait until it has."""
    with hold(False), ThreadPoolExecutor(os.cpu_count()) as pool:
        replies = [child.ask("load", folder=folder) for child in workers[:1]]
        replies += pool.map(lambda child: child.ask("load", folder=folder), workers[1:])
    return {child.engine: reply for child, reply in zip(workers, replies, strict=True)}


def take_turns(workers: Sequence[Child], folder: str, seconds: float, rounds: int, rest: float = REST) -> dict[str, dict[str, Any]]:
    """Time the workers in turn on one model for about `seconds` in all, at least `rounds` rounds. By engine, over rounds: ms (median of
    the median call) and ratio (median of its time to the first worker's); cpu_ms and cpu_ratio, the same of all threads' CPU time,
    which a neighbour on the same core does not lengthen; best_ms (any call); out_of_turn (cores it kept busy while others ran)."""
    turns: dict[str, list[dict[str, list[float]]]] = {child.engine: [] for child in workers}
    failed: dict[str, dict[str, Any]] = {}
    before, start = {child.engine: child.cpu() for child in workers}, time.perf_counter()
    inside = {child.engine: [0.0, 0.0] for child in workers}  # CPU seconds and seconds
    done = 0
    while done < rounds or time.perf_counter() - start < seconds:
        for child in workers:
            if child.engine in failed:
                continue
            time.sleep(rest)
            cpu, at = child.cpu(), time.perf_counter()
            reply = child.ask("time", folder=folder, calls=CALLS)
            inside[child.engine][0] += child.cpu() - cpu
            inside[child.engine][1] += time.perf_counter() - at
            if "failed" in reply:
                failed[child.engine] = reply
            else:
                turns[child.engine].append(reply)
        done += 1
    took = time.perf_counter() - start
    idle = {c.engine: (c.cpu() - before[c.engine] - inside[c.engine][0]) / max(1e-9, took - inside[c.engine][1]) for c in workers}
    ours = turns[workers[0].engine]
    return {name: failed.get(name) or _summary(each, ours) | {"out_of_turn": round(idle[name], 4)} for name, each in turns.items()}


def _summary(turns: list[dict[str, list[float]]], ours: list[dict[str, list[float]]]) -> dict[str, Any]:
    found: dict[str, Any] = {"best_ms": 1e3 * min(min(turn["seconds"]) for turn in turns), "rounds": len(turns)}
    for key, prefix in (("seconds", ""), ("cpu", "cpu_")):
        each, first = ([median(turn[key]) for turn in some] for some in (turns, ours))
        found[f"{prefix}ms"] = 1e3 * median(each)
        found[f"{prefix}ratio"] = median(a / max(b, 1e-9) for a, b in zip(each, first, strict=False)) if first else None
    return found


def measure(
    cells: Sequence[Cell], workers: Sequence[Child], seconds: float, rounds: int, hold: Callable[[bool], Any]
) -> list[dict[str, Any]]:
    """Export and load every cell, then time one after the other: a row each. `engines` holds by name what `take_turns` gives, the
    precision and the error; `alone` tells whether the exclusive lock was held."""
    with tempfile.TemporaryDirectory() as top:
        folders = [f"{top}/{i}" for i in range(len(cells))]
        with hold(False):
            jobs = [export(cell, folder) for cell, folder in zip(cells, folders, strict=True)]
        loaded = [{} if "failed" in job else load(workers, folder, hold) for job, folder in zip(jobs, folders, strict=True)]
        with hold(True) as alone:
            rows = [row(*each, workers, seconds, rounds) | {"alone": alone} for each in zip(jobs, folders, loaded, strict=True)]
        for child in workers:
            child.ask("clear")
    return rows


def export(cell: Cell, folder: str) -> dict[str, Any]:
    """The cell, its zeros and its flops, or why there are none."""
    os.mkdir(folder)
    command = [sys.executable, "-m", "benchmarks.peer_export", json.dumps(asdict(cell)), folder]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {**asdict(cell), "failed": f"export: {lines[-1] if lines else done.returncode}"[:400]}
    return json.loads((Path(folder) / "job.json").read_text())


def row(job: dict[str, Any], folder: str, loaded: dict[str, Any], workers: Sequence[Child], seconds: float, rounds: int) -> dict[str, Any]:
    """One cell, timed on the engines that loaded it."""
    ready = [child for child in workers if "failed" not in loaded.get(child.engine, {"failed"})]
    if ready[:1] != list(workers[:1]):
        return job if "failed" in job else {**job, "failed": f"sparsecc: {loaded[workers[0].engine]['failed']}"}
    timed = take_turns(ready, folder, seconds, rounds)
    engines = {}
    for name, reply in loaded.items():
        known = {key: reply[key] for key in ("error", "failed") if key in reply}
        engines[name] = {"precision": ENGINES[name].precision, **known, "load_seconds": reply.get("seconds"), **timed.get(name, {})}
    found = {package: version for reply in loaded.values() for package, version in reply.get("versions", {}).items()}
    return {**job, "engines": engines, "versions": found, "vs": {key: verdict(engines, key) for key in ("ratio", "cpu_ratio")}}


def verdict(engines: dict[str, Any], key: str) -> dict[str, float | None]:
    """How many times faster sparsecc was, by the ratio called `key`, than the best "dense fp32", "dense" of any precision, "deepsparse"."""
    ratio = {name: engine[key] for name, engine in engines.items() if engine.get(key)}
    dense = {name: ratio[name] for name in ratio if name not in ("sparsecc", "floor", "deepsparse")}
    return {
        "dense fp32": min((dense[name] for name in dense if engines[name]["precision"] == "fp32"), default=None),
        "dense": min(dense.values(), default=None),
        "deepsparse": ratio.get("deepsparse"),
    }


def lock(file: Path | None, patience: float) -> Callable[[bool], Any]:
    """hold(True) while timing, hold(False) while preparing: an exclusive or a shared flock on `file`, if one is given. Who has waited
    `patience` seconds for the exclusive one gets the shared one. The context's value: True, False, or None where there is no file."""

    @contextlib.contextmanager
    def hold(exclusive: bool) -> Iterator[bool | None]:
        with file.open("a") if file else contextlib.nullcontext() as held:
            yield acquire(held, patience if exclusive else 0.0) if held else None

    return hold


def acquire(held: IO[str], patience: float) -> bool:
    """Whether the exclusive lock could be had; the shared one if not."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.01)
    fcntl.flock(held, fcntl.LOCK_SH)
    return False


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """A column per cell, a line per engine: milliseconds, times sparsecc's by latency and by CPU time, error."""
    out = Table(title="peers: ms a call, times sparsecc's, the same by CPU time (medians of one interleaved run), largest error")
    out.add_column("engine", no_wrap=True)
    for row in rows:
        out.add_column(f"{row['model']} {row['batch']} x {row['seq']}\n{row['pattern']}\n{row['threads']} threads", justify="right")
    for name, engine in ENGINES.items():
        cells = [_told(row.get("engines", {}).get(name)) for row in rows]
        if any(cells):
            out.add_row(name if name.endswith(engine.precision) else f"{name} {engine.precision}", *cells)
    return out


def _told(engine: dict[str, Any] | None) -> str:
    if not engine:
        return ""
    if not engine.get("ratio"):
        return "[red]failed"
    error = f" {engine['error']:.0e}" if "error" in engine else ""
    return f"{engine['ms']:.2f} {engine['ratio']:.2f}x {engine['cpu_ratio']:.2f}x{error}"


def _recipe(name: str) -> str:
    """The way out."""
    path = f"/somewhere/{name}"
    own = " (ONNX Runtime also comes with pip install -e '.[bench]')" if name == "onnxruntime" else ""
    return f"python3 -m venv {path}; {path}/bin/pip install {PACKAGES[name]}; --peer {name}={path}/bin/python{own}"
