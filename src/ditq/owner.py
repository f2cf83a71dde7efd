"""Which process has made a temporary file or a lock, and whether that process is gone."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

OWNER = r"(\d+)\.(\d+)\.([0-9a-f]{8})"  # process id, its start time, and a hash of the machine


def owner() -> str:
    """This process as a short text for a file name, see :data:`OWNER`."""
    return f"{os.getpid()}.{_start(os.getpid())}.{_machine()}"


def is_gone(text: str) -> bool:
    """Whether the process that :func:`owner` described has ended. False if that cannot be known.

    It cannot for processes of another machine or container, for any other text, and on Windows.
    """
    match = re.fullmatch(OWNER, text)
    if match is None or match[3] != _machine() or os.name == "nt":
        return False
    try:
        os.kill(int(match[1]), 0)  # sends nothing; only asks whether the process is there
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # of another user
        pass
    start, then = _start(int(match[1])), int(match[2])
    return start == -1 or (start != then and 0 not in (start, then))


def _start(pid: int) -> int:
    """When a process started, in the clock ticks of the system; 0 if the system does not say, -1 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0
    ended = fields[0] in (b"Z", b"X")  # killed, but its parent has not asked for its status yet
    return -1 if ended else int(fields[19])


@lru_cache
def _machine() -> str:
    """A hash of what tells machines and containers apart that write into the same folder."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/etc/machine-id").read_text())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
