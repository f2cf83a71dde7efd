"""Atomic writing of files and folders: under a temporary name in the same folder, then renamed.

A temporary name says which process made it. What a killed process has left is removed by the next one that writes into
the same folder.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ditq.errors import DitqError, UsageError, warn
from ditq.owner import OWNER, is_gone, owner

_TEMPORARY = re.compile(rf"\..*-ditq-(?P<old>old-)?(?P<owner>{OWNER})-[a-z0-9_]{{8}}(\.tmp)?", re.DOTALL)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary file that replaces ``path`` if the block succeeds, and is deleted if it fails.

    A reader sees either the old file or the new one, and two writers never write to the same file. The folder must
    exist.
    """
    sweep(path.parent)
    handle, name = tempfile.mkstemp(prefix=_prefix(path), suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp creates files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically, see :func:`atomic`."""
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Writes a file in UTF-8 atomically, see :func:`atomic`."""
    write_bytes(path, content.encode())


def sweep(folder: Path) -> None:
    """Removes the temporary files and folders in ``folder`` whose process is gone, and nothing else.

    A folder that such a process had moved away to replace it is moved back if nothing stands in its place.
    """
    try:
        names = [name for name in os.listdir(folder) if name.startswith(".")]
    except OSError:  # no folder, or not readable: what writes there says so
        return
    for name in names:
        match, path = _TEMPORARY.fullmatch(name), folder / name
        if match is None or path.is_symlink() or not is_gone(match["owner"]):
            continue
        with suppress(OSError):  # another process sweeps at the same time, or the folder is read-only
            if not path.is_dir():
                path.unlink()
                continue
            if match["old"]:
                _move_back(path)
            shutil.rmtree(path)


def _move_back(backup: Path) -> None:
    for old in backup.iterdir():
        target = backup.parent / old.name
        if not os.path.lexists(target):
            os.rename(old, target)
            warn(f"A process was killed while it replaced {target}; the earlier {target.name} was put back.")


def _prefix(path: Path, kind: str = "") -> str:
    name = path.name.encode(errors="surrogateescape")[:120].decode(errors="ignore")  # names have 255 bytes at most
    return f".{name}-ditq-{kind}{owner()}-"


def check_output(out: str | Path) -> None:
    """Checks before the work starts that the output folder can be created.

    Raises:
        UsageError, DitqError: see :func:`new_folder`.
    """
    with new_folder(out, keep=False):
        pass


def check_file(path: Path) -> None:
    """Checks before the work starts that a file can be written, and creates missing folders above it.

    Raises:
        DitqError: it cannot (read-only, full disk).
    """
    sweep(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=_prefix(path), suffix=".tmp", dir=path.parent) as file:
            file.write(b"x")
    except OSError as error:
        raise DitqError(f"Cannot write {path}: {error.strerror or error}. Choose another place.") from error


def make_writable(folder: Path) -> None:
    """Lets the owner write and delete a copied folder, whose source may have been read-only."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o700 if path.is_dir() else 0o600))


@contextmanager
def new_folder(out: str | Path, *, overwrite: bool = False, keep: bool = True) -> Iterator[Path]:
    """Yields a temporary folder that becomes ``out`` if the block succeeds, and is deleted if it fails.

    Missing folders above ``out`` are created, and removed again if they stay empty.

    Args:
        out: the folder to create.
        overwrite: whether an existing ``out`` is replaced.
        keep: False deletes the temporary folder in any case.

    Raises:
        UsageError: ``overwrite`` is False, and ``out`` exists or was created by someone else in the meantime.
        DitqError: the folder cannot be written (read-only, full disk).
    """
    out = Path(out)
    sweep(out.parent)
    if os.path.lexists(out) and not overwrite:
        raise UsageError(f"The output folder {out} exists already. Choose another, or delete it first.")
    temporary: Path | None = None
    missing_parents = [parent for parent in (out.parent, *out.parent.parents) if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=_prefix(out), dir=out.parent))
        temporary.chmod(0o755)
        yield temporary
        if keep:
            (_replace if overwrite else _claim)(temporary, out)
            temporary = None
    except OSError as error:
        raise DitqError(f"Cannot write {out}: {error.strerror or error}. Nothing was left behind.") from error
    except Exception as error:
        # safetensors reports a full disk with its own error class.
        if type(error).__name__ == "SafetensorError":
            raise DitqError(f"Cannot write {out}: {error}. Nothing was left behind.") from error
        raise
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing_parents:
            with suppress(OSError):  # not created, or not empty
                parent.rmdir()


def _claim(folder: Path, out: Path) -> None:
    """Renames ``folder`` to ``out``, which must not exist: another program's folder is never replaced."""
    out_exists = UsageError(
        f"The output folder {out} appeared while ditq was working. It was left unchanged, and the result was "
        "discarded. Choose another folder, or delete it, and run again."
    )
    if os.name == "nt":  # on Windows, renaming never replaces a folder
        try:
            os.rename(folder, out)
        except FileExistsError as error:
            raise out_exists from error
        return
    # Elsewhere, renaming replaces an empty folder: create it first, so that it is ours.
    try:
        out.mkdir()
    except FileExistsError as error:
        raise out_exists from error
    try:
        os.rename(folder, out)
    except OSError as error:
        with suppress(OSError):
            out.rmdir()
        raise out_exists if os.path.lexists(out) else error from error


def _replace(folder: Path, out: Path) -> None:
    """Replaces ``out`` by ``folder``. The old folder is moved away, and deleted only after the new one is in place.

    If the process is killed in between, :func:`sweep` moves the old folder back.
    """
    if not os.path.lexists(out):
        os.rename(folder, out)
        return
    backup = Path(tempfile.mkdtemp(prefix=_prefix(out, "old-"), dir=out.parent))
    old = backup / out.name
    os.rename(out, old)
    try:
        os.rename(folder, out)
    except BaseException:
        os.rename(old, out)
        backup.rmdir()
        raise
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(backup, ignore_errors=True)
    else:
        old.unlink()
        backup.rmdir()


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
