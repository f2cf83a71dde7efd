"""Where ditq keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """``DITQ_CACHE``, or ``ditq`` in the user's cache folder."""
    base = os.environ.get("DITQ_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "ditq")
    return Path(base).expanduser()
