"""Allocations of other systems, to compare with at the same budget: uniform, SDNQ, AutoQuantize, MixDQ."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ditq.allocation.costs import Cost
from ditq.allocation.decoupled import group_of, members_of, part_of
from ditq.allocation.program import Errors, integer_program
from ditq.allocation.scores import Scores
from ditq.allocation.space import Genome, Space
from ditq.allocation.uncertainty import errors_of
from ditq.architectures import Architecture
from ditq.conversion.scales import balanced
from ditq.errors import UsageError
from ditq.numerics import fake_quantize
from ditq.plan import LayerPlan
from ditq.trace.blocks import on_device
from ditq.trace.calls import Call
from ditq.trace.hooks import all_hooked, hooked

# ----------------------------------------------------------------------------------------------- uniform


def interleaved_uniform(space: Space) -> Genome:
    """The uniform rule between two widths: two neighbouring choices, spread evenly over the genes in their order.

    A gene gets the more precise choice as soon as the part of the budget that the genes up to it are entitled to, in
    proportion to their costs, allows it (Bresenham's line). With 4 and 8 bits, equal layers and an average of 5, every
    fourth layer has 8.

    Raises:
        UsageError: not even a single choice for all genes meets the budgets.
    """
    if not space.uniforms:
        raise UsageError("No single choice for all layers meets the budget: add a cheaper one, or raise the budget.")
    low = space.uniforms[0]
    common = [c for c in space.choices[0] if all(c in possible for possible in space.choices)]
    position = common.index(low[0])
    if position == 0:
        return low
    high = common[position - 1]
    rises = [
        {name: costs[high][name] - costs[choice][name] for name in space.limits}
        for costs, choice in zip(space.costs, low, strict=True)
    ]
    whole = {name: sum(rise[name] for rise in rises) for name in space.limits}
    share = min((space.limits[name] - space.cost(low, name)) / rise for name, rise in whole.items() if rise > 0)
    genome = list(low)
    entitled, used = dict.fromkeys(space.limits, 0.0), dict.fromkeys(space.limits, 0.0)
    for i, rise in enumerate(rises):
        for name in space.limits:
            entitled[name] += share * rise[name]
        if all(used[name] + rise[name] <= entitled[name] + 1e-9 * whole[name] for name in space.limits):
            genome[i] = high
            for name in space.limits:
                used[name] += rise[name]
    return tuple(genome)


# ----------------------------------------------------------------------------------------- weight errors


@torch.no_grad()
def weight_errors(model: nn.Module, architecture: Architecture, space: Space) -> list[dict[int | str, float]]:
    """SDNQ's score: the mean squared error of the rounded weight over the weight's variance.

    Needs no data. The weights are rotated as planned, but not smoothed, which needs calibration, and are rounded to
    nearest. A gene of several layers has the sum of their squared errors over the sum of their squared deviations.

    Args:
        model: the 16-bit transformer.
        architecture: of the model.
        space: bits of weights.

    Returns:
        For each gene, the error of each choice; 0 for 16 bit.

    Raises:
        UsageError: the space does not choose bits of weights.
    """
    _check_weights(space)
    linears = {linear.name: linear.module for linear in architecture.linears(model)}
    out: list[dict[int | str, float]] = []
    for gene in space.genes:
        power = 0.0
        for plan in gene.layers:
            w = linears[plan.name].weight.detach().float()
            power += float((w - w.mean()).square().sum())
        out.append(
            {
                choice: sum(float(_rounding(linears[plan.name], plan).square().sum()) for plan in plans)
                / max(power, 1e-30)
                for choice, plans in gene.plans.items()
            }
        )
    return out


def weight_error_rule(space: Space, errors: Errors) -> Genome:
    """SDNQ's rule: each gene gets the cheapest choice whose error is within a threshold, the same for all genes.

    SDNQ fixes the threshold (0.01, or one by bits); here it is the smallest that meets the budgets. A gene without
    such a choice gets its most costly one.

    Args:
        space: the genes and the budgets.
        errors: of each gene at each choice, e.g. of :func:`weight_errors`.

    Returns:
        A legal genome. Genes are cheapened one by one as the threshold rises, so less than a gene's step of the budget
        stays unused.
    """

    def chosen(threshold: float) -> Genome:
        return tuple(
            next((c for c in reversed(possible) if error[c] <= threshold), possible[0])
            for possible, error in zip(space.choices, errors, strict=True)
        )

    # At the largest error all choices are the cheapest. Costs fall with the threshold.
    thresholds = sorted({e for error in errors for e in error.values()})
    first = bisect_left(thresholds, True, key=lambda threshold: space.legal(chosen(threshold)))
    return chosen(thresholds[min(first, len(thresholds) - 1)])


# -------------------------------------------------------------------------------------- gradient errors


def gradient_errors(
    model: nn.Module,
    architecture: Architecture,
    space: Space,
    calls: Sequence[Call],
    *,
    probes: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[int | str, float]]:
    """ModelOpt AutoQuantize's score: sum of g^2 (Y_q - Y)^2 over the outputs Y of a layer, g the gradient of the loss.

    It is the second-order change of the loss with the diagonal of the Fisher matrix for the Hessian. AutoQuantize
    takes a training loss; without one, the loss here is <F, r>, with the model's output F and random r ~ N(0, 1): over
    r, the mean of g^2 is the diagonal of J^T J (Hutchinson), so the score estimates the squared change of the output
    if the changes of a layer's outputs were independent.

    Args:
        model: the 16-bit transformer, of floating-point linears.
        architecture: of the model.
        space: bits of weights.
        calls: recorded calls of the transformer, arguments by name.
        probes: random r for each call; one backward pass each.
        seed: of r.
        progress: called with (calls done, all calls).

    Returns:
        For each gene, the score of each choice, the mean over calls and probes, for :func:`integer_program`.

    Raises:
        UsageError: the space does not choose bits of weights; no calls.
    """
    _check_weights(space)
    if not calls:
        raise UsageError("Gradient scores need at least one recorded call of the transformer.")
    linears = {linear.name: linear.module for linear in architecture.linears(model)}
    totals: list[dict[int | str, float]] = [dict.fromkeys(gene.plans, 0.0) for gene in space.genes]
    generator = torch.Generator().manual_seed(seed)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            x = args[0] if args else kwargs["input"]
            y = y if y.requires_grad else y.detach().requires_grad_()
            seen.setdefault(name, []).append((x.detach(), y))
            return y

        return hook

    for done, call in enumerate(calls, 1):
        seen.clear()
        watching = (hooked(linears[plan.name], after=keep(plan.name)) for plan in space.layers)
        with torch.enable_grad(), all_hooked(watching):
            output = model(**on_device(call, model), return_dict=False)[0]
        pairs = [(name, x, y) for name, kept in seen.items() for x, y in kept]
        powers: dict[str, list[tuple[Tensor, Tensor]]] = {}  # inputs, and squared gradients summed over probes
        for probe in range(probes):
            r = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
            gradients = torch.autograd.grad(
                output, [y for _, _, y in pairs], r, retain_graph=probe + 1 < probes, allow_unused=True
            )
            for (name, x, _), gradient in zip(pairs, gradients, strict=True):
                if gradient is not None:
                    powers.setdefault(name, []).append((x, gradient.float().square()))
        del output, pairs
        for gene, total in zip(space.genes, totals, strict=True):
            for choice, plans in gene.plans.items():
                for plan in plans:
                    total[choice] += _change(linears[plan.name], plan, powers.get(plan.name, ()))
        if progress:
            progress(done, len(calls))
    return [{choice: x / (len(calls) * probes) for choice, x in total.items()} for total in totals]


@torch.no_grad()
def _change(linear: nn.Linear, plan: LayerPlan, powers: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Sum of g^2 (Y_q - Y)^2 over inputs and squared gradients of one layer."""
    if plan.weight is None or not powers:
        return 0.0
    difference = _rounding(linear, plan)
    return sum(float((power * F.linear(_rotated(x, plan), difference).square()).double().sum()) for x, power in powers)


def _rotated(x: Tensor, plan: LayerPlan) -> Tensor:
    return balanced(x.reshape(-1, x.shape[-1]), None, plan.rotate, weight=False).reshape(x.shape)


def _rounding(linear: nn.Linear, plan: LayerPlan) -> Tensor:
    """Q(W) - W, float32 [N, K], of the rotated weight; 0 for 16 bit."""
    w = balanced(linear.weight.detach(), None, plan.rotate, weight=True)
    return torch.zeros_like(w) if plan.weight is None else fake_quantize(w, plan.weight) - w


def _check_weights(space: Space) -> None:
    if not str(space.coarsest[0]).startswith("w"):
        raise UsageError(
            "This score is of rounded weights: choose bits of weights, Choices(weights=(8, 4)), not "
            f"{'group sizes' if isinstance(space.coarsest[0], int) else 'bits of activations'}."
        )


# ----------------------------------------------------------------------------------------------- MixDQ

RATIOS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.7, 2.0)
"""Values of k: average bits of the content group over those of the quality group."""


@dataclass(frozen=True)
class MixDQ:
    """The result of :func:`mixdq`.

    Attributes:
        genome: the best one.
        ratio: its k.
        tried: every feasible k with its genome and that genome's value.
    """

    genome: Genome
    ratio: float
    tried: tuple[tuple[float, Genome, float], ...]


def mixdq(
    space: Space,
    scores: Scores,
    evaluate: Callable[[Genome], float],
    *,
    content: str | None = None,
    quality: str | None = None,
    ratios: Sequence[float] = RATIOS,
) -> MixDQ:
    """MixDQ's allocation: an integer program for each of two groups, whose share of the budget is scanned.

    The content group is cross-attention and FFNs (and text streams), the quality group all others. For each k, with
    r the size of the content group over that of the quality group, the budget B splits into average bits of

        b_quality = B (1 + r) / (k r + 1),    b_content = k b_quality

    and each group is allocated within its part. The k whose genome has the smallest value wins. MixDQ ranks the
    content group by SSIM and the quality group by SQNR; both are the error by default. Budgets in bytes or
    BitOps are split likewise, with the groups' costs at the cheapest choices as sizes.

    Args:
        space: bits of weights or of activations, by layer or role.
        scores: of the same part and unit.
        evaluate: the value of a genome, smaller is better, e.g. the error of generated images. Called once for each
            genome.
        content: metric of the content group.
        quality: metric of the quality group.
        ratios: values of k. 1 is always tried, too.

    Raises:
        UsageError: as :func:`ditq.allocation.uncertainty.errors_of`; a gene with layers of both groups.
    """
    genes = [(gene.name, [plan.role for plan in gene.layers]) for gene in space.genes]
    members = members_of(genes, lambda role: "content" if _is_content(role) else "quality")
    metric = {"content": content, "quality": quality}
    parts = {group: part_of(space, numbers, space.limits) for group, numbers in members.items()}
    errors = {group: errors_of(part, scores, metric[group]) for group, part in parts.items()}
    values: dict[Genome, float] = {}
    tried: list[tuple[float, Genome, float]] = []
    for ratio in sorted({1.0, *ratios}):
        genome = list(space.coarsest)
        for group, numbers in members.items():
            limits = {name: _part_limit(space, parts, group, name, ratio) for name in space.limits}
            part = part_of(space, numbers, limits)
            if not part.legal(part.coarsest):
                break
            for i, choice in zip(numbers, integer_program(part, errors[group]), strict=True):
                genome[i] = choice
        else:
            whole = tuple(genome)
            if whole not in values:
                values[whole] = evaluate(whole)
            tried.append((ratio, whole, values[whole]))
    # Of equal values, that of the most even split.
    ratio, best, _ = min(tried, key=lambda entry: (entry[2], max(entry[0], 1 / entry[0])))
    return MixDQ(best, ratio, tuple(tried))


def _is_content(role: str) -> bool:
    return group_of(role) == "content" or role.startswith("ffn")


def _part_limit(space: Space, parts: dict[str, Space], group: str, name: Cost, ratio: float) -> float:
    """The limit of a cost in one of the groups, of what the searched layers may cost together."""
    weights = {
        other: (ratio if other == "content" else 1.0)
        * sum(part.costs[i][c][name] for i, c in enumerate(part.coarsest))
        for other, part in parts.items()
    }
    limit = space.limits[name] - space.fixed.get(name, 0.0)
    return limit * weights[group] / max(sum(weights.values()), 1e-300)
