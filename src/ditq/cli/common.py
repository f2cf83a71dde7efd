"""Shared by several verbs: options, prompts, devices, progress bars and tables."""

from __future__ import annotations

import codecs
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditq.errors import UsageError
from ditq.report.terminal import Terminal, table

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from ditq.architectures import Architecture
    from ditq.comparison import Comparison
    from ditq.metrics import Interval

Pipeline = Annotated[str, typer.Argument(help="A pipeline folder, a hub id, or bundled:NAME.")]
Seed = Annotated[int, typer.Option(help="Seed of noise, calibration and rotations.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; auto: a GPU if there is one, else the CPU.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16; auto: bfloat16 on a GPU, else float32.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars, no tables.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Steps = Annotated[int | None, typer.Option(help="Sampling steps; default: the pipeline's.", min=1)]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; default: the pipeline's.")]
Frames = Annotated[
    int | None, typer.Option(help="Frames of a video; default: that of the model or the pipeline.", min=1)
]
Height = Annotated[int | None, typer.Option(help="Pixels; default: that of the model or the pipeline.", min=1)]
Width = Annotated[int | None, typer.Option(help="Pixels; default: that of the model or the pipeline.", min=1)]
Variant = Annotated[
    str | None, typer.Option("--variant", help="Variant of the weight files, e.g. fp16; default: the plain files.")
]
FramesPerSecond = Annotated[float | None, typer.Option("--fps", help="Frame rate of videos; default: 8.", min=0.1)]
BatchSize = Annotated[int, typer.Option(help="Images generated at once.", min=1)]
PromptFile = Annotated[
    Path | None, typer.Option("--prompts", help="Text file, one prompt (or class name, or class number) per line.")
]
ArchitectureOption = Annotated[
    str | None,
    typer.Option("--architecture", help="Name or YAML file, for a transformer class that ditq does not support."),
]

out = Terminal()
err = Terminal(stderr=True)


def numbers(option: str, text: str, wanted: str) -> list[int]:
    """The numbers of a comma-separated option.

    Args:
        option: without its dashes, for the message.
        text: e.g. ``8,4,3``.
        wanted: what is expected, for the message.

    Raises:
        UsageError: an entry is not a whole number.
    """
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UsageError(f"--{option} must be comma-separated {wanted}; got {text!r}.") from None


def print_json(data: Any) -> None:
    """JSON on stdout, nothing else."""
    json.dump(data, sys.stdout, indent=1)
    sys.stdout.write("\n")


def pick_device(device: str) -> torch.device:
    """The device of ``--device``.

    Raises:
        UsageError: the name is not a device, or this machine does not have it.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return chosen


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The compute dtype of ``--dtype``."""
    import torch

    if dtype == "auto":
        # On a CPU, float32 is the default of diffusers, and faster than bf16 without bf16 instructions.
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise UsageError(f"--dtype must be auto, {', '.join(known)}; got {dtype!r}.")
    return known[dtype]


def open_pipeline(path: str, device: str = "auto", dtype: str = "auto", variant: str | None = None) -> Any:
    """Loads a pipeline and puts it on the device, without the libraries' own progress bars."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from ditq import api

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        if library.get_verbosity() == logging.WARNING:  # the default; a level that the user set is kept
            library.set_verbosity_error()
    chosen = pick_device(device)
    return api.load(path, dtype=pick_dtype(dtype, chosen), variant=variant).to(chosen)


def pick_architecture(pipe: Any, name: str | None) -> Architecture:
    """The architecture of ``--architecture``, by default that of the pipeline's transformer."""
    from ditq import architectures

    return architectures.load(name) if name else architectures.match(pipe.transformer)


def pick_fps(fps: float | None, pipe: Any) -> float:
    """The frame rate of ``--fps``.

    Raises:
        UsageError: the pipeline generates images.
    """
    from ditq.report.video import FRAMES_PER_SECOND
    from ditq.sampling import draws_videos

    if fps is not None and not draws_videos(pipe):
        raise UsageError(f"{type(pipe).__name__} generates images; --fps is for video pipelines. Leave it out.")
    return fps or FRAMES_PER_SECOND


def read_prompts(file: Path) -> list[str]:
    """The prompts of a text file, one per line.

    Raises:
        UsageError: the file is missing or empty, or neither UTF-8 nor UTF-16 with a byte-order mark.
    """
    if not file.is_file():
        raise UsageError(f"The prompts file {file} does not exist.")
    prompts = [line.strip() for line in decoded(file.read_bytes(), file).splitlines() if line.strip()]
    if not prompts:
        raise UsageError(f"The prompts file {file} is empty: write one prompt per line.")
    return prompts


def decoded(content: bytes, file: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte-order mark. Other encodings cannot be told apart.

    Raises:
        UsageError: the content is neither; the message names the line.
    """
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        where = "" if utf16 else f": line {line} has a byte that is not UTF-8"
        raise UsageError(
            f"The prompts file {file} is not text in {'UTF-16' if utf16 else 'UTF-8'}{where}. Save it as UTF-8."
        ) from error


def pick_prompts(
    path: str, pipe: Any, architecture: Architecture, file: Path | None, split: str, count: int | None = None
) -> list[str]:
    """Prompts from a file, from the lists of a bundled model, or evenly spaced classes of the pipeline.

    Args:
        path: of the pipeline.
        pipe: the loaded pipeline.
        architecture: of its transformer.
        file: of ``--prompts``.
        split: list of the bundled model, "calibration" or "evaluation".
        count: number of prompts; None: all.

    Raises:
        UsageError: the file is missing or empty, or the pipeline needs one.
    """
    if file is not None:
        prompts = read_prompts(file)
    elif path.startswith("bundled:"):
        import ditq_bundled

        prompts = ditq_bundled.prompts(path.removeprefix("bundled:"), split)
    elif architecture.pipeline.condition == "class_labels":
        labels = sorted(set((getattr(pipe, "labels", None) or {}).values())) or list(range(1000))
        prompts = [str(label) for label in labels[:: max(1, len(labels) // 32)]][:32]
    else:
        raise UsageError("Pass --prompts FILE with typical prompts, one per line (32 are enough).")
    return prompts[:count] if count else prompts


def plan_file(first: Path, component: str) -> Path:
    """The plan file of another transformer, next to that of the first: ``NAME.transformer_2.json``."""
    return first.with_name(f"{first.stem}.{component}.json")


FEWEST_UNITS = 2  # done before a time left is shown: the first one also pays for what is done once


class TimeLeft:
    """The time left of each stage, from the speed since the stage's first call.

    Results that were found in a study or a cache are counted in the first call, so they do not make it look faster.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.first: dict[str, tuple[float, int]] = {}

    def text(self, stage: str, done: int, total: int) -> str:
        """``12 min left``; empty before two units are done by this process, and at the end."""
        now = self.clock()
        if done < self.first.get(stage, (now, done + 1))[1]:  # a new stage, or the same one of the next part
            self.first[stage] = (now, done)
        begin, already = self.first[stage]
        if done - already < FEWEST_UNITS or done >= total:
            return ""
        return f"{_duration((now - begin) / (done - already) * (total - done))} left"


def _duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Callable[..., None] | None]:
    """Yields a callback (stage, done, total, note="") that shows one bar per stage on stderr; None if quiet.

    A bar has the time since its first call, and the time left.
    """
    if quiet:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    bars: dict[str, Any] = {}
    left = TimeLeft()
    columns = (TextColumn("{task.description:<12}", markup=False), BarColumn(20), MofNCompleteColumn(),
               TimeElapsedColumn(), TextColumn("{task.fields[left]}", markup=False),
               TextColumn("{task.fields[note]}", markup=False))  # fmt: skip
    with Progress(*columns, console=err) as progress:

        def show(stage: str, done: int, total: int, note: str = "") -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=total, note=note, left="")
            progress.update(bars[stage], completed=done, total=total, note=note, left=left.text(stage, done, total))

        yield show


def metrics_table(title: str, rows: Sequence[tuple[str, Mapping[str, Interval], str]]) -> Table:
    """Rows of (model, metrics by name, size) as a table of means with 95 % intervals."""
    result = table("model", title=title)
    for column in ("PSNR dB", "SSIM", "latent SQNR", "transformer"):
        result.add_column(column, justify="right", no_wrap=True)
    for name, metrics, size in rows:
        values = [(metrics[key], digits) for key, digits in (("psnr_db", 1), ("ssim", 3), ("latent_sqnr_db", 1))]
        result.add_row(name, *(_plus_minus(value, digits) for value, digits in values), size)
    return result


def comparison_table(title: str, comparison: Comparison) -> Table:
    """One row per metric, one column per model; signs mark values that differ measurably from the reference."""
    from ditq.metrics.interval import FEWEST

    names = list(comparison.models)
    skipped = comparison.measurement.skipped
    plan = comparison.reference.plan
    label = f"W{plan.nominal_weight_bits}A{plan.nominal_activation_bits}" if plan else "16 bit"
    caption = f"= no measurable difference to {label}, - worse, + better (paired, 95 %)"
    if len(comparison.reference.samples.images) < FEWEST:
        caption = f"n/a: no intervals and no verdicts from fewer than {FEWEST} pairs"
    if skipped:
        caption += f"\nnot measured, see the report for why: {', '.join(skipped)}"
    result = table("metric", title=title, caption=caption)
    for name in (label, *names):
        result.add_column(name, justify="right", overflow="fold")
    signs = {"same": " =", "worse": " -", "better": " +", None: "  "}
    for entry in comparison.measurement.descriptions:
        scores = [comparison.measurement.scores[name][entry.name] for name in names]
        reference = scores[0].reference
        arrow = "↑" if entry.higher_is_better else "↓"
        unit = f" {entry.unit}" if entry.unit else ""
        result.add_row(
            f"{entry.title}{unit} {arrow}",
            _plus_minus(reference, _digits(reference)) if reference else "",
            *(_plus_minus(score, _digits(score)) + signs[score.verdict] for score in scores),
        )
    for row in _costs(comparison):
        result.add_row(*row)
    return result


def _costs(comparison: Comparison) -> list[list[str]]:
    """Rows for memory and time of the transformers, if they were measured."""
    subjects, rows = list(comparison.models.values()), []
    full = comparison.reference.transformer_bytes
    if full:
        sizes = [f"{s.transformer_bytes / 1e6:.1f} ({s.transformer_bytes / full:.2f})  " for s in subjects]
        rows.append(["transformer MB", f"{full / 1e6:.1f}", *sizes])
    times = [s.step_time for s in subjects if s.step_time]
    if len(times) == len(subjects):
        base = comparison.reference.step_time
        ratios = [f"{time.ms_median:.0f} ({time.ratio_to_reference:.2f} x)  " for time in times]
        rows.append(["transformer call ms", f"{base.ms_median:.0f}" if base else "", *ratios])
    return rows


def _digits(a: Interval) -> int:
    """Decimal digits that are meaningful with an interval of this width; three significant ones without interval."""
    from ditq.report.wording import three_digits

    if a.ci95 is None:
        return three_digits(abs(a.mean))
    width = a.ci95[1] - a.ci95[0]
    return 1 if width == 0 else min(5, max(1, 1 - math.floor(math.log10(width))))


def _plus_minus(a: Interval, digits: int) -> str:
    """A mean and the longer side of its 95 % interval; the JSON has both ends."""
    if a.ci95 is None:
        return f"{a.mean:.{digits}f} ± n/a"
    return f"{a.mean:.{digits}f} ± {max(a.ci95[1] - a.mean, a.mean - a.ci95[0]):.{digits}f}"
