"""The search space: one group size for each quantized linear, within a budget of bit operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

from ditq.allocation.budget import bit_operations, grouped
from ditq.errors import UsageError
from ditq.plan import MIN_GROUP_SIZE, LayerPlan

# Q-DiT's set; all divide the 1152 and 4608 input channels of DiT-XL.
SIZES = (32, 64, 128, 192, 288)

Genome = tuple[int, ...]
"""A group size for every layer of a space, in the order of its layers."""


@dataclass(frozen=True)
class Space:
    """All genomes whose cost is within the budget.

    Attributes:
        layers: the quantized linears.
        choices: possible group sizes of each layer, ascending.
        costs: BitOps of each layer at each of its choices.
        budget: largest allowed BitOps of a genome.
    """

    layers: tuple[LayerPlan, ...]
    choices: tuple[tuple[int, ...], ...]
    costs: tuple[dict[int, float], ...]
    budget: float

    @classmethod
    def of(
        cls,
        layers: Sequence[LayerPlan],
        rows: Mapping[str, float],
        *,
        sizes: Sequence[int] | None = None,
        budget: float | str = "uniform:128",
    ) -> Space:
        """The space of the quantized layers among ``layers``.

        Args:
            layers: plans of linears; those in 16 bit are left out.
            rows: tokens that each layer reads per generated image, by layer name.
            sizes: S; each layer takes those that divide its input channels. None: those of ``SIZES`` that divide the
                input channels of at least one layer.
            budget: BitOps per image; or ``uniform:G``, the BitOps of group size G in every layer.

        Raises:
            UsageError: a size divides no layer, or a layer has no size that divides it; activations are static; the
                budget allows no genome, or only one.
        """
        quantized = tuple(layer for layer in layers if layer.weight is not None)
        _check_formats(quantized)
        widths = sorted({layer.in_features for layer in quantized})
        ordered = sorted(set(sizes)) if sizes else [g for g in SIZES if any(width % g == 0 for width in widths)]
        for size in ordered:
            if size < MIN_GROUP_SIZE or all(width % size for width in widths):
                raise UsageError(
                    f"Group size {size} divides no layer: layers have {_listed(widths)} input channels, and a group "
                    f"has at least {MIN_GROUP_SIZE}. Possible are {_listed(_divisors(widths))}."
                )
        choices = tuple(tuple(g for g in ordered if layer.in_features % g == 0) for layer in quantized)
        for layer, possible in zip(quantized, choices, strict=True):
            if not possible:
                raise UsageError(
                    f"None of the group sizes {_listed(ordered)} divides the {layer.in_features} input channels of "
                    f"layer {layer.name!r}; add one of {_listed(_divisors([layer.in_features]))}."
                )
        costs = tuple(
            {size: bit_operations(grouped(layer, size), size, rows[layer.name]) for size in possible}
            for layer, possible in zip(quantized, choices, strict=True)
        )
        space = cls(quantized, choices, costs, _budget(budget, quantized, rows))
        space._check_budget()
        return space

    @property
    def coarsest(self) -> Genome:
        """The largest group size everywhere: the cheapest genome."""
        return tuple(possible[-1] for possible in self.choices)

    @property
    def uniforms(self) -> list[Genome]:
        """Legal genomes with a single group size, the finest first."""
        sizes = sorted(set.intersection(*map(set, self.choices)))
        return [genome for size in sizes if self.legal(genome := (size,) * len(self.layers))]

    def cost(self, genome: Genome) -> float:
        """BitOps of a genome, for one image."""
        return sum(costs[size] for costs, size in zip(self.costs, genome, strict=True))

    def legal(self, genome: Genome) -> bool:
        """Whether a genome is within the budget (up to rounding)."""
        return self.cost(genome) <= self._limit

    @cached_property
    def _limit(self) -> float:
        return self.budget * (1 + 1e-9)

    def repaired(self, genome: Genome, random: Random) -> Genome:
        """A legal genome: while ``genome`` is over the budget, a random layer gets its next larger group size.

        The paper's pseudo-code draws again until a genome is legal. That would hardly end: with the default sizes the
        mean cost of random genomes is above that of uniform 128, and over a hundred layers the cost varies little.
        """
        genes, cost = list(genome), self.cost(genome)
        while cost > self._limit:
            i = random.choice([i for i, size in enumerate(genes) if size != self.choices[i][-1]])
            larger = self.choices[i][self.choices[i].index(genes[i]) + 1]
            cost += self.costs[i][larger] - self.costs[i][genes[i]]
            genes[i] = larger
        return tuple(genes)

    def random(self, random: Random) -> Genome:
        """A random legal genome."""
        return self.repaired(tuple(random.choice(possible) for possible in self.choices), random)

    def planned(self, genome: Genome) -> list[LayerPlan]:
        """The layer plans of a genome."""
        return [grouped(layer, size) for layer, size in zip(self.layers, genome, strict=True)]

    def _check_budget(self) -> None:
        lowest = self.cost(self.coarsest)
        if not self.legal(self.coarsest):
            raise UsageError(
                f"No allocation meets the budget of {self.budget:.6g} BitOps per image: the largest group sizes take "
                f"{lowest:.6g}. Raise the budget, or add larger group sizes."
            )
        finer = [costs[possible[-2]] - costs[possible[-1]] for costs, possible in zip(self.costs, self.choices,
                 strict=True) if len(possible) > 1]  # fmt: skip
        if not finer or lowest + min(finer) > self._limit:
            widths = sorted({layer.in_features for layer in self.layers})
            raise UsageError(
                f"There is nothing to search: the only allocation within the budget of {self.budget:.6g} BitOps per "
                f"image has the largest group size in every layer. Raise the budget, or add larger group sizes: "
                f"layers have {_listed(widths)} input channels."
            )


def _check_formats(layers: Sequence[LayerPlan]) -> None:
    for layer in layers:
        if layer.timesteps:
            raise UsageError(
                f"Layer {layer.name!r} has separate weights for each timestep range; search without timestep ranges."
            )
        if layer.activation is not None and not layer.activation.dynamic:
            raise UsageError(
                f"Layer {layer.name!r} has static activation scales; the search needs dynamic ones. Use "
                "--set activations.granularity=token --set activations.dynamic=true."
            )


def _budget(budget: float | str, layers: Sequence[LayerPlan], rows: Mapping[str, float]) -> float:
    if not isinstance(budget, str):
        return float(budget)
    kind, _, text = budget.partition(":")
    if kind == "uniform" and text.isdigit() and int(text) >= MIN_GROUP_SIZE:
        size = int(text)
        for layer in layers:
            if layer.in_features % size:
                raise UsageError(
                    f"The budget {budget!r} means group size {size} in every layer, but it does not divide the "
                    f"{layer.in_features} input channels of layer {layer.name!r}; pass another size, or a number."
                )
        return sum(bit_operations(grouped(layer, size), size, rows[layer.name]) for layer in layers)
    try:
        return float(budget)
    except ValueError:
        raise UsageError(
            f"A budget must be a number of BitOps per image, or uniform:G for group size G (at least "
            f"{MIN_GROUP_SIZE}) in every layer; got {budget!r}."
        ) from None


def _divisors(widths: Sequence[int]) -> list[int]:
    """Multiples of 16 that divide at least one of the widths; kernels need multiples of 16."""
    return sorted({g for width in widths for g in range(16, width + 1, 16) if width % g == 0})


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
