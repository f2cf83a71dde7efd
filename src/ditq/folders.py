"""Where ditq keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_root() -> Path:
    """``DITQ_CACHE``, or ``ditq`` in the user's cache folder of this system (Linux: ``~/.cache``)."""
    own = os.environ.get("DITQ_CACHE")
    return Path(own).expanduser() if own else Path(platformdirs.user_cache_dir("ditq", appauthor=False))
