"""Files and folders appear whole or not at all, and what somebody else has put there stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ditq.errors import DitqError, UsageError
from ditq.files import atomic, check_output, make_writable, new_folder, write_text


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
