"""The whole search on a pipeline: draw the reference, span the space, run the strategy, return the plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ditq import digests
from ditq.allocation import study
from ditq.allocation.budget import scale_overhead_bits
from ditq.allocation.candidates import Candidates
from ditq.allocation.evolution import Evolution, Scored
from ditq.allocation.fitness import PREDICTION, Fitness, kept_moments, outputs_of
from ditq.allocation.rivals import Fixed, integer_program, layer_errors, uniform_genomes
from ditq.allocation.space import Genome, Space
from ditq.architectures import Architecture
from ditq.calibration import Statistics, calibrate
from ditq.conversion import draft, plan_layers
from ditq.errors import DitqError, UsageError, unknown
from ditq.plan import LayerPlan, Plan
from ditq.recipe import Recipe
from ditq.sampling import Samples, batches, fingerprint, sample
from ditq.trace.calls import Call, merged

STRATEGIES = ("evolution", "random", "program", "uniform")
ROUNDINGS = ("nearest", "recipe")

# Added to the seed, so that neither calibration nor a comparison with the same seed sees the noise of the search.
NOISE_OFFSET = 20_000

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        plan: the best allocation, with the rounding that the recipe asks for; carry it out on a fresh pipeline.
        candidate: the same as it is in the model now.
        fitness: of the best candidate; smaller is better.
        bit_operations, budget: of the plan and at most, for one picture.
        scale_overhead_bits: bits of scales and zero points for each quantized weight.
        scored: all individuals with their fitness.
        evaluated: how many of them this process evaluated.
    """

    plan: Plan
    candidate: Plan
    genome: Genome
    fitness: float
    fitness_name: str
    strategy: str
    bit_operations: float
    budget: float
    scale_overhead_bits: float
    scored: tuple[Scored, ...]
    evaluated: int

    def summary(self) -> str:
        """The result in three lines."""
        sizes = {size: self.genome.count(size) for size in sorted(set(self.genome))}
        groups = ", ".join(f"{count} of {size}" for size, count in sizes.items())
        return (
            f"{self.strategy}: {self.fitness_name} {self.fitness:.4g}, the best of {len(self.scored)} allocations "
            f"({self.evaluated} evaluated by this process)\n"
            f"group sizes: {groups} layers\n"
            f"{self.bit_operations:.4g} BitOps a picture of at most {self.budget:.4g}; "
            f"scales take {self.scale_overhead_bits:.3f} bits a weight"
        )


def search(
    pipe: Any,
    architecture: Architecture,
    recipe: Recipe,
    conditions: Sequence[str],
    *,
    strategy: str | Evolution = "evolution",
    trials: int = 500,
    sizes: Sequence[int] | None = None,
    budget: float | str = "uniform:128",
    fitness: Fitness = PREDICTION,
    moments: int = 1,
    rounding: Literal["nearest", "recipe"] = "recipe",
    steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 16,
    calibration: Sequence[str] | None = None,
    statistics: Statistics | None = None,
    storage: str | Path | None = None,
    seed: int = 0,
    patience: float = study.PATIENCE,
    progress: Progress | None = None,
    on_trial: Callable[[int, int, float], None] | None = None,
) -> SearchResult:
    """Searches the group size of every linear that ``recipe`` quantizes (Q-DiT's automatic granularity allocation).

    Formats, balance and the layers that stay in 16 bit are the recipe's; its granularities are replaced by groups.
    The pipeline is used up: its transformer is left as the best candidate.

    Args:
        conditions: what every candidate draws, number i from the noise of one seed. Class names or prompts.
        strategy: a name of ``STRATEGIES``, or an :class:`Evolution` with other numbers than the paper's.
        trials: candidates that are evaluated at most; ``program`` and ``uniform`` have few.
        sizes, budget: see :meth:`Space.of`.
        moments: random timesteps of each picture that a fitness of outputs looks at. Many pictures and few moments
            of each tell more of other pictures, at one cost, than few pictures and all their moments.
        rounding: of the candidates. "recipe" does it as the recipe asks; where that is GPTQ, each layer is rounded
            once at each size, on inputs of the 16-bit model. "nearest" is the paper's.
        calibration: conditions to calibrate with, where the recipe or ``program`` needs it.
        statistics: finished statistics, instead of calibrating here.
        storage, patience: see :func:`ditq.allocation.run`.
        progress: called with (stage, done, total) while preparing; on_trial: see :func:`ditq.allocation.run`.

    Raises:
        UsageError: an unknown strategy; no conditions; calibration is needed and there is nothing to calibrate with;
            see also :meth:`Space.of` and :func:`ditq.allocation.run`.
        DitqError: every candidate draws NaN or Inf.
    """
    if isinstance(strategy, str) and strategy not in STRATEGIES:
        raise unknown("strategy", strategy, STRATEGIES)
    if rounding not in ROUNDINGS:
        raise unknown("rounding of candidates", rounding, ROUNDINGS)
    if moments < 1:
        raise UsageError(f"A fitness of outputs looks at 1 timestep of each picture at least, got moments={moments}.")
    if trials < 1:
        raise UsageError(f"A search needs at least 1 trial, got {trials}.")
    model: nn.Module = pipe.transformer
    nearest = recipe.model_copy(update={"rounding": "nearest"})
    candidate = recipe if rounding == "recipe" else nearest
    if statistics is None and (candidate.needs_calibration or strategy == "program"):
        if not calibration:
            raise UsageError("This search needs calibration: give prompts, or finished statistics.")
        statistics = calibrate(
            pipe, architecture, calibration, recipe.calibration, seed=seed, resume=True,
            progress=None if progress is None else lambda done, total: progress("calibrate", done, total),
        )  # fmt: skip
    layers = plan_layers(model, architecture, candidate, statistics, seed=seed, progress=progress)
    in_stacks = {linear.name for group in architecture.groups(model) for linear in group.linears}
    searched = [layer for layer in layers if layer.weight is not None and layer.name in in_stacks]
    wanted = {x.name: {"rounding": x.rounding, "gptq": x.gptq} for x in draft(model, architecture, recipe)}
    drawing: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale, "seed": seed + NOISE_OFFSET}
    whole = fingerprint(pipe)

    def draw() -> Samples:
        decode = fitness.sees == "pictures"
        return sample(pipe, architecture, conditions, batch_size=batch_size, decode=decode, **drawing)

    calls: list[Call] = []
    with _counted_rows(model, searched) as rows:
        if fitness.sees == "outputs":
            calls = _moments(pipe, architecture, conditions, moments, batch_size, drawing)
        else:
            reference = draw()
    before = outputs_of(model, calls)
    if progress:
        progress("reference", 1, 1)
    per_picture = {name: n / len(conditions) for name, n in rows.items()}
    space = Space.of(searched, per_picture, sizes=sizes, budget=budget)
    plan_of_search = _strategy(strategy, space, model, architecture, statistics, progress)
    candidates = Candidates(model, architecture, layers, space, statistics, recipe, seed)

    def evaluate(genome: Genome) -> float:
        candidates.put(genome)
        if fitness.sees == "outputs":
            return fitness.score(before, outputs_of(model, calls))
        return fitness.score(reference, draw())

    name = strategy if isinstance(strategy, str) else "evolution"
    identity = {
        "model and code": whole,
        "recipe": recipe.name,
        "layers": digests.of_json([layer.model_dump(mode="json") for layer in layers]),
        "statistics": "" if statistics is None else digests.of_json(_sums(statistics)),
        "sizes": sorted({size for possible in space.choices for size in possible}),
        "budget": space.budget,
        "strategy": name,
        "settings": digests.of_json(asdict(plan_of_search)) if is_dataclass(plan_of_search) else "",
        "fitness": fitness.name,
        "moments": moments if fitness.sees == "outputs" else None,
        "rounding": rounding,
        "conditions": digests.of_json(list(conditions)),
        "steps": steps,
        "guidance scale": guidance_scale,
        "seed": seed,
    }
    found = study.run(
        space, plan_of_search, evaluate, trials=trials, seed=seed, storage=storage, identity=identity,
        patience=patience, on_trial=on_trial,
    )  # fmt: skip
    genome, value = found.best
    if not math.isfinite(value):
        raise DitqError(f"All {len(found.scored)} candidates draw NaN or Inf; take more bits or another recipe.")
    candidates.put(genome)
    chosen = {layer.name: layer for layer in space.planned(genome)}
    best = [chosen.get(layer.name, layer).model_copy(update=wanted[layer.name]) for layer in layers]
    plan = candidates.plan.model_copy(update={"folds": (), "layers": tuple(best)})
    return SearchResult(
        plan, candidates.plan, genome, value, fitness.name, name, space.cost(genome), space.budget,
        scale_overhead_bits(plan), found.scored, found.evaluated,
    )  # fmt: skip


def _strategy(
    strategy: str | Evolution,
    space: Space,
    model: nn.Module,
    architecture: Architecture,
    statistics: Statistics | None,
    progress: Progress | None,
) -> Evolution | Fixed:
    if isinstance(strategy, Evolution):
        return strategy
    if strategy == "evolution":
        return Evolution()
    if strategy == "random":
        return Evolution(crossover=0, mutation=0)
    if strategy == "uniform":
        return uniform_genomes(space)
    assert statistics is not None
    errors = layer_errors(
        model, architecture, space, statistics,
        None if progress is None else lambda done, total: progress("layer errors", done, total),
    )  # fmt: skip
    return Fixed((integer_program(space, errors),))


def _moments(
    pipe: Any,
    architecture: Architecture,
    conditions: Sequence[str],
    moments: int,
    batch_size: int,
    drawing: dict[str, Any],
) -> list[Call]:
    """Kept calls along the trajectories of all pictures, those of one timestep side by side."""
    calls: list[Call] = []
    done = 0
    for numbers in batches(pipe, conditions, batch_size):
        batch, seed = [conditions[i] for i in numbers], drawing["seed"] + done
        done += len(batch)
        with kept_moments(pipe.transformer, architecture, moments, seed) as recorder:
            sample(pipe, architecture, batch, batch_size=len(batch), decode=False, **{**drawing, "seed": seed})
        calls += recorder.calls()
    return merged(calls, architecture)


@contextmanager
def _counted_rows(model: nn.Module, layers: Sequence[LayerPlan]) -> Iterator[dict[str, int]]:
    """Rows (tokens) that each layer is called with inside."""
    rows = {layer.name: 0 for layer in layers}

    def count(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows[name] += args[0].numel() // args[0].shape[-1]

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(count(name)) for name in rows]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def _sums(statistics: Statistics) -> dict[str, float]:
    return {name: float(group.absmax.double().sum()) for name, group in statistics.groups.items()}
