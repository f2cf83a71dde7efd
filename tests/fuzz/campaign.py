"""A campaign of faults: damaged inputs of every kind of file, and processes killed at any moment.

    python tests/fuzz/campaign.py --seed 0 --inputs 10000
    python tests/fuzz/campaign.py --seed 0 --input 1234      # one input again, with its traceback
    python tests/fuzz/campaign.py --seed 0 --kills 200

The seed and the number of an input decide everything about it. Exit status 1 if an input fails.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process with one thread can be forked
os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(path) for path in (HERE, HERE.parent, HERE.parent / "allocation") if str(path) not in sys.path]

import diffusers  # noqa: E402
import kinds  # noqa: E402
import torch  # noqa: E402
from safetensors import SafetensorError  # noqa: E402

import ditq  # noqa: E402
from ditq.errors import DitqError  # noqa: E402

SECONDS = 20  # a longer input hangs
BYTES = 2 * 2**30  # an input that takes more memory fails
LONGEST = 2500  # characters of a message that somebody reads
BATCH = 500  # inputs per process

REFUSED = "refused"
FAILURES = ("crash", "hang", "memory", "traceback", kinds.SILENT)
PACKAGE = str(Path(ditq.__file__).parent)


@dataclass
class Report:
    """Counts by kind and class, and the failures."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, number: int, kind: str, result: str, note: str) -> None:
        self.counts[kind, result] += 1
        if result in FAILURES:
            self.failures.append(f"input {number} ({kind}): {result}: {note}")

    def table(self) -> str:
        columns = [REFUSED, kinds.EQUAL, kinds.VALID, kinds.RECOMPUTED, *FAILURES]
        rows = sorted({kind for kind, _ in self.counts})
        lines = [f"{'':22}" + "".join(f"{c:>20}" for c in columns)]
        for row in rows:
            lines.append(f"{row:22}" + "".join(f"{self.counts[row, c]:20}" for c in columns))
        totals = (sum(self.counts[row, c] for row in rows) for c in columns)
        return "\n".join([*lines, f"{'all':22}" + "".join(f"{total:20}" for total in totals)])


def names(base: Path) -> list[str]:
    """The kinds whose originals could be written. OpenVINO is not asked here: its threads would not survive a fork."""
    return [name for name in kinds.KINDS if name != "exported folder" or (base / "exported").is_dir()]


def attempt(seed: int, number: int, base: Path, work: Path, references: dict[str, Any]) -> tuple[str, str, str]:
    """The kind of one input, its class and a note."""
    random = Random(f"{seed}/{number}")
    chosen = names(base)
    name = chosen[number % len(chosen)]
    kind = kinds.KINDS[name]()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    for file in kind.files:
        (shutil.copytree if (base / file).is_dir() else shutil.copy)(base / file, work / file)
    name = name.strip()
    if name not in references:
        kind.tried = False  # type: ignore[attr-defined]
        references[name] = kind.read(work)
        shutil.rmtree(work)
        work.mkdir()
        for file in kind.files:
            (shutil.copytree if (base / file).is_dir() else shutil.copy)(base / file, work / file)
    kind.damage(random, work)
    try:
        result = kind.judge(kind.read(work), references[name])
    except Exception as error:
        return name, *of_error(error)
    note = "what it computes differs from what was saved, and nothing was said" if result == kinds.SILENT else ""
    return name, result, note


def of_error(error: Exception) -> tuple[str, str]:
    """The class of an error: a message for users, or one from inside of a library."""
    text = f"{type(error).__name__}: {error}"
    causes = [error]
    while (cause := causes[-1].__cause__) is not None and isinstance(cause, Exception):
        causes.append(cause)
    if any(isinstance(c, MemoryError) or "allocate memory" in str(c)[:LONGEST] for c in causes):
        return "memory", text[:300]
    if not isinstance(error, DitqError | SafetensorError | OSError):
        if raised_in_ditq(error) or not isinstance(error, ValueError | KeyError | TypeError):
            return "traceback", where(error)
    elif "errors.pydantic.dev" in text or len(text) > LONGEST or not str(error):
        return "traceback", f"no message for a user: {text[:300]}"
    if "diffusers pipeline:" in text and raised_in_ditq(causes[-1]) and not isinstance(causes[-1], DitqError):
        return "traceback", where(causes[-1])  # ditq.load wraps what other libraries raise, and hides this one
    return REFUSED, text[:300]


def raised_in_ditq(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(PACKAGE)


def where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = " > ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames)
    return f"{type(error).__name__}: {str(error)[:200]} ({places})"


# -------------------------------------------------------------------------------- processes that may die


def forked(work: Callable[[Any], None]) -> tuple[int, int]:
    """Runs a function in a child that writes lines to a pipe; the process and the pipe's end to read."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.close(reading)
            os.setsid()
            with os.fdopen(writing, "w", buffering=1) as stream:
                work(stream)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    return process, reading


def peak() -> int:
    """Peak memory of this process in bytes since :func:`forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def worker(seed: int, numbers: range, base: Path, work: Path, loud: bool = False) -> Callable[[Any], None]:
    def run(stream: Any) -> None:
        import resource

        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        diffusers.utils.logging.disable_progress_bar()
        if not loud:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 2)
            os.dup2(quiet, 1)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + 2 * BYTES, used + 2 * BYTES))
        references: dict[str, Any] = {}
        for number in numbers:
            stream.write(json.dumps([number]) + "\n")
            forget_peak()
            name, result, note = attempt(seed, number, base, work, references)
            if peak() > BYTES:
                result, note = "memory", f"{peak() / 2**30:.1f} GiB"
            stream.write(json.dumps([number, name, result, note]) + "\n")

    return run


def lines(process: int, reading: int, seconds: float) -> Iterator[list[Any] | None]:
    """Lines of a child as they come; None once if none comes in time, then the child is killed."""
    rest = b""
    while True:
        ready, _, _ = select.select([reading], [], [], seconds)
        if not ready:
            os.killpg(process, signal.SIGKILL)
            yield None
            return
        content = os.read(reading, 1 << 16)
        if not content:
            return
        *whole, rest = (rest + content).split(b"\n")
        yield from (json.loads(line) for line in whole)


def inputs(seed: int, count: int, base: Path, first: int = 0, loud: bool = False) -> Report:
    """Tries inputs ``first`` to ``first + count - 1``, one after the other, in processes that may die."""
    report, number, end = Report(), first, first + count
    chosen = names(base)
    while number < end:
        process, reading = forked(worker(seed, range(number, min(number + BATCH, end)), base, base / "work", loud))
        late = False
        for line in lines(process, reading, SECONDS):
            late = line is None
            if line is not None and len(line) > 1:
                number, name, result, note = line
                report.add(number, name, result, note)
                number += 1
                if loud:
                    print(name, result, note, sep=": ")
        os.close(reading)
        _, status = os.waitpid(process, 0)
        if status:
            kind = chosen[number % len(chosen)].strip()
            if late:
                report.add(number, kind, "hang", f"more than {SECONDS} s")
            else:
                report.add(number, kind, "crash", f"the process ended with status {status}")
            number += 1
    return report


def prepared(base: Path) -> None:
    """Writes the originals, in a process of its own: threads that OpenVINO starts would not survive a fork."""
    os.environ["DITQ_CACHE"] = str(base / "cache")
    process, reading = forked(lambda _: kinds.build(base))
    os.close(reading)
    if os.waitpid(process, 0)[1]:
        raise RuntimeError("The undamaged files could not be written.")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int, default=0, help="number of damaged inputs")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--input", type=int, help="only the input of this number, with all that it prints")
    parser.add_argument("--kills", type=int, default=0, help="number of killed processes")
    parser.add_argument("--without", action="append", default=[], help="a kind of file to leave out")
    parser.add_argument("--only", help="the one kind of file to damage")
    options = parser.parse_args(arguments)
    for name in options.without if options.only is None else kinds.KINDS.keys() - {options.only}:
        del kinds.KINDS[name]
    torch.set_num_threads(1)
    begin = time.monotonic()
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        base = Path(folder)
        if options.inputs or options.input is not None:
            prepared(base)
            one = options.input is not None
            report = inputs(
                options.seed, 1 if one else options.inputs, base, options.input if one else options.first, loud=one
            )
            print(report.table())
            failures += report.failures
        if options.kills:
            import kills

            counts, found = kills.campaign(options.seed, options.kills, base)
            print("\n".join(f"{name:24} {result:24} {n:6}" for (name, result), n in sorted(counts.items())))
            failures += found
    print(f"seed {options.seed}, {time.monotonic() - begin:.0f} s, {len(failures)} failures")
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
