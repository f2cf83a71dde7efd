"""Baselines of the evolutionary search: uniform group sizes, and an integer program on layer errors.

Random search is :class:`ditq.allocation.Evolution` without crossover and mutation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import nn

from ditq.allocation.budget import grouped
from ditq.allocation.space import Genome, Space
from ditq.architectures import Architecture
from ditq.calibration import Statistics
from ditq.conversion.error import SEARCH_ROWS, output_error
from ditq.conversion.scales import group_scale
from ditq.errors import DitqError, UsageError


@dataclass(frozen=True)
class Fixed:
    """A strategy with a fixed list of individuals."""

    genomes: tuple[Genome, ...]

    def generation(self, number: int, space: Space, scored: Any, earlier: Any, random: Random) -> list[Genome]:
        """All individuals in the first generation; the later ones are empty."""
        return list(self.genomes) if number == 0 else []


def uniform_genomes(space: Space) -> Fixed:
    """Every legal genome with a single group size.

    Raises:
        UsageError: no single group size is legal.
    """
    if not space.uniforms:
        raise UsageError(
            "No single group size divides every layer and meets the budget: choose other sizes or another budget."
        )
    return Fixed(tuple(space.uniforms))


@torch.no_grad()
def layer_errors(
    model: nn.Module,
    architecture: Architecture,
    space: Space,
    statistics: Statistics,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[int, float]]:
    """Relative output error ||Y - Q(X) Q(W)^T||^2 / ||Y||^2 of each layer at each of its group sizes.

    Measured on calibration inputs of the 16-bit model, one layer at a time (weights by min-max).

    Args:
        model: the transformer before anything is quantized.
        architecture: of the model.
        space: the layers and their group sizes.
        statistics: with samples of every layer's input.
        progress: called with (layers done, total layers).
    """
    groups = {linear.name: group for group in architecture.groups(model) for linear in group.linears}
    exact: dict[str, torch.Tensor] = {}
    errors: list[dict[int, float]] = []
    for layer, possible in zip(space.layers, space.choices, strict=True):
        group = groups[layer.name]
        inputs = statistics.groups[group.name]
        x = inputs.rows()
        x = x[:: max(1, len(x) // SEARCH_ROWS)].to(group.linears[0].module.weight.device)
        scale = None if layer.smooth is None else group_scale(layer.smooth, group, inputs, statistics.timesteps)
        errors.append(
            {g: output_error(x, group, [grouped(layer, g)], scale, layer.rotate, exact) for g in possible}
        )  # fmt: skip
        exact.clear()
        if progress:
            progress(len(errors), len(space.layers))
    return errors


def integer_program(space: Space, errors: Sequence[Mapping[int, float]]) -> Genome:
    """The genome with the smallest sum of layer errors within the budget (MixDQ's program, on group sizes).

    Minimise sum_l,g e_lg x_lg over binary x with sum_g x_lg = 1 for every layer and sum_l,g c_lg x_lg <= budget.

    Raises:
        UsageError: scipy is not installed.
        DitqError: the solver finds no solution.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import block_diag, csr_array
    except ImportError as error:
        raise UsageError("The integer program needs scipy: pip install 'ditq[search]'.") from error
    pairs = [(i, size) for i, possible in enumerate(space.choices) for size in possible]
    value = [errors[i][size] for i, size in pairs]
    # Costs are divided by the budget, since the solver's tolerances are absolute and costs reach 1e13.
    cost = csr_array([[space.costs[i][size] / space.budget for i, size in pairs]])
    one_each = block_diag([[[1.0] * len(possible)] for possible in space.choices])
    solved = milp(
        value,
        integrality=[1] * len(pairs),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(cost, ub=1)],
    )
    if solved.x is None:
        raise DitqError(f"The integer program found no allocation: {solved.message}")
    chosen = {i: size for (i, size), x in zip(pairs, solved.x, strict=True) if x > 0.5}
    genome = tuple(chosen[i] for i in range(len(space.layers)))
    # The solver's tolerance may put the sum slightly above the budget.
    return genome if space.legal(genome) else space.repaired(genome, Random(0))
