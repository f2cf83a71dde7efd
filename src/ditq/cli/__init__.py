"""The command line: one file per verb, thin over ``ditq.api``. Torch is imported only when a verb runs."""

from __future__ import annotations

import signal
import sys
from typing import Any


def main() -> None:
    """Entry point of ``ditq``. Exit status: 0 success, 1 failure, 2 wrong usage. Errors go to stderr."""
    from ditq.cli.app import run

    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(sys.argv[1:]))


def _terminate(*_: Any) -> None:
    """Ends as after Ctrl-C: temporary folders and locks are removed."""
    raise KeyboardInterrupt
