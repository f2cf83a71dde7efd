"""``ditq export``: exports a quantized pipeline to another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditq.cli.common import ArchitectureOption, PromptFile, Quiet, Variant, out, progress_bars, read_prompts


def export(
    pipeline: Annotated[str, typer.Argument(help="Folder of a pipeline quantized by ditq.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder to write; must not exist.")],
    engine: Annotated[str, typer.Option(help="openvino: integer kernels for CPUs.")] = "openvino",
    shapes: Annotated[
        str, typer.Option(help="dynamic: one graph for all sizes; static: compiled for each size, and faster.")
    ] = "dynamic",
    attention: Annotated[
        str,
        typer.Option(
            help="f32; bf16: for long sequences, with static shapes; auto: bf16 if the CPU supports it; "
            "int8: queries and keys in 8 bits (calibrated on --prompts)."
        ),
    ] = "auto",
    steps: Annotated[
        str,
        typer.Option(
            help="Of a plan whose activation bits change with the timestep: exact (refused), or finest (the most "
            "precise bits at all timesteps)."
        ),
    ] = "exact",
    prompts: PromptFile = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--option", help="NAME=VALUE option of the runtime, e.g. INFERENCE_NUM_THREADS=4."),
    ] = None,
    whole_pipeline: Annotated[
        bool, typer.Option("--whole-pipeline", help="Also export the VAE's decoder and T5 text encoders, in float.")
    ] = False,
    allow_float: Annotated[
        bool, typer.Option("--allow-float", help="Accept layers that the runtime executes in floating point.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the calibration noise, for --attention int8; default: 0.")
    ] = None,
    architecture: ArchitectureOption = None,
    variant: Variant = None,
    quiet: Quiet = False,
) -> None:
    """Compile the blocks of a quantized pipeline for a faster runtime; the result loads like any pipeline.

    Example: ditq export emoji-w8a8 --engine openvino --out emoji-w8a8-cpu
    """
    from ditq import api
    from ditq.errors import UsageError

    settings = {}
    for option in options or []:
        name, equals, value = option.partition("=")
        if not equals or not name:
            raise UsageError(f"--option must be NAME=VALUE, got {option!r}.")
        settings[name] = value
    with progress_bars(quiet) as progress:
        text = api.export(
            pipeline, out_dir, engine=engine, shapes=shapes, attention=attention, steps=steps,
            options=settings,
            prompts=None if prompts is None else read_prompts(prompts), seed=seed, progress=progress,
            architecture=architecture, allow_float=allow_float, whole_pipeline=whole_pipeline, variant=variant,
        )  # fmt: skip
    if not quiet:
        out.print(text)
        out.print(f"saved to {out_dir}", soft_wrap=True)


VERB = export
