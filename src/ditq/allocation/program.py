"""Allocations without a search: uniform ones, and an integer program on errors that add up.

Random search is :class:`ditq.allocation.Evolution` without crossover and mutation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from torch import nn

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
    """Every legal genome with a single choice.

    Raises:
        UsageError: no single choice is legal.
    """
    if not space.uniforms:
        raise UsageError(
            "No single group size divides every layer and meets the budget: choose other sizes or another budget."
            if isinstance(space.coarsest[0], int)
            else "No single choice for all layers meets the budget: add a cheaper one, or raise the budget."
        )
    return Fixed(tuple(space.uniforms))


Errors = Sequence[Mapping[int | str, float]]
"""The error of every gene at each of its choices. Errors add up over genes; smaller is better."""


@torch.no_grad()
def layer_errors(
    model: nn.Module,
    architecture: Architecture,
    space: Space,
    statistics: Statistics,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[int | str, float]]:
    """Relative output error ||Y - Q(X) Q(W)^T||^2 / ||Y||^2 of each gene at each of its choices, summed over layers.

    Measured on calibration inputs of the 16-bit model, one layer at a time (weights by min-max).

    Args:
        model: the transformer before anything is quantized.
        architecture: of the model.
        space: the genes and their choices.
        statistics: with samples of every layer's input.
        progress: called with (genes done, total genes).
    """
    groups = {linear.name: group for group in architecture.groups(model) for linear in group.linears}
    errors: list[dict[int | str, float]] = []
    for gene in space.genes:
        exact: dict[str, torch.Tensor] = {}
        totals: dict[int | str, float] = {}
        for choice, plans in gene.plans.items():
            totals[choice] = 0.0
            for plan in plans:
                if plan.weight is None and plan.activation is None:
                    continue
                group = groups[plan.name]
                inputs = statistics.groups[group.name]
                x = inputs.rows()
                x = x[:: max(1, len(x) // SEARCH_ROWS)].to(group.linears[0].module.weight.device)
                scale = None if plan.smooth is None else group_scale(plan.smooth, group, inputs, statistics.timesteps)
                totals[choice] += output_error(x, group, [plan], scale, plan.rotate, exact)
        errors.append(totals)
        if progress:
            progress(len(errors), len(space.genes))
    return errors


def integer_program(space: Space, errors: Errors) -> Genome:
    """The genome with the smallest sum of errors within all budgets (MixDQ's program).

    Minimise sum_g,c e_gc x_gc over binary x with sum_c x_gc = 1 for every gene g and, for every budget,
    sum_g,c cost_gc x_gc <= limit.

    Raises:
        UsageError: scipy is not installed.
        DitqError: the solver finds no solution.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import block_diag, csr_array
    except ImportError as error:
        raise UsageError("The integer program needs scipy: pip install 'ditq[search]'.") from error
    pairs = [(i, choice) for i, possible in enumerate(space.choices) for choice in possible]
    value = np.array([errors[i][choice] for i, choice in pairs])
    # The solver's tolerances are absolute: errors are divided by their largest, and costs, which reach 1e13, by their
    # limit.
    value = value / max(np.abs(value).max(), 1e-300)
    constraints = [LinearConstraint(block_diag([[[1.0] * len(possible)] for possible in space.choices]), 1, 1)]
    for name, limit in space.limits.items():
        free = limit - space.fixed.get(name, 0.0)
        cost = csr_array([[space.costs[i][choice][name] / free for i, choice in pairs]])
        constraints.append(LinearConstraint(cost, ub=1))
    solved = milp(
        value, integrality=[1] * len(pairs), bounds=Bounds(0, 1), constraints=constraints, options={"mip_rel_gap": 0}
    )
    if solved.x is None:
        raise DitqError(f"The integer program found no allocation: {solved.message}")
    chosen = {i: choice for (i, choice), x in zip(pairs, solved.x, strict=True) if x > 0.5}
    genome = tuple(chosen[i] for i in range(len(space.genes)))
    # The solver's tolerance may put the sum slightly above the budget.
    return genome if space.legal(genome) else space.repaired(genome, Random(0))
