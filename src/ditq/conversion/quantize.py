"""Applies a recipe to a model: drafts the plan, chooses the balance of every input group, carries the plan out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from ditq.architectures import Architecture
from ditq.calibration import Statistics
from ditq.conversion.balance import choose_balance
from ditq.conversion.convert import convert
from ditq.conversion.draft import draft, estimate
from ditq.conversion.policy import with_policy
from ditq.errors import UsageError
from ditq.plan import LayerPlan, Plan
from ditq.recipe import Recipe

Progress = Callable[[str, int, int], None]


def plan_layers(
    model: nn.Module,
    architecture: Architecture,
    recipe: Recipe,
    statistics: Statistics | None,
    *,
    seed: int = 0,
    trajectory: Sequence[float] = (),
    progress: Progress | None = None,
) -> list[LayerPlan]:
    """The layer plans of a recipe, with the chosen balance; the model is not changed.

    Args:
        trajectory: timesteps of a sampling run, for a recipe with a step policy.

    Raises:
        UsageError: the recipe needs calibration and there are no statistics; see also
            :func:`ditq.conversion.policy.with_policy`.
    """
    if recipe.needs_calibration and statistics is None:
        raise UsageError(f"Recipe {recipe.name!r} needs calibration: pass prompts (or a calibration callable).")
    statistics = statistics.at(recipe.calibration.timesteps) if statistics else None
    plans = {layer.name: layer for layer in draft(model, architecture, recipe)}
    groups = architecture.groups(model)
    timesteps = statistics.timesteps if statistics else None
    for i, group in enumerate(groups):
        layers = [plans[x.name] for x in group.linears if plans[x.name].weight]
        if layers:
            inputs = statistics.groups[group.name] if statistics else None
            smooth, rotate = choose_balance(group, layers, recipe.balance, inputs, timesteps, seed)
            for layer in layers:
                plans[layer.name] = layer.model_copy(update={"smooth": smooth, "rotate": rotate})
        if progress:
            progress("balance", i + 1, len(groups))
    return with_policy(list(plans.values()), recipe, trajectory)


def quantize_model(
    model: nn.Module,
    architecture: Architecture,
    job: Recipe | Plan,
    statistics: Statistics | None,
    *,
    seed: int = 0,
    trajectory: Sequence[float] = (),
    progress: Progress | None = None,
) -> Plan:
    """Quantizes ``model`` in place by a recipe or a plan, and returns the completed plan.

    Args:
        seed: of a recipe's rotations; a plan has its own.
        trajectory: timesteps of a sampling run, for a recipe with a step policy.
    """
    plan = job
    if isinstance(plan, Recipe):
        layers = plan_layers(
            model, architecture, plan, statistics, seed=seed, trajectory=trajectory, progress=progress
        )
        update = {"layers": tuple(layers), "seed": seed, "trajectory": tuple(trajectory) or None}
        plan = estimate(model, architecture, plan).model_copy(update=update)
    on_layer = None if progress is None else lambda done, total: progress("quantize", done, total)
    return convert(model, architecture, plan, statistics, progress=on_layer)
