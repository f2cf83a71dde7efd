"""The command line as a function."""

from __future__ import annotations

from typing import Any

import pytest

from ditq.cli.app import run


def ditq(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command line."""
    status = run([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err
