"""Metric-decoupled mixed precision (ViDiT-Q-MP): role groups with a budget each, allocated by their own metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ditq.allocation.costs import Cost
from ditq.allocation.program import Errors, integer_program
from ditq.allocation.scores import ERRORS, Array, Scores, listed
from ditq.allocation.space import Genome, Space
from ditq.allocation.uncertainty import agreement, errors_of, losses
from ditq.errors import UsageError, unknown

Group = Literal["content", "quality", "temporal"]
GROUPS: tuple[Group, ...] = ("content", "quality", "temporal")

Within = Literal["greedy", "program"]
WITHIN = ("greedy", "program")

RESAMPLES = 500  # of the prompts, for standard errors


def group_of(role: str) -> Group:
    """The group of a role, by the aspect of an image or video that it mostly changes (ViDiT-Q, section 3.4).

    ``content``: cross-attention, where the image reads the prompt, and the paths of text tokens: the text stream of
    an MM-DiT (``joint_attn.txt``, ``ffn.txt``) and the text refiner. The paper has no MM-DiT: there a text stream and
    its joint attention do what cross-attention does in the others. ``temporal``: temporal attention. ``quality``:
    all others: self- and spatial attention, FFNs, the image stream of an MM-DiT, and streams of both (``single``).

    Example:
        >>> group_of("cross_attn.kv"), group_of("joint_attn.txt.q"), group_of("ffn.up")
        ('content', 'content', 'quality')
    """
    first, *others = role.split(".")
    if first in ("cross_attn", "refiner") or "txt" in others:
        return "content"
    return "temporal" if first == "temporal_attn" else "quality"


@dataclass(frozen=True)
class Allocation:
    """The result of :func:`allocate_decoupled`.

    Attributes:
        genome: within all budgets of the space.
        budgets: by group: the average bits of its weights (or activations) that it may use.
        notes: what was not done as asked, for the user.
    """

    genome: Genome
    budgets: dict[str, float]
    notes: tuple[str, ...]


def allocate_decoupled(
    space: Space, scores: Scores, *, metrics: Mapping[str, str], within: Within = "program"
) -> Allocation:
    """ViDiT-Q-MP: budgets of groups by the error of the output, choices within a group by the group's metric.

    1. The integer program on shrunk errors (:attr:`Scores.error`) splits every budget between the groups
       (:func:`group_of`).
    2. Within a group: ``greedy``, as in the paper, or the ``program``, by the shrunk harm of the group's metric.

    A metric that does not rank the group's genes alike in both halves of the prompts is noise
    (:func:`ditq.allocation.uncertainty.agreement`): the group then uses the error, and a note says so.

    Args:
        space: bits of weights or of activations, by layer or role.
        scores: of the same part and unit.
        metrics: by group; a group without one uses the error. Groups that the model does not have are ignored.
        within: how a group's budget is spent.

    Raises:
        UsageError: an unknown group or metric; a gene with layers of several groups; segments with a metric other than
            ``prediction``; scores that do not fit the space (see :func:`ditq.allocation.uncertainty.errors_of`).
        DitqError: the integer program has no solution.
    """
    for group, metric in metrics.items():
        if group not in GROUPS:
            raise unknown("group of roles", group, GROUPS)
        if metric not in scores.metrics:
            raise unknown("metric of these scores", metric, scores.metrics)
    if within not in WITHIN:
        raise unknown("allocation within a group", within, WITHIN)
    if any(gene.segment for gene in space.genes) and set(metrics.values()) - set(ERRORS):
        raise UsageError(
            f"Only errors are known by timestep. Allocate timestep segments by {scores.error!r} in all groups, or "
            "pass no segments."
        )
    members = members_of([(gene.name, [plan.role for plan in gene.layers]) for gene in space.genes])
    base = integer_program(space, errors_of(space, scores))
    genome = list(base)
    budgets: dict[str, float] = {}
    notes: list[str] = []
    for group, numbers in members.items():
        used = {name: sum(space.costs[i][base[i]][name] for i in numbers) for name in space.limits}
        part = part_of(space, numbers, used)
        budgets[group] = average_bits(space, base, numbers)
        metric, note = _usable(scores, part, group, metrics.get(group, scores.error))
        notes += note
        errors = errors_of(part, scores, metric)
        chosen = integer_program(part, errors) if within == "program" else greedy(part, errors)
        for i, choice in zip(numbers, chosen, strict=True):
            genome[i] = choice
    return Allocation(tuple(genome), budgets, tuple(notes))


def greedy(space: Space, errors: Errors, *, per_cost: bool = False) -> Genome:
    """Promotes the most sensitive gene, one choice at a time, from the cheapest everywhere until the budget is used.

    Args:
        space: with the budgets.
        errors: of every gene at each of its choices.
        per_cost: promote by the fall of the error per cost (of the first budget), not by the fall alone as the paper
            does, which prefers large genes.

    Returns:
        A genome in which no single promotion fits any more. Of equal promotions, the cheaper one comes first.
    """
    position = [len(possible) - 1 for possible in space.choices]
    total = {name: space.cost(space.coarsest, name) for name in space.limits}
    while True:
        best: tuple[float, float, int] | None = None
        for i, at in enumerate(position):
            if at == 0:
                continue
            here, up = space.choices[i][at], space.choices[i][at - 1]
            rise = {name: space.costs[i][up][name] - space.costs[i][here][name] for name in space.limits}
            if any(total[name] + rise[name] > limit * (1 + 1e-9) for name, limit in space.limits.items()):
                continue
            fall, cost = errors[i][here] - errors[i][up], rise[space.primary]
            rank = (fall / max(cost, 1e-300) if per_cost else fall, -cost, -i)
            best = rank if best is None else max(best, rank)
        if best is None:
            return tuple(possible[at] for possible, at in zip(space.choices, position, strict=True))
        i = -best[2]
        here, up = space.choices[i][position[i]], space.choices[i][position[i] - 1]
        for name in total:
            total[name] += space.costs[i][up][name] - space.costs[i][here][name]
        position[i] -= 1


def members_of(
    genes: Sequence[tuple[str, Sequence[str]]], rule: Callable[[str], str] = group_of
) -> dict[str, list[int]]:
    """The numbers of the genes of each group, in the order of :data:`GROUPS`; groups without genes are left out.

    Args:
        genes: the name and the roles of each gene.
        rule: the group of a role.

    Raises:
        UsageError: a gene has layers of several groups.
    """
    members: dict[str, list[int]] = {group: [] for group in GROUPS}
    for i, (name, roles) in enumerate(genes):
        groups = sorted({rule(role) for role in roles})
        if len(groups) > 1:
            raise UsageError(
                f"{name!r} has layers of the groups {listed(groups)}, which are allocated by metrics of their own. "
                "Use unit layer or role: a choice must belong to one group."
            )
        members[groups[0]].append(i)
    return {group: numbers for group, numbers in members.items() if numbers}


def part_of(space: Space, numbers: Sequence[int], limits: Mapping[Cost, float]) -> Space:
    """The space of some genes, with limits of their own. Costs that these genes do not have are not limited."""
    costs = tuple(space.costs[i] for i in numbers)
    needed = {name for of_gene in costs for choice in of_gene.values() for name, cost in choice.items() if cost > 0}
    kept = {name: limit for name, limit in limits.items() if name in needed}
    return replace(space, genes=tuple(space.genes[i] for i in numbers), costs=costs, limits=kept, fixed={})


def average_bits(space: Space, genome: Genome, numbers: Sequence[int]) -> float:
    """The average bits of some genes: of weights, or of activations over products and time, whichever is chosen."""
    kind: Cost = "weights" if str(space.coarsest[0]).startswith("w") else "activations"
    cost = bits = 0.0
    for i in numbers:
        cost += space.costs[i][genome[i]][kind]
        bits += space.costs[i][genome[i]][kind] / int(str(genome[i])[1:])
    return cost / bits


def _usable(scores: Scores, part: Space, group: str, metric: str) -> tuple[str, list[str]]:
    """The metric to rank a group by, and notes."""
    if len(part.genes) == 1 or metric in ERRORS:
        return metric, []
    found = agreement(scores, metric, genes=[gene.name for gene in part.genes])[-1]
    if not found.is_noise:
        return metric, []
    title, error = scores.metrics[metric].title, scores.metrics[scores.error].title
    return scores.error, [f"{group}: {error} instead of {title}, which does not rank its genes ({found})"]


# ------------------------------------------------------------------------------------- the table of groups


@dataclass(frozen=True)
class Decoupling:
    """Which metric each group of roles changes most (ViDiT-Q, Fig. 20).

    Attributes:
        choice: the width of the quantized group.
        groups: with at least one gene.
        metrics: by name.
        drops: [groups, metrics], the relative drop of each metric.
        errors: [groups, metrics], the standard errors of the drops over prompts.
        loads: [groups, metrics]: drops as z-scores over groups, then a softmax over metrics: 1 for a group is shared
            between the metrics that it changes more than the other groups do.
        load_errors: [groups, metrics], the standard errors of the loads.
    """

    choice: str
    groups: tuple[str, ...]
    metrics: tuple[str, ...]
    drops: Array
    errors: Array
    loads: Array
    load_errors: Array


def decoupling(scores: Scores, choice: str, metrics: Sequence[str] | None = None, seed: int = 0) -> Decoupling:
    """The drop of every metric if one group of roles is quantized, and the loads of the groups on the metrics.

    The drop of a group is the sum over its genes, each of which was quantized alone: to first order that of the whole
    group. Standard errors are from a bootstrap over prompts, with the same prompts for all groups and metrics.

    Args:
        scores: by layer or role.
        choice: a width of the scores.
        metrics: by name; by default all but errors, or the error if there is no other.
        seed: of the bootstrap.

    Raises:
        UsageError: an unknown width or metric, or a gene with layers of several groups.
    """
    if choice not in scores.choices:
        raise unknown("width of these scores", choice, scores.choices)
    names = tuple(metrics or [name for name in scores.values if name not in ERRORS] or [scores.error])
    members = members_of(list(zip(scores.genes, scores.roles, strict=True)))
    column = scores.choices.index(choice)
    harms = [losses(scores, name)[:, column] for name in names]  # [genes, prompts] each
    table = np.stack([[harm[numbers].sum(0) for harm in harms] for numbers in members.values()])
    table = table[:, :, ~np.isnan(table).any((0, 1))]
    prompts = table.shape[2]
    drops = table.mean(2)
    generator = np.random.default_rng(seed)
    each = np.stack([table[:, :, generator.integers(0, prompts, prompts)].mean(2) for _ in range(RESAMPLES)])
    load_errors = np.stack([_loads(drop) for drop in each]).std(0, ddof=1)
    return Decoupling(choice, tuple(members), names, drops, each.std(0, ddof=1), _loads(drops), load_errors)


def _loads(drops: Array) -> Array:
    deviation = drops - drops.mean(0)
    scores = deviation / np.maximum(deviation.std(0), 1e-300)
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))
