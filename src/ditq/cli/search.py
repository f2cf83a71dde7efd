"""``ditq search``: searches bits or a group size for every layer of a pipeline and writes a plan."""

from __future__ import annotations

import inspect
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
    numbers,
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
    weight_bits: Annotated[
        str | None,
        typer.Option(help="Bits of weights to choose from: 2 to 8, and 16 to keep a layer. E.g. 8,4,3."),
    ] = None,
    activation_bits: Annotated[
        str | None, typer.Option(help="Bits of activations to choose from: 2 to 8, and 16. E.g. 8,6,4.")
    ] = None,
    unit: Annotated[str, typer.Option(help="What shares its bits: layer, block or role.")] = "layer",
    segments: Annotated[
        int, typer.Option(help="Parts of the sampling run with activation bits of their own.", min=1)
    ] = 1,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="May be repeated. 5GB: of all transformers as stored; weights:4, activations:6: average bits; a "
            "number: BitOps per image; uniform:G: the BitOps of group size G everywhere. The first three choose bits, "
            "also without --weight-bits. Default for group sizes: uniform:128."
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="For bits, by measured sensitivity: error (integer program, the default), greedy, or decoupled "
            "(ViDiT-Q: a metric for each group of roles). By evaluating candidates, for group sizes or one kind of "
            "bits: evolution (Q-DiT, the default for group sizes), random, program (integer program), uniform."
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="Of --strategy decoupled, may be repeated: GROUP=NAME with a metric of ditq compare for the group "
            "content, quality or temporal, e.g. content=clip_score. Groups without one use the prediction error."
        ),
    ] = None,
    trials: Annotated[int, typer.Option(help="Allocations to evaluate, over all processes.", min=1)] = 500,
    sizes: Annotated[
        str | None,
        typer.Option(help="Group sizes; each layer uses those that divide it. Default: of 32,64,128,192,288."),
    ] = None,
    fitness: Annotated[
        str,
        typer.Option(
            help="Error against 16 bit: prediction (of the transformer along the 16-bit trajectory) or latent (at the "
            "end of the trajectory). Distance to real images: fid, kid, sfid."
        ),
    ] = "prediction",
    real: Annotated[Path | None, typer.Option(help="Folder of real images, for fid, kid and sfid.")] = None,
    error: Annotated[
        str | None,
        typer.Option(
            help="Of the sensitivity: latent (of the final latents, in whole sampling runs; default), or prediction "
            "(of the transformer at a few steps, several times as fast)."
        ),
    ] = None,
    network: Annotated[str, typer.Option(help="Feature network, for metrics that need one.")] = "auto",
    prompts: PromptFile = None,
    pictures: Annotated[
        int | None,
        typer.Option(
            help="Number of images to evaluate each allocation on (default: 128), or of prompts to measure the "
            "sensitivity on (default: 32).",
            min=1,
        ),
    ] = None,
    moments: Annotated[
        int | None,
        typer.Option(
            help="Random timesteps of each image that the prediction error uses; default: 1, for sensitivity 4.",
            min=1,
        ),
    ] = None,
    rounding: Annotated[
        str, typer.Option(help="Of the candidates: recipe (GPTQ once per layer and size), or nearest (as in Q-DiT).")
    ] = "recipe",
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps of each image; default: 10 for group sizes, 20 for bits.", min=1)
    ] = None,
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
    """Search bits or a group size for every linear layer, within budgets.

    Bits: the sensitivity of every layer is measured (see ditq sensitivity), and the layers that suffer most get most
    bits. Group sizes: candidates are evaluated within a budget of bit operations. Run it again to continue after an
    interruption, or in several processes at once to share the work. A pipeline with two transformers (Wan 2.2 A14B)
    gets a plan file for each: PLAN.json and PLAN.transformer_2.json.

    Example: ditq search bundled:emoji-class --recipe rtn-w4a8 --weight-bits 8,4,3 --budget weights:4 --out plan.json

    Example: ditq search bundled:emoji-class --recipe qdit-w4a4 --sizes 32,64,128,256 --out plan.json
    """
    from ditq import api, requests
    from ditq.allocation import Bits, Evolution
    from ditq.errors import UsageError
    from ditq.files import check_file
    from ditq.sampling import size_arguments

    if out_file.is_dir():
        raise UsageError(f"--out must be a plan file, got the folder {out_file}.")
    chosen_sizes = numbers("sizes", sizes, "numbers, e.g. 32,64,128") if sizes else None
    what: dict[str, Any] = {
        "weights": numbers("weight-bits", weight_bits, "bits, e.g. 8,4,3") if weight_bits else (),
        "activations": numbers("activation-bits", activation_bits, "bits, e.g. 8,6,4") if activation_bits else (),
        "unit": unit, "segments": segments, "budget": budget or None, "strategy": strategy,
        "metrics": _metrics(metric or []), "error": error,
    }  # fmt: skip
    evolution = Evolution(population, top_k, crossover, mutation, mutation_probability)
    options: dict[str, Any] = {"sizes": chosen_sizes} if chosen_sizes else {}
    job = requests.search_job(**what, options=options)  # before the pipeline is loaded
    by_scores = isinstance(job, Bits)
    of_bits = isinstance(job, Bits) or "choices" in job
    if by_scores:
        _check_defaults(
            strategy or "error", trials=trials, storage=storage, population=population, top_k=top_k,
            crossover=crossover, mutation=mutation, mutation_probability=mutation_probability,
        )  # fmt: skip
    else:
        what["strategy"] = evolution if strategy in (None, "evolution") else strategy
        options |= {"trials": trials, "storage": storage or out_file.with_suffix(".search")}
    check_file(out_file)  # before the slow part
    pipe = open_pipeline(pipeline, device, dtype, variant)
    arch = pick_architecture(pipe, architecture)
    calibration = pick_prompts(pipeline, pipe, arch, prompts, "calibration")
    size = size_arguments(pipe, frames=frames, height=height, width=width)
    if by_scores:  # a prompt that comes twice would agree with itself
        conditions = calibration[: pictures or 32]
    else:
        conditions = [calibration[i % len(calibration)] for i in range(pictures or 128)]
    with progress_bars(quiet or as_json) as progress:

        def on_trial(done: int, total: int, best: float) -> None:
            if progress:
                progress("search", done, total, f"best {best:.4g}")

        if not by_scores:
            options["on_trial"] = on_trial
        result = api.search(
            pipe, recipe, conditions, overrides=overrides or [], architecture=arch, component=component, seed=seed,
            steps=steps or (20 if of_bits else 10), guidance_scale=guidance_scale, batch_size=batch_size,
            arguments=size, network=network, fitness=_fitness(fitness, pipeline, real, network),
            moments=moments or (4 if by_scores else 1), rounding=rounding, calibration=calibration,
            progress=progress, **what, **options,
        )  # fmt: skip
    files = {result.component: out_file} | {x.component: plan_file(out_file, x.component) for x in result.others}
    for name, plan in result.plans.items():
        _write(plan, files[name])
    if as_json:
        more = {x.component: {"out": str(files[x.component]), **_json(x, budget)} for x in result.others}
        print_json({"out": str(out_file), **_json(result, budget), **more})
    elif not quiet:
        _show(result)
        for name in list(files)[1:]:
            text = f"the plan of {name} is in {files[name]}; ditq quantize reads it together with the first"
            out.print(text, soft_wrap=True)
        out.print(f"saved to {out_file}; next: ditq quantize {pipeline} --plan {out_file} --out DIR", soft_wrap=True)


def _metrics(texts: list[str]) -> dict[str, str]:
    """The metrics of ``--metric GROUP=NAME`` by group."""
    from ditq.errors import UsageError

    found: dict[str, str] = {}
    for text in texts:
        group, equals, name = text.partition("=")
        if not (group and equals and name):
            raise UsageError(f"--metric must be GROUP=NAME, e.g. content=clip_score; got {text!r}.")
        if group in found:
            raise UsageError(f"--metric has two metrics for the group {group!r}: {found[group]} and {name}. Pass one.")
        found[group] = name
    return found


def _check_defaults(strategy: str, **values: Any) -> None:
    """Refuses options of candidates that were changed, in a search that has no candidates."""
    from ditq.errors import UsageError

    for name, value in values.items():
        if value != inspect.signature(search).parameters[name].default:
            raise UsageError(
                f"--{name.replace('_', '-')} has no effect with --strategy {strategy}, which does not evaluate "
                "candidates: leave it out, or search with --strategy evolution."
            )


def _show(result: SearchResult) -> None:
    """The result for the terminal."""
    from ditq.report import allocation as report

    if not result.chosen:
        out.print(result.summary())
        return
    for table in report.tables(result, width=out.width):
        out.print(table)
        out.print()
    for line in report.lines(result):
        out.print(line, soft_wrap=True)


def _json(result: SearchResult, budgets: list[str] | None) -> dict[str, Any]:
    from ditq.report import allocation as report
    from ditq.report.tables import layer_json

    data = {
        "hash": result.plan.hash(), "strategy": result.strategy,
        "fitness": {"name": result.fitness_name, "value": result.fitness},
        "bit_operations": result.bit_operations,
    }  # fmt: skip
    if result.chosen:
        data |= {"budget": budgets, "scale_overhead_bits": result.scale_overhead_bits}
        data |= report.allocation_json(result)
    else:
        data |= {
            "budget": result.budget, "scale_overhead_bits": result.scale_overhead_bits,
            "trials": len(result.scored), "evaluated": result.evaluated,
        }  # fmt: skip
    if isinstance(result.genome[0], int):
        sizes = {layer.name: layer.weight.group_size for layer in result.plan.quantized if layer.weight}
        return {**data, "group_sizes": sizes}
    bits = ("weight_bits", "activation_bits", "steps")
    layers = {layer.name: {k: v for k, v in layer_json(layer).items() if k in bits} for layer in result.plan}
    return {**data, "bits": layers}


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
