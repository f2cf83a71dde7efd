"""``ditq compare``: compares quantized pipelines with a 16-bit one on the same prompts and seeds."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from ditq.cli.common import (
    ArchitectureOption,
    AsJson,
    BatchSize,
    Device,
    Dtype,
    Frames,
    FramesPerSecond,
    Guidance,
    Height,
    PromptFile,
    Quiet,
    Seed,
    Steps,
    Variant,
    Width,
    comparison_table,
    open_pipeline,
    out,
    pick_architecture,
    pick_device,
    pick_dtype,
    pick_fps,
    pick_prompts,
    print_json,
    progress_bars,
)


def compare(
    reference: Annotated[str, typer.Argument(help="The 16-bit pipeline.")],
    quantized: Annotated[list[str], typer.Argument(help="Quantized pipelines, one or more.")],
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder for the report; must not exist.")] = None,
    prompts: PromptFile = None,
    count: Annotated[int | None, typer.Option(help="Use the first N prompts only.", min=1)] = None,
    metrics: Annotated[
        str,
        typer.Option(
            help="Comma-separated metric names; basic: PSNR, SSIM, latent SQNR; all: every metric available here."
        ),
    ] = "all",
    network: Annotated[
        str, typer.Option(help="Feature network; auto: that of the model, else an installed one.")
    ] = "auto",
    real: Annotated[
        Path | None,
        typer.Option(help="Folder of real images for KID, FID, precision and recall, or of videos for KVD, FVD."),
    ] = None,
    explain: Annotated[
        int,
        typer.Option(help="Number of prompts to measure layer errors and the speed of a call on; 0: neither.", min=0),
    ] = 4,
    card: Annotated[
        bool, typer.Option(help="Also write a model card and the report into every quantized folder.")
    ] = True,
    cached: Annotated[bool, typer.Option("--cache/--no-cache", help="Cache images and reuse them.")] = True,
    steps: Steps = None,
    guidance: Guidance = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    fps: FramesPerSecond = None,
    batch_size: BatchSize = 8,
    architecture: ArchitectureOption = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    variant: Variant = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure the loss from quantization on the same prompts and noise: metrics with intervals, and a report.

    Example: ditq compare bundled:emoji-t2i emoji-w8a8 emoji-w4a8 --out comparison
    """
    from ditq import comparison
    from ditq.checkpoint.folder import resolve
    from ditq.files import check_output, new_folder
    from ditq.metrics.measure import BASIC
    from ditq.report import attach, html
    from ditq.report.video import overview, save_side_by_side
    from ditq.report.wording import counted
    from ditq.sampling import PictureCache, size_arguments

    if out_dir is not None:
        html.check_installed()
        check_output(out_dir)
    for path in (reference, *quantized):
        resolve(path)
    base = open_pipeline(reference, device, dtype, variant)
    arch = pick_architecture(base, architecture)
    size, rate = size_arguments(base, frames=frames, height=height, width=width), pick_fps(fps, base)
    chosen = pick_prompts(reference, base, arch, prompts, "evaluation", count)
    del base
    chosen_device = pick_device(device)
    chosen_metrics = (
        BASIC if metrics == "basic" else "all" if metrics == "all" else metrics.replace(" ", "").split(",")
    )
    with progress_bars(quiet or as_json) as progress:
        result = comparison.compare(
            reference, quantized, chosen, seed=seed, steps=steps, guidance_scale=guidance, batch_size=batch_size,
            arguments=size, architecture=arch, metrics=chosen_metrics, network=network, real=real,
            cache=PictureCache() if cached else None, explain=explain, device=chosen_device,
            dtype=pick_dtype(dtype, chosen_device), variant=variant, progress=progress,
        )  # fmt: skip
    data = {
        "reference": reference,
        "quantized": quantized[0] if len(quantized) == 1 else quantized,
        **result.as_dict(),
    }
    notes: list[str] = []
    if out_dir is not None:
        passed = {"--prompts": prompts, "--count": count, "--steps": steps, "--guidance": guidance, "--real": real,
                 "--frames": frames, "--height": height, "--width": width, "--fps": fps,
                 "--architecture": architecture, "--batch-size": batch_size, "--metrics": metrics,
                 "--network": network, "--explain": explain, "--seed": seed, "--device": device, "--dtype": dtype,
                 "--variant": variant, "--out": out_dir}  # fmt: skip
        options = [text for name, value in passed.items() if value is not None for text in (name, str(value))]
        command = shlex.join(["ditq", "compare", reference, *quantized, *options])
        report, images = result.report(command=command), result.pictures()
        with new_folder(out_dir) as folder:
            if report.kind == "video":
                report.sampler["fps"] = rate
                notes += save_side_by_side(images, report.prompts, folder, rate)
            html.write(report, images, folder)
            (folder / "values.json").write_text(json.dumps(result.measurement.values, indent=1))
            overview(images, report.prompts).save(folder / "sheet.png")
            if card:
                notes += [attach.attach(report, model, folder / "report.html") for model in report.models]
    if as_json:
        print_json(data)
    elif not quiet:
        out.print(comparison_table(f"{counted(len(chosen), 'prompt')}, seed {seed}, mean and 95 % interval", result))
        for line in (*notes, *([f"report: {out_dir / 'report.html'}"] if out_dir else [])):
            out.print(line, soft_wrap=True)


VERB = compare
