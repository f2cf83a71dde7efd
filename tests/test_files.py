"""Files and folders appear whole or not at all, and what somebody else has put there stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from ditq.errors import DitqError, UsageError
from ditq.files import atomic, check_file, check_output, make_writable, new_folder, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    with atomic(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path
    assert (path.read_text(), names(tmp_path)) == ("half", ["a.json"])


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    write_text(tmp_path / "ours", "x")
    (tmp_path / "theirs").write_text("x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_failed_write_keeps_the_old_file_and_no_other(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_text(path, "old")
    with pytest.raises(type(error)), atomic(path) as temporary:
        temporary.write_text("new")
        raise error
    assert (path.read_text(), names(tmp_path)) == ("old", ["a"])


# --------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("content", ["precious.txt", None], ids=["full", "empty"])
def test_folder_that_appears_meanwhile_is_left_alone(content: str | None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="appeared while ditq was working"), new_folder(out) as folder:
        (folder / "result").write_text("x")
        out.mkdir()
        if content:
            (out / content).write_text("mine")
    assert names(tmp_path) == ["out"]
    assert names(out) == ([content] if content else [])


def test_file_that_appears_meanwhile_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="appeared"), new_folder(tmp_path / "out"):
        (tmp_path / "out").write_text("mine")
    assert (tmp_path / "out").read_text() == "mine"
    assert names(tmp_path) == ["out"]


def test_folder_filled_at_the_last_moment_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between our claim of the name and the rename."""
    out, rename = tmp_path / "out", os.rename

    def late(source: Path, target: Path) -> None:
        (target / "precious.txt").write_text("mine")
        rename(source, target)

    monkeypatch.setattr("os.rename", late)
    with pytest.raises(UsageError, match="appeared"), new_folder(out) as folder:
        (folder / "result").write_text("x")
    assert names(tmp_path) == ["out"]
    assert names(out) == ["precious.txt"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_dangling_link_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="exists already"):
        check_output(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()


def test_overwriting_keeps_the_old_folder_until_the_new_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the process dies, the old folder is whole somewhere."""
    out, moments = tmp_path / "out", []
    out.mkdir()
    (out / "old").write_text("x")
    rename, rmtree = os.rename, __import__("shutil").rmtree

    def seen(what: str) -> None:
        moments.append((what, len(list(tmp_path.rglob("old"))), len(list(tmp_path.rglob("new")))))

    monkeypatch.setattr("os.rename", lambda *a: (seen("rename"), rename(*a)))
    monkeypatch.setattr("shutil.rmtree", lambda *a, **k: (seen("remove"), rmtree(*a, **k)))
    with new_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("x")
    assert moments == [("rename", 1, 1), ("rename", 1, 1), ("remove", 1, 1)]
    assert (names(tmp_path), names(out)) == (["out"], ["new"])


def test_overwriting_that_fails_at_the_end_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename, calls = tmp_path / "out", os.rename, []
    out.mkdir()
    (out / "old").write_text("x")

    def second_fails(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr("os.rename", second_fails)
    with pytest.raises(DitqError, match="Input/output error"), new_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("x")
    assert (names(tmp_path), names(out)) == (["out"], ["old"])


def test_check_leaves_nothing(tmp_path: Path) -> None:
    check_output(tmp_path / "deep" / "er" / "out")
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_a_copy_of_a_read_only_folder_can_be_written(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "file").write_text("x")
    for path in (inner / "file", inner, tmp_path / "a"):
        path.chmod(0o444 if path.is_file() else 0o555)
    make_writable(tmp_path / "a")
    assert [path.stat().st_mode & 0o200 for path in (tmp_path / "a", inner, inner / "file")] == [0o200] * 3


# --------------------------------------------------------------------------------------------- killed processes

KILLED = """
import os, signal, sys
from pathlib import Path
from ditq.files import atomic, new_folder
import ditq.files
out, how = Path(sys.argv[1]), sys.argv[2]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if how == "file":
    with atomic(out) as file:
        file.write_text("half")
        die()
rename, calls = os.rename, []
def nth(*a):
    calls.append(a)
    if how == str(len(calls)):
        die()
    rename(*a)
    if how == f"{len(calls)} done":
        die()
os.rename = nth
with new_folder(out, overwrite=True) as folder:
    (folder / "new").write_text("x")
    if how == "folder":
        die()
"""

needs_processes = pytest.mark.skipif(os.name == "nt", reason="nothing counts as gone there")


def kill(out: Path, how: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(out), how], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL


@needs_processes
@pytest.mark.parametrize("how", ["file", "folder"])
@pytest.mark.parametrize("next_is", ["file", "folder"])
def test_the_next_run_sweeps_what_a_killed_one_left(how: str, next_is: str, tmp_path: Path) -> None:
    kill(tmp_path / ("ü" * 90), how)
    assert len(names(tmp_path)) == 1
    if next_is == "file":
        write_text(tmp_path / "b", "x")
    else:
        with new_folder(tmp_path / "b"):
            pass
    assert names(tmp_path) == ["b"]


@needs_processes
@pytest.mark.parametrize(("how", "kept"), [("1", "old"), ("1 done", "old"), ("2", "old"), ("2 done", "new")])
def test_a_folder_that_was_being_replaced_is_put_back(how: str, kept: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("x")
    kill(out, how)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_output(tmp_path / "another")
    assert [len(names(tmp_path)), names(out)] == [1, [kept]]
    assert ["was put back" in str(warning.message) for warning in said] == [True] * (how in ("1 done", "2"))


def test_what_is_not_of_a_dead_process_stays(tmp_path: Path) -> None:
    theirs = [".a-ditq-x", ".a-abcd1234", ".a-ditq-1.2.00000000-abcd1234", ".cache", "a-ditq-1.2.00000000-abcd1234"]
    for name in theirs:
        (tmp_path / name).mkdir()
    with new_folder(tmp_path / "out"), new_folder(tmp_path / "out2"):
        assert len(names(tmp_path)) == len(theirs) + 2  # nor does one run sweep another's
    assert names(tmp_path) == sorted([*theirs, "out", "out2"])


def test_a_file_that_cannot_be_written_is_known_before_the_work(tmp_path: Path) -> None:
    check_file(tmp_path / "missing" / "folder" / "plan.json")
    assert names(tmp_path / "missing" / "folder") == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(DitqError, match=r"Cannot write .*file/plan\.json"):
        check_file(tmp_path / "file" / "plan.json")
