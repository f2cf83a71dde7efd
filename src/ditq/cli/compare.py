"""``ditq compare``: two pipelines on the same prompts and seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ditq.cli.common import (
    ArchitectureOption,
    AsJson,
    BatchSize,
    Device,
    Dtype,
    Guidance,
    PromptFile,
    Quiet,
    Seed,
    Steps,
    metrics_table,
    open_pipeline,
    out,
    pick_architecture,
    pick_prompts,
    print_json,
    progress_bars,
)


def compare(
    reference: Annotated[str, typer.Argument(help="The 16-bit pipeline.")],
    quantized: Annotated[str, typer.Argument(help="The quantized pipeline.")],
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder for sheet and report; must not exist.")] = None,
    prompts: PromptFile = None,
    count: Annotated[int | None, typer.Option(help="Use the first so many prompts.", min=1)] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    batch_size: BatchSize = 8,
    architecture: ArchitectureOption = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure how far a quantized pipeline's pictures are from the 16-bit ones, prompt by prompt.

    Example: ditq compare bundled:emoji-t2i emoji-w4a8 --out comparison
    """
    from ditq import api
    from ditq.report.sheet import sheet

    if out_dir is not None:
        api.check_output(out_dir)
    a, b = (open_pipeline(path, device, dtype) for path in (reference, quantized))
    arch = pick_architecture(a, architecture)
    wanted = pick_prompts(reference, a, arch, prompts, "evaluation", count)
    with progress_bars(quiet or as_json) as progress:
        comparison = api.compare(
            a, b, wanted, seed=seed, steps=steps, guidance_scale=guidance, batch_size=batch_size,
            architecture=arch, progress=progress,
        )  # fmt: skip
    data = {"reference": reference, "quantized": quantized, **comparison.as_dict()}
    if out_dir is not None:
        with api.new_folder(out_dir) as folder:
            (folder / "comparison.json").write_text(json.dumps({**data, "values": comparison.values}, indent=1))
            shown = slice(0, 12)
            rows = [("reference", comparison.reference.images[shown]), ("quantized", comparison.other.images[shown])]
            sheet(rows, comparison.reference.conditions[shown]).save(folder / "sheet.png")
    if as_json:
        print_json(data)
    elif not quiet:
        title = f"{len(wanted)} pairs, seed {seed}, mean and 95 % interval"
        out.print(metrics_table(title, [(quantized, dict(comparison.metrics), "")]))
        if out_dir is not None:
            out.print(f"pictures: {out_dir / 'sheet.png'}", markup=False)


VERB = compare
