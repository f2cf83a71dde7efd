"""Step policies: the first and the last steps of a sampling run get more bits (``diffusion_step_policy``)."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from ditq.errors import UsageError
from ditq.plan import ALWAYS, LayerPlan, StepFormat, first_error
from ditq.recipe import Recipe, StepPolicy


def with_policy(layers: Sequence[LayerPlan], recipe: Recipe, trajectory: Sequence[float]) -> list[LayerPlan]:
    """The plans with the recipe's step policy; without one, as they are.

    Args:
        trajectory: timesteps of the sampling run whose first and last steps are meant, in its order.

    Raises:
        UsageError: the run has not more steps than the policy names, no layer would change, or a layer cannot.
    """
    policy = recipe.diffusion_step_policy
    if policy is None:
        return list(layers)
    if not trajectory:
        raise UsageError(
            f"Recipe {recipe.name!r} has a diffusion_step_policy, which counts the steps of a sampling run: pass a "
            "pipeline (a transformer alone has none), or a Plan."
        )
    ranges = _ranges(policy, trajectory)
    weights, activations = recipe.at_steps
    try:
        changed = [_changed(layer, ranges, weights, activations) for layer in layers]
    except ValidationError as error:
        raise UsageError(f"The diffusion_step_policy cannot be carried out: {first_error(error)}.") from error
    if changed == list(layers):
        have = f"W{recipe.weights.bits}A{recipe.activations.bits if recipe.activations else 16}"
        raise UsageError(
            f"diffusion_step_policy has no effect in recipe {recipe.name!r}: no layer of {have} gets more bits by "
            f"{f'step_weights={weights}' if weights else f'step_activations={activations}'}. Set a larger number, or "
            "leave the policy out."
        )
    return changed


def _ranges(policy: StepPolicy, trajectory: Sequence[float]) -> list[tuple[float, float, bool]]:
    """Ranges of timesteps in ascending order: begin, end, and whether they get more bits.

    A border is half-way between two steps, so that other numbers of steps fall into the same parts.
    """
    total, first, last = len(trajectory), policy.first_steps, policy.last_steps
    if first + last >= total:
        raise UsageError(
            f"diffusion_step_policy names {first} first and {last} last steps, and the run has {total}. Name fewer "
            "than all, or raise the bits of the recipe."
        )
    borders = [(trajectory[cut - 1] + trajectory[cut]) / 2 for cut in (first, total - last) if 0 < cut < total]
    marks = [True] * bool(first) + [False] + [True] * bool(last)
    if trajectory[0] > trajectory[-1]:
        borders, marks = borders[::-1], marks[::-1]
    ends = [-ALWAYS, *borders, ALWAYS]
    return [(begin, end, more) for begin, end, more in zip(ends, ends[1:], marks, strict=False)]


def _changed(
    layer: LayerPlan, ranges: Sequence[tuple[float, float, bool]], weights: int | None, activations: int | None
) -> LayerPlan:
    """One plan with more bits in the marked ranges, where it has fewer."""
    if layer.weight is None:
        return layer
    if weights is not None and weights > layer.weight.bits:
        finer = layer.weight.with_bits(weights)
        fields = {
            "weight": finer,
            "timesteps": tuple((begin, end) for begin, end, _ in ranges),
            "range_weights": tuple(finer if more else layer.weight for _, _, more in ranges),
        }
        return LayerPlan(**{**dict(layer), **fields})
    if activations is not None and activations > layer.activation_bits and layer.activation is not None:
        finer_input = None if activations == 16 else layer.activation.with_bits(activations)
        steps = tuple(
            StepFormat(begin=begin, end=end, activation=layer.activation) for begin, end, more in ranges if not more
        )
        return LayerPlan(**{**dict(layer), "activation": finer_input, "steps": steps})
    return layer
