"""What the command line prints besides the results of its verbs."""

from __future__ import annotations

import warnings

import pytest
from console import ditq

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
