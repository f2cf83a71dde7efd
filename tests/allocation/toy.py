"""A space of layers without a model, a fitness with a known optimum, and a worker process."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from helpers import layer_plan, token_format, weight_format

from ditq.allocation import Evolution, Space, run
from ditq.allocation.space import Genome

SIZES = (16, 32, 64, 128)
EVOLUTION = Evolution(population=8, top_k=3, crossover=3, mutation=3)
IDENTITY = {"model": "toy", "seed": 0}


def toy_space(widths: Sequence[int] = (128, 256, 384, 512, 640, 768), budget: float | str = "uniform:64") -> Space:
    """Linears of these widths, W4A8."""
    layers = [
        layer_plan(f"block.{i}", k=k, n=96, weight=weight_format(), activation=token_format())
        for i, k in enumerate(widths)
    ]
    return Space.of(layers, {layer.name: 10.0 * (i + 1) for i, layer in enumerate(layers)}, sizes=SIZES, budget=budget)


def toy_fitness(genome: Genome) -> float:
    """Weighted layer errors: finer groups are better, in some layers more than in others."""
    return sum((1, 9, 2, 8, 3, 7)[i % 6] * size**0.5 for i, size in enumerate(genome))


def work(storage: str, log: str, trials: int, seconds: float, patience: float) -> None:
    """One process of a search; it logs every genome that it starts to evaluate."""

    def evaluate(genome: Genome) -> float:
        with open(log, "a") as file:
            file.write(" ".join(map(str, genome)) + "\n")
        time.sleep(seconds)
        return toy_fitness(genome)

    run(
        toy_space(), EVOLUTION, evaluate, trials=trials, storage=storage, identity=IDENTITY, patience=patience
    )  # fmt: skip


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5]))
