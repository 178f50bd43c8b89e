"""The tuning cache: shared, torn, and unwritable files."""

from __future__ import annotations

import json
import multiprocessing
import warnings
from pathlib import Path

import pytest

from sparsecc.autotune import TuneCache, cache
from sparsecc.autotune.cache import FILE


def test_last_value_wins_here_and_in_the_next_process(tmp_path: Path) -> None:
    first = TuneCache(tmp_path / "new" / "folder")
    assert first.get("a") is None
    first.put("a", {"config": "spmm(vectors=1)", "shape": (3, 4)})
    first.put("a", {"config": "spmm(vectors=2)", "shape": (3, 4)})
    first.put("ключ\n", {"x": 1.5})
    for reader in (first, TuneCache(tmp_path / "new" / "folder")):
        assert reader.get("a") == {"config": "spmm(vectors=2)", "shape": [3, 4]}
        assert reader.get("ключ\n") == {"x": 1.5}
    assert len((tmp_path / "new" / "folder" / FILE).read_bytes().splitlines()) == 3


def test_sees_what_others_append_or_replace(tmp_path: Path) -> None:
    mine, other = TuneCache(tmp_path), TuneCache(tmp_path)
    mine.put("a", {"n": 1})
    other.put("a", {"n": 2})
    assert mine.get("a") == {"n": 2}
    mine.put("a", {"n": 3})
    assert other.get("a") == {"n": 3}
    (tmp_path / FILE).unlink()
    assert mine.get("a") == {"n": 3}
    (tmp_path / FILE).write_text('{"key": "b", "value": {}}\n')
    assert mine.get("b") == {}


def test_corrupted_lines_are_skipped_with_one_warning(tmp_path: Path) -> None:
    good = json.dumps({"key": "a", "value": {"n": 1}})
    lines = ["{torn", good, "[1]", '{"key": 3, "value": {}}', '{"key": "b"}', "", "\0\0"]
    (tmp_path / FILE).write_text("\n".join(lines) + "\n")
    reader = TuneCache(tmp_path)
    with pytest.warns(RuntimeWarning, match="skipped 5 corrupted lines") as caught:
        assert reader.get("a") == {"n": 1}
    assert len(caught) == 1
    with (tmp_path / FILE).open("a") as f:
        f.write("again\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reader.get("b") is None


def test_a_torn_last_line_costs_only_itself(tmp_path: Path) -> None:
    writer = TuneCache(tmp_path)
    with (tmp_path / FILE).open("a") as f:
        f.write('{"key": "torn", "val')
    assert writer.get("torn") is None  # perhaps another process is writing it: no warning yet
    writer.put("a", {"n": 1})
    with pytest.warns(RuntimeWarning, match="skipped 1 corrupted line of"):
        assert TuneCache(tmp_path).get("a") == {"n": 1}


def test_unusable_folder_warns_once_and_keeps_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    memory = TuneCache(tmp_path / "file" / "folder")
    with pytest.warns(RuntimeWarning, match="stay in memory") as caught:
        memory.put("a", {"n": 1})
        memory.put("b", {"n": 2})
    assert len(caught) == 1
    assert memory.get("a") == {"n": 1} and memory.get("b") == {"n": 2}


def test_read_only_file_is_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TuneCache(tmp_path).put("a", {"n": 1})
    reader = TuneCache(tmp_path)

    def refuse(file: Path, line: bytes) -> None:
        raise PermissionError(f"read-only: {file}")

    monkeypatch.setattr(cache, "_append", refuse)
    with pytest.warns(RuntimeWarning, match="cannot write"):
        reader.put("b", {"n": 2})
    assert reader.get("a") == {"n": 1} and reader.get("b") == {"n": 2}


def test_values_that_json_cannot_say_are_refused(tmp_path: Path) -> None:
    writer = TuneCache(tmp_path)
    with pytest.raises(TypeError):
        writer.put("a", {"bad": object()})
    assert writer.get("a") is None and not (tmp_path / FILE).exists()


def test_without_file_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_fcntl", None)
    TuneCache(tmp_path).put("a", {"n": 1})
    assert TuneCache(tmp_path).get("a") == {"n": 1}


def test_default_folder_is_the_knob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECC_CACHE", str(tmp_path / "here"))
    assert TuneCache().file == tmp_path / "here" / FILE


def test_without_any_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_default_dir", lambda: None)
    memory = TuneCache()
    memory.put("a", {"n": 1})
    assert memory.file is None and memory.get("a") == {"n": 1}


def write_many(folder: str, name: str, count: int) -> None:
    """Runs in a process of its own."""
    writer = TuneCache(folder)
    for i in range(count):
        writer.put(f"{name}{i}", {"from": name, "filler": name * 2000})
        writer.put("shared", {"from": name, "i": i})


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="a spawned process cannot import this file")
def test_two_processes_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=write_many, args=(str(tmp_path), name, 50)) for name in "xy"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reader = TuneCache(tmp_path)
        assert all(reader.get(f"{name}{i}") == {"from": name, "filler": name * 2000} for name in "xy" for i in range(50))
    shared = reader.get("shared")
    assert shared and shared["i"] == 49
