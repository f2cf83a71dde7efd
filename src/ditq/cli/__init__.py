"""The command line: one file per verb, thin over ``ditq.api``. Torch is imported only when a verb runs."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of ``ditq``. Exit status: 0 success, 1 failure, 2 wrong usage. Errors go to stderr."""
    from ditq.cli.app import run

    sys.exit(run(sys.argv[1:]))
