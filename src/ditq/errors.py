"""Errors that ditq raises on purpose: one paragraph, the wrong value, the allowed ones, the next step."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable


class DitqError(Exception):
    """Base of all errors a user can do something about. The command line prints it without a traceback."""


class UsageError(DitqError, ValueError):
    """The request itself is wrong (exit status 2 on the command line)."""


class CheckpointError(DitqError, ValueError):
    """A file that was not written by this version of ditq, or was damaged since."""


class NothingQuantizedError(DitqError):
    """A run that would leave every layer as it was."""


def unknown(kind: str, value: object, known: Iterable[str], hint: str = "") -> UsageError:
    """The error for a name that is not one of ``known``; suggests the closest one."""
    names = sorted(known)
    close = difflib.get_close_matches(str(value), names, n=1)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    return UsageError(f"Unknown {kind} {str(value)!r}.{guess} Known: {', '.join(names)}.{' ' + hint if hint else ''}")


def warn(message: str) -> None:
    """A ``UserWarning`` at the line outside of ditq that called it."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "ditq":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
