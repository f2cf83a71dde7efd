"""``ditq sensitivity``: measures how much the model suffers if one layer, block or role alone is quantized."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    Steps,
    Variant,
    Width,
    numbers,
    open_pipeline,
    out,
    pick_architecture,
    pick_prompts,
    print_json,
    progress_bars,
)

if TYPE_CHECKING:
    from ditq.allocation import Scores
    from ditq.report.sensitivity import Decoupling, Matrix


def sensitivity(
    pipeline: Pipeline,
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the scores and the report; replaces those of an earlier run."),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="A recipe name (see ditq recipes) or a YAML file; the widths replace its bits.")
    ] = "rtn-w4a8",
    weights: Annotated[
        str, typer.Option(help="Bits of weights to measure, of 2 to 8; none: leave them out.")
    ] = "8,4,3",
    activations: Annotated[
        str, typer.Option(help="Bits of activations to measure, of 2 to 8; none: leave them out.")
    ] = "8,6,4",
    unit: Annotated[str, typer.Option(help="What is quantized alone: layer, block or role.")] = "block",
    error: Annotated[
        str,
        typer.Option(
            help="latent: the error of the final latents, in whole sampling runs, and of the transformer's output; "
            "prediction: the latter only, several times as fast."
        ),
    ] = "latent",
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            help="Metrics of generated images besides the prediction error, as in ditq compare; comma-separated or "
            "repeated. They take most of the time."
        ),
    ] = None,
    network: Annotated[str, typer.Option(help="Feature network, for metrics that need one.")] = "auto",
    prompts: PromptFile = None,
    pictures: Annotated[int, typer.Option(help="Number of prompts: the first N.", min=1)] = 32,
    moments: Annotated[
        int, typer.Option(help="Random timesteps of each prompt at which the prediction error is measured.", min=1)
    ] = 4,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    batch_size: BatchSize = 16,
    storage: Annotated[
        str | None,
        typer.Option(help="File (or URL of a database) of a single study; default: in ditq's cache."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a recipe field, e.g. balance.alpha=0.7.")
    ] = None,
    component: Annotated[
        str | None,
        typer.Option(help="Measure transformer or transformer_2 only; default: all transformers of the pipeline."),
    ] = None,
    architecture: ArchitectureOption = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    variant: Variant = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure how much the model suffers if one layer, block or role alone is quantized, on paired seeds.

    Weights and activations are measured apart, at every width. Run it again to continue after an interruption, or in
    several processes at once to share the work; a finished measurement is read from ditq's cache.

    Example: ditq sensitivity bundled:emoji-class --unit block --weights 8,4,3 --activations none --out sensitivity
    """
    from ditq import api, requests
    from ditq.errors import UsageError
    from ditq.files import check_file, check_output
    from ditq.report import html
    from ditq.report import sensitivity as report
    from ditq.sampling import size_arguments

    bits = {name: _bits(name, text) for name, text in (("weights", weights), ("activations", activations))}
    requests.sensitivity_parts(bits["weights"], bits["activations"], unit)  # before the pipeline is loaded
    if out_dir is not None:
        if out_dir.exists() and not out_dir.is_dir():
            raise UsageError(f"--out must be a folder, got the file {out_dir}.")
        html.check_installed()  # and the folder, before the slow part
        check_file(out_dir / "report.html") if out_dir.exists() else check_output(out_dir)
    pipe = open_pipeline(pipeline, device, dtype, variant)
    arch = pick_architecture(pipe, architecture)
    calibration = pick_prompts(pipeline, pipe, arch, prompts, "calibration")
    size = size_arguments(pipe, frames=frames, height=height, width=width)
    names = [name for text in metrics or [] for name in text.replace(" ", "").split(",") if name]
    with progress_bars(quiet or as_json) as progress:
        scores = api.sensitivity(
            pipe, recipe, calibration[:pictures], **bits, unit=unit, error=error, metrics=names, network=network,
            moments=moments,
            overrides=overrides or [], architecture=arch if architecture else None, component=component, seed=seed,
            steps=steps, guidance_scale=guidance_scale, batch_size=batch_size, arguments=size,
            calibration=calibration, storage=storage, progress=progress,
        )  # fmt: skip
    several = report.has_several(scores)
    agreements = [_agreement(one) for one in scores]
    lines = [
        f"{report.label(one, several)}, {one.metrics[metric].title}: {entry}"
        for one, by_metric in zip(scores, agreements, strict=True)
        for metric, entries in by_metric.items()
        for entry in entries
    ]
    decoupled = [report.decoupling_of(one, report.label(one, several)) for one in scores]
    decouplings = [groups for groups in decoupled if groups]
    files: dict[str, str] = {}
    if out_dir is not None:
        out_dir.mkdir(parents=True, exist_ok=True)
        for one in scores:
            name = f"{one.info['component']}-{one.part}" if several else one.part
            files[report.label(one, several)] = str(one.save(out_dir / f"sensitivity-{name}.json"))
        title = f"Sensitivity of {pipeline} to quantization"
        files["report"] = str(report.write_report(out_dir / "report.html", scores, lines, decouplings, title=title))
    if as_json:
        components: dict[str, dict[str, Any]] = {}
        for one, by_metric, groups in zip(scores, agreements, decoupled, strict=True):
            components.setdefault(one.info["component"], {})[one.part] = _json(one, by_metric, groups)
        print_json({"pipeline": pipeline, "recipe": recipe, "unit": unit, "files": files, "components": components})
    elif not quiet:
        for one in scores:
            for metric in one.metrics:
                for table in report.tables(one, metric, name=report.label(one, several), width=out.width):
                    out.print(table)
                    out.print()
        for groups in decouplings:
            out.print(report.decoupling_table(**groups))
            out.print()
        for line in (*lines, *(f"{name}: {file}" for name, file in files.items())):
            out.print(line, soft_wrap=True)


def _bits(name: str, text: str) -> list[int]:
    """The widths of ``--weights`` or ``--activations``; empty for ``none`` and an empty text."""
    if text.strip().lower() in ("", "none"):
        return []
    return numbers(name, text, "bits of 2 to 8, e.g. 8,4,3, or none")


def _agreement(scores: Scores) -> dict[str, Sequence[Any]]:
    """Rank agreement between disjoint sets of prompts, by metric, one entry for each choice."""
    from ditq.allocation.uncertainty import agreement

    return {metric: agreement(scores, metric) for metric in scores.metrics}


def _json(scores: Scores, agreements: dict[str, Sequence[Any]], groups: Decoupling | None) -> dict[str, Any]:
    from ditq.allocation.scores import mean_and_error

    metrics = {}
    for metric, kind in scores.metrics.items():
        mean, error = mean_and_error(scores.harms(metric))
        metrics[metric] = {"kind": kind.kind, "harm": _numbers(mean), "standard_error": _numbers(error)}
    return {
        "genes": scores.genes, "choices": scores.choices, "prompts": len(set(scores.prompts)), "metrics": metrics,
        "agreement": {
            metric: [{"text": str(entry), "is_noise": bool(entry.is_noise)} for entry in entries]
            for metric, entries in agreements.items()
        },
        **({"decoupling": _groups_json(groups)} if groups else {}),
    }  # fmt: skip


def _groups_json(groups: Decoupling) -> dict[str, Any]:
    return {
        **groups, "drops": _numbers(groups["drops"]), "errors": _numbers(groups["errors"]),
        "loads": _numbers(groups["loads"]),
    }  # fmt: skip


def _numbers(values: Matrix) -> list[list[float | None]]:
    """[rows][columns]; None for NaN, which JSON lacks."""
    return [[float(x) if math.isfinite(x) else None for x in row] for row in values]


VERB = sensitivity
