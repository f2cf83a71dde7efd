"""The verbs, which the subpackages implement; compare is in ``comparison``."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditq import allocation, architectures, engines, requests
from ditq.allocation import Scores, SearchResult
from ditq.allocation.scores import ERRORS, LATENT_ERROR
from ditq.architectures import Architecture
from ditq.calibration import Statistics, calibrate, watch
from ditq.checkpoint.backend import attach
from ditq.checkpoint.folder import keep_labels, load_pipeline, local, read_plans, resolve, save_pipeline
from ditq.components import plan_of, transformer_names
from ditq.components import transformers as transformers_of
from ditq.conversion import draft, quantize_model
from ditq.conversion.finest import drop_steps, without_steps
from ditq.conversion.rollback import restored_on_error
from ditq.errors import UsageError, unknown
from ditq.files import make_writable, new_folder
from ditq.plan import Plan
from ditq.recipe import Calibration, Recipe
from ditq.recipe import load as load_recipe
from ditq.sampling import Sampling, condition_list, example_condition, trajectory_timesteps

Progress = Callable[[str, int, int], None]


@dataclass
class Result:
    """The result of :func:`quantize`.

    Attributes:
        model: the quantized transformer, changed in place.
        plan: the complete plan, also saved with the checkpoint.
        seconds: time of each stage.
        engine: the engine that runs the model, and its device.
    """

    model: nn.Module
    plan: Plan
    seconds: dict[str, float]
    engine: str

    def summary(self) -> str:
        """A table of the quantized layers, memory and average bits, as text."""
        from ditq.report.tables import plan_text

        return plan_text(self.plan, engine=self.engine)


def quantize(
    pipe: Any,
    recipe: str | Path | Recipe | Plan = "viditq-w4a8",
    *,
    prompts: Sequence[str] | None = None,
    calibrate_with: Callable[[nn.Module], None] | None = None,
    statistics: Statistics | None = None,
    calibration: Calibration | None = None,
    overrides: str | Sequence[str] = (),
    seed: int | None = None,
    architecture: str | Path | Architecture | None = None,
    component: str | None = None,
    cache: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Quantizes the transformer of a pipeline (or a bare transformer) in place.

    A call that fails or is interrupted leaves the transformer as it was. For this, the 16-bit weights stay in memory
    until the call returns.

    Args:
        pipe: a diffusers pipeline, or its transformer.
        recipe: name of a recipe, path of a YAML file, a :class:`Recipe`, or a :class:`Plan` to apply.
        prompts: calibration prompts, or class names or numbers for a class-conditional pipeline.
        calibrate_with: for a bare transformer: a function that runs it on representative inputs.
        statistics: optional, if already computed; replaces the calibration.
        calibration: calibration settings for a Plan that needs calibration; a recipe has its own.
        overrides: ``key=value`` assignments to recipe fields; a single one may be a string.
        seed: of a recipe's rotations and calibration, 0 by default; a Plan has its own.
        architecture: name or YAML file, if ditq does not support the transformer's class.
        component: name of the transformer in the pipeline, by default "transformer", see :mod:`ditq.components`. The
            second is calibrated on the latents of the first as it is, quantized or not.
        cache, resume: of calibration with prompts, see :func:`ditq.calibration.calibrate`.
        progress: called with (stage, done, total).

    Raises:
        UsageError: an unknown recipe or architecture, no prompts for a recipe that needs calibration, a
            transformer that is quantized already, or an argument without effect.
        DitqError: NaN or Inf in weights or activations; nothing to quantize.

    Example:
        >>> import ditq
        >>> pipe = ditq.load("bundled:emoji-t2i")
        >>> result = ditq.quantize(pipe, "rtn-w4a8", overrides=["clip=mse"])
        >>> round(result.plan.average_bits, 2), len(result.plan.quantized)
        (4.96, 80)
    """
    requests.check_prompts(prompts)
    prompts = None if prompts is None else list(prompts)  # an iterator can be read once only
    model = requests.float_transformer(pipe, component)
    job = requests.job_of(recipe, overrides)
    seed = requests.seed_of(job, seed)
    calibrating = statistics is None and job.needs_calibration
    requests.check_quantize(
        pipe is model, job, calibrating, prompts, calibrate_with, statistics, calibration, cache, resume
    )
    arch = architectures.load(architecture) if architecture else architectures.match(model)
    requests.check_weights(model)
    if isinstance(job, Recipe):
        draft(model, arch, job)  # refuses formats that do not fit the layers before the slow calibration
    seconds: dict[str, float] = {}
    with restored_on_error(model):
        model.eval()
        begin = time.perf_counter()
        if calibrating:
            settings = job.calibration if isinstance(job, Recipe) else calibration or Calibration()
            if not job.needs_calls:
                settings = settings.model_copy(update={"calls": 0})
            if calibrate_with is not None:
                statistics = watch(model, arch, calibrate_with, settings.calls, seed)
            else:
                statistics = calibrate(
                    pipe, arch, prompts or (), settings, component=component or "transformer", seed=seed, cache=cache,
                    resume=resume,
                    progress=None if progress is None else lambda done, total: progress("calibrate", done, total),
                )  # fmt: skip
            seconds["calibrate"] = time.perf_counter() - begin
        begin = time.perf_counter()
        trajectory = [] if pipe is model else _trajectory(pipe, arch, job, prompts)
        plan = quantize_model(model, arch, job, statistics, seed=seed, trajectory=trajectory, progress=progress)
        seconds["quantize"] = time.perf_counter() - begin
        attach(model, plan)
    keep_labels(pipe)
    return Result(model, plan, seconds, engines.describe(plan, next(model.parameters()).device))


def _trajectory(
    pipe: Any, architecture: Architecture, job: Recipe | Plan, prompts: Sequence[str] | None
) -> list[float]:
    """The timesteps that a recipe's step policy counts; none without a policy."""
    if not isinstance(job, Recipe) or job.diffusion_step_policy is None:
        return []
    settings = job.calibration
    sampling = Sampling(0, settings.steps, settings.guidance_scale, 1, settings.arguments)
    return trajectory_timesteps(pipe, architecture, (prompts or [example_condition(pipe, architecture)])[0], sampling)


def load(path: str | Path, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    """A pipeline from a folder, a hub id or ``bundled:NAME``, 16-bit or quantized by ditq.

    Args:
        path: folder, hub id or ``bundled:NAME``.
        dtype: of the parameters and of the floating-point computation; by default the choice of diffusers.
        kwargs: further arguments of ``DiffusionPipeline.from_pretrained``, e.g. ``variant="fp16"``.

    Raises:
        UsageError: the folder is not a diffusers pipeline, the pipeline does not have a transformer, or there is no
            bundled model of this name.
        CheckpointError: files are damaged, or do not fit their plan.

    Example:
        >>> import ditq
        >>> type(ditq.load("bundled:emoji-t2i")).__name__
        'PixArtAlphaPipeline'
    """
    pipe = load_pipeline(resolve(path), dtype, **kwargs)
    if getattr(pipe, "transformer", None) is None:
        raise UsageError(f"{path} is a {type(pipe).__name__}, which does not have a transformer to quantize.")
    return pipe


def save(pipe: Any, out: str | Path, *, source: str | Path | None = None, overwrite: bool = False) -> Path:
    """Writes a pipeline to a new folder. If it fails, nothing is left behind.

    Args:
        pipe: a diffusers pipeline.
        out: folder to write.
        source: folder or name from which the pipeline was loaded; components that ditq does not change are copied
            from it.
        overwrite: replaces an existing folder.

    Raises:
        UsageError: the folder exists already.
        DitqError: the folder cannot be written (read-only, full disk).

    Example:
        >>> import ditq
        >>> pipe = ditq.load("bundled:emoji-t2i")
        >>> plan = ditq.quantize(pipe, "rtn-w8a8").plan
        >>> folder = ditq.save(pipe, "emoji-w8a8", source="bundled:emoji-t2i")
        >>> ditq.load(folder).transformer.config.quantization_config.plan == plan
        True
    """
    save_pipeline(pipe, out, source, overwrite)
    return Path(out)


def export(
    source: str | Path,
    out: str | Path,
    *,
    engine: str = "openvino",
    shapes: str = "dynamic",
    attention: str = "auto",
    steps: str = "exact",
    options: Mapping[str, str | int] | None = None,
    condition: str | None = None,
    prompts: Sequence[str] | None = None,
    whole_pipeline: bool = False,
    architecture: str | Path | Architecture | None = None,
    allow_float: bool = False,
    seed: int | None = None,
    variant: str | None = None,
    progress: Progress | None = None,
) -> str:
    """Copies a quantized pipeline and adds its blocks as graphs of another runtime.

    ``DiffusionPipeline.from_pretrained(out)`` then runs the graphs inside the same pipeline. The copy still has the
    whole checkpoint: ``with ditq.use_engine("torch")`` loads it without the graphs.

    Args:
        source: folder of a pipeline quantized by ditq.
        out: folder to write; must not exist.
        engine: "openvino".
        shapes: "dynamic" compiles the graphs once for all sizes. "static" compiles them for each new size, which
            takes seconds; later calls of that size are faster.
        attention: precision of its two products. "f32" is float32. "bf16" is bf16 for long sequences, with
            shapes="static" only. "auto" is bf16 on CPUs with bf16 instructions. "int8" rounds queries and keys to
            8 bits with static scales, calibrated on ``prompts``, and is like "auto" otherwise.
        steps: of a plan whose activation bits change with the timestep, which graphs do not have. "exact" refuses it;
            "finest" exports the nearest plan, with the most precise bits of each layer at all timesteps.
        options: of the runtime by its own names, e.g. ``{"INFERENCE_NUM_THREADS": 4}``; kept in the config.
        condition: prompt or class of the example call; any will do.
        prompts, seed, progress: as in :func:`quantize`, for attention="int8" only. At most 16 prompts are used; by
            default the class names of the pipeline, if it has them.
        whole_pipeline: also exports the decoder of the VAE and T5 text encoders, in floating point.
        architecture: name or YAML file, if ditq does not support the transformer's class.
        allow_float: accepts layers that the runtime executes in floating point.
        variant: of the weights of ``source``, as in ``ditq.load(source, variant=...)``.

    Returns:
        How the layers are executed, as text.

    Raises:
        UsageError: an unknown engine or option, a source that is not a folder quantized by ditq, an existing
            ``out``, or prompts or a seed for attention other than "int8".
        DitqError: the runtime is not available, or would execute a quantized layer in floating point.

    Example:
        >>> import ditq
        >>> pipe = ditq.load("bundled:emoji-t2i")
        >>> result = ditq.quantize(pipe, "rtn-w8a8")
        >>> folder = ditq.save(pipe, "emoji-w8a8-to-export")
        >>> print(ditq.export(folder, "emoji-w8a8-cpu"))  # doctest: +SKIP
    """
    from ditq.engines import use_engine
    from ditq.openvino.pipeline import export_pipeline
    from ditq.openvino.properties import check_properties

    requests.check_export(engine, shapes, attention, steps, prompts, seed)
    folder = local(source, "export")
    plans = read_plans(folder, variant)
    if not plans:
        raise UsageError(f"{source} is not a folder with a pipeline quantized by ditq; run ditq quantize first.")
    settings = {"name": engine, "shapes": shapes, "attention": attention, "options": dict(options or {})}
    with new_folder(out) as temporary:
        check_properties(options or {})
        with use_engine("torch"):
            pipe = load(folder, variant=variant)
        arch = architectures.load(architecture) if architecture else architectures.match(pipe.transformer)
        shutil.copytree(folder, temporary, dirs_exist_ok=True)
        make_writable(temporary)
        if steps == "finest":
            _drop_steps(pipe, temporary, variant)
        return export_pipeline(
            pipe, arch, temporary, settings, quantized=list(plans), condition=condition, prompts=prompts,
            whole_pipeline=whole_pipeline, allow_float=allow_float, seed=seed or 0, progress=progress,
        )  # fmt: skip


def _drop_steps(pipe: Any, folder: Path, variant: str | None) -> None:
    """Gives the transformers of a pipeline their most precise grids at all timesteps, and saves them into its copy.

    Raises:
        UsageError: no layer changes with the timestep.
    """
    changed = 0
    for name, model in transformers_of(pipe).items():
        if drop_steps(model):
            changed += 1
            attach(model, without_steps(plan_of(model)))
            model.save_pretrained(folder / name, variant=variant)
    if not changed:
        raise UsageError("steps='finest' has no effect: no layer changes with the timestep. Leave it out.")


def search(
    pipe: Any,
    recipe: str | Path | Recipe = "qdit-w4a8",
    prompts: Sequence[str] = (),
    *,
    weights: Sequence[int] = (),
    activations: Sequence[int] = (),
    unit: str = "layer",
    segments: int = 1,
    budget: float | str | Sequence[float | str] | None = None,
    strategy: str | allocation.Evolution | None = None,
    metrics: Mapping[str, str] | None = None,
    error: str | None = None,
    network: str = "auto",
    overrides: str | Sequence[str] = (),
    architecture: str | Path | Architecture | None = None,
    component: str | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 16,
    arguments: Mapping[str, Any] | None = None,
    **options: Any,
) -> SearchResult:
    """Searches bits, or a group size, for every linear layer, within budgets.

    Apply ``result.plan`` to a fresh pipeline with :func:`quantize`. Bits are searched if ``weights`` or
    ``activations`` are passed, or a budget of bytes or bits: by default, the sensitivity of every layer is measured
    and an integer program chooses (:func:`ditq.allocation.allocate_bits`). Otherwise group sizes are searched, by
    evolution.

    Args:
        pipe: a 16-bit pipeline. The search changes it: its transformers become the best candidates.
        recipe, overrides: formats and balance of the layers, see :func:`quantize`.
        prompts: prompts, or class names or numbers, that every candidate samples.
        weights, activations: bits to choose from, 2 to 8 or 16. With a budget in bytes or bits of weights alone,
            weights default to :data:`ditq.allocation.WEIGHTS`; likewise activations.
        unit: what shares its bits: "layer", "block" or "role".
        segments: parts of the sampling trajectory with activation bits of their own.
        budget: one or several, e.g. "5GB", "weights:3.5", ["weights:4", "activations:6"], see
            :mod:`ditq.allocation.budget`. All transformers of the pipeline share them.
        strategy: for bits: "error" (default), "greedy" or "decoupled"; or, one transformer at a time, those of
            :func:`ditq.allocation.search`: "evolution" (default for group sizes), "random", "program", "uniform".
        error: of the sensitivity: "latent" (default; of the final latents, a sampling run for each layer and width),
            or "prediction" (at a few steps, several times as fast).
        metrics: of "decoupled": a metric of ``ditq compare`` for groups of roles, e.g. ``{"content": "clip_score"}``.
        network: the feature network, for metrics that need one.
        architecture: name or YAML file, if ditq does not support the transformer's class.
        component: name of the transformer to search; by default all, one after the other. The second is searched
            with the first as its best candidate. ``result.plans`` has the plan of each.
        seed, steps, guidance_scale, batch_size, arguments: see :class:`ditq.sampling.Sampling`.
        options: of :func:`ditq.allocation.search`: trials, sizes, fitness, storage ...; with a strategy by scores:
            moments, fitness, rounding, calibration, progress.

    Raises:
        UsageError, DitqError: see :func:`ditq.allocation.search`.

    Example:
        >>> import ditq
        >>> pipe = ditq.load("bundled:emoji-class")
        >>> result = ditq.search(pipe, "rtn-w4a8", ["0", "1"], sizes=[64, 128, 256], trials=2, steps=2)
        >>> result.strategy, len(result.scored)
        ('evolution', 2)
        >>> pipe = ditq.load("bundled:emoji-class")
        >>> result = ditq.search(
        ...     pipe, "rtn-w4a8", ["0", "1"], weights=[8, 4, 3], unit="role", budget="weights:4", steps=2, moments=1
        ... )
        >>> result.strategy, round(result.costs["weights"], 1) <= 4.0
        ('error', True)
    """
    prompts = condition_list(prompts)
    models = requests.float_transformers(pipe, component)
    if len(models) > 1 and options.get("statistics") is not None:
        raise UsageError("statistics= are those of one transformer: name it, e.g. component='transformer'.")
    sampling = Sampling(seed, steps, guidance_scale, batch_size, dict(arguments or {}))
    loaded = load_recipe(recipe).override(overrides)
    archs = {
        name: architectures.load(architecture) if architecture else architectures.match(model)
        for name, model in models.items()
    }
    job = requests.search_job(weights, activations, unit, segments, budget, strategy, metrics, error, options)
    results = []
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(restored_on_error(model))
            model.eval()
        if isinstance(job, allocation.Bits):
            results = allocation.allocate_bits(
                pipe, archs, loaded, prompts, sampling, job,
                images=_image_metrics(sorted(set(job.metrics.values())), network), **options,
            )  # fmt: skip
            for result in results:
                attach(models[result.component], result.candidate)
        else:
            for name, arch in archs.items():
                result = allocation.search(pipe, arch, loaded, prompts, sampling, component=name, **job, **options)
                attach(models[name], result.candidate)
                results.append(result)
    return replace(results[0], others=tuple(results[1:]))


def sensitivity(
    pipe: Any,
    recipe: str | Path | Recipe = "rtn-w4a8",
    prompts: Sequence[str] = (),
    *,
    weights: Sequence[int] = (8, 4, 3),
    activations: Sequence[int] = (8, 6, 4),
    unit: str = "block",
    error: str = "latent",
    metrics: Sequence[str] = (),
    network: str = "auto",
    moments: int = 4,
    overrides: str | Sequence[str] = (),
    architecture: str | Path | Architecture | None = None,
    component: str | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 16,
    arguments: Mapping[str, Any] | None = None,
    calibration: Sequence[str] | None = None,
    storage: str | Path | None = None,
    progress: Progress | None = None,
) -> list[Scores]:
    """Measures how much the model suffers if one layer, block or role alone is quantized, on paired seeds.

    Weights and activations are measured apart, at every width. The same call again reads the results from ditq's
    cache; several processes share the work; an interrupted run goes on. The pipeline is left as it was.

    Args:
        pipe: a 16-bit pipeline.
        recipe, overrides: balance, rounding and formats; the widths replace its bits. See :func:`quantize`.
        prompts: prompts, or class names or numbers, of all measurements.
        weights, activations: bits to measure, of 2 to 8; an empty list leaves that part out.
        unit: what is quantized alone: "layer", "block" or "role".
        error: "latent" also measures the error of the final latents, in a whole sampling run for every width;
            "prediction" only that of the transformer's output, several times as fast.
        metrics: of generated images, besides these errors: names of ``ditq compare``'s metrics with a value
            for each prompt. They need whole sampling runs and take most of the time.
        network: the feature network, for metrics that need one.
        moments: random timesteps of each prompt at which the prediction error is measured.
        architecture: name or YAML file, if ditq does not support the transformer's class.
        component: name of the transformer to measure; by default all, one after the other.
        seed, steps, guidance_scale, batch_size, arguments: see :class:`ditq.sampling.Sampling`.
        calibration: prompts to calibrate with, for recipes that need it; by default ``prompts``.
        storage: file of the study; by default in ditq's cache, named by everything that the scores depend on.
        progress: called with (stage, done, total).

    Returns:
        The scores of every transformer and part.

    Raises:
        UsageError, DitqError: see :func:`ditq.allocation.measure_sensitivity`.

    Example:
        >>> import ditq
        >>> pipe = ditq.load("bundled:emoji-class")
        >>> scores = ditq.sensitivity(pipe, "rtn-w4a8", ["0", "1"], weights=[4], activations=[], steps=2, moments=1)
        >>> scores[0].choices, len(scores[0].genes)
        (('w4',), 8)
    """
    prompts = condition_list(prompts)
    models = requests.float_transformers(pipe, component)
    sampling = Sampling(seed, steps, guidance_scale, batch_size, dict(arguments or {}))
    loaded = load_recipe(recipe).override(overrides)
    parts = requests.sensitivity_parts(weights, activations, unit)
    if error not in ERRORS:
        raise unknown("error", error, ERRORS)
    if storage is not None and len(parts) * len(models) > 1:
        raise UsageError(
            "storage= is the file of one study, and this run has several (weights and activations of every "
            "transformer). Leave it out, or measure one: activations=[] and component='transformer'."
        )
    images = _image_metrics(metrics, network)
    scores = []
    for name, model in models.items():
        arch = architectures.load(architecture) if architecture else architectures.match(model)
        with restored_on_error(model, always=True):
            model.eval()
            for part, choices in parts.items():
                scores.append(
                    allocation.measure_sensitivity(
                        pipe, arch, loaded, prompts, sampling, part=part, choices=choices, component=name,
                        moments=moments, latent=error == LATENT_ERROR, images=images,
                        calibration=calibration or prompts, storage=storage,
                        progress=progress,
                    )
                )  # fmt: skip
    return scores


def _image_metrics(metrics: Sequence[str], network: str) -> allocation.ImageMetrics:
    if not metrics:
        return allocation.NO_IMAGES
    from ditq.metrics.per_image import image_metrics

    return image_metrics(metrics, network)


transformers = transformer_names
"""Alias with the name that it had in ditq 0.1."""
