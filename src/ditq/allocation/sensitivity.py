"""Sensitivity: how much the model suffers if one layer, block or role alone is quantized, on paired seeds.

Every gene is quantized alone at every width, weights and inputs apart, and the model runs on the same transformer
calls of the 16-bit trajectory (``prediction``: the relative squared error of its output, per prompt and timestep) and,
for metrics of images, samples the same prompts from the same noise. The values of every prompt are kept: intervals,
rank agreement and allocation follow from them. A study holds the results, so a run resumes, is shared between
processes, and the same run again reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ditq import digests
from ditq.allocation import study
from ditq.allocation.calibrated import calibrated
from ditq.allocation.candidates import Candidates
from ditq.allocation.choices import Choices
from ditq.allocation.fitness import kept_moments, outputs_of
from ditq.allocation.probes import InputProbes, WeightProbes
from ditq.allocation.program import Fixed
from ditq.allocation.rows import counted_rows
from ditq.allocation.scores import LATENT_ERROR, PREDICTION, MetricKind, Scores
from ditq.allocation.space import Genome, Space
from ditq.architectures import Architecture
from ditq.conversion import draft, plan_layers
from ditq.conversion.rollback import restored_on_error
from ditq.errors import DitqError, UsageError
from ditq.plan import LayerPlan
from ditq.recipe import Recipe
from ditq.sampling import Samples, Sampling, batches, cache_root, condition_list, fingerprint, sample
from ditq.trace.calls import Call, call_time, merged

Part = Literal["weights", "activations"]
PARTS = ("weights", "activations")

Progress = Callable[[str, int, int], None]

# Packages of ditq that the scores depend on, besides those used for sampling.
CODE = ("allocation", "calibration", "conversion", "metrics", "trace")

# Added to the seed, so that neither calibration, nor a search, nor a comparison uses the noise of the measurement.
NOISE_OFFSET = 30_000

PROMPT = "ditq_prompt"
"""An argument that recorded calls carry while they are merged: the number of the prompt of each row."""

DIGITS = 6  # of stored values


@dataclass(frozen=True)
class ImageMetrics:
    """Metrics of images, measured by the caller: this package does not know them.

    Attributes:
        kinds: by name.
        measure: (samples of the 16-bit model, samples of the probed one) to the values of every prompt, by metric.
    """

    kinds: Mapping[str, MetricKind] = field(default_factory=dict)
    measure: Callable[[Samples, Samples], Mapping[str, Sequence[float]]] | None = None


NO_IMAGES = ImageMetrics()


def measure_sensitivity(
    pipe: Any,
    architecture: Architecture,
    recipe: Recipe,
    conditions: Sequence[str],
    sampling: Sampling,
    *,
    part: Part,
    choices: Choices,
    component: str = "transformer",
    moments: int = 4,
    latent: bool = False,
    images: ImageMetrics = NO_IMAGES,
    calibration: Sequence[str] | None = None,
    storage: str | Path | None = None,
    patience: float = study.PATIENCE,
    progress: Progress | None = None,
) -> Scores:
    """Measures every gene at every width, alone. The model is left as it was.

    Args:
        pipe: a 16-bit pipeline.
        architecture: of the transformer.
        recipe: balance, rounding and formats; what is measured replaces the bits.
        conditions: prompts or class names; all measurements use the same ones with the same noise.
        sampling: of the trajectories; its seed also sets the calibration.
        part: what is quantized: weights, with inputs in 16 bit, or activations, with weights in 16 bit.
        choices: widths and the unit (layer, block or role) of a gene. 16 bit is added as the reference.
        component: name of the transformer to measure.
        moments: random timesteps of each prompt at which ``prediction`` is measured.
        latent: also measures the error of the final latents, which takes a whole sampling run for every width.
        images: further metrics, of generated images.
        calibration: conditions to calibrate with, if the recipe needs it.
        storage: of the study; by default in ditq's cache, named by everything that the scores depend on.
        patience: see :func:`ditq.allocation.run`.
        progress: called with ("sensitivity", measurements done, all measurements) and those of the preparation.

    Raises:
        UsageError: no prompts, no widths below 16 bit, missing calibration prompts, or a storage of another run.
        DitqError: the transformer is not called in these sampling steps, or a measurement is NaN or Inf.
    """
    conditions = condition_list(conditions)
    model: nn.Module = getattr(pipe, component)
    _check(recipe, part, choices, moments)
    widths = sorted({16, *(choices.weights or choices.activations)}, reverse=True)
    choices = Choices(**{part: tuple(widths)}, unit=choices.unit)  # type: ignore[arg-type]
    drafted = _searched(draft(model, architecture, recipe), model, architecture)
    space = _space(drafted, choices)
    base: Genome = tuple(possible[0] for possible in space.choices)
    genomes = [base, *(_changed(base, i, c) for i, possible in enumerate(space.choices) for c in possible[1:])]
    identity = {
        "model and code": fingerprint(pipe, code=CODE),
        "component": component,
        "architecture": digests.of_json(architecture.model_dump(mode="json")),
        "recipe": digests.of_json(recipe.model_dump(mode="json")),
        "part": part,
        "genes": digests.of_json([[gene.name, *map(str, gene.plans)] for gene in space.genes]),
        "conditions": digests.of_json(conditions),
        "calibration": digests.of_json(list(calibration or ())),
        "moments": moments,
        "latent": latent,
        "metrics": sorted(images.kinds),
        "sampling": digests.of_json([sampling.seed, sampling.sampler, sampling.batch_size]),
    }
    if storage is None:
        storage = cache_root() / "sensitivity" / f"{digests.of_json(identity)}.search"
    laboratory: list[_Laboratory] = []

    def evaluate(genome: Genome) -> study.Measured:
        if not laboratory:  # a run that finds all results never gets here
            laboratory.append(
                _Laboratory(
                    pipe, component, architecture, recipe, conditions, sampling, part, choices, moments, latent,
                    images, calibration, progress,
                )
            )  # fmt: skip
        return laboratory[0].measured(genome)

    def on_trial(done: int, total: int, best: float) -> None:
        if progress:
            progress("sensitivity", done, total)

    with restored_on_error(model, always=True):
        trials = study.run(
            space, Fixed(tuple(genomes)), evaluate, trials=len(genomes), seed=sampling.seed, storage=storage,
            identity=identity, name=f"{study.NAME}-sensitivity", patience=patience, on_trial=on_trial,
        )  # fmt: skip
    return _scores(space, trials, part, choices, latent, images, recipe, conditions, sampling, component)


def _check(recipe: Recipe, part: Part, choices: Choices, moments: int) -> None:
    widths = choices.weights if part == "weights" else choices.activations
    if part not in PARTS:
        raise UsageError(f"The part to quantize must be weights or activations, got {part!r}.")
    if not [b for b in widths if b < 16]:
        raise UsageError(f"Sensitivity of {part} needs widths below 16 bit, e.g. 8, 4, 3; got {list(widths)}.")
    if recipe.diffusion_step_policy is not None:
        raise UsageError("Sensitivity is measured at every timestep alone: leave diffusion_step_policy out.")
    if moments < 1:
        raise UsageError(f"Sensitivity needs at least 1 timestep of each prompt, got moments={moments}.")


def _searched(layers: Sequence[LayerPlan], model: nn.Module, architecture: Architecture) -> list[LayerPlan]:
    """The quantized layers inside of the blocks."""
    inside = {linear.name for group in architecture.groups(model) for linear in group.linears}
    return [layer for layer in layers if layer.weight is not None and layer.name in inside]


def _space(layers: Sequence[LayerPlan], choices: Choices) -> Space:
    rows = dict.fromkeys((layer.name for layer in layers), 1.0)  # costs are not asked for
    return Space.of(layers, rows, choices=choices, budget=float("inf"), check=False)


def _changed(base: Genome, gene: int, choice: int | str) -> Genome:
    return (*base[:gene], choice, *base[gene + 1 :])


class _Laboratory:
    """The model with its probes and the results of the 16-bit model. Everything slow is here."""

    def __init__(
        self,
        pipe: Any,
        component: str,
        architecture: Architecture,
        recipe: Recipe,
        conditions: Sequence[str],
        sampling: Sampling,
        part: Part,
        choices: Choices,
        moments: int,
        latent: bool,
        images: ImageMetrics,
        calibration: Sequence[str] | None,
        progress: Progress | None,
    ) -> None:
        self.pipe, self.architecture, self.conditions, self.images = pipe, architecture, conditions, images
        self.latent = latent
        self.model: nn.Module = getattr(pipe, component)
        self.noise = sampling.shifted(NOISE_OFFSET)
        seed = sampling.seed
        statistics = None
        if recipe.needs_calibration:
            statistics = calibrated(pipe, component, architecture, recipe, calibration, seed, progress)
        if part == "activations":  # weights stay in floats: there is nothing to round
            recipe = recipe.model_copy(update={"rounding": "nearest"})
        layers = plan_layers(self.model, architecture, recipe, statistics, seed=seed, progress=progress)
        searched = _searched(layers, self.model, architecture)
        with counted_rows(self.model, searched) as rows:
            self.calls, self.steps = _tagged_moments(self.model, pipe, architecture, conditions, moments, self.noise)
        if not any(rows.values()):
            raise DitqError(f"{component} is not called in these sampling steps; measure with more steps.")
        self.rows = {name: count / len(conditions) for name, count in rows.items()}
        self.prompts = [call.pop(PROMPT).tolist() for call in self.calls]
        space = _space(searched, choices)
        kind: type[Candidates] = WeightProbes if part == "weights" else InputProbes
        self.probes = kind(self.model, architecture, layers, space, statistics, recipe, seed)
        self.base: Genome = tuple(possible[0] for possible in space.choices)
        self.probes.put(self.base)
        self.reference = outputs_of(self.model, self.calls)
        self.samples = self._samples() if images.kinds or latent else None

    def measured(self, genome: Genome) -> study.Measured:
        self.probes.put(genome)
        if genome == self.base:
            return study.Measured(0.0, self._facts())
        outputs = outputs_of(self.model, self.calls)
        errors: dict[tuple[int, float], list[float]] = {}
        for call, prompts, a, b in zip(self.calls, self.prompts, self.reference, outputs, strict=True):
            time = call_time(self.architecture, call)
            for prompt, error in zip(prompts, _ratios(a, b), strict=True):
                errors.setdefault((prompt, time), []).append(error)
        values: dict[str, list[float]] = {PREDICTION: [float(np.mean(errors[key])) for key in sorted(errors)]}
        if self.samples is not None:
            samples = self._samples()
            if self.latent:
                values[LATENT_ERROR] = _ratios(self.samples.latents, samples.latents)
            if self.images.measure is not None:
                found = self.images.measure(self.samples, samples)
                values |= {name: list(found[name]) for name in self.images.kinds}
        for name, numbers in values.items():
            if not np.isfinite(numbers).all():
                raise DitqError(f"{name} is NaN or Inf with {_named(genome, self.base, self.probes.space)}.")
        rounded = {name: [float(f"{x:.{DIGITS}g}") for x in numbers] for name, numbers in values.items()}
        return study.Measured(float(np.mean(values[PREDICTION])), {"values": rounded})

    def _facts(self) -> dict[str, Any]:
        """What belongs to the 16-bit model: stored with the trial that changes nothing."""
        pairs = {
            (prompt, call_time(self.architecture, call))
            for call, prompts in zip(self.calls, self.prompts, strict=True)
            for prompt in prompts
        }
        reference: dict[str, list[float]] = {}
        own = [name for name, kind in self.images.kinds.items() if kind.kind == "own"]
        if own and self.samples is not None:
            assert self.images.measure is not None
            found = self.images.measure(self.samples, self.samples)
            for name in own:
                if not np.isfinite(found[name]).all():
                    raise DitqError(f"{name} of the 16-bit model is NaN or Inf.")
            reference = {name: [float(f"{x:.{DIGITS}g}") for x in found[name]] for name in own}
        return {
            "prompts": [prompt for prompt, _ in sorted(pairs)],
            "timesteps": [time for _, time in sorted(pairs)],
            "steps": self.steps,
            "rows": self.rows,
            "reference": reference,
        }

    def _samples(self) -> Samples:
        return sample(self.pipe, self.architecture, self.conditions, self.noise, decode=bool(self.images.kinds))


def _ratios(a: Tensor, b: Tensor) -> list[float]:
    """||b - a||^2 / ||a||^2 of every row."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    ratios: list[float] = ((b - a).square().sum(1) / a.square().sum(1).clamp_min(1e-30)).tolist()
    return ratios


def _named(genome: Genome, base: Genome, space: Space) -> str:
    changed = [f"{g.name} at {c}" for g, c, b in zip(space.genes, genome, base, strict=True) if c != b]
    return " and ".join(changed) or "the 16-bit model"


def _tagged_moments(
    model: nn.Module,
    pipe: Any,
    architecture: Architecture,
    conditions: Sequence[str],
    moments: int,
    sampling: Sampling,
) -> tuple[list[Call], list[float]]:
    """Kept calls along the trajectories of all prompts, merged by timestep, whose rows carry the number of their
    prompt; and the timesteps of the whole run, in order.
    """
    calls: list[Call] = []
    times: list[float] = []
    done = 0
    for numbers in batches(pipe, conditions, sampling.batch_size):
        noise = sampling.shifted(done)
        with kept_moments(model, architecture, moments, noise.seed) as recorder:
            sample(pipe, architecture, [conditions[i] for i in numbers], noise.batch(len(numbers)), decode=False)
        for slot, kept in recorder.by_slot():
            for call in kept:
                rows = len(call[architecture.forward.sample])
                calls.append({**call, PROMPT: torch.full((rows,), numbers[slot])})
        times = times or recorder.times
        done += len(numbers)
    return merged(calls, architecture), times


def _scores(
    space: Space,
    trials: study.Trials,
    part: Part,
    choices: Choices,
    latent: bool,
    images: ImageMetrics,
    recipe: Recipe,
    conditions: Sequence[str],
    sampling: Sampling,
    component: str,
) -> Scores:
    """The results of a finished study as scores."""
    facts, *measured = trials.details
    widths = space.choices[0][1:]
    titles: dict[str, str] = {
        PREDICTION: "prediction error",
        **({LATENT_ERROR: "error of the final latents"} if latent else {}),
    }
    errors = {name: MetricKind(kind="error", higher_is_better=False, title=title) for name, title in titles.items()}
    kinds = {**errors, **images.kinds}
    values: dict[str, list[list[list[float]]]] = {name: [] for name in kinds}
    results = iter(measured)
    for possible in space.choices:
        of_gene = [next(results)["values"] for _ in possible[1:]]
        for name in kinds:
            values[name].append([found[name] for found in of_gene])
    return Scores.model_validate(
        {
            "part": part, "unit": choices.unit, "genes": [gene.name for gene in space.genes],
            "roles": [[layer.role for layer in gene.layers] for gene in space.genes],
            "parameters": [sum(layer.parameters for layer in gene.layers) for gene in space.genes],
            "choices": list(map(str, widths)), "metrics": kinds, "values": values, "reference": facts["reference"],
            "prompts": facts["prompts"], "timesteps": facts["timesteps"], "steps": facts["steps"],
            "rows": facts["rows"],
            "info": {
                "recipe": recipe.name, "component": component, "seed": sampling.seed, "prompts": len(conditions),
                "steps": len(facts["steps"]), "measured": trials.evaluated,
            },
        }
    )  # fmt: skip
