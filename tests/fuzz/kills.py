"""Processes killed at any moment: what they leave is absent or whole, and the next run ends as an unbroken one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from helpers import CLASSES, tiny_dit

import ditq
from ditq.openvino.runtime import why_unavailable

WHOLE, NOTHING, BEFORE = "whole", "nothing", "as before"
"""What a killed process leaves: its complete result, nothing, or what stood there before."""

CALIBRATION = ("calibration.steps=2", "calibration.prompts=4", "calibration.batch_size=1", "calibration.rows=32")
SET = [part for setting in CALIBRATION for part in ("--set", setting)]
SEARCH = ["--sizes", "16,32,64", "--budget", "uniform:32", "--trials", "6", "--strategy", "random"]
CHANGING = re.compile(rb'"(seconds|created|time|ms_[a-z]+|runs)[^,}]*[,}]')


@dataclass(frozen=True)
class Verb:
    """A command that writes ``out``; ``reruns``: the arguments with which it goes on after a kill."""

    name: str
    arguments: tuple[str, ...]
    reruns: tuple[str, ...] = ()


def verbs() -> list[Verb]:
    few = ("--steps", "2", "--quiet")
    exports = [Verb("export", ("export", "w8a8", "--quiet"))] if why_unavailable() is None else []
    return [
        Verb("quantize", ("quantize", "tiny", "--recipe", "smoothquant-w4a8", *SET, "--quiet")),
        Verb(
            "quantize --resume", ("quantize", "tiny", "--recipe", "viditq-w4a8", *SET, "--quiet"), reruns=("--resume",)
        ),
        Verb("search", ("search", "tiny", "--recipe", "rtn-w4a4", *SEARCH, "--quiet")),
        Verb("generate", ("generate", "quantized", "--prompt", CLASSES[0], *few)),
        Verb("compare", ("compare", "tiny", "quantized", "--prompts", "prompts.txt", *few)),
        *exports,
        Verb("save(overwrite=True)", ()),
    ]


def build(base: Path) -> None:
    """Writes what the verbs read."""
    tiny_dit().save_pretrained(base / "tiny")
    for name, recipe in (("quantized", "rtn-w4a8"), ("w8a8", "rtn-w8a8"), ("other", "rtn-w6a6")):
        pipe = tiny_dit()
        ditq.quantize(pipe, recipe)
        ditq.save(pipe, base / name)
    (base / "prompts.txt").write_text("\n".join(CLASSES[:2]))


def campaign(seed: int, count: int, base: Path) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Kills ``count`` runs of all verbs in turn; returns counts by verb and what was left, and the failures."""
    from campaign import forked

    def child(work: Callable[[], int], folder: Path, kill_after: float | None = None) -> tuple[int, float]:
        """Exit status (-9 if killed) and seconds of a function in a process of its own."""

        def run(stream: Any) -> None:
            os.chdir(folder)
            os.environ["DITQ_CACHE"] = str(folder / "cache")
            torch.set_num_threads(1)
            quiet = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            os._exit(work())

        begin = time.monotonic()
        process, reading = forked(run)
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
        os.close(reading)
        _, status = os.waitpid(process, 0)
        return os.waitstatus_to_exitcode(status), time.monotonic() - begin

    base = base / "kills"
    base.mkdir()
    status, _ = child(lambda: build(base) or 0, base)
    if status:
        raise RuntimeError((base / "log").read_text()[-3000:])
    originals = [path for path in base.iterdir() if path.name not in ("log", "cache")]
    counts, failures, random = Counter[tuple[str, str]](), list[str](), Random(seed)
    unbroken: dict[str, tuple[str, float]] = {}
    chosen = verbs()
    for number in range(count + len(chosen)):
        verb = chosen[number % len(chosen)]
        folder = base / f"work{number}"
        folder.mkdir()
        for path in originals:
            (folder / path.name).symlink_to(path)
        before = None
        if not verb.arguments:  # something to overwrite
            shutil.copytree(base / "other", folder / "out")
            before = digest(folder / "out")
        work = command(verb)
        if number < len(chosen):
            status, seconds = child(work, folder)
            if status:
                raise RuntimeError(f"{verb.name}: {(folder / 'log').read_text()[-3000:]}")
            unbroken[verb.name] = digest(folder / "out"), seconds
            continue
        expected, seconds = unbroken[verb.name]
        status, _ = child(work, folder, kill_after=random.uniform(0, 1.05 * seconds))
        left = digest(folder / "out")
        what = {expected: WHOLE, "": NOTHING, before: BEFORE}.get(left, "half-written")
        hidden = [path for path in folder.glob(".out-*old*") if (path / "out").exists()]
        if what == NOTHING and before and hidden:
            what = BEFORE  # moved away for the new one; the next run puts it back
        counts[verb.name, f"killed, {what}" if status == -signal.SIGKILL else f"ended, {what}"] += 1
        problem = "" if what in (WHOLE, BEFORE if before else NOTHING) else f"left {what}"
        if what != WHOLE:
            status, _ = child(command(verb, again=True), folder)
            if status:
                problem = problem or f"the next run failed: {(folder / 'log').read_text()[-600:]}"
            elif digest(folder / "out") != expected:
                problem = problem or "the next run gave something else"
            litter = [path.name for path in folder.iterdir() if path.name.startswith(".") and ".lock" not in path.name]
            if litter and not problem:
                problem = f"litter: {litter[:3]}"
        if problem:
            failures.append(f"kill {number} ({verb.name}): {problem}")
        shutil.rmtree(folder, ignore_errors=True)
    return counts, failures


def command(verb: Verb, again: bool = False) -> Callable[[], int]:
    """What a process runs, in a folder with the inputs, to write ``out``."""
    if not verb.arguments:

        def save() -> int:
            pipe = tiny_dit()
            ditq.quantize(pipe, "rtn-w8a8")
            ditq.save(pipe, Path("out"), overwrite=True)
            return 0

        return save
    from ditq.cli.app import run

    arguments = [*verb.arguments, "--out", "out", *(verb.reruns if again else ())]
    return lambda: int(run(arguments) or 0)


def digest(path: Path) -> str:
    """Of all files, without times and reports; "" if there is nothing."""
    if not os.path.lexists(path):
        return ""
    whole = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        content = file.read_bytes()
        if file.suffix == ".html" or file.name in ("README.md", "report.json", "values.json"):
            content = b""  # with times and dates
        if file.suffix == ".json":
            with contextlib.suppress(ValueError):
                content = CHANGING.sub(b"", json.dumps(json.loads(content), sort_keys=True).encode())
        whole.update(f"{file.relative_to(path)} ".encode() + hashlib.sha256(content).digest())
    return whole.hexdigest()
