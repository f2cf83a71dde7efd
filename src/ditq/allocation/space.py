"""The search space: for each gene (a layer, a block, a role) the layer plans to choose from, within budgets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random

from ditq.allocation import budget as budgets
from ditq.allocation.budget import Budget
from ditq.allocation.choices import Choices, Gene, with_segments
from ditq.allocation.costs import COSTS, Cost, averaged, costs_of
from ditq.components import prefixed
from ditq.errors import UsageError
from ditq.plan import LayerPlan

Genome = tuple[int | str, ...]
"""The choice of every gene of a space, in the order of its genes: a group size, or a width such as ``"w4"``."""


@dataclass(frozen=True)
class Space:
    """All genomes whose costs are within the limits.

    Attributes:
        genes: each with its possible layer plans, the most costly first.
        costs: of every gene, by choice: what its layers cost then, see :func:`ditq.allocation.costs.costs_of`.
        limits: the largest allowed sum of each limited cost; a cost without a limit may take any value.
        fixed: what a genome costs besides its genes: the bytes of the rest of the transformer.
        units: what one unit of each cost is, see :func:`ditq.allocation.costs.averaged`.
    """

    genes: tuple[Gene, ...]
    costs: tuple[dict[int | str, dict[Cost, float]], ...]
    limits: dict[Cost, float]
    fixed: dict[Cost, float]
    units: dict[Cost, float]

    @classmethod
    def of(
        cls,
        layers: Sequence[LayerPlan],
        rows: Mapping[str, float],
        *,
        sizes: Sequence[int] | None = None,
        budget: Budget | Sequence[Budget] = "uniform:128",
        choices: Choices | None = None,
        other_bytes: float = 0.0,
        trajectory: Sequence[float] = (),
        check: bool = True,
    ) -> Space:
        """The space of the quantized layers among ``layers``.

        Args:
            layers: plans of linears; those in 16 bit are left out.
            rows: tokens that each layer reads per generated image, by layer name.
            sizes: group sizes S; short for ``choices=Choices(sizes=S)``.
            budget: one or several, see :mod:`ditq.allocation.budget`.
            choices: what is chosen, by default a group size for every layer.
            other_bytes: bytes of the transformer besides these layers, for a budget in bytes.
            trajectory: timesteps of the sampling run, for layers whose bits change with the timestep.
            check: False accepts a space with one genome or none, for measuring it gene by gene.

        Raises:
            UsageError: a size divides no layer, or a layer has no size that divides it; activations are static; the
                budget allows no genome, or only one.
        """
        quantized = tuple(layer for layer in layers if layer.weight is not None)
        chosen = choices or Choices(sizes=None if sizes is None else tuple(sizes))
        genes = chosen.genes(quantized)
        costs = tuple(
            {
                choice: _sum(costs_of(plan, rows[plan.name], gene.share, trajectory) for plan in plans)
                for choice, plans in gene.plans.items()
            }
            for gene in genes
        )
        searched = {plan.name for gene in genes for plan in next(iter(gene.plans.values()))}
        in_genes = [layer for layer in quantized if layer.name in searched]
        limits = budgets.limits(budget, in_genes, rows)
        constant = float(sum(layer.stored_bytes() for layer in quantized if layer.name not in searched))
        if genes and genes[0].share is not None:  # activations only: the weights are fixed
            constant += sum(layer.stored_bytes() for layer in in_genes)
        fixed: dict[Cost, float] = {"bytes": other_bytes + constant}
        space = cls(genes, costs, limits, fixed, averaged(in_genes, rows))
        if check:
            space.check_budget()
        return space

    @classmethod
    def joined(cls, spaces: Mapping[str, Space], budget: Budget | Sequence[Budget]) -> Space:
        """The spaces of several transformers of one pipeline, within budgets that they share.

        Args:
            spaces: by component, with any budgets; these are not used.
            budget: of all together.

        Raises:
            UsageError: see :meth:`of`.
        """
        total: dict[Cost, float] = {}
        for space in spaces.values():
            for name, unit in space.units.items():
                total[name] = 1.0 if name in ("bytes", "bit_operations") else total.get(name, 0.0) + unit
        fixed: dict[Cost, float] = {"bytes": sum(space.fixed.get("bytes", 0.0) for space in spaces.values())}
        genes = tuple(
            replace(gene, name=prefixed(component, gene.name))
            for component, space in spaces.items()
            for gene in space.genes
        )
        costs = tuple(costs for space in spaces.values() for costs in space.costs)
        return cls(genes, costs, budgets.shared_limits(budget, total), fixed, total)

    @cached_property
    def layers(self) -> tuple[LayerPlan, ...]:
        """The searched layers, each with the plan of its most costly choice."""
        first = {plan.name: plan for gene in self.genes for plan in next(iter(gene.plans.values()))}
        return tuple(first.values())

    @cached_property
    def choices(self) -> tuple[tuple[int | str, ...], ...]:
        """The possible choices of each gene, the most costly first."""
        return tuple(tuple(gene.plans) for gene in self.genes)

    @property
    def primary(self) -> Cost:
        """The cost that the first budget limits."""
        return next(iter(self.limits))

    @property
    def budget(self) -> float:
        """The limit of the first budget."""
        return self.limits[self.primary]

    @property
    def coarsest(self) -> Genome:
        """The last choice everywhere: the cheapest genome."""
        return tuple(possible[-1] for possible in self.choices)

    @property
    def uniforms(self) -> list[Genome]:
        """Legal genomes with a single choice, the most costly first."""
        common = [c for c in self.choices[0] if all(c in possible for possible in self.choices)]
        return [genome for c in common if self.legal(genome := (c,) * len(self.genes))]

    def cost(self, genome: Genome, name: Cost | None = None) -> float:
        """A cost of a genome (by default that of the first budget), for one image."""
        name = name or self.primary
        own = sum(costs[choice][name] for costs, choice in zip(self.costs, genome, strict=True))
        return own + self.fixed.get(name, 0.0)

    def legal(self, genome: Genome) -> bool:
        """Whether a genome is within all budgets (up to rounding)."""
        return all(self.cost(genome, name) <= limit * (1 + 1e-9) for name, limit in self.limits.items())

    def repaired(self, genome: Genome, random: Random) -> Genome:
        """A legal genome: while ``genome`` is over a budget, a random gene gets its next cheaper choice.

        The paper's pseudo-code draws again until a genome is legal. That would hardly end: with the default sizes the
        mean cost of random genomes is above that of uniform 128, and over a hundred layers the cost varies little.
        """
        genes = list(genome)
        for name, limit in self.limits.items():
            cost = self.cost(tuple(genes), name)
            while cost > limit * (1 + 1e-9):
                i = random.choice([i for i, choice in enumerate(genes) if choice != self.choices[i][-1]])
                cheaper = self.choices[i][self.choices[i].index(genes[i]) + 1]
                cost += self.costs[i][cheaper][name] - self.costs[i][genes[i]][name]
                genes[i] = cheaper
        return tuple(genes)

    def random(self, random: Random) -> Genome:
        """A random legal genome."""
        return self.repaired(tuple(random.choice(possible) for possible in self.choices), random)

    def planned(self, genome: Genome) -> list[LayerPlan]:
        """The layer plans of a genome."""
        whole: dict[str, LayerPlan] = {}
        segments: dict[str, list[tuple[Gene, LayerPlan]]] = {}
        for gene, choice in zip(self.genes, genome, strict=True):
            for plan in gene.plans[choice]:
                if gene.segment is None:
                    whole[plan.name] = plan
                else:
                    segments.setdefault(plan.name, []).append((gene, plan))
        return [*whole.values(), *(with_segments(parts) for parts in segments.values())]

    def averages(self, genome: Genome) -> dict[Cost, float]:
        """All costs in the units of budgets: bytes, BitOps, average bits of weights and of activations."""
        return {name: self.cost(genome, name) / max(unit, 1e-30) for name, unit in self.units.items()}

    def check_limits(self) -> None:
        """Raises UsageError if the budgets allow no genome; the message says which one, and by how much."""
        for name, limit in self.limits.items():
            lowest, unit = self.cost(self.coarsest, name), self.units[name]
            if lowest > limit * (1 + 1e-9):
                raise UsageError(
                    f"No allocation meets the budget of {number(limit / unit)} {COSTS[name]}: the cheapest choices "
                    f"({_listed(sorted({str(possible[-1]) for possible in self.choices}))}) take "
                    f"{number(lowest / unit)}, {number((lowest - limit) / unit)} more. Raise the budget, or add "
                    f"{'larger group sizes' if isinstance(self.coarsest[0], int) else 'cheaper choices'}."
                )

    def check_budget(self) -> None:
        """Raises UsageError if the budgets allow no genome, or only one; see :meth:`of`."""
        self.check_limits()
        if not any(self.legal(self._with(i, possible[-2])) for i, possible in enumerate(self.choices) if possible[1:]):
            widths = sorted({layer.in_features for layer in self.layers})
            sizes = isinstance(self.coarsest[0], int)
            raise UsageError(
                f"There is nothing to search: the only allocation within the budget of "
                f"{number(self.budget / self.units[self.primary])} {COSTS[self.primary]} has "
                + (
                    "the largest group size in every layer. Raise the budget, or add larger group sizes: layers have "
                    f"{_listed(widths)} input channels."
                    if sizes
                    else "the cheapest choice everywhere. Raise the budget, or add cheaper choices."
                )
            )

    def _with(self, gene: int, choice: int | str) -> Genome:
        """The cheapest genome with another choice for one gene."""
        genome = list(self.coarsest)
        genome[gene] = choice
        return tuple(genome)


def number(value: float) -> str:
    """A cost in a message."""
    return f"{value:.6g}"


def _sum(parts: Iterable[dict[Cost, float]]) -> dict[Cost, float]:
    total: dict[Cost, float] = dict.fromkeys(COSTS, 0.0)
    for part in parts:
        for name, value in part.items():
            total[name] += value
    return total


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))
