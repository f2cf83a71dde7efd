"""The errors that ditq raises. A message is one paragraph: the wrong value, the allowed values, the next step."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable


class DitqError(Exception):
    """The base of all errors that a user can fix. The command line prints them without a traceback."""


class UsageError(DitqError, ValueError):
    """The request itself is wrong (exit status 2 on the command line)."""


class CheckpointError(DitqError, ValueError):
    """A file that this version of ditq cannot read, or that is damaged."""


class NothingQuantizedError(DitqError):
    """A run that would not quantize any layer."""


def unknown(kind: str, value: object, known: Iterable[str], hint: str = "") -> UsageError:
    """The error for a name that is not one of ``known``; suggests the closest one."""
    names = sorted(known)
    close = difflib.get_close_matches(str(value), names, n=1)
    suggestion = f" Did you mean {close[0]!r}?" if close else ""
    return UsageError(
        f"Unknown {kind} {str(value)!r}.{suggestion} Known: {', '.join(names)}.{' ' + hint if hint else ''}"
    )


class DitqWarning(UserWarning):
    """What ditq says about a run that goes on. The command line prints these warnings, and no others."""


def warn(message: str) -> None:
    """Issues a :class:`DitqWarning` that points to the line outside of ditq from which it was called."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "ditq":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, DitqWarning, stacklevel=level)
