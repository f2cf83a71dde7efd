"""``ditq demo``: a trained model, quantized six ways, beside its 16-bit self, with numbers and a page to look at."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ditq.cli.common import Quiet, Seed, metrics_table, open_pipeline, out, pick_prompts, progress_bars

RECIPES = ("rtn-static-w8a8", "viditq-w8a8", "rtn-w4a8", "viditq-w4a8", "rtn-w4a4", "viditq-w4a4")
KEPT = "viditq-w4a8"  # its checkpoint stays in the output folder


def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for pictures, numbers and a checkpoint.")] = Path(
        "ditq-out/demo"
    ),
    model: Annotated[str, typer.Option(help="A bundled model.")] = "bundled:emoji-t2i",
    count: Annotated[int, typer.Option(help="Held-out prompts to draw.", min=1)] = 16,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Quantize a bundled trained model to W8A8, W4A8 and W4A4, draw held-out prompts, compare.

    Example: ditq demo
    """
    import torch

    from ditq import api, architectures
    from ditq.calibration import calibrate
    from ditq.comparison import compare
    from ditq.recipe import Calibration
    from ditq.report import html
    from ditq.report.sheet import sheet

    begin = time.perf_counter()
    html.check_installed()
    pipe = open_pipeline(model)
    arch = architectures.match(pipe.transformer)
    wanted = pick_prompts(model, pipe, arch, None, "evaluation", count)
    calibration = pick_prompts(model, pipe, arch, None, "calibration")
    with progress_bars(quiet) as progress, api.new_folder(out_dir, overwrite=True) as folder:

        def show(stage: str, done: int, total: int) -> None:
            if progress:
                progress(stage, done, total)

        # Calibration looks at the 16-bit model only, so one run serves all recipes.
        statistics = calibrate(
            pipe, arch, calibration, Calibration(), seed=seed, progress=lambda d, t: show("calibrate", d, t)
        )

        def quantized(recipe: str) -> Any:
            def make() -> Any:
                copy = open_pipeline(model)
                api.quantize(copy, recipe, statistics=statistics, seed=seed)
                if recipe == KEPT:
                    copy.save_pretrained(folder / recipe)
                return copy

            return make

        found = compare(
            model, {recipe: quantized(recipe) for recipe in RECIPES}, wanted, seed=seed, batch_size=16,
            metrics="all", explain=1, progress=show,
        )  # fmt: skip
        report, pictures = found.report(command="ditq demo"), found.pictures()
        html.write(report, pictures, folder)
        shown = slice(0, 10)
        labels = ["16 bit", *RECIPES]
        rows = [(label, images[shown]) for label, images in zip(labels, pictures.values(), strict=True)]
        sheet(rows, wanted[shown]).save(folder / "sheet.png")
        (folder / "demo.json").write_text(json.dumps(found.as_dict(), indent=1))
    seconds = time.perf_counter() - begin
    if not quiet:
        full = found.reference.transformer_bytes
        table = [
            (name, dict(found.measurement.scores[name]),
             f"{subject.transformer_bytes / 1e6:.1f} MB ({subject.transformer_bytes / full:.2f})")
            for name, subject in found.models.items()
        ]  # fmt: skip
        title = f"{model}, {len(wanted)} held-out prompts, seed {seed}: closeness to 16 bit (± 95 %)"
        out.print(metrics_table(title, table))
        out.print(
            f"{seconds:.0f} s on {torch.get_num_threads()} threads; a checkpoint: {out_dir / KEPT}", markup=False
        )
    out.print(f"pictures: {out_dir / 'sheet.png'}\nreport: {out_dir / 'report.html'}", markup=False)


VERB = demo
