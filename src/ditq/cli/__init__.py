"""The command line: one file a verb, thin over ``ditq.api``. Torch is imported when a verb runs, not before."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of ``ditq``: exit status 0 done, 1 the work failed, 2 wrong usage; errors on stderr."""
    from ditq.cli.app import run

    sys.exit(run(sys.argv[1:]))
