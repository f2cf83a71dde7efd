"""``ditq demo``: a trained model, quantized, beside its 16-bit self, with numbers."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from ditq.cli.common import Quiet, Seed, metrics_table, open_pipeline, out, pick_prompts, progress_bars

RECIPES = ("rtn-static-w8a8", "viditq-w8a8", "rtn-w4a8", "viditq-w4a8", "rtn-w4a4", "viditq-w4a4")


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
    from ditq.report.sheet import sheet
    from ditq.sampling import sample

    begin = time.perf_counter()
    pipe = open_pipeline(model)
    arch = architectures.match(pipe.transformer)
    wanted = pick_prompts(model, pipe, arch, None, "evaluation", count)
    calibration = pick_prompts(model, pipe, arch, None, "calibration")
    with progress_bars(quiet) as progress:

        def show(stage: str, done: int, total: int) -> None:
            if progress:
                progress(stage, done, total)

        # Calibration looks at the 16-bit model only, so one run serves all recipes.
        statistics = calibrate(
            pipe, arch, calibration, Calibration(), seed=seed, progress=lambda d, t: show("calibrate", d, t)
        )
        show("16-bit", 0, 1)
        reference = sample(pipe, arch, wanted, seed=seed, batch_size=16)
        show("16-bit", 1, 1)
        sheet_rows, table_rows, numbers = [("16 bit", reference.images)], [], {}
        with api.new_folder(out_dir, overwrite=True) as folder:
            for recipe in RECIPES:
                show(recipe, 0, 2)
                pipe = open_pipeline(model)
                result = api.quantize(pipe, recipe, statistics=statistics, seed=seed)
                show(recipe, 1, 2)
                comparison = compare(
                    reference, sample(pipe, arch, wanted, seed=seed, batch_size=16), seed=seed, batch_size=16
                )
                show(recipe, 2, 2)
                size, full = result.plan.memory()
                sheet_rows.append((recipe, comparison.other.images))
                table_rows.append((recipe, dict(comparison.metrics), f"{size / 1e6:.1f} MB ({size / full:.2f})"))
                numbers[recipe] = {**comparison.as_dict(), "transformer_bytes": size, "transformer_bytes_16bit": full}
                if recipe == "viditq-w4a8":
                    pipe.save_pretrained(folder / recipe)
            shown = slice(0, 10)
            sheet([(label, images[shown]) for label, images in sheet_rows], wanted[shown]).save(folder / "sheet.png")
            (folder / "demo.json").write_text(json.dumps(numbers, indent=1))
    seconds = time.perf_counter() - begin
    if not quiet:
        title = f"{model}, {len(wanted)} held-out prompts, seed {seed}: closeness to 16 bit (± 95 %)"
        out.print(metrics_table(title, table_rows))
        out.print(
            f"{seconds:.0f} s on {torch.get_num_threads()} threads; a checkpoint: {out_dir / 'viditq-w4a8'}",
            markup=False,
        )
    out.print(f"pictures: {out_dir / 'sheet.png'}", markup=False)


VERB = demo
