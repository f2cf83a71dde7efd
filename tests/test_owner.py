"""Which processes count as gone: those that have ended, and no others."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ditq.owner import is_gone, owner

pytestmark = pytest.mark.skipif(os.name == "nt", reason="nothing counts as gone there")


def of(process: subprocess.Popen[bytes]) -> str:
    """What :func:`owner` says in this process."""
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


def start() -> subprocess.Popen[bytes]:
    code = "from ditq.owner import owner; import time; print(owner(), flush=True); time.sleep(60)"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)


def test_a_process_is_gone_once_it_is_killed() -> None:
    with start() as process:
        text = of(process)
        assert not is_gone(text)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert is_gone(text)  # though nobody has asked for its status yet
    assert is_gone(text)


def test_a_new_process_of_the_same_number_is_another() -> None:
    pid, start, machine = owner().split(".")
    assert not is_gone(owner())
    if os.path.exists("/proc/self/stat"):
        assert is_gone(f"{pid}.{int(start) + 1}.{machine}")


@pytest.mark.parametrize("text", ["", "study.search", "1.2", "999999999.1.00000000", "x.1.00000000", "-1.1.0"])
def test_what_cannot_be_known_is_not_gone(text: str) -> None:
    assert not is_gone(text)
