"""The whole search on a pipeline: sample the reference, build the space, run the strategy, return the plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ditq import digests
from ditq.allocation import study
from ditq.allocation.budget import Budget
from ditq.allocation.calibrated import calibrated
from ditq.allocation.candidates import Candidates
from ditq.allocation.choices import Choices
from ditq.allocation.costs import Cost, scale_overhead_bits
from ditq.allocation.evolution import Evolution, Scored
from ditq.allocation.fitness import PREDICTION, Fitness, kept_moments, outputs_of
from ditq.allocation.program import Fixed, integer_program, layer_errors, uniform_genomes
from ditq.allocation.rows import counted_rows
from ditq.allocation.space import Genome, Space
from ditq.architectures import Architecture
from ditq.calibration import Statistics
from ditq.conversion import draft, estimate, plan_layers
from ditq.errors import DitqError, UsageError, unknown
from ditq.plan import LayerPlan, Plan
from ditq.recipe import Recipe
from ditq.sampling import (
    Samples,
    Sampling,
    batches,
    condition_list,
    fingerprint,
    sample,
    trajectory_timesteps,
)  # fmt: skip
from ditq.trace.calls import Call, merged

STRATEGIES = ("evolution", "random", "program", "uniform")
ROUNDINGS = ("nearest", "recipe")

# Packages of ditq that the fitness of a candidate depends on, besides those used for sampling.
CODE = ("allocation", "calibration", "conversion", "metrics", "trace")

# Added to the seed, so that neither calibration nor a comparison with the same seed uses the noise of the search.
NOISE_OFFSET = 20_000

SAMPLING = Sampling(batch_size=16)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Chosen:
    """What one gene got, and why.

    Attributes:
        gene: name of the layer, block or role, with the timestep segment if it has one.
        roles: of its layers.
        choice: e.g. ``w4``.
        error: relative error of the transformer's output if only this gene is quantized so; shrunk by its noise.
        cheapest: the error at the cheapest choice.
        parameters: weights of its layers.
        segment: its timesteps, e.g. ``t > 500``; empty for all.
    """

    gene: str
    roles: tuple[str, ...]
    choice: str
    error: float
    cheapest: float
    parameters: int
    segment: str = ""


@dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Attributes:
        plan: the best allocation, with the recipe's rounding; apply it to a fresh pipeline.
        candidate: the plan of the best candidate that the model now has, with the candidates' rounding.
        genome: choices of the best candidate.
        fitness: of the best candidate; smaller is better.
        fitness_name: name of the fitness.
        strategy: name of the strategy.
        bit_operations: BitOps of the plan per image.
        budget: limit of the first budget.
        costs: of the plan, in the units of budgets: bytes of the transformer, BitOps per image, average bits of the
            searched weights and of their inputs.
        scale_overhead_bits: bits of scales and zero points per quantized weight.
        scored: all individuals with their fitness.
        evaluated: number of individuals that this process evaluated.
        component: name of the transformer in the pipeline.
        others: results of the pipeline's other transformers, searched after this one.
        chosen: what was chosen by scores, for each gene; empty for other strategies.
        notes: what the user should know about the scores and budgets.
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
    costs: dict[Cost, float] = field(default_factory=dict)
    component: str = "transformer"
    others: tuple[SearchResult, ...] = ()
    chosen: tuple[Chosen, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def plans(self) -> dict[str, Plan]:
        """The plan of every transformer that was searched, by component."""
        return {result.component: result.plan for result in (self, *self.others)}

    def summary(self) -> str:
        """The result in three lines per transformer; several transformers are headed by their names."""
        if not self.others:
            return self._lines()
        return "\n".join(f"{result.component}:\n{result._lines()}" for result in (self, *self.others))

    def _chosen_lines(self) -> str:
        """The costs, the error, and what was chosen for each role."""
        bits = f"{self.costs['weights']:.2f} bits a weight, {self.costs['activations']:.2f} bits an input"
        return "\n".join(
            [
                f"{self.strategy}: {self.costs['bytes'] / 1e6:.2f} MB, {bits} (of the layers in the blocks)",
                f"{self.fitness_name} {self.fitness:.4g} on the prompts of the search",
                *self.notes,
            ]
        )

    def _lines(self) -> str:
        if self.chosen:
            return self._chosen_lines()
        counts = {choice: self.genome.count(choice) for choice in sorted(set(self.genome), key=str)}
        if isinstance(self.genome[0], int):
            counts = {size: self.genome.count(size) for size in sorted(set(self.genome))}
            chosen = "group sizes: " + ", ".join(f"{count} of {size}" for size, count in counts.items()) + " layers"
        else:
            chosen = "chosen: " + ", ".join(f"{count} x {choice}" for choice, count in counts.items())
        costs = (
            f"{self.bit_operations:.4g} BitOps per image, budget {self.budget:.4g}"
            if isinstance(self.genome[0], int)
            else f"{self.costs['bytes'] / 1e6:.2f} MB, weights of {self.costs['weights']:.2f} bits, inputs of "
            f"{self.costs['activations']:.2f} bits, {self.bit_operations:.4g} BitOps per image"
        )
        return (
            f"{self.strategy}: {self.fitness_name} {self.fitness:.4g}, the best of {len(self.scored)} allocations "
            f"({self.evaluated} evaluated by this process)\n"
            f"{chosen}\n"
            f"{costs}; scales take {self.scale_overhead_bits:.3f} bits per weight"
        )


def search(
    pipe: Any,
    architecture: Architecture,
    recipe: Recipe,
    conditions: Sequence[str],
    sampling: Sampling = SAMPLING,
    *,
    component: str = "transformer",
    strategy: str | Evolution | Fixed = "evolution",
    trials: int = 500,
    sizes: Sequence[int] | None = None,
    choices: Choices | None = None,
    budget: Budget | Sequence[Budget] | None = None,
    fitness: Fitness = PREDICTION,
    moments: int = 1,
    rounding: Literal["nearest", "recipe"] = "recipe",
    calibration: Sequence[str] | None = None,
    statistics: Statistics | None = None,
    layers: Sequence[LayerPlan] | None = None,
    trajectory: Sequence[float] = (),
    storage: str | Path | None = None,
    patience: float = study.PATIENCE,
    progress: Progress | None = None,
    on_trial: Callable[[int, int, float], None] | None = None,
) -> SearchResult:
    """Searches the layer plans of the linears that ``recipe`` quantizes: their group sizes (Q-DiT's automatic
    granularity allocation), or the bits of their weights or activations.

    The recipe sets the formats, the balance and the layers that stay in 16 bit; what is chosen replaces its part of
    the formats. The search changes the pipeline: its transformer becomes the best candidate.

    Args:
        pipe: a 16-bit pipeline.
        architecture: of the transformer.
        recipe: of the layers.
        conditions: prompts or class names that every candidate samples, with the same noise for each candidate.
        sampling: of the candidates; its seed also sets calibration and the individuals.
        component: name of the transformer to search. Other transformers of the pipeline run as they are.
        strategy: one of ``STRATEGIES``, an :class:`Evolution` with settings other than the paper's, or
            :class:`Fixed` genomes, which no budget restricts.
        trials: largest number of candidates to evaluate; ``program`` and ``uniform`` have fewer.
        sizes, choices: see :meth:`Space.of`.
        budget: one or several, see :mod:`ditq.allocation.budget`; by default ``uniform:128`` for group sizes.
        fitness: score of a candidate.
        moments: random timesteps of each image that a fitness of outputs uses. At equal cost, many images with few
            moments generalize better than few images with all their moments.
        rounding: of the candidates. "recipe" uses the recipe's rounding; if that is GPTQ, each layer is rounded once
            at each size, on inputs of the 16-bit model. "nearest" is the paper's.
        calibration: conditions to calibrate with, if the recipe or ``program`` needs calibration.
        statistics: optional, if already computed; replaces the calibration.
        layers: plans of all linears to start from, if already computed; by default those of the recipe.
        trajectory: timesteps of the sampling run, for ``layers`` that change with them.
        storage, patience: see :func:`ditq.allocation.run`.
        progress: called with (stage, done, total) during the preparation.
        on_trial: see :func:`ditq.allocation.run`.

    Raises:
        UsageError: an unknown strategy; no conditions; calibration is needed but no prompts for it were passed;
            see also :meth:`Space.of` and :func:`ditq.allocation.run`.
        DitqError: every candidate generates NaN or Inf; or the transformer is not called in these sampling steps.
    """
    _check(strategy, rounding, moments, trials)
    conditions, seed = condition_list(conditions), sampling.seed
    model: nn.Module = getattr(pipe, component)
    candidate = recipe if rounding == "recipe" else recipe.model_copy(update={"rounding": "nearest"})
    if statistics is None and (candidate.needs_calibration or strategy == "program"):
        statistics = calibrated(pipe, component, architecture, recipe, calibration, seed, progress)
    trajectory = trajectory or _trajectory(pipe, architecture, recipe, conditions, sampling, choices)
    layers = list(
        layers
        or plan_layers(model, architecture, candidate, statistics, seed=seed, trajectory=trajectory, progress=progress)
    )
    in_stacks = {linear.name for group in architecture.groups(model) for linear in group.linears}
    searched = [layer for layer in layers if layer.weight is not None and layer.name in in_stacks]
    recipe_layers = draft(model, architecture, recipe)
    pipeline_hash = fingerprint(pipe, code=CODE)
    noise = sampling.shifted(NOISE_OFFSET)
    rows, score = _scorer(pipe, component, architecture, conditions, noise, searched, fitness, moments)
    if not any(rows.values()):
        raise DitqError(f"{component} is not called in these sampling steps; search with more steps.")
    if progress:
        progress("reference", 1, 1)
    rows_per_image = {name: n / len(conditions) for name, n in rows.items()}
    whole = estimate(model, architecture, recipe).model_copy(update={"layers": tuple(layers)})
    space = Space.of(
        searched, rows_per_image, sizes=sizes, choices=choices,
        budget=float("inf") if isinstance(strategy, Fixed) else _budget(budget, choices),
        other_bytes=other_bytes(whole, searched),
        trajectory=trajectory, check=not isinstance(strategy, Fixed),
    )  # fmt: skip
    chosen_strategy = _strategy(strategy, space, model, architecture, statistics, progress)
    candidates = Candidates(model, architecture, layers, space, statistics, recipe, seed)

    def evaluate(genome: Genome) -> float:
        candidates.put(genome)
        return score()

    name = strategy if isinstance(strategy, str) else "fixed" if isinstance(strategy, Fixed) else "evolution"
    identity = {
        "model and code": pipeline_hash,
        "component": component,
        "architecture": digests.of_json(architecture.model_dump(mode="json")),
        "recipe": recipe.name,
        "layers": digests.of_json([layer.model_dump(mode="json") for layer in layers]),
        "statistics": "" if statistics is None else digests.of_json(_sums(statistics)),
        **_settings(space, chosen_strategy, name, fitness, moments),
        "rounding": rounding,
        "conditions": digests.of_json(conditions),
        "steps": sampling.steps,
        "guidance scale": sampling.guidance_scale,
        "arguments": digests.of_json(dict(sampling.arguments)),
        "seed": seed,
    }
    results = study.run(
        space, chosen_strategy, evaluate, trials=trials, seed=seed, storage=storage, identity=identity,
        name=study.NAME if component == "transformer" else f"{study.NAME}-{component}", patience=patience,
        on_trial=on_trial,
    )  # fmt: skip
    genome, value = results.best
    if not math.isfinite(value):
        raise DitqError(
            f"All {len(results.scored)} candidates generate NaN or Inf; choose more bits or another recipe."
        )
    candidates.put(genome)
    followed = {"trajectory": tuple(trajectory) or None}
    candidates.plan = candidates.plan.model_copy(update=followed)
    plan = _plan(candidates.plan, layers, space.planned(genome), recipe_layers)
    return SearchResult(
        plan, candidates.plan, genome, value, fitness.name, name, space.cost(genome, "bit_operations"), space.budget,
        scale_overhead_bits(plan), results.scored, results.evaluated, space.averages(genome), component,
    )  # fmt: skip


def _trajectory(
    pipe: Any,
    architecture: Architecture,
    recipe: Recipe,
    conditions: Sequence[str],
    sampling: Sampling,
    choices: Choices | None,
) -> list[float]:
    """The timesteps of the sampling run, if the bits of a layer may change with them."""
    if recipe.diffusion_step_policy is None and not (choices and choices.segments):
        return []
    return trajectory_timesteps(pipe, architecture, conditions[0], sampling)


def _plan(
    candidate: Plan, layers: Sequence[LayerPlan], chosen: Sequence[LayerPlan], recipe_layers: Sequence[LayerPlan]
) -> Plan:
    """The best candidate with the recipe's rounding, ready for a fresh pipeline."""
    best, roundings = {layer.name: layer for layer in chosen}, {layer.name: layer for layer in recipe_layers}

    def rounded(layer: LayerPlan) -> LayerPlan:
        if layer.weight is None:
            return layer
        wanted = roundings[layer.name]
        return layer.model_copy(update={"rounding": wanted.rounding, "gptq": wanted.gptq})

    final = (rounded(best.get(layer.name, layer)) for layer in layers)
    return candidate.model_copy(update={"layers": tuple(final)})


def _settings(
    space: Space, strategy: Evolution | Fixed, name: str, fitness: Fitness, moments: int
) -> dict[str, str | int | float | list[int] | None]:
    """The search settings in a study's identity."""
    return {
        "choices": digests.of_json([[gene.name, *map(str, gene.plans)] for gene in space.genes]),
        "budget": digests.of_json(space.limits) if len(space.limits) > 1 else space.budget,
        "strategy": name,
        "settings": digests.of_json(asdict(strategy)) if is_dataclass(strategy) else "",
        "fitness": fitness.name,
        "moments": moments if fitness.sees == "outputs" else None,
    }


def other_bytes(plan: Plan, searched: Sequence[LayerPlan]) -> int:
    """Bytes of a transformer besides the searched layers."""
    return plan.memory()[0] - sum(layer.stored_bytes() for layer in searched)


def _budget(budget: Budget | Sequence[Budget] | None, choices: Choices | None) -> Budget | Sequence[Budget]:
    if budget is not None:
        return budget
    if choices is not None and not choices.of_sizes:
        raise UsageError("A search of bits needs a budget, e.g. budget='weights:4' or budget='5GB'.")
    return "uniform:128"


def _check(strategy: str | Evolution | Fixed, rounding: str, moments: int, trials: int) -> None:
    if isinstance(strategy, str) and strategy not in STRATEGIES:
        raise unknown("strategy", strategy, STRATEGIES)
    if rounding not in ROUNDINGS:
        raise unknown("rounding of candidates", rounding, ROUNDINGS)
    if moments < 1:
        raise UsageError(f"A fitness of outputs needs at least 1 timestep of each image, got moments={moments}.")
    if trials < 1:
        raise UsageError(f"A search needs at least 1 trial, got {trials}.")


def _scorer(
    pipe: Any,
    component: str,
    architecture: Architecture,
    conditions: Sequence[str],
    sampling: Sampling,
    layers: Sequence[LayerPlan],
    fitness: Fitness,
    moments: int,
) -> tuple[dict[str, int], Callable[[], float]]:
    """Records the results of the 16-bit model as the reference of the search.

    Returns:
        Rows (tokens) that each layer read; and a function that returns the fitness of the model in its current state.
    """
    model: nn.Module = getattr(pipe, component)
    if fitness.sees == "outputs":
        with counted_rows(model, layers) as rows:
            calls = _moments(pipe, component, architecture, conditions, moments, sampling)
        reference_outputs = outputs_of(model, calls)
        return rows, lambda: fitness.score(reference_outputs, outputs_of(model, calls))

    def samples() -> Samples:
        return sample(pipe, architecture, conditions, sampling, decode=fitness.sees == "pictures")

    with counted_rows(model, layers) as rows:
        reference = samples()
    return rows, lambda: fitness.score(reference, samples())


def _strategy(
    strategy: str | Evolution | Fixed,
    space: Space,
    model: nn.Module,
    architecture: Architecture,
    statistics: Statistics | None,
    progress: Progress | None,
) -> Evolution | Fixed:
    if isinstance(strategy, Evolution | Fixed):
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
    component: str,
    architecture: Architecture,
    conditions: Sequence[str],
    moments: int,
    sampling: Sampling,
) -> list[Call]:
    """Kept calls along the trajectories of all images, merged by timestep."""
    calls: list[Call] = []
    done = 0
    for numbers in batches(pipe, conditions, sampling.batch_size):
        batch, noise = [conditions[i] for i in numbers], sampling.shifted(done)
        done += len(batch)
        with kept_moments(getattr(pipe, component), architecture, moments, noise.seed) as recorder:
            sample(pipe, architecture, batch, noise.batch(len(batch)), decode=False)
        calls += recorder.calls()
    return merged(calls, architecture)


def _sums(statistics: Statistics) -> dict[str, list[float]]:
    """Sums over the maxima and over the sample of every group."""
    return {
        name: [float(part.double().sum()) for part in (group.absmax, group.sample)]
        for name, group in statistics.groups.items()
    }
