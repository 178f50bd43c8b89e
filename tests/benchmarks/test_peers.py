"""The comparison with other engines, without any: what --peer takes, the workers' protocol, how turns are taken, rows, the picture."""
from __future__ import annotations

import fcntl
import io
import itertools
import json
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import peer_engines, peer_worker, peers, plot
from benchmarks.peer_engines import ENGINES, Case, Engine

WANTED = np.array([[[1.0, -4.0], [2.0, 0.5]]])

FAKE = """
import json, sys
engine = sys.argv[1]
for line in sys.stdin:
    request = json.loads(line)
    if engine == "dies":
        sys.exit("no such instruction")
    reply = {"load": {"seconds": 0.5, "error": 1e-7, "versions": {engine: "1.0"}}, "stop": {}, "clear": {}}.get(request["do"])
    if reply is None:
        took = [float(sys.argv[2])] * request["calls"]
        reply = {"failed": "RuntimeError: no"} if engine == "refuses" else {"seconds": took, "cpu": took}
    print(json.dumps(reply), flush=True)
    if request["do"] == "stop":
        break
"""


def fakes(*engines: str) -> list[peers.Child]:
    """Workers that answer that a call takes 1 s, 2 s, ..."""
    return [peers.Child(engine, i + 1, [sys.executable, "-c", FAKE]) for i, engine in enumerate(engines)]


@pytest.fixture
def case(tmp_path: Path) -> Case:
    np.save(tmp_path / "expected.npy", WANTED)
    np.savez(tmp_path / "inputs.npz", input_ids=np.ones((1, 2), np.int64))
    return Case(tmp_path, 1)


def served(engine: Any, *requests: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replies of a worker of an engine whose call is `engine`."""
    monkeypatch.setitem(peer_engines.ENGINES, "fake", Engine("", "fp32", True, ("numpy",), lambda case: engine))
    replies = io.StringIO()
    peer_worker.Worker("fake", 1).serve(io.StringIO("\n".join(map(json.dumps, requests))), replies)
    return [json.loads(line) for line in replies.getvalue().splitlines()]


def test_worker_answers_each_request(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()
    time_it = {"do": "time", "folder": str(case.folder), "calls": 3}
    requests = [{"do": "load", "folder": str(case.folder)}, time_it, {"do": "clear"}, time_it, {"do": "stop"}, time_it]
    load, timed, _, cleared, stop = served(lambda: (next(calls), WANTED + 0.01)[1], *requests, monkeypatch=monkeypatch)
    assert load["error"] == pytest.approx(0.01 / 4)
    assert load["versions"] == {"numpy": np.__version__}
    assert len(timed["seconds"]) == len(timed["cpu"]) == 3 and next(calls) == 1 + 4
    assert cleared["failed"].startswith("RuntimeError: nothing was loaded")
    assert stop == {}


def test_worker_outlives_failures(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [{"do": "time", "folder": "F", "calls": 1}, {"do": "dance"}, {"do": "load", "folder": str(case.folder)}]
    early, unknown, shape = served(lambda: WANTED[0], *requests, monkeypatch=monkeypatch)
    assert early["failed"] == "RuntimeError: nothing was loaded from F"
    assert "load, time, clear, stop" in unknown["failed"]
    assert "expected (1, 2, 2)" in shape["failed"]


def test_worker_keeps_stdout_for_replies(case: Case) -> None:
    """A process of its own: an engine of another interpreter that is missing is a reply, not a crash."""
    child = peers.Child("deepsparse", 1, [sys.executable, "-m", "benchmarks.peer_worker"])
    reply = child.ask("load", folder=str(case.folder))
    assert "failed" in child.ask("time", folder="", calls=1)
    child.close()
    assert reply["failed"].startswith("ModuleNotFoundError") or "ValueError" in reply["failed"]


def test_parse_peer() -> None:
    assert peers.Peer.parse("onnxruntime") == peers.Peer("onnxruntime", sys.executable)
    assert peers.Peer.parse(f"deepsparse={sys.executable}").python == sys.executable


@pytest.mark.parametrize("text", ["tensorrt", "=x", "deepsparse=/no/such/python", "openvino=", f"openvino={os.path.dirname(__file__)}"])
def test_parse_peer_names_the_way_out(text: str) -> None:
    with pytest.raises(peers.PeerError, match=r"known are onnxruntime|pip install") as raised:
        peers.Peer.parse(text)
    assert f"--peer {text}" in str(raised.value)


def test_require_asks_the_interpreter(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(peers.PeerError, match=r"has no deepsparse; .*pip install deepsparse"):
        peers.Peer("deepsparse", str(bare)).require()
    peers.Peer("json", str(bare)).require()


def test_children_are_of_the_peers_given() -> None:
    peer = peers.Peer("onnxruntime", sys.executable)
    workers = peers.children([peer], 1, ["onnxruntime int8", "floor", "deepsparse"])
    for child in workers:
        child.close()
    assert [child.engine for child in workers] == ["sparsecc", "floor", "onnxruntime int8"]


def test_turns_are_interleaved_and_failures_reported() -> None:
    workers = fakes("sparsecc", "torch eager", "refuses", "dies")
    timed = peers.take_turns(workers, "", 0.0, 3, rest=0.0)
    for child in workers:
        child.close()
    assert timed["sparsecc"]["ratio"] == 1.0 and timed["sparsecc"]["rounds"] == 3
    eager = timed["torch eager"]
    assert eager["ms"] == eager["cpu_ms"] == eager["best_ms"] == 2000.0 and eager["ratio"] == eager["cpu_ratio"] == 2.0
    assert timed["refuses"] == {"failed": "RuntimeError: no"}
    assert timed["dies"]["failed"] == "exit code 1: no such instruction"


def test_spinning_out_of_turn_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = fakes("sparsecc", "spins")
    share = {"sparsecc": 0.0, "spins": 0.5}
    monkeypatch.setattr(peers.Child, "cpu", lambda child: share[child.engine] * time.perf_counter())
    timed = peers.take_turns(workers, "", 0.0, 2, rest=0.01)
    for child in workers:
        child.close()
    assert timed["sparsecc"]["out_of_turn"] == 0
    assert timed["spins"]["out_of_turn"] == pytest.approx(0.5, rel=0.05)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="CPU seconds come from /proc")
def test_cpu_seconds_of_a_worker() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint('{}', flush=True); input(); input()"
    child = peers.Child("busy", 1, [sys.executable, "-c", burn])
    assert child.ask("load") == {}
    assert 0.25 < child.cpu() < 1.0
    child.close()


def test_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a row in the results holds, from workers that answer."""

    def export(command: list[str], **_: Any) -> Any:
        job = json.loads(command[-2])
        (Path(command[-1]) / "job.json").write_text(json.dumps(job | {"zeros": 0.9, "flops": 10}))
        return types.SimpleNamespace(returncode=int(job["model"] == "no"), stderr="KeyError: 'no'\n")

    monkeypatch.setattr(peers.subprocess, "run", export)
    workers = fakes("sparsecc", "torch eager", "openvino int8", "deepsparse", "refuses")
    monkeypatch.setitem(ENGINES, "refuses", ENGINES["onnxruntime"])
    cells = [peers.Cell("minilm", "unstructured(0.9)", 2), peers.Cell("no", "", 2)]
    row, failed = peers.measure(cells, workers, 0.0, 2, peers.lock(None, 0.0))
    for child in workers:
        child.close()
    assert json.loads(json.dumps(row)) == row
    assert (row["model"], row["pattern"], row["threads"], row["batch"], row["seq"]) == ("minilm", "unstructured(0.9)", 2, 1, 128)
    assert row["vs"]["ratio"] == row["vs"]["cpu_ratio"] == {"dense fp32": 2.0, "dense": 2.0, "deepsparse": 4.0}
    assert row["engines"]["openvino int8"]["precision"] == "int8" and row["engines"]["openvino int8"]["error"] == 1e-7
    assert row["engines"]["refuses"]["failed"] == "RuntimeError: no"
    assert row["versions"]["deepsparse"] == "1.0"
    assert failed["failed"] == "export: KeyError: 'no'"
    assert peers.table([row, failed]).row_count == 5


def test_lock(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    hold = peers.lock(file, 0.05)
    with hold(True) as alone, file.open("a") as other:
        assert alone
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with hold(False), hold(True) as alone:
        assert not alone
    with peers.lock(None, 0.0)(True) as alone:
        assert alone is None


def test_kind_and_zeros() -> None:
    assert plot.kind_and_zeros("block(4, 1, 0.95)") == ("block(4, 1)", 0.95)
    assert plot.kind_and_zeros("unstructured(0.5)") == ("unstructured", 0.5)
    with pytest.raises(ValueError, match="no share of zeros"):
        plot.kind_and_zeros("nm(2, 4)")


def test_plot_of_the_stored_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    stored = json.loads((plot.ROOT / "benchmarks" / "results" / "cpu-peers.json").read_text())
    assert stored["machine"] and stored["versions"]["torch"] and stored["peers"]
    for row in stored["peers"]:
        assert row["vs"] == {key: peers.verdict(row["engines"], key) for key in ("ratio", "cpu_ratio")}
        assert row["engines"]["sparsecc"]["ratio"] == 1.0 and row["engines"]["sparsecc"]["error"] < 1e-5
    plot.draw(stored, "minilm", 1, tmp_path / "sub" / "peers.png")
    assert (tmp_path / "sub" / "peers.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no row of minilm with batch 7"):
        plot.draw(stored, "minilm", 7, tmp_path / "none.png")


def test_series_leaves_failures_out() -> None:
    rows = [
        {"pattern": f"unstructured({zeros})", "engines": {"sparsecc": {"ms": ms}, "deepsparse": {"failed": "no"}}}
        for zeros, ms in ((0.9, 5.0), (0.5, 9.0))
    ]
    assert plot.series([*rows, {"failed": "export"}]) == {"sparsecc": [(0.5, 9.0), (0.9, 5.0)]}
