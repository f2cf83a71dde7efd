"""``ditq demo``: quantizes a bundled model with several recipes and compares it with 16 bit."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditq.cli.common import (
    Quiet,
    Seed,
    comparison_table,
    metrics_table,
    open_pipeline,
    out,
    pick_prompts,
    progress_bars,
)

if TYPE_CHECKING:
    from ditq.comparison import Comparison

RECIPES = ("rtn-static-w8a8", "viditq-w8a8", "rtn-w4a8", "viditq-w4a8", "rtn-w4a4", "viditq-w4a4")
VIDEO_RECIPES = ("viditq-w8a8", "viditq-w4a8", "rtn-w4a8")
KEPT = "viditq-w4a8"  # the recipe whose checkpoint is saved
IMAGES, VIDEOS = "bundled:emoji-t2i", "bundled:emoji-video"
# From the model card of emoji-video. LattePipeline's defaults, 50 steps at 7.5, are for a model 100 times larger.
VIDEO_SAMPLER: dict[str, Any] = {"steps": 20, "guidance_scale": 4.0}
VIDEO_CALIBRATION = 16  # prompts; half of a recipe's default, since a video takes as long as eight images


def demo(
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Folder for images, numbers and a checkpoint.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help=f"A bundled model; default: {IMAGES}, with --video {VIDEOS}.")
    ] = None,
    video: Annotated[bool, typer.Option("--video", help="Use a video model and write one animation.")] = False,
    count: Annotated[
        int | None, typer.Option(help="Number of held-out prompts; default: 16, with --video 12.", min=1)
    ] = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Quantize a bundled model to W8A8, W4A8 and (images) W4A4, generate held-out prompts, and compare.

    Example: ditq demo
    """
    from ditq.errors import UsageError
    from ditq.files import new_folder
    from ditq.report import html
    from ditq.sampling import draws_videos

    begin = time.perf_counter()
    html.check_installed()
    model = model or (VIDEOS if video else IMAGES)
    pipe = open_pipeline(model)
    if video and not draws_videos(pipe):
        raise UsageError(f"{model} generates images; leave out --video, or use {VIDEOS}.")
    video = draws_videos(pipe)
    out_dir = out_dir or Path("ditq-out/demo-video" if video else "ditq-out/demo")
    with progress_bars(quiet) as progress, new_folder(out_dir, overwrite=True) as folder:
        show = progress or (lambda stage, done, total: None)
        result = _quantize_and_compare(model, pipe, video, count or (12 if video else 16), seed, folder, show)
        notes = _write(result, video, folder)
    seconds = time.perf_counter() - begin
    if not quiet:
        _print(result, model, video, seconds, out_dir)
    files = {"side by side": "side-by-side.gif"} if video else {}
    for label, name in {**files, "images": "sheet.png", "report": "report.html"}.items():
        out.print(f"{label}: {out_dir / name}", soft_wrap=True)
    for note in notes:
        out.print(note, soft_wrap=True)


def _quantize_and_compare(
    model: str, pipe: Any, video: bool, count: int, seed: int, folder: Path, show: Callable[..., None]
) -> Comparison:
    """Quantizes fresh pipelines by all recipes of the demo and compares them with the 16-bit one."""
    from ditq import api, architectures
    from ditq.calibration import calibrate
    from ditq.comparison import compare
    from ditq.recipe import Calibration

    sampler = VIDEO_SAMPLER if video else {}
    settings = Calibration(**sampler, prompts=VIDEO_CALIBRATION) if video else Calibration()
    arch = architectures.match(pipe.transformer)
    prompts = pick_prompts(model, pipe, arch, None, "evaluation", count)
    calibration = pick_prompts(model, pipe, arch, None, "calibration")
    # Calibration runs the 16-bit model only, so all recipes share it.
    statistics = calibrate(pipe, arch, calibration, settings, seed=seed, progress=partial(show, "calibrate"))

    def quantized(recipe: str) -> Callable[[], Any]:
        def make() -> Any:
            copy = open_pipeline(model)
            api.quantize(copy, recipe, statistics=statistics, seed=seed)
            if recipe == KEPT:
                copy.save_pretrained(folder / recipe)
            return copy

        return make

    return compare(
        model, {recipe: quantized(recipe) for recipe in (VIDEO_RECIPES if video else RECIPES)}, prompts, seed=seed,
        batch_size=16, metrics="all", explain=1, progress=show, **sampler,
    )  # fmt: skip


def _write(result: Comparison, video: bool, folder: Path) -> list[str]:
    """Writes the page, the sheet, the animation of videos and the numbers; returns notes for the user."""
    from ditq.report import html
    from ditq.report.video import overview, save_side_by_side

    report, images = result.report(command="ditq demo --video" if video else "ditq demo"), result.pictures()
    html.write(report, images, folder)
    labelled = dict(zip(("16 bit", *result.models), images.values(), strict=True))
    overview(labelled, report.prompts).save(folder / "sheet.png")
    (folder / "demo.json").write_text(json.dumps(result.as_dict(), indent=1))
    return save_side_by_side(labelled, report.prompts, folder) if video else []


def _print(result: Comparison, model: str, video: bool, seconds: float, out_dir: Path) -> None:
    """The table of the demo, and where its checkpoint is."""
    import torch

    from ditq.report.wording import counted

    prompts, seed = result.reference.samples.conditions, result.settings["seed"]
    title = f"{model}, {counted(len(prompts), 'prompt')}, seed {seed}: closeness to 16 bit (± 95 %)"
    if video:
        out.print(comparison_table(title, result))
    else:
        full = result.reference.transformer_bytes
        rows = [
            (name, dict(result.measurement.scores[name]),
             f"{subject.transformer_bytes / 1e6:.1f} MB ({subject.transformer_bytes / full:.2f})")
            for name, subject in result.models.items()
        ]  # fmt: skip
        out.print(metrics_table(title, rows))
    out.print(f"{seconds:.0f} s on {torch.get_num_threads()} threads; a checkpoint: {out_dir / KEPT}", soft_wrap=True)


VERB = demo
