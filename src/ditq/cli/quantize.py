"""``ditq quantize``: a pipeline in, a quantized pipeline folder out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from ditq.plan import Plan
    from ditq.recipe import Recipe


def quantize(
    pipeline: Pipeline,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder to write; must not exist.")],
    recipe: Annotated[str, typer.Option(help="A recipe name (see ditq recipes) or a YAML file.")] = "viditq-w4a8",
    plan: Annotated[
        Path | None,
        typer.Option(help="A plan file (from ditq search) instead of a recipe; its recipe says how to calibrate."),
    ] = None,
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
    """Quantize the transformer (of Wan 2.2 A14B both, one after the other) and save the whole pipeline.

    Example: ditq quantize bundled:emoji-t2i --recipe viditq-w4a8 --out emoji-w4a8
    """
    from ditq import api
    from ditq.recipe import load
    from ditq.report.tables import plan_json, plan_summary, plan_table

    given = None if plan is None else _read(plan)
    wanted = (load(recipe) if given is None else _recipe_of(given, overrides or [])).override(overrides or [])
    api.check_output(out_dir)  # before minutes of work, not after
    pipe = open_pipeline(pipeline, device, dtype)
    arch = pick_architecture(pipe, architecture)
    chosen = None
    if (given or wanted).needs_calibration or prompts is not None:
        chosen = pick_prompts(pipeline, pipe, arch, prompts, "calibration")
    results = {}
    for component in api.transformers(pipe):
        with progress_bars(quiet or as_json) as progress:
            results[component] = api.quantize(
                pipe, given or wanted, prompts=chosen, calibration=wanted.calibration, seed=seed, architecture=arch,
                component=component, cache=cache, resume=resume, progress=progress,
            )  # fmt: skip
    api.save(pipe, out_dir, source=pipeline)
    sizes = {c: sum(f.stat().st_size for f in (out_dir / c).glob("*.safetensors")) for c in results}
    if as_json:
        first, *more = ({"seconds": r.seconds, **plan_json(r.plan, sizes[c])} for c, r in results.items())
        print_json({"out": str(out_dir), **first, **({"transformer_2": more[0]} if more else {})})
    elif not quiet:
        for component, result in results.items():
            out.print(plan_table(result.plan, width=out.width))
            out.print(plan_summary(result.plan, sizes[component]), markup=False)
            out.print(f"engine: {result.engine}", markup=False)
        out.print(f"saved to {out_dir}", markup=False)


def _read(path: Path) -> Plan:
    """The plan in a file, checked."""
    import json

    from ditq.errors import CheckpointError, UsageError
    from ditq.plan import Plan

    try:
        return Plan.from_dict(json.loads(path.read_text()))
    except OSError as error:
        raise UsageError(f"There is no plan file {path} that can be read; ditq search writes one.") from error
    except ValueError as error:  # of JSON, of text, or of a field
        reason = error if isinstance(error, CheckpointError) else f"it is not JSON ({error})"
        raise CheckpointError(f"{path} is no plan: {reason}") from error


def _recipe_of(plan: Plan, overrides: list[str]) -> Recipe:
    """The recipe a plan was made from, for its calibration; of a recipe that ditq does not know, the defaults."""
    from ditq.errors import UsageError
    from ditq.recipe import Recipe, load, names

    for assignment in overrides:
        if not assignment.strip().startswith("calibration."):
            raise UsageError(f"A plan is explicit: with --plan, --set changes calibration only, got {assignment!r}.")
    if plan.recipe in names():
        return load(plan.recipe)
    return Recipe.model_validate(
        {"method": plan.method, "weights": plan.quantized[0].weight, "activations": plan.quantized[0].activation}
    )


VERB = quantize
