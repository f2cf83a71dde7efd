"""The generations of the evolutionary search: legal, new, children of the best, and a pure function of the seed."""

from random import Random

import pytest
from toy import EVOLUTION, toy_fitness, toy_space

from ditq.allocation import Evolution
from ditq.errors import UsageError


def generations(strategy: Evolution, count: int, seed: int = 0, **space: object) -> list[list[tuple[int, ...]]]:
    found: list[list[tuple[int, ...]]] = []
    chosen = toy_space(**space)
    for number in range(count):
        seen = [genome for members in found for genome in members]
        scored = [(genome, toy_fitness(genome)) for genome in seen]
        found.append(strategy.generation(number, chosen, scored, seen, Random(f"{seed}/{number}")))
    return found


def test_defaults_are_the_papers() -> None:
    assert Evolution() == Evolution(population=50, top_k=10, crossover=25, mutation=25, probability=0.1)


def test_every_individual_is_legal_and_new() -> None:
    space = toy_space()
    everyone = [genome for members in generations(EVOLUTION, 6) for genome in members]
    assert len(everyone) == len(set(everyone)) == 6 * 8
    assert all(space.legal(genome) for genome in everyone)


def test_the_search_starts_from_the_finest_uniform_size_within_the_budget() -> None:
    assert generations(EVOLUTION, 1)[0][0] == (64,) * 6
    assert generations(EVOLUTION, 1, budget="uniform:32")[0][0] == (32,) * 6


def test_generations_repeat_themselves_by_seed() -> None:
    assert generations(EVOLUTION, 4) == generations(EVOLUTION, 4)
    assert generations(EVOLUTION, 4) != generations(EVOLUTION, 4, seed=1)


def test_crossover_takes_genes_of_the_two_best() -> None:
    space = toy_space(budget="uniform:16")  # nothing to repair
    scored = [((16,) * 6, 1.0), ((128,) * 6, 2.0), ((64,) * 6, 3.0)]
    strategy = Evolution(population=10, top_k=2, crossover=10, mutation=0)
    children = strategy.generation(1, space, scored, [g for g, _ in scored], Random(0))
    assert len(children) == 10
    assert {gene for child in children for gene in child} == {16, 128}


def test_mutation_changes_the_share_of_genes_that_it_should() -> None:
    space = toy_space(widths=(128,) * 600, budget="uniform:16")
    parent = (32,) * 600
    strategy = Evolution(population=20, top_k=1, crossover=0, mutation=20, probability=0.1)
    children = strategy.generation(1, space, [(parent, 0.0)], [parent], Random(0))
    changed = sum(gene != 32 for child in children for gene in child) / (20 * 600)
    assert changed == pytest.approx(0.1 * 3 / 4, abs=0.01)  # one draw of four gives the old size again


def test_a_small_space_is_searched_whole_and_then_ends() -> None:
    space = toy_space(widths=(128, 128))
    legal = {(a, b) for a in (16, 32, 64, 128) for b in (16, 32, 64, 128) if space.legal((a, b))}
    found = generations(EVOLUTION, 6, widths=(128, 128))
    everyone = [genome for members in found for genome in members]
    assert sorted(everyone) == sorted(legal)
    assert found[-1] == []


def test_it_beats_random_search_on_the_toy() -> None:
    def best(strategy: Evolution, seed: int) -> float:
        found = generations(strategy, 8, seed, widths=(128, 256, 384, 512) * 4, budget="uniform:64")
        return min(toy_fitness(genome) for members in found for genome in members)

    chance = Evolution(population=8, top_k=3, crossover=0, mutation=0)
    assert sum(best(EVOLUTION, seed) < best(chance, seed) for seed in range(10)) >= 9


@pytest.mark.parametrize(
    ("numbers", "word"),
    [
        ({"population": 0}, "population"),
        ({"crossover": 30, "mutation": 30}, "must not exceed the population"),
        ({"probability": 0.0}, "probability"),
        ({"mutation": -1}, "mutation"),
    ],
)
def test_wrong_numbers_are_refused(numbers: dict[str, float], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Evolution(**numbers)  # type: ignore[arg-type]
