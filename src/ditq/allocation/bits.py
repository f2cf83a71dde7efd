"""Bits for every layer of a pipeline's transformers by sensitivity scores, within budgets that these share.

1. Sensitivity: what quantizing each layer (block, role) alone costs, weights and inputs apart.
2. Weights: the integer program, the greedy rule, or ViDiT-Q's decoupled metrics, within bytes or average bits.
3. Activations, given the weights: the same, within average bits or bit operations; optionally by timestep segment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

from ditq.allocation.budget import Budget, kind_of, shared_limits
from ditq.allocation.calibrated import calibrated
from ditq.allocation.choices import Choices, Unit, segments_of
from ditq.allocation.costs import COSTS, Cost, averaged, costs_of
from ditq.allocation.decoupled import GROUPS, allocate_decoupled, greedy
from ditq.allocation.fitness import LATENT, Fitness
from ditq.allocation.program import Errors, Fixed, integer_program
from ditq.allocation.rivals import interleaved_uniform
from ditq.allocation.scores import ERRORS, LATENT_ERROR, Scores
from ditq.allocation.search import Chosen, SearchResult, other_bytes, search
from ditq.allocation.sensitivity import NO_IMAGES, ImageMetrics, Part, measure_sensitivity
from ditq.allocation.space import Genome, Space
from ditq.allocation.uncertainty import agreement, errors_of
from ditq.architectures import Architecture
from ditq.calibration import Statistics
from ditq.conversion import estimate, plan_layers
from ditq.conversion.rollback import restored_on_error
from ditq.errors import UsageError, unknown
from ditq.plan import LayerPlan
from ditq.recipe import Recipe
from ditq.sampling import Sampling, condition_list

ByScores = Literal["error", "greedy", "decoupled"]
BY_SCORES: tuple[ByScores, ...] = get_args(ByScores)

POWERS = (0.5, 2.0)
"""Of the errors, in further allocations that are tried: the larger, the fewer large errors."""

WEIGHTS = (16, 8, 6, 5, 4, 3, 2)
ACTIVATIONS = (16, 8, 7, 6, 5, 4)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Bits:
    """What to choose.

    Attributes:
        weights, activations: widths to choose from; empty: those of the recipe stay.
        budget: one or several, see :mod:`ditq.allocation.budget`; shared by all transformers.
        unit: what shares a choice: layer, block or role.
        segments: of the sampling trajectory, each with activation bits of its own.
        strategy: ``error``: the integer program on the error; a few allocations are tried in the whole
            model, and the best one counts. ``greedy``: the most sensitive first, as in ViDiT-Q, by the
            error. ``decoupled``: ViDiT-Q's groups of roles, each by its own metric.
        metrics: of ``decoupled``: a metric of images for each group (content, quality, temporal).
        error: of the sensitivity. ``latent``: of the final latents, which takes a whole sampling run for each layer
            and width. ``prediction``: of the transformer's output at a few steps, several times as fast; it does not
            see that errors of some layers add up over the steps.

    Raises:
        UsageError: a value that does not exist, or has no effect.
    """

    budget: tuple[Budget, ...]
    weights: tuple[int, ...] = ()
    activations: tuple[int, ...] = ()
    unit: str = "layer"
    segments: int = 1
    strategy: str = "error"
    metrics: Mapping[str, str] = field(default_factory=dict)
    error: str = LATENT_ERROR

    def __post_init__(self) -> None:
        if self.error not in ERRORS:
            raise unknown("error", self.error, ERRORS)
        if self.strategy not in BY_SCORES:
            raise unknown("strategy", self.strategy, BY_SCORES)
        if not self.weights and not self.activations:
            raise UsageError("Pass widths to choose from: weights=[8, 4, 3] or activations=[8, 6, 4].")
        for part in ("weights", "activations"):
            if getattr(self, part):
                self.choices(part, ())
        if self.segments < 1 or (self.segments > 1 and not self.activations):
            raise UsageError("Segments of the trajectory (at least 1) have their own activations: pass activations=.")
        if self.metrics and self.strategy != "decoupled":
            raise UsageError(f"metrics have no effect with strategy {self.strategy!r}; they are for 'decoupled'.")
        for group in self.metrics:
            if group not in GROUPS:
                raise unknown("group of roles", group, GROUPS)
        if self.strategy == "decoupled" and self.unit == "block":
            raise UsageError("A block has roles of several groups: use unit 'layer' or 'role' with 'decoupled'.")
        if self.segments > 1 and self.metrics:
            raise UsageError("Metrics of images are not known by timestep: pass metrics or segments, not both.")
        for part in self.parts:
            if not self.budgets(part):
                needed = "5GB or weights:4" if part == "weights" else "activations:6, or a number of BitOps"
                raise UsageError(f"Bits of {part} need a budget of their own: pass budget={needed}.")
        shared_limits(self.budget, dict.fromkeys(COSTS, 1.0))  # refuses wrong budgets before the slow part
        used = [budget for part in self.parts for budget in self.budgets(part)]
        for budget in self.budget:
            if budget not in used:
                raise UsageError(f"The budget {budget!r} limits nothing that is chosen ({' and '.join(self.parts)}).")

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is chosen, in order."""
        return tuple(part for part in ("weights", "activations") if getattr(self, part))

    def budgets(self, part: Part) -> tuple[Budget, ...]:
        """The budgets that limit one part: bit operations limit the last one, given the other."""
        kinds = {"weights": {"bytes", "weights"}, "activations": {"activations"}}[part]
        if part == self.parts[-1]:
            kinds = kinds | {"bit_operations"}
        return tuple(budget for budget in self.budget if kind_of(budget) in kinds)

    def choices(self, part: Part, steps: Sequence[float]) -> Choices:
        """The choices of one part; activations by segments of a run with these timesteps, if asked for."""
        parts = () if part == "weights" or self.segments == 1 or not steps else segments_of(steps, self.segments)
        return Choices(**{part: tuple(getattr(self, part))}, unit=cast(Unit, self.unit), segments=parts)


@dataclass(frozen=True)
class Transformer:
    """A transformer of the pipeline, before anything is chosen.

    Attributes:
        layers: plans of all its linears, by the recipe.
        scores: by part.
        share: of all transformer steps that are its own.
    """

    component: str
    architecture: Architecture
    statistics: Statistics | None
    layers: tuple[LayerPlan, ...]
    scores: Mapping[Part, Scores]
    share: float = 1.0

    @property
    def steps(self) -> tuple[float, ...]:
        """The timesteps of its calls in a sampling run."""
        return next(iter(self.scores.values())).steps

    @property
    def rows(self) -> dict[str, float]:
        """Tokens that each layer reads per image."""
        return next(iter(self.scores.values())).rows

    def space(self, pipe: Any, recipe: Recipe, layers: Sequence[LayerPlan], choices: Choices) -> Space:
        """The space of its layers, without a budget."""
        model = getattr(pipe, self.component)
        inside = {linear.name for group in self.architecture.groups(model) for linear in group.linears}
        searched = [layer for layer in layers if layer.weight is not None and layer.name in inside]
        whole = estimate(model, self.architecture, recipe).model_copy(update={"layers": tuple(layers)})
        return Space.of(
            searched, self.rows, choices=choices, budget=float("inf"), other_bytes=other_bytes(whole, searched),
            trajectory=self.steps, check=False,
        )  # fmt: skip


def allocate_bits(
    pipe: Any,
    architectures: Mapping[str, Architecture],
    recipe: Recipe,
    conditions: Sequence[str],
    sampling: Sampling,
    bits: Bits,
    *,
    moments: int = 4,
    images: ImageMetrics = NO_IMAGES,
    fitness: Fitness = LATENT,
    rounding: Literal["nearest", "recipe"] = "recipe",
    calibration: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> list[SearchResult]:
    """Chooses the bits of all transformers; the pipeline's transformers become the chosen ones.

    Args:
        pipe: a 16-bit pipeline.
        architectures: of the transformers to quantize, by component.
        recipe: formats, balance and rounding; the chosen bits replace its bits.
        conditions: prompts or classes on which sensitivity is measured, and the result is evaluated.
        sampling: of the trajectories; its seed also sets the calibration.
        bits: what to choose, within which budgets, and how.
        moments: random timesteps of each prompt at which the prediction error is measured.
        images: metrics of images, for the strategy ``decoupled``.
        fitness, rounding: of the evaluation of the result, see :func:`ditq.allocation.search`.
        calibration: conditions to calibrate with; by default ``conditions``.
        progress: called with (stage, done, total).

    Returns:
        A result for each transformer.

    Raises:
        UsageError: an infeasible budget, which the message names with what is missing; decoupled metrics for several
            transformers at once; see also :class:`Bits` and :func:`ditq.allocation.measure_sensitivity`.
    """
    conditions = condition_list(conditions)
    if bits.strategy == "decoupled" and len(architectures) > 1:
        raise UsageError("Decoupled metrics are those of one transformer: name it, e.g. component='transformer'.")
    _check_feasible(pipe, architectures, recipe, bits)
    found = [
        _measured(
            pipe, name, architecture, recipe, conditions, sampling, bits, moments, images, calibration or conditions,
            progress,
        )
        for name, architecture in architectures.items()
    ]  # fmt: skip
    steps = sum(len(one.steps) for one in found)
    transformers = {one.component: replace(one, share=len(one.steps) / steps) for one in found}
    layers = {name: list(one.layers) for name, one in transformers.items()}
    chosen: dict[str, tuple[Chosen, ...]] = dict.fromkeys(transformers, ())
    notes: list[str] = []
    results: dict[str, SearchResult] = {}
    for part in bits.parts:
        choices = {name: bits.choices(part, one.steps) for name, one in transformers.items()}
        spaces = {
            name: one.space(pipe, recipe, layers[name], choices[name]) for name, one in transformers.items()
        }  # fmt: skip
        genomes, errors, more = _allocated(spaces, transformers, part, bits)
        notes += more
        for name, one in transformers.items():
            tried = Fixed(tuple(dict.fromkeys(genomes[name])))
            with ExitStack() as stack:
                if part != bits.parts[-1]:
                    stack.enter_context(restored_on_error(getattr(pipe, name), always=True))
                result = search(
                    pipe, one.architecture, recipe, conditions, sampling, component=name, strategy=tried,
                    trials=len(tried.genomes), choices=choices[name], fitness=fitness, rounding=rounding,
                    calibration=calibration or conditions, statistics=one.statistics, layers=layers[name],
                    trajectory=one.steps, progress=progress,
                )  # fmt: skip
            planned = {layer.name: layer for layer in spaces[name].planned(result.genome)}
            layers[name] = [planned.get(layer.name, layer) for layer in layers[name]]
            chosen[name] += _explained(spaces[name], result.genome, errors[name])
            if len(tried.genomes) > 1:
                notes.append(_compared(part, tried, result))
            results[name] = result
        together = tuple(choice for name in spaces for choice in results[name].genome)
        notes += _used(Space.joined(spaces, bits.budgets(part)), together, part)
    return [_finished(results[name], one, bits, chosen[name], notes) for name, one in transformers.items()]


def _finished(
    result: SearchResult, transformer: Transformer, bits: Bits, chosen: tuple[Chosen, ...], notes: Sequence[str]
) -> SearchResult:
    """The result with the averages over all layers that could have been quantized, and what was chosen."""
    searched = {layer.name for layer in transformer.layers if layer.weight is not None}
    layers = [layer for layer in result.plan if layer.name in searched and layer.name in transformer.rows]
    costs = {**result.costs, **_averages(layers, transformer)}
    return replace(result, strategy=bits.strategy, chosen=chosen, notes=tuple(notes), costs=costs)


def _compared(part: Part, tried: Fixed, result: SearchResult) -> str:
    values = dict(result.scored)
    numbers = ", ".join(f"{values[genome]:.2f}" for genome in tried.genomes)
    return f"{part}: {result.fitness_name} of the allocations that were tried together: {numbers}; the least was taken"


def _check_feasible(pipe: Any, architectures: Mapping[str, Architecture], recipe: Recipe, bits: Bits) -> None:
    """Refuses budgets of bytes and average bits that no choice meets, before the slow part.

    Costs are those of the draft, which lacks the tensors of the balance: no budget is refused that could be met.
    """
    for part in bits.parts:
        budgets = tuple(budget for budget in bits.budgets(part) if kind_of(budget) != "bit_operations")
        spaces = {}
        for name, architecture in architectures.items():
            model = getattr(pipe, name)
            inside = {linear.name for group in architecture.groups(model) for linear in group.linears}
            whole = estimate(model, architecture, recipe)
            searched = [layer for layer in whole.quantized if layer.name in inside]
            rows = dict.fromkeys((layer.name for layer in searched), 1.0)  # unknown; the cheapest choice is uniform
            spaces[name] = Space.of(
                searched, rows, choices=bits.choices(part, ()), budget=float("inf"),
                other_bytes=other_bytes(whole, searched), check=False,
            )  # fmt: skip
        Space.joined(spaces, budgets).check_limits()


def _averages(layers: Sequence[LayerPlan], transformer: Transformer) -> dict[Cost, float]:
    """Average bits of weights and of inputs over all layers that could have been quantized, those kept included."""
    units = averaged(layers, transformer.rows)
    sums = [costs_of(layer, transformer.rows[layer.name], None, transformer.steps) for layer in layers]
    names: tuple[Cost, ...] = ("weights", "activations")
    return {name: sum(costs[name] for costs in sums) / units[name] for name in names}


def _measured(
    pipe: Any,
    component: str,
    architecture: Architecture,
    recipe: Recipe,
    conditions: Sequence[str],
    sampling: Sampling,
    bits: Bits,
    moments: int,
    images: ImageMetrics,
    calibration: Sequence[str],
    progress: Progress | None,
) -> Transformer:
    """Calibrates one transformer, plans its layers by the recipe, and measures its sensitivity."""
    model = getattr(pipe, component)
    plain = recipe.model_copy(update={"diffusion_step_policy": None, "step_activations": None, "step_weights": None})
    if plain != recipe and bits.activations:
        raise UsageError("Activation bits by timestep are chosen by segments=; leave diffusion_step_policy out.")
    with restored_on_error(model, always=True):
        scores: dict[Part, Scores] = {
            part: measure_sensitivity(
                pipe, architecture, plain, conditions, sampling, part=part, choices=bits.choices(part, ()),
                component=component, moments=moments, latent=bits.error == LATENT_ERROR,
                images=images, calibration=calibration, progress=progress,
            )
            for part in bits.parts
        }  # fmt: skip
        statistics = None
        if recipe.needs_calibration:
            statistics = calibrated(pipe, component, architecture, recipe, calibration, sampling.seed, progress)
        layers = plan_layers(
            model, architecture, recipe, statistics, seed=sampling.seed,
            trajectory=next(iter(scores.values())).steps, progress=progress,
        )  # fmt: skip
    return Transformer(component, architecture, statistics, tuple(layers), scores)


def _allocated(
    spaces: Mapping[str, Space], transformers: Mapping[str, Transformer], part: Part, bits: Bits
) -> tuple[dict[str, list[Genome]], dict[str, Errors], list[str]]:
    """Genomes of all transformers within the shared budgets, the errors that decided, and notes."""
    whole = Space.joined(spaces, bits.budgets(part))
    whole.check_budget()
    errors: dict[str, Errors] = {}
    notes: list[str] = []
    for name, space in spaces.items():
        scores = transformers[name].scores[part]
        # The final latents are those of the whole run; a prediction error is the mean over the own steps.
        share = 1.0 if scores.error == LATENT_ERROR else transformers[name].share
        of_one: Errors = errors_of(space, scores)
        overall = agreement(scores)[-1]
        where = f"{part} of {name}" if len(spaces) > 1 else part
        if overall.is_noise:
            of_one = _alike(space, of_one)
            notes.append(f"{where}: {overall}; all count alike, by their size")
        else:
            notes.append(f"{where}: {overall}")
        errors[name] = [{choice: share * error for choice, error in of_gene.items()} for of_gene in of_one]
    together: Errors = [of_gene for of_one in errors.values() for of_gene in of_one]
    if bits.strategy == "decoupled":
        [(name, one)] = transformers.items()
        space = replace(spaces[name], limits=whole.limits)
        allocation = allocate_decoupled(space, one.scores[part], metrics=bits.metrics)
        alternatives = [allocation.genome]
        notes += [f"{part}: {group}: {mean:.2f} bits on average" for group, mean in allocation.budgets.items()]
        notes += allocation.notes
    elif bits.strategy == "greedy":
        alternatives = [greedy(whole, together)]
    else:
        alternatives = [integer_program(whole, together)]
        if len(spaces) == 1:
            alternatives += _others(whole, together)
    genomes: dict[str, list[Genome]] = {name: [] for name in spaces}
    for genome in alternatives:
        start = 0
        for name, space in spaces.items():
            genomes[name].append(genome[start : start + len(space.genes)])
            start += len(space.genes)
    return genomes, errors, notes


def _others(space: Space, errors: Errors) -> list[Genome]:
    """Allocations to try beside the program's, since large errors do not simply add up: by powers of the errors, and
    uniform.
    """
    powers = ([{c: e**p for c, e in of_gene.items()} for of_gene in errors] for p in POWERS)
    others = [integer_program(space, powered) for powered in powers]
    return [*others, interleaved_uniform(space)] if space.uniforms else others


def _alike(space: Space, errors: Errors) -> Errors:
    """Errors that rank no gene: the mean over genes at each choice, in proportion to the weights of each."""
    sizes = [sum(layer.parameters for layer in gene.layers) * (gene.share or 1.0) for gene in space.genes]
    mean = sum(sizes) / len(sizes)
    means = {
        choice: sum(of_gene[choice] for of_gene in errors if choice in of_gene)
        / max(1, sum(choice in of_gene for of_gene in errors))
        for choice in dict.fromkeys(choice for of_gene in errors for choice in of_gene)
    }
    return [
        {choice: means[choice] * size / mean for choice in of_gene}
        for of_gene, size in zip(errors, sizes, strict=True)
    ]


def _used(space: Space, genome: Genome, part: Part) -> list[str]:
    """How much of each budget is used."""
    return [
        f"{part}: {_amount(space.cost(genome, name), space, name)} of {_amount(limit, space, name)} {_WORDS[name]}"
        for name, limit in space.limits.items()
    ]


def _amount(cost: float, space: Space, name: Cost) -> str:
    """A cost in the words' unit."""
    return f"{cost / 1e6:.2f}" if name == "bytes" else f"{cost / space.units[name]:.6g}"


_WORDS = {
    "bytes": "MB",
    "bit_operations": "bit operations per image",
    "weights": "bits on average",
    "activations": "bits on average",
}


def _explained(space: Space, genome: Genome, errors: Errors) -> tuple[Chosen, ...]:
    return tuple(
        Chosen(
            gene.name, tuple(dict.fromkeys(layer.role for layer in gene.layers)), str(choice), of_gene[choice],
            of_gene[possible[-1]], sum(layer.parameters for layer in gene.layers),
            "" if gene.segment is None else str(gene.segment),
        )
        for gene, choice, of_gene, possible in zip(space.genes, genome, errors, space.choices, strict=True)
    )  # fmt: skip
