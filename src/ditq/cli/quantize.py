"""``ditq quantize``: quantizes a pipeline and saves it to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditq.cli.common import (
    ArchitectureOption,
    AsJson,
    Device,
    Dtype,
    Pipeline,
    PromptFile,
    Quiet,
    Variant,
    err,
    open_pipeline,
    out,
    pick_architecture,
    pick_prompts,
    plan_file,
    print_json,
    progress_bars,
)

if TYPE_CHECKING:
    from ditq.plan import Plan
    from ditq.recipe import Recipe


def quantize(
    pipeline: Pipeline,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder to write; must not exist.")],
    recipe: Annotated[
        str | None, typer.Option(help="A recipe name (see ditq recipes) or a YAML file; default: viditq-w4a8.")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="A plan file (from ditq search) instead of a recipe; calibrates as its recipe does."),
    ] = None,
    prompts: PromptFile = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a recipe field, e.g. balance.alpha=0.7.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the calibration cache.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Folder of the calibration cache.")] = None,
    architecture: ArchitectureOption = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of calibration noise and rotations; default: 0. A plan has its own.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    variant: Variant = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Quantize the transformer (both of Wan 2.2 A14B) and save the whole pipeline.

    Example: ditq quantize bundled:emoji-t2i --recipe viditq-w4a8 --out emoji-w4a8
    """
    from ditq import api, requests
    from ditq.components import transformer_names
    from ditq.errors import UsageError
    from ditq.files import check_output
    from ditq.recipe import Recipe, load
    from ditq.report.tables import plan_json, plan_summary, plan_table

    if plan is not None and recipe is not None:
        raise UsageError("--plan replaces --recipe: pass only one of them.")
    job: Plan | Recipe = load(recipe or "viditq-w4a8").override(overrides or []) if plan is None else _read(plan)
    second_plan = None if plan is None else plan_file(plan, "transformer_2")  # ditq search writes one per transformer
    settings = None if isinstance(job, Recipe) else _recipe_of(job, overrides or []).calibration
    requests.seed_of(job, seed)
    check_output(out_dir)  # before the slow part
    pipe = open_pipeline(pipeline, device, dtype, variant)
    arch = pick_architecture(pipe, architecture)
    options: dict[str, Any] = {}
    if job.needs_calibration:
        chosen = pick_prompts(pipeline, pipe, arch, prompts, "calibration")
        options = {"prompts": chosen, "calibration": settings, "cache": cache, "resume": resume}
    else:
        options_of_calibration = {"--prompts": prompts, "--resume": resume, "--cache": cache}
        if unused := [name for name, value in options_of_calibration.items() if value]:
            err.print(f"{' and '.join(unused)}: not used, as this needs no calibration.", soft_wrap=True)
    results = {}
    for component in transformer_names(pipe):
        if component == "transformer_2" and second_plan is not None and second_plan.is_file():
            job = _read(second_plan)
        with progress_bars(quiet or as_json) as progress:
            results[component] = api.quantize(
                pipe, job, seed=seed, architecture=arch, component=component, progress=progress, **options
            )
    # The other components are copied as they are, but the files of a variant would need --variant again.
    api.save(pipe, out_dir, source=pipeline if variant is None else None)
    sizes = {c: sum(f.stat().st_size for f in (out_dir / c).glob("*.safetensors")) for c in results}
    if as_json:
        first, *more = ({"seconds": r.seconds, **plan_json(r.plan, sizes[c])} for c, r in results.items())
        print_json({"out": str(out_dir), **first, **({"transformer_2": more[0]} if more else {})})
    elif not quiet:
        for component, result in results.items():
            out.print(plan_table(result.plan, width=out.width))
            out.print(plan_summary(result.plan, sizes[component]))
            out.print(f"engine: {result.engine}", soft_wrap=True)
        out.print(f"saved to {out_dir}", soft_wrap=True)


def _read(path: Path) -> Plan:
    """The plan in a file, checked."""
    from ditq.errors import CheckpointError, UsageError
    from ditq.plan import Plan
    from ditq.reading import read_json

    if not path.is_file():
        raise UsageError(f"Cannot read the plan file {path}; ditq search writes one.")
    try:
        return Plan.from_dict(read_json(path, CheckpointError))
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not a plan file: {error}") from error


def _recipe_of(plan: Plan, overrides: list[str]) -> Recipe:
    """The recipe of a plan, for its calibration settings; their defaults if the recipe is not built in."""
    from ditq.errors import UsageError
    from ditq.recipe import Recipe, load, names

    for assignment in overrides:
        if not assignment.strip().startswith("calibration."):
            raise UsageError(f"A plan is explicit: with --plan, --set changes calibration only, got {assignment!r}.")
    if plan.recipe in names():
        return load(plan.recipe).override(overrides)
    if not plan.quantized:
        raise UsageError("The plan keeps every layer in 16 bit: there is nothing to quantize. Choose another plan.")
    return Recipe.model_validate(
        {"method": plan.method, "weights": plan.quantized[0].weight, "activations": plan.quantized[0].activation}
    ).override(overrides)


VERB = quantize
