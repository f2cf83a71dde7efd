"""``ditq export``: a quantized pipeline for another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditq.cli.common import ArchitectureOption, Quiet, out


def export(
    pipeline: Annotated[str, typer.Argument(help="A folder with a pipeline that ditq has quantized.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder to write; must not exist.")],
    engine: Annotated[str, typer.Option(help="openvino: integer kernels of the CPU.")] = "openvino",
    shapes: Annotated[
        str, typer.Option(help="dynamic: one graph for all sizes; static: compiled for each size, faster then.")
    ] = "dynamic",
    attention: Annotated[
        str, typer.Option(help="Long attention with static shapes: f32, bf16, or auto: bf16 where the CPU has it.")
    ] = "auto",
    options: Annotated[
        list[str] | None, typer.Option("--option", help="NAME=VALUE of the runtime, e.g. INFERENCE_NUM_THREADS=4.")
    ] = None,
    whole_pipeline: Annotated[
        bool, typer.Option("--whole-pipeline", help="The VAE's decoder and T5 text encoders too, in floats.")
    ] = False,
    allow_float: Annotated[
        bool, typer.Option("--allow-float", help="Take layers that the runtime cannot multiply in integers.")
    ] = False,
    architecture: ArchitectureOption = None,
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
            raise UsageError(f"--option takes NAME=VALUE, got {option!r}.")
        settings[name] = value
    text = api.export(
        pipeline, out_dir, engine=engine, shapes=shapes, attention=attention, options=settings,
        architecture=architecture, allow_float=allow_float, whole_pipeline=whole_pipeline,
    )  # fmt: skip
    if not quiet:
        out.print(text, markup=False)
        out.print(f"saved to {out_dir}", markup=False)


VERB = export
