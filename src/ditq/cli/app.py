"""Builds the command line from its verbs, and reports errors as one paragraph and an exit status."""

from __future__ import annotations

import importlib
import io
import os
import pkgutil
import re
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from ditq.errors import DitqError, DitqWarning, UsageError
from ditq.report.terminal import ERRORS, printable

DESCRIPTION = "Post-training quantization for diffusion transformers. --debug on any verb shows tracebacks."
SETTINGS = {"help_option_names": ["-h", "--help"]}

# Exit status of typer after Ctrl-C.
_INTERRUPTED = 130


def _print_version(version: bool) -> None:
    if version:
        print(f"ditq {metadata.version('ditq')}")
        raise typer.Exit


def build() -> typer.Typer:
    """The application; every module of ``ditq.cli`` with a ``VERB`` is a verb."""
    app = typer.Typer(help=DESCRIPTION, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                      context_settings=SETTINGS)  # fmt: skip
    app.callback()(_options)
    for info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        module = importlib.import_module(f"{__package__}.{info.name}")
        if hasattr(module, "VERB"):
            app.command(info.name.rstrip("_"))(module.VERB)
    return app


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the verb."""


def run(arguments: list[str]) -> int:
    """Runs one command line and returns its exit status."""
    debug = "--debug" in arguments
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", DitqWarning)
            warnings.showwarning = _print_warning
        return _run([a for a in arguments if a != "--debug"], debug)


def _run(arguments: list[str], debug: bool) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ERRORS)  # replaces characters that the terminal cannot print
    try:
        build()(args=arguments, standalone_mode=True)
    except SystemExit as done:
        if done.code == _INTERRUPTED:
            print("\nInterrupted; no output was written. Finished calibration batches are kept (continue with "
                  "--resume), and so are the trials of a search (run it again).", file=sys.stderr)  # fmt: skip
            return 1
        return done.code if isinstance(done.code, int) else 1
    except UsageError as error:
        return _fail(error, debug, 2)
    except DitqError as error:
        return _fail(error, debug, 1)
    except OSError as error:
        return _fail(error, debug, 1)
    except Exception as error:
        if debug:
            raise
        return _fail(error, debug, 1, hint=" This is unexpected; --debug shows where.")
    return 0


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {printable(str(message))}", file=sys.stderr)


def _fail(error: BaseException, debug: bool, status: int, hint: str = "") -> int:
    if debug:
        import traceback

        traceback.print_exception(error)
    else:
        kind = "" if isinstance(error, DitqError) else f"{type(error).__name__}: "
        # One paragraph, even if the error quotes several lines.
        text = re.sub(r"\s*\n\s*", " ", f"{kind}{error}{hint}")
        print(f"error: {printable(text)}", file=sys.stderr)
    return status
