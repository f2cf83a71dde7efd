"""The file of a search after a full disk or a kill in the middle of a line."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_study import search

from ditq.allocation.journal import Journal, drop_half_line
from ditq.errors import DitqError


@pytest.mark.parametrize("tail", [b'{"op_code":4,"tri', b'{"op', b'{"op_code":4,"tri{"op_code":5,"worker_id":"a"}\n'])
def test_a_half_line_is_dropped_with_a_word_and_the_search_goes_on(tail: bytes, tmp_path: Path) -> None:
    storage = tmp_path / "search"
    first = search(storage, trials=3)
    whole = storage.read_bytes()
    storage.write_bytes(whole + tail)
    with pytest.warns(UserWarning, match="last line was not written to its end"):
        again = search(storage, trials=3)
    assert (again.scored, again.evaluated) == (first.scored, 0)
    assert storage.read_bytes().startswith(whole)


@pytest.mark.parametrize("content", [b"", b"mine", b"mine\n", b'{"a": 1', b'first\n{"op_code":4'])
def test_another_file_is_left_alone(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    drop_half_line(file)
    assert file.read_bytes() == content


def test_a_full_disk_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(str(tmp_path / "search"))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DitqError, match="Cannot write the storage .* No space left on device.*run the search again"):
        journal.append_logs([{"op_code": 1}])


@pytest.mark.skipif(os.name == "nt", reason="nothing counts as gone there")
def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    storage = tmp_path / "search"
    code = f"""
import os, signal
from ditq.allocation.journal import Journal
Journal({str(storage)!r})._lock.acquire()
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert os.path.lexists(f"{storage}.lock")
    begin = time.monotonic()
    Journal(str(storage)).append_logs([{"op_code": 1}])
    assert time.monotonic() - begin < 1
    assert [path.name for path in tmp_path.iterdir()] == ["search"]


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_lock_of_an_unknown_owner_is_waited_for_with_a_word(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditq.allocation.journal.PATIENCE", 1.2)
    lock = tmp_path / "search.lock"
    lock.symlink_to(tmp_path / "search") if kind == "link" else lock.touch()
    with pytest.warns(UserWarning, match=r"Waiting for another process to release .*search\.lock"):
        Journal(str(tmp_path / "search")).append_logs([{"op_code": 1}])
    assert not os.path.lexists(lock)


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    one, other = (Journal(str(tmp_path / "search"))._lock for _ in range(2))
    one.acquire()
    thread = threading.Thread(target=other.acquire)
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    one.release()
    thread.join(5)
    assert not thread.is_alive()
