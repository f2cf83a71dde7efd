"""The command in a separate process: interrupts, kills, full disks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import PROMPTS, tiny_pixart
from safetensors.torch import load_file

LONG = ["calibration.steps=4", "calibration.prompts=24", "calibration.batch_size=1", "calibration.rows=64"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline and a file of 24 prompts."""
    base = tmp_path_factory.mktemp("process")
    tiny_pixart().save_pretrained(base / "tiny")
    (base / "prompts.txt").write_text("\n".join(f"{PROMPTS[i % 4]} {i}" for i in range(24)))
    return base


def command(folder: Path, out: Path, *more: str, settings: list[str] = LONG) -> list[str]:
    options = [part for setting in settings for part in ("--set", setting)]
    return [
        sys.executable, "-m", "ditq", "quantize", str(folder / "tiny"), "--prompts", str(folder / "prompts.txt"),
        "--out", str(out), "--quiet", *options, *more,
    ]  # fmt: skip


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "DITQ_CACHE": str(cache), "OMP_NUM_THREADS": "1"}


def stop_after(batches: int, cache: Path, arguments: list[str], how: Callable[[subprocess.Popen[str]], None]) -> str:
    """Runs a command until N calibration batches are cached, stops it, and returns its output."""
    process = subprocess.Popen(
        arguments, env=environment(cache), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 120
    while len(list(cache.rglob("batch-*.safetensors"))) < batches:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.01)
    how(process)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    return err


def test_kill_in_calibration_then_resume_gives_what_an_unbroken_run_gives(folder: Path, tmp_path: Path) -> None:
    cache, out, whole = tmp_path / "cache", tmp_path / "out", tmp_path / "whole"
    stop_after(2, cache, command(folder, out), lambda p: p.send_signal(signal.SIGKILL))
    assert not out.exists()
    kept = {f: f.stat().st_mtime_ns for f in cache.rglob("batch-*.safetensors")}
    assert 2 <= len(kept) < 24
    subprocess.run(command(folder, out, "--resume"), env=environment(cache), check=True, timeout=300)
    assert all(f.stat().st_mtime_ns == before for f, before in kept.items())  # finished batches were not redone
    subprocess.run(command(folder, whole), env=environment(tmp_path / "other"), check=True, timeout=300)
    a, b = (load_file(next((x / "transformer").glob("*.safetensors"))) for x in (out, whole))
    assert a.keys() == b.keys()
    assert all(a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_says_how_to_go_on_and_leaves_nothing(number: signal.Signals, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    err = stop_after(1, tmp_path / "cache", command(folder, out), lambda p: p.send_signal(number))
    assert "--resume" in err
    assert "Traceback" not in err
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))


def test_full_disk_is_one_message_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: writing the transformer fails half-way."""
    out = tmp_path / "out"
    code = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)); "
    code += "sys.argv = ['ditq', *sys.argv[1:]]; runpy.run_module('ditq', run_name='__main__')"
    arguments = command(folder, out, "--recipe", "rtn-w8a8", settings=["calibration.prompts=1", "calibration.steps=1"])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments[3:]],
        env=environment(tmp_path / "cache"), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))
