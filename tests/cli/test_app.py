"""What the command line prints besides the results of its verbs."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from console import ditq
from helpers import tiny_dit

from ditq.errors import warn


def test_the_command_line_prints_the_warnings_of_ditq_and_no_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def verb(*_: object, **__: object) -> None:
        warnings.warn("of a library", UserWarning, stacklevel=1)
        warn("of ditq")

    monkeypatch.setattr("ditq.cli.app.build", lambda: verb)
    status, _, err = ditq(capsys, "anything")
    assert (status, err) == (0, "warning: of ditq\n")


@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_an_ascii_terminal_gets_tables_bars_and_files(variables: dict[str, str], tmp_path: Path) -> None:
    tiny_dit().save_pretrained(tmp_path / "tiny")
    (tmp_path / "prompts").write_text("1\n2\n")
    environment = {**os.environ, "PYTHONCOERCECLOCALE": "0", "DITQ_CACHE": str(tmp_path / "cache"), **variables}
    options = ["--prompts", "prompts", "--steps", "1", "--metrics", "basic", "--explain", "0", "--out", "out"]
    code = """
from ditq.cli.app import run
import sys
verbs = [["recipes"], ["compare", "tiny", "tiny", *sys.argv[1:]]]
sys.exit(max(map(run, verbs)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *options], env=environment, cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert b"+-" in done.stdout
    (done.stdout + done.stderr).decode("ascii")
