"""The file of a search: Optuna's journal, which survives a full disk and a killed process in the middle of a line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from ditq.errors import DitqError, warn

FIRST = b'{"op_code":'  # how every line begins


class _Tail(JournalFileSymlinkLock):
    """Optuna's lock. Its holder may append, so it first drops what a killed or failed holder left of a line."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = Path(path)

    def acquire(self) -> bool:
        acquired = super().acquire()
        try:
            drop_half_line(self.path)
        except BaseException:
            self.release()
            raise
        return acquired


class Journal(JournalFileBackend):
    """A journal that is cut back to whole lines before and after a failed write.

    Raises:
        DitqError: a line cannot be written (full disk, read-only).
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, _Tail(path))
        self.path = Path(path)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        try:
            super().append_logs(logs)
        except OSError as error:
            raise DitqError(
                f"Cannot write the storage {self.path}: {error.strerror or error}. Its finished trials are kept: free "
                "space or make it writable, and run the search again."
            ) from error


def drop_half_line(path: Path) -> None:
    """Cuts the last line of a journal off if it was not written to its end. Any other file is left alone."""
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        start, tail = _last_line(file, size)
        if tail.endswith(b"\n") and _is_json(tail):
            return
        file.seek(0)
        begin = file.read(len(FIRST))
        if not tail or not FIRST.startswith(begin[:size]) or not FIRST.startswith(tail[: len(FIRST)]):
            return
        file.truncate(start)
    warn(f"{path}: the last line was not written to its end (a full disk, or a killed process). It was dropped.")


def _last_line(file: Any, size: int) -> tuple[int, bytes]:
    """Where the last line begins, and the line."""
    length = 4096
    while True:
        begin = max(0, size - length)
        file.seek(begin)
        content = file.read(size - begin)
        end = content.rfind(b"\n", 0, max(0, len(content) - 1))
        if end >= 0 or begin == 0:
            return begin + end + 1, content[end + 1 :]
        length *= 4


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
