"""The file of a search: Optuna's journal, which survives a full disk and a killed process in the middle of a line."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from ditq.errors import DitqError, warn
from ditq.owner import is_gone, owner

PATIENCE = 30.0  # seconds until a lock counts as dead whose owner cannot be asked; writing a line takes milliseconds

FIRST = b'{"op_code":'  # how every line begins


class _Lock(JournalFileSymlinkLock):
    """Optuna's lock, a symbolic link, which here names its owner: that of a killed process is taken over at once.

    Its holder may append, so it first drops what a killed or failed holder left of a line.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path, self.link = Path(path), Path(self._lock_file)

    def acquire(self) -> bool:
        begin, seen, warned, pause = time.monotonic(), None, False, 0.001
        while not self._take():
            now, state = time.monotonic(), self._state()
            if state is None or state != seen:  # released, or another owner
                begin, seen = now, state
            if state is not None and (is_gone(state[0]) or now - begin > PATIENCE):
                self._drop(state)
                continue
            if now - begin > 1 and not warned:
                warned = True
                warn(
                    f"Waiting for another process to release {self.link}. If it does not within {PATIENCE:.0f} "
                    "seconds, it counts as dead."
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        try:
            drop_half_line(self.path)
        except BaseException:
            self.release()
            raise
        return True

    def release(self) -> None:
        with suppress(FileNotFoundError):  # another process counted this one as dead
            if os.readlink(self.link) == owner():
                self.link.unlink()

    def _take(self) -> bool:
        try:
            os.symlink(owner(), self.link)
        except FileExistsError:
            return False
        return True

    def _state(self) -> tuple[str, int, int] | None:
        """The owner of the lock and what tells two locks of it apart; None if nobody has it."""
        try:
            status = self.link.lstat()
            text = os.readlink(self.link) if self.link.is_symlink() else ""  # no link: of another program
        except FileNotFoundError:
            return None
        return text, status.st_ino, status.st_mtime_ns

    def _drop(self, state: tuple[str, int, int]) -> None:
        """Removes a dead lock. The system's lock on the journal keeps two processes from removing one another's."""
        with self.path.open("rb+") as journal:
            if sys.platform != "win32":
                import fcntl

                fcntl.flock(journal, fcntl.LOCK_EX)  # released when the file is closed
            if self._state() == state:
                self.link.unlink(missing_ok=True)


class Journal(JournalFileBackend):
    """A journal that is cut back to whole lines before and after a failed write.

    Raises:
        DitqError: a line cannot be written (full disk, read-only).
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, _Lock(path))
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
