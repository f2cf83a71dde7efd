"""Q-DiT's evolutionary search: each generation is a pure function of the earlier ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from random import Random

from ditq.allocation.space import Genome, Space
from ditq.errors import UsageError

Scored = tuple[Genome, float]
"""A genome and its fitness; smaller is better."""

Make = Callable[[Space, Sequence[Genome], Random], Genome]

# Attempts to find a new individual before the space counts as exhausted.
ATTEMPTS = 1000


@dataclass(frozen=True)
class Evolution:
    """The paper's evolutionary search with its defaults. Without crossover and mutation it is a random search.

    The first generation has the finest uniform group size within the budget (by default 128) and random individuals.
    The parents of each later generation are the best ``top_k`` individuals so far. A crossover child takes each gene
    from one of two parents. A mutated child is a copy of one parent in which each gene is drawn again with
    ``probability``. Random individuals fill the generation. Children over the budget are repaired, see
    :meth:`ditq.allocation.Space.repaired`, and no individual occurs twice.

    Attributes:
        population: N_p, individuals per generation.
        top_k: number of parents.
        crossover: children of two parents per generation.
        mutation: mutated children per generation.
        probability: of drawing a gene of a mutated child again.
    """

    population: int = 50
    top_k: int = 10
    crossover: int = 25
    mutation: int = 25
    probability: float = 0.1

    def __post_init__(self) -> None:
        if min(self.population, self.top_k) < 1 or min(self.crossover, self.mutation) < 0:
            raise UsageError("population and top-k must be at least 1, crossover and mutation at least 0.")
        if self.crossover + self.mutation > self.population:
            raise UsageError(
                f"crossover ({self.crossover}) plus mutation ({self.mutation}) must not exceed the population of "
                f"{self.population}."
            )
        if not 0 < self.probability <= 1:
            raise UsageError(f"The mutation probability must be above 0 and at most 1, got {self.probability}.")

    def generation(
        self, number: int, space: Space, scored: Sequence[Scored], earlier: Collection[Genome], random: Random
    ) -> list[Genome]:
        """New individuals; fewer than ``population`` if the space does not have more.

        Args:
            number: index of the generation, from 0.
            space: the search space.
            scored: all earlier individuals with a fitness, oldest first.
            earlier: all earlier individuals.
            random: source of all random choices.
        """
        parents = [genome for genome, _ in sorted(scored, key=lambda individual: individual[1])[: self.top_k]]
        kinds: list[Make] = [self._crossover] * self.crossover + [self._mutated] * self.mutation if parents else []
        kinds += [self._random] * (self.population - len(kinds))
        genomes = space.uniforms[:1] if number == 0 else []
        existing = {*earlier, *genomes}
        for make in kinds[len(genomes) :]:  # a child that exists already is replaced by a random individual
            genome = self._new(make, space, parents, existing, random) or self._new(
                self._random, space, parents, existing, random
            )
            if genome is None:
                break
            genomes.append(genome)
            existing.add(genome)
        return genomes

    def _new(
        self, make: Make, space: Space, parents: Sequence[Genome], existing: Collection[Genome], random: Random
    ) -> Genome | None:
        for _ in range(ATTEMPTS):
            if (genome := space.repaired(make(space, parents, random), random)) not in existing:
                return genome
        return None

    def _crossover(self, _: Space, parents: Sequence[Genome], random: Random) -> Genome:
        a, b = random.sample(parents, 2) if len(parents) > 1 else (parents[0], parents[0])
        return tuple(random.choice(pair) for pair in zip(a, b, strict=True))

    def _mutated(self, space: Space, parents: Sequence[Genome], random: Random) -> Genome:
        parent = random.choice(parents)
        return tuple(
            random.choice(possible) if random.random() < self.probability else gene
            for gene, possible in zip(parent, space.choices, strict=True)
        )

    def _random(self, space: Space, _: Sequence[Genome], random: Random) -> Genome:
        return space.random(random)
