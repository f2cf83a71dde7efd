"""``ditq quantize``: a pipeline in, a quantized pipeline folder out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditq.cli.common import (
    ArchitectureOption,
    AsJson,
    Device,
    Dtype,
    Pipeline,
    PromptFile,
    Quiet,
    Seed,
    open_pipeline,
    out,
    pick_architecture,
    pick_prompts,
    print_json,
    progress_bars,
)


def quantize(
    pipeline: Pipeline,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder to write; must not exist.")],
    recipe: Annotated[str, typer.Option(help="A recipe name (see ditq recipes) or a YAML file.")] = "viditq-w4a8",
    prompts: PromptFile = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a recipe field, e.g. balance.fold=false.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the calibration cache.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Folder of the calibration cache.")] = None,
    architecture: ArchitectureOption = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Quantize the transformer of a pipeline and save the whole pipeline.

    Example: ditq quantize bundled:emoji-t2i --recipe viditq-w4a8 --out emoji-w4a8
    """
    from ditq import api
    from ditq.recipe import load
    from ditq.report.tables import plan_json, plan_summary, plan_table

    wanted = load(recipe).override(overrides or [])
    api.check_output(out_dir)  # before minutes of work, not after
    pipe = open_pipeline(pipeline, device, dtype)
    arch = pick_architecture(pipe, architecture)
    chosen = None
    if wanted.needs_calibration or prompts is not None:
        chosen = pick_prompts(pipeline, pipe, arch, prompts, "calibration")
    with progress_bars(quiet or as_json) as progress:
        result = api.quantize(
            pipe, wanted, prompts=chosen, seed=seed, architecture=arch, cache=cache, resume=resume, progress=progress
        )
    api.save(pipe, out_dir, source=pipeline)
    size = sum(f.stat().st_size for f in (out_dir / "transformer").glob("*.safetensors"))
    if as_json:
        print_json({"out": str(out_dir), "seconds": result.seconds, **plan_json(result.plan, size)})
    elif not quiet:
        out.print(plan_table(result.plan, full=False))
        out.print(plan_summary(result.plan, size), markup=False)
        out.print(f"engine: {result.engine}", markup=False)
        out.print(f"saved to {out_dir}", markup=False)


VERB = quantize
