"""Prompts files in several encodings, and progress bars."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ditq.cli import common
from ditq.cli.common import TimeLeft, progress_bars, read_prompts
from ditq.errors import UsageError


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompts_are_the_same_in_every_encoding(encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("ein grüner Baum\n\n猫\n".encode(encoding))
    assert read_prompts(file) == ["ein grüner Baum", "猫"]


def test_another_encoding_is_refused_with_the_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("a tree\nein grüner Baum\n".encode("latin-1"))
    with pytest.raises(UsageError, match=r"prompts\.txt is not text in UTF-8: line 2 .* Save it as UTF-8"):
        read_prompts(file)


def test_the_time_left_follows_from_what_this_process_did() -> None:
    left = TimeLeft(clock=iter([0.0, 10.0, 20.0, 30.0, 40.0, 100.0, 101.0, 102.0, 103.0, 200.0]).__next__)
    calls = [
        ("sensitivity", 20, 26, ""),  # found in the study
        ("sensitivity", 21, 26, ""),  # one unit is no speed
        ("sensitivity", 22, 26, "40 s left"),
        ("sensitivity", 24, 26, "15 s left"),
        ("sensitivity", 26, 26, ""),
        ("sensitivity", 1, 1000, ""),  # the next part
        ("sensitivity", 2, 1000, ""),
        ("sensitivity", 3, 1000, "17 min left"),
        ("calibrate", 1, 8, ""),
        ("calibrate", 3, 8, "5 min left"),  # 48.5 s each
    ]
    assert [left.text(*call[:3]) for call in calls] == [call[3] for call in calls]
    left = TimeLeft(clock=iter([0.0, 200.0]).__next__)
    assert [left.text("search", 0, 102), left.text("search", 2, 102)] == ["", "2 h 47 min left"]


def test_bars_of_every_verb_have_the_time_left_and_fit_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 6000.0, 12000.0])
    monkeypatch.setattr(common, "TimeLeft", lambda: TimeLeft(clock=now.__next__))
    monkeypatch.setattr(common.err, "width", 80)
    with progress_bars(quiet=False) as progress:
        assert progress
        for done in (0, 1, 2):
            progress("layer errors", done, 500, "best -12.3456")
    [line] = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"layer errors +2/500 +0:00:\d\d 830 h 0 min left best -12.3456 *", line), line
    assert len(line.rstrip()) <= 80


def test_quiet_bars_are_none() -> None:
    with progress_bars(quiet=True) as progress:
        assert progress is None
