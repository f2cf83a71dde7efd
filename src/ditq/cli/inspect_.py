"""``ditq inspect``: shows how each layer of a checkpoint is quantized."""

from __future__ import annotations

from typing import Annotated

import typer

from ditq.cli.common import AsJson, Pipeline, Variant, out, print_json


def inspect(
    pipeline: Pipeline,
    as_json: AsJson = False,
    layers: Annotated[bool, typer.Option("--layers", "--full", help="One row per layer.")] = False,
    roles: Annotated[bool, typer.Option("--roles", help="One row per role.")] = False,
    verify: Annotated[bool, typer.Option(help="Check every tensor against the plan and its checksum.")] = True,
    variant: Variant = None,
) -> None:
    """Show the plan of a quantized pipeline: formats, balance, bits, bytes. Equal blocks are shown once.

    Example: ditq inspect emoji-w4a8 --json
    """
    from ditq.checkpoint.folder import local, read_plans
    from ditq.checkpoint.variants import check_variant, weight_files
    from ditq.checkpoint.verify import verify as verify_files
    from ditq.errors import UsageError
    from ditq.report.grouping import By
    from ditq.report.tables import plan_json, plan_summary, plan_table

    folder = local(pipeline, "inspect")
    plans = read_plans(folder, variant)
    if not plans:
        raise UsageError(f"{pipeline} is not quantized by ditq; there is no plan to show.")
    sizes = {}
    for component, plan in plans.items():
        files = weight_files(folder / component, variant)
        check_variant(folder, {component: None}, variant)
        if verify:
            verify_files(files, plan)
        sizes[component] = sum(file.stat().st_size for file in files)
    if as_json:
        first, *others = plans
        data = {component: plan_json(plan, sizes[component]) for component, plan in plans.items()}
        print_json({**data[first], **{component: data[component] for component in others}})
        return
    by: By = "layers" if layers else "roles" if roles else "blocks"
    for component, plan in plans.items():
        if len(plans) > 1:
            out.print(f"{component}:")
        out.print(plan_table(plan, by=by, width=out.width))
        out.print(plan_summary(plan, sizes[component]))


VERB = inspect
