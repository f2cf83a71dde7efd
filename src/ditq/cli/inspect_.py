"""``ditq inspect``: shows how each layer of a checkpoint is quantized."""

from __future__ import annotations

from typing import Annotated

import typer

from ditq.cli.common import AsJson, Pipeline, out, print_json


def inspect(
    pipeline: Pipeline,
    as_json: AsJson = False,
    layers: Annotated[bool, typer.Option("--layers", "--full", help="One row per layer.")] = False,
    roles: Annotated[bool, typer.Option("--roles", help="One row per role.")] = False,
    verify: Annotated[bool, typer.Option(help="Check every tensor against the plan and its checksum.")] = True,
) -> None:
    """Show the plan of a quantized pipeline: formats, balance, bits, bytes. Equal blocks are shown once.

    Example: ditq inspect emoji-w4a8 --json
    """
    from pathlib import Path

    from ditq.checkpoint.folder import read_plan, resolve
    from ditq.checkpoint.verify import verify as verify_files
    from ditq.errors import UsageError
    from ditq.report.grouping import By
    from ditq.report.tables import plan_json, plan_summary, plan_table

    folder = resolve(pipeline)
    if not isinstance(folder, Path):
        raise UsageError(f"inspect reads folders only; download {pipeline!r} first.")
    plan = read_plan(folder)
    if plan is None:
        raise UsageError(f"{pipeline} is not quantized by ditq; there is no plan to show.")
    files = sorted((folder / "transformer").glob("*.safetensors"))
    if verify:
        verify_files(files, plan)
    size = sum(file.stat().st_size for file in files)
    if as_json:
        print_json(plan_json(plan, size))
        return
    by: By = "layers" if layers else "roles" if roles else "blocks"
    out.print(plan_table(plan, by=by, width=out.width))
    out.print(plan_summary(plan, size))


VERB = inspect
