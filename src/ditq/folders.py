"""The cache folder of ditq."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_root() -> Path:
    """``DITQ_CACHE`` if it is set, else ``ditq`` in the user's cache folder of this system (Linux: ``~/.cache``)."""
    configured = os.environ.get("DITQ_CACHE")
    return Path(configured).expanduser() if configured else Path(platformdirs.user_cache_dir("ditq", appauthor=False))
