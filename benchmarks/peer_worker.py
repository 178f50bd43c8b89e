"""One engine in a process of its own, driven by JSON lines: the child of `benchmarks/cpu.py peers`.

    PYTHON -m benchmarks.peer_worker ENGINE THREADS

A request is one line on stdin and its reply one line on stdout:

    {"do": "load", "folder": F}               {"seconds": 1.2, "error": 3e-7, "versions": {...}}      the model that `peer_export` wrote
    {"do": "time", "folder": F, "calls": 2}   {"seconds": [0.012, 0.011], "cpu": [0.011, 0.011]}      after one call that does not count
    {"do": "clear"}                           {}                                                      forget every model
    {"do": "stop"}                            {}                                                      the last one

A request that fails gets {"failed": "Type: message"}, and the worker goes on. Needs numpy and the engine alone, Python 3.10 or later.
"""
from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from benchmarks.peer_engines import ENGINES, Case, Engine
from benchmarks.peer_llama import DECODERS


class Worker:
    """Answers requests about one engine, a key of `engines`, `ENGINES` or `DECODERS`, that may use `threads` threads."""

    def __init__(self, engine: str, threads: int, engines: Mapping[str, Engine] = ENGINES) -> None:
        self.engine, self.threads, self.engines = engine, threads, engines
        self._calls: dict[str, Callable[[], Any]] = {}

    def load(self, folder: str) -> dict[str, Any]:
        """Load, and compare the output with the expected one: `error` is the largest difference over the largest magnitude."""
        import numpy as np

        start = time.perf_counter()
        engine = {**ENGINES, **DECODERS, **self.engines}[self.engine]
        call = self._calls[folder] = engine.load(Case(Path(folder), self.threads))
        out = call()
        reply: dict[str, Any] = {"seconds": time.perf_counter() - start, "versions": versions(engine.packages)}
        if engine.exact is not None:
            wanted = np.load(str(Path(folder) / "expected.npy"))
            given = np.asarray(out, dtype=np.float64)
            if given.shape != wanted.shape:
                raise ValueError(f"the output's shape is {given.shape}, expected {wanted.shape}")
            reply["error"] = float(np.abs(given - wanted).max() / np.abs(wanted).max())
        return reply

    def time(self, folder: str, calls: int) -> dict[str, Any]:
        """Seconds of each call, and of all threads' CPU time. The first call, which finds the others' data in the caches, is left out."""
        if folder not in self._calls:
            raise RuntimeError(f"nothing was loaded from {folder}")
        call, seconds, cpu = self._calls[folder], [], []
        for _ in range(calls + 1):
            start, busy = time.perf_counter(), time.process_time()
            call()
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - busy)
        return {"seconds": seconds[1:], "cpu": cpu[1:]}

    def clear(self) -> dict[str, Any]:
        """Models at once may not fit."""
        self._calls.clear()
        gc.collect()
        return {}

    def serve(self, requests: IO[str], replies: IO[str]) -> None:
        """Until "stop" or the end of the requests."""
        for line in requests:
            request = json.loads(line)
            what = request.pop("do")
            try:
                if what not in ("load", "time", "clear", "stop"):
                    raise ValueError(f"unknown request {what!r}: load, time, clear, stop")
                reply = {} if what == "stop" else getattr(self, what)(**request)
            except Exception as problem:
                text = str(problem).strip().split("\n")[0]
                reply = {"failed": f"{type(problem).__name__}: {text}"[:400]}
            replies.write(json.dumps(reply) + "\n")
            replies.flush()
            if what == "stop":
                return


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Of installed distributions."""
    from importlib import metadata

    return {name: metadata.version(name) for name in packages}


def main(engines: Mapping[str, Engine] = ENGINES) -> None:
    """Confine the process to as many CPUs as threads, keep stdout for replies, and serve. The command line ends with both."""
    engine, threads = sys.argv[-2], int(sys.argv[-1])
    if hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, set(cpus[-threads:]))  # interrupts mostly go to the first
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not a reply
    Worker(engine, threads, engines).serve(sys.stdin, replies)
    replies.flush()
    os._exit(0)  # some engines hang or crash while they take their thread pools down


if __name__ == "__main__":
    main()
