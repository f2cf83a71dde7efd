"""Writing so that nobody sees half a file or half a folder: under a temporary name beside it, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ditq.errors import DitqError, UsageError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that replaces it when everything inside succeeds, and is deleted if not.

    A reader finds the old file or the new one, and two writers never write to one file. The folder must exist.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp's files are their owner's only
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file all at once, see :func:`atomic`."""
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Writes a file in UTF-8 all at once, see :func:`atomic`."""
    write_bytes(path, content.encode())


def check_output(out: str | Path) -> None:
    """Fails now rather than after the work, where ``out`` exists or its parent cannot be written.

    Raises:
        UsageError, DitqError: see :func:`new_folder`.
    """
    with new_folder(out, keep=False):
        pass


@contextmanager
def new_folder(out: str | Path, *, overwrite: bool = False, keep: bool = True) -> Iterator[Path]:
    """A temporary folder beside ``out`` that becomes ``out`` if everything inside succeeds, and vanishes if not.

    ``keep=False`` lets it vanish in any case. Folders above ``out`` are made, and removed again if left empty.

    Raises:
        UsageError: ``out`` exists, or appeared before the work was done, and ``overwrite`` is False.
        DitqError: it cannot be written (read-only, full disk).
    """
    out = Path(out)
    if os.path.lexists(out) and not overwrite:
        raise UsageError(f"The output folder {out} exists already. Choose another, or delete it first.")
    temporary: Path | None = None
    made = [parent for parent in (out.parent, *out.parent.parents) if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        temporary.chmod(0o755)
        yield temporary
        if keep:
            (_replace if overwrite else _claim)(temporary, out)
            temporary = None
    except OSError as error:
        raise DitqError(f"Cannot write {out}: {error.strerror or error}. Nothing was left behind.") from error
    except Exception as error:
        # safetensors reports a full disk as an error of its own.
        if type(error).__name__ == "SafetensorError":
            raise DitqError(f"Cannot write {out}: {error}. Nothing was left behind.") from error
        raise
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # not made, or not empty
                parent.rmdir()


def _claim(folder: Path, out: Path) -> None:
    """Renames ``folder`` to ``out``, which must not exist: what somebody else has put there is never removed."""
    taken = UsageError(
        f"The output folder {out} appeared while ditq was working; it was left alone, and the result was not kept. "
        "Choose another folder, or delete it, and run again."
    )
    if os.name == "nt":  # where renaming replaces nothing
        try:
            os.rename(folder, out)
        except FileExistsError as error:
            raise taken from error
        return
    # Elsewhere renaming replaces an empty folder, so it has to be our own.
    try:
        out.mkdir()
    except FileExistsError as error:
        raise taken from error
    try:
        os.rename(folder, out)
    except OSError as error:
        with suppress(OSError):
            out.rmdir()
        raise taken if os.path.lexists(out) else error from error


def _replace(folder: Path, out: Path) -> None:
    """Renames ``folder`` to ``out`` and then deletes the old ``out``: at every moment both are whole on the disk.

    Killed between the two renames, the old folder is left as ``.NAME-old-XXXX`` beside the new ``.NAME-XXXX``.
    """
    if not os.path.lexists(out):
        os.rename(folder, out)
        return
    shelter = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
    old = shelter / out.name
    os.rename(out, old)
    try:
        os.rename(folder, out)
    except BaseException:
        os.rename(old, out)
        shelter.rmdir()
        raise
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(shelter, ignore_errors=True)
    else:
        old.unlink()
        shelter.rmdir()


def _umask() -> int:
    """The process's mask of permissions, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
