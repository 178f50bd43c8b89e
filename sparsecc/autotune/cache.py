"""The tuning cache: one JSON object per line, appended, shared by any number of processes."""

from __future__ import annotations

import json
import os
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

try:
    import fcntl as _fcntl
except ImportError:  # Windows: appends of one write call seldom tear, and a torn line is skipped
    _fcntl = None

FILE = "tune.jsonl"


class TuneCache:
    """key -> dict, in `path`/tune.jsonl; `path` None means SPARSECC_CACHE or ~/.cache/sparsecc.

    The last line of a key wins. What other processes append is seen at the next `get`. The file is a convenience: where it cannot be
    read or written, a single warning says so and new results stay in memory.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        folder = _default_dir() if path is None else Path(path)
        self.file = folder / FILE if folder else None
        self._entries: dict[str, dict[str, Any]] = {}
        self._inode, self._read = -1, 0  # of the file, what has been read up to which byte
        self._warned: set[str] = set()
        self._lock = threading.Lock()

    def get(self, key: str) -> dict[str, Any] | None:
        """The value last put under `key`, by any process, or None."""
        with self._lock:
            self._refresh()
            return self._entries.get(key)

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Remember `value`. Raises TypeError if JSON cannot say it."""
        line = json.dumps({"key": key, "value": value}).encode()
        with self._lock:
            self._refresh()
            self._take(line)  # as read back: no difference between this process and the next
            if self.file and "unusable" not in self._warned:
                try:
                    _append(self.file, line + b"\n")
                except OSError as error:
                    self._warn("unusable", f"cannot write the tuning cache {self.file}: {error}; new results stay in memory")

    def _refresh(self) -> None:
        """Read what was appended since the last time: whole lines only, another process may be writing."""
        if not self.file:
            return
        try:
            status = self.file.stat()
            if status.st_ino != self._inode or status.st_size < self._read:  # replaced or cut: from the start
                self._inode, self._read = status.st_ino, 0
            if status.st_size == self._read:
                return
            with self.file.open("rb") as f:
                f.seek(self._read)
                lines = f.read()
        except FileNotFoundError:
            return
        except OSError as error:
            self._warn("unusable", f"cannot read the tuning cache {self.file}: {error}; new results stay in memory")
            return
        whole = lines[: lines.rfind(b"\n") + 1]
        self._read += len(whole)
        bad = sum(not self._take(line) for line in whole.splitlines() if line.strip())
        if bad:
            self._warn("corrupted", f"skipped {bad} corrupted line{'s' * (bad > 1)} of the tuning cache {self.file}")

    def _take(self, line: bytes) -> bool:
        """Enter one line; False if it is no entry."""
        try:
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
        except (ValueError, KeyError, TypeError):
            return False
        if not (isinstance(key, str) and isinstance(value, dict)):
            return False
        self._entries[key] = value
        return True

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"sparsecc: {message}", RuntimeWarning, stacklevel=4)


def _append(file: Path, line: bytes) -> None:
    """Append under a lock, with one write call, on a line of its own."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
    try:
        if _fcntl:
            with suppress(OSError):  # a file system without locks
                _fcntl.flock(fd, _fcntl.LOCK_EX)
        size = os.lseek(fd, 0, os.SEEK_END)
        if size:
            os.lseek(fd, size - 1, os.SEEK_SET)
            if os.read(fd, 1) != b"\n":  # a process died while it wrote
                line = b"\n" + line
        if os.write(fd, line) < len(line):
            raise OSError("the disk is full")
    finally:
        os.close(fd)  # drops the lock


def _default_dir() -> Path | None:
    from sparsecc.debug import cache_dir  # above this package in the import order

    return cache_dir()
