"""The campaign of faults: a short run in the suite, the long one with ``-m fuzz``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).with_name("campaign.py")


def run(*arguments: str) -> str:
    """In a process of its own, which has no threads yet and can be forked."""
    done = subprocess.run([sys.executable, str(CAMPAIGN), *arguments], capture_output=True, text=True, timeout=6000)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def test_damaged_inputs_are_refused_or_read_as_they_were() -> None:
    assert " 0 failures" in run("--seed", "1", "--inputs", "120")


@pytest.mark.fuzz
def test_ten_thousand_damaged_inputs() -> None:
    run("--seed", "0", "--inputs", "10000")


@pytest.mark.fuzz
def test_two_hundred_kills() -> None:
    run("--seed", "0", "--kills", "200")
