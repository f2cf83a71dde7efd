"""``ditq search``: searches a group size for every layer of a pipeline and writes a plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditq.cli.common import (
    ArchitectureOption,
    AsJson,
    BatchSize,
    Device,
    Dtype,
    Frames,
    Guidance,
    Height,
    Pipeline,
    PromptFile,
    Quiet,
    Seed,
    Variant,
    Width,
    open_pipeline,
    out,
    pick_architecture,
    pick_prompts,
    plan_file,
    print_json,
    progress_bars,
)

if TYPE_CHECKING:
    from ditq.allocation import Fitness, SearchResult
    from ditq.metrics.real import Real
    from ditq.plan import Plan


def search(
    pipeline: Pipeline,
    out_file: Annotated[Path, typer.Option("--out", help="Plan file to write, for ditq quantize --plan.")],
    recipe: Annotated[str, typer.Option(help="A recipe name (see ditq recipes) or a YAML file.")] = "qdit-w4a8",
    strategy: Annotated[
        str, typer.Option(help="evolution (Q-DiT), or a baseline: random, program (integer program), uniform.")
    ] = "evolution",
    trials: Annotated[int, typer.Option(help="Allocations to evaluate, over all processes.", min=1)] = 500,
    sizes: Annotated[
        str | None,
        typer.Option(help="Group sizes; each layer uses those that divide it. Default: of 32,64,128,192,288."),
    ] = None,
    budget: Annotated[
        str, typer.Option(help="Largest BitOps per image: a number, or uniform:G for group size G everywhere.")
    ] = "uniform:128",
    fitness: Annotated[
        str,
        typer.Option(
            help="Error against 16 bit: prediction (of the transformer along the 16-bit trajectory) or latent (at the "
            "end of the trajectory). Distance to real images: fid, kid, sfid."
        ),
    ] = "prediction",
    real: Annotated[Path | None, typer.Option(help="Folder of real images, for fid, kid and sfid.")] = None,
    network: Annotated[str, typer.Option(help="Feature network, for fid, kid and sfid.")] = "auto",
    prompts: PromptFile = None,
    pictures: Annotated[int, typer.Option(help="Number of images to evaluate each allocation on.", min=1)] = 128,
    moments: Annotated[
        int, typer.Option(help="Random timesteps of each image that --fitness prediction uses.", min=1)
    ] = 1,
    rounding: Annotated[
        str, typer.Option(help="Of the candidates: recipe (GPTQ once per layer and size), or nearest (as in Q-DiT).")
    ] = "recipe",
    steps: Annotated[int | None, typer.Option(help="Sampling steps of each image.", min=1)] = 10,
    guidance_scale: Guidance = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    batch_size: BatchSize = 16,
    storage: Annotated[
        str | None,
        typer.Option(
            help="File (or URL of a database) to resume the search from and to share between processes; "
            "default: next to --out, ending in .search."
        ),
    ] = None,  # fmt: skip
    population: Annotated[int, typer.Option(help="Individuals per generation.")] = 50,
    top_k: Annotated[int, typer.Option(help="Number of best individuals used as parents.")] = 10,
    crossover: Annotated[int, typer.Option(help="Children of two parents per generation.")] = 25,
    mutation: Annotated[int, typer.Option(help="Mutated children per generation.")] = 25,
    mutation_probability: Annotated[float, typer.Option(help="Per layer of a mutated child.")] = 0.1,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a recipe field, e.g. balance.alpha=0.7.")
    ] = None,
    component: Annotated[
        str | None,
        typer.Option(help="Search transformer or transformer_2 only; default: all transformers of the pipeline."),
    ] = None,
    architecture: ArchitectureOption = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    variant: Variant = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Search a group size for every linear layer, within a budget of bit operations.

    Run it again to continue after an interruption, or in several processes at once to share the work. A pipeline with
    two transformers (Wan 2.2 A14B) gets a plan file for each: PLAN.json and PLAN.transformer_2.json.

    Example: ditq search bundled:emoji-class --recipe qdit-w4a4 --sizes 32,64,128,256 --out plan.json
    """
    from ditq import api
    from ditq.allocation import Evolution
    from ditq.errors import UsageError
    from ditq.files import check_file
    from ditq.sampling import size_arguments

    if out_file.is_dir():
        raise UsageError(f"--out must be a plan file, got the folder {out_file}.")
    try:
        chosen_sizes = [int(size) for size in sizes.split(",")] if sizes else None
    except ValueError:
        raise UsageError(f"--sizes must be comma-separated numbers, e.g. 32,64,128; got {sizes!r}.") from None
    evolution = Evolution(population, top_k, crossover, mutation, mutation_probability)
    check_file(out_file)  # before the slow part
    pipe = open_pipeline(pipeline, device, dtype, variant)
    arch = pick_architecture(pipe, architecture)
    calibration = pick_prompts(pipeline, pipe, arch, prompts, "calibration")
    size = size_arguments(pipe, frames=frames, height=height, width=width)
    chosen = _fitness(fitness, pipeline, real, network)
    with progress_bars(quiet or as_json) as progress:

        def on_trial(done: int, total: int, best: float) -> None:
            if progress:
                progress("search", done, total, f"best {best:.4g}")

        result = api.search(
            pipe, recipe, [calibration[i % len(calibration)] for i in range(pictures)], overrides=overrides or [],
            architecture=arch, component=component, seed=seed, steps=steps, guidance_scale=guidance_scale,
            batch_size=batch_size, arguments=size,
            strategy=evolution if strategy == "evolution" else strategy, trials=trials, sizes=chosen_sizes,
            budget=budget, fitness=chosen, moments=moments, rounding=rounding, calibration=calibration,
            storage=storage or out_file.with_suffix(".search"), progress=progress, on_trial=on_trial,
        )  # fmt: skip
    files = {result.component: out_file} | {x.component: plan_file(out_file, x.component) for x in result.others}
    for name, plan in result.plans.items():
        _write(plan, files[name])
    if as_json:
        more = {x.component: {"out": str(files[x.component]), **_json(x)} for x in result.others}
        print_json({"out": str(out_file), **_json(result), **more})
    elif not quiet:
        out.print(result.summary())
        for name in list(files)[1:]:
            text = f"the plan of {name} is in {files[name]}; ditq quantize reads it together with the first"
            out.print(text, soft_wrap=True)
        out.print(f"saved to {out_file}; next: ditq quantize {pipeline} --plan {out_file} --out DIR", soft_wrap=True)


def _json(result: SearchResult) -> dict[str, Any]:
    return {
        "hash": result.plan.hash(), "strategy": result.strategy,
        "fitness": {"name": result.fitness_name, "value": result.fitness},
        "bit_operations": result.bit_operations, "budget": result.budget,
        "scale_overhead_bits": result.scale_overhead_bits,
        "trials": len(result.scored), "evaluated": result.evaluated,
        "group_sizes": {layer.name: layer.weight.group_size for layer in result.plan.quantized if layer.weight},
    }  # fmt: skip


def _write(plan: Plan, path: Path) -> None:
    """Writes a plan file atomically: an earlier plan is replaced only by a complete one."""
    from ditq.errors import DitqError
    from ditq.files import write_text

    try:
        write_text(path, plan.to_json() + "\n")
    except OSError as error:
        raise DitqError(f"Cannot write {path}: {error.strerror or error}.") from error


def _fitness(name: str, pipeline: str, real: Path | None, network: str) -> Fitness:
    from ditq.allocation import LATENT, PREDICTION
    from ditq.comparison import BUNDLED_NETWORK, bundled_real
    from ditq.errors import UsageError, unknown
    from ditq.metrics.fitness import METRICS, distance_to_real
    from ditq.metrics.measure import feature_network

    errors = {"prediction": PREDICTION, "latent": LATENT}
    if name in errors:
        return errors[name]
    if name not in METRICS:
        raise unknown("fitness", name, [*errors, *METRICS])
    images: Real | Path | None = real
    if images is None and pipeline.startswith("bundled:"):
        network, images = BUNDLED_NETWORK, bundled_real()
    if images is None:
        raise UsageError(f"--fitness {name} needs real images; pass --real FOLDER.")
    return distance_to_real(name, images, feature_network(network)())


VERB = search
