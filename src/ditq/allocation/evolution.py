"""Q-DiT's evolutionary search: which individuals a generation has, as a pure function of those before it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from random import Random

from ditq.allocation.space import Genome, Space
from ditq.errors import UsageError

Scored = tuple[Genome, float]
"""A genome and its fitness; smaller is better."""

Make = Callable[[Space, Sequence[Genome], Random], Genome]

# Draws of one individual that was not there before, until a space counts as used up.
ATTEMPTS = 1000


@dataclass(frozen=True)
class Evolution:
    """The paper's search; defaults are its own. Without crossover and mutation it is random search.

    The first generation is the finest uniform group size within the budget (by default 128), and random individuals.
    Each later one has children of the best ``top_k`` of all so far: ``crossover`` take each gene from one of two
    parents, ``mutation`` are one parent whose genes are drawn anew with ``probability``; random individuals fill it
    up. Children over the budget are repaired (:meth:`ditq.allocation.Space.repaired`), and no individual comes twice.

    Attributes:
        population: N_p, individuals in a generation.
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
                f"crossover ({self.crossover}) and mutation ({self.mutation}) make more children than the population "
                f"of {self.population} has places."
            )
        if not 0 < self.probability <= 1:
            raise UsageError(f"The probability of mutation must be above 0 and at most 1, got {self.probability}.")

    def generation(
        self, number: int, space: Space, scored: Sequence[Scored], seen: Collection[Genome], random: Random
    ) -> list[Genome]:
        """New individuals; fewer than the population where the space has no more.

        Args:
            number: of the generation, from 0.
            scored: all earlier individuals that have a fitness, in the order they were made.
            seen: all earlier individuals.
        """
        parents = [genome for genome, _ in sorted(scored, key=lambda individual: individual[1])[: self.top_k]]
        kinds: list[Make] = [self._crossover] * self.crossover + [self._mutated] * self.mutation if parents else []
        kinds += [self._random] * (self.population - len(kinds))
        out = space.uniforms[:1] if number == 0 else []
        known = {*seen, *out}
        for make in kinds[len(out) :]:  # a child that was there before becomes a random newcomer
            genome = self._new(make, space, parents, known, random) or self._new(
                self._random, space, parents, known, random
            )
            if genome is None:
                break
            out.append(genome)
            known.add(genome)
        return out

    def _new(
        self, make: Make, space: Space, parents: Sequence[Genome], known: Collection[Genome], random: Random
    ) -> Genome | None:
        for _ in range(ATTEMPTS):
            if (genome := space.repaired(make(space, parents, random), random)) not in known:
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
