"""The verbs: quantize, load, save, export, search (and compare, in ``comparison``). What they do is in the folders."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditq import allocation, architectures, engines
from ditq.allocation import SearchResult
from ditq.architectures import Architecture
from ditq.calibration import Statistics, calibrate
from ditq.calibration.capture import Capture
from ditq.checkpoint.backend import attach
from ditq.checkpoint.folder import load_pipeline, read_plans, resolve, save_pipeline
from ditq.components import transformer_names
from ditq.conversion import convert, draft, quantize_model
from ditq.errors import DitqError, UsageError, unknown
from ditq.files import new_folder
from ditq.openvino.options import ATTENTIONS, SHAPES
from ditq.plan import Plan
from ditq.recipe import Calibration, Recipe
from ditq.recipe import load as load_recipe
from ditq.sampling import Sampling

Progress = Callable[[str, int, int], None]


@dataclass
class Result:
    """What :func:`quantize` did.

    Attributes:
        model: the quantized transformer (it was changed in place).
        plan: the complete plan, also saved with the checkpoint.
        seconds: time of each stage.
        engine: who runs it, and on which device.
    """

    model: nn.Module
    plan: Plan
    seconds: dict[str, float]
    engine: str

    def summary(self) -> str:
        """A table of what was done to which layer, memory and average bits, as text."""
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

    Args:
        pipe: a diffusers pipeline, or its transformer.
        recipe: name of a recipe, path of a YAML file, a :class:`Recipe`, or a :class:`Plan` to carry out.
        prompts: what calibration draws: prompts, or class names or numbers for a class-conditional pipeline.
        calibrate_with: for a bare transformer: a function that runs it on representative inputs.
        statistics: finished statistics, instead of calibrating here.
        calibration: how to calibrate for a Plan that needs it; a recipe says so itself.
        overrides: ``key=value`` assignments to recipe fields; a single one may be a string.
        seed: of a recipe's rotations and calibration, 0 by default; a Plan carries its own.
        architecture: name or YAML file, where the transformer's class is not known to ditq.
        component: which transformer of the pipeline, by default "transformer", see :mod:`ditq.components`. The second
            is calibrated on what the first, quantized or not, hands over to it.
        cache, resume: of calibration by prompts, see :func:`ditq.calibration.calibrate`.
        progress: called with (stage, done, total).

    Raises:
        UsageError: an unknown recipe or architecture, no prompts where calibration is needed, a
            transformer that is quantized already, or an argument that would have no effect.
        DitqError: NaN or Inf in weights or activations; nothing to quantize.
    """
    model = _transformer(pipe, component)
    job = _job(recipe, overrides)
    seed = _seed(job, seed)
    calibrating = statistics is None and job.needs_calibration
    _check_arguments(pipe is model, job, calibrating, prompts, calibrate_with, statistics, calibration, cache, resume)
    arch = architectures.load(architecture) if architecture else architectures.match(model)
    check_weights(model)
    if isinstance(job, Recipe):
        draft(model, arch, job)  # refuses formats that do not fit the layers before calibration takes its time
    seconds: dict[str, float] = {}
    training = model.training
    model.eval()
    try:
        begin = time.perf_counter()
        if calibrating:
            settings = job.calibration if isinstance(job, Recipe) else calibration or Calibration()
            if not job.needs_calls:
                settings = settings.model_copy(update={"calls": 0})
            if calibrate_with is not None:
                statistics = _watch(model, arch, calibrate_with, settings.calls, seed)
            else:
                statistics = calibrate(
                    pipe, arch, prompts or (), settings, component=component or "transformer", seed=seed, cache=cache,
                    resume=resume,
                    progress=None if progress is None else lambda done, total: progress("calibrate", done, total),
                )  # fmt: skip
            seconds["calibrate"] = time.perf_counter() - begin
        begin = time.perf_counter()
        plan = _carry_out(model, arch, job, statistics, seed, progress)
        seconds["quantize"] = time.perf_counter() - begin
    except BaseException:
        model.train(training)
        raise
    attach(model, plan)
    _keep_labels(pipe)
    return Result(model, plan, seconds, engine_of(model, plan))


def _transformer(pipe: Any, component: str | None) -> nn.Module:
    """The 16-bit transformer that ``quantize`` is asked to change."""
    if isinstance(pipe, nn.Module) and component is not None:
        raise UsageError(
            f"component={component!r} chooses a transformer of a pipeline; got the transformer itself, a "
            f"{type(pipe).__name__}. Leave component out."
        )
    name = component or "transformer"
    model: Any = pipe if isinstance(pipe, nn.Module) else getattr(pipe, name, None)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"quantize() takes a diffusers pipeline with a {name}, or a transformer; got {type(pipe).__name__}."
        )
    if getattr(model, "is_quantized", False):
        raise UsageError(f"This {type(model).__name__} is quantized already; load the 16-bit model.")
    return model


def _job(recipe: str | Path | Recipe | Plan, overrides: str | Sequence[str]) -> Recipe | Plan:
    """What to carry out: a plan as it is, or a recipe with its overrides."""
    assignments = [overrides] if isinstance(overrides, str) else list(overrides)
    if isinstance(recipe, Plan):
        if assignments:
            raise UsageError("A Plan is explicit; overrides change recipes only.")
        return recipe
    loaded = load_recipe(recipe)
    return loaded.override(assignments) if assignments else loaded


def _seed(job: Recipe | Plan, seed: int | None) -> int:
    if isinstance(job, Recipe):
        return seed or 0
    if seed is not None:
        raise UsageError(f"A Plan carries its own seed ({job.seed}); leave out seed={seed}.")
    return job.seed


def _check_arguments(
    bare: bool,
    job: Recipe | Plan,
    calibrating: bool,
    prompts: Sequence[str] | None,
    calibrate_with: Callable[[nn.Module], None] | None,
    statistics: Statistics | None,
    calibration: Calibration | None,
    cache: Path | None,
    resume: bool,
) -> None:
    """Refuses arguments of ``quantize`` that would have no effect, and those that are missing.

    Args:
        bare: whether a transformer was given instead of a pipeline.
        calibrating: whether statistics are needed and not there.
    """
    check_prompts(prompts)
    if isinstance(job, Recipe) and calibration is not None:
        raise UsageError(
            "calibration= goes with a Plan; a recipe says itself how to calibrate. Change that with overrides, e.g. "
            "overrides=['calibration.steps=4']."
        )
    if statistics is not None and (prompts is not None or calibrate_with is not None or calibration is not None):
        raise UsageError(
            "statistics= are the outcome of a calibration: pass them alone, without prompts, calibrate_with or "
            "calibration."
        )
    if calibrate_with is not None and not bare:
        raise UsageError("calibrate_with= is for a bare transformer; a pipeline is calibrated with prompts=[...].")
    if prompts is not None and bare:
        raise UsageError(
            "prompts= need a pipeline that draws them; calibrate a bare transformer with calibrate_with=function."
        )
    if (cache is not None or resume) and not (calibrating and prompts is not None):
        raise UsageError(
            "cache= and resume= keep and find batches of calibration prompts; nothing is calibrated by prompts here. "
            "Leave them out."
        )
    if not calibrating:
        return
    if prompts is not None and not [p for p in prompts if str(p).strip()]:
        raise UsageError("There are no calibration prompts: the list is empty.")
    if prompts is None and calibrate_with is None:
        raise UsageError(
            f"{'Recipe ' + repr(job.name) if isinstance(job, Recipe) else 'This plan'} needs calibration: pass "
            "prompts=[...]" + (", or for a bare transformer calibrate_with=function." if bare else ".")
        )


def check_prompts(prompts: Sequence[str] | None) -> None:
    """Refuses a single string, which would be taken for a list of characters."""
    if isinstance(prompts, str):
        raise UsageError(f"prompts must be a list of strings, got the string {prompts!r}: pass prompts=[{prompts!r}].")


@torch.no_grad()
def _watch(
    model: nn.Module, arch: Architecture, run: Callable[[nn.Module], None], calls: int, seed: int
) -> Statistics:
    """Statistics of what a bare transformer sees while ``run`` calls it."""
    capture = Capture(arch, arch.groups(model), rows=64, seed=seed, calls=calls)
    with capture.watching(model):
        run(model)
    return capture.statistics()


def _carry_out(
    model: nn.Module,
    arch: Architecture,
    job: Recipe | Plan,
    statistics: Statistics | None,
    seed: int,
    progress: Progress | None,
) -> Plan:
    if isinstance(job, Recipe):
        return quantize_model(model, arch, job, statistics, seed=seed, progress=progress)
    on_layer = None if progress is None else lambda done, total: progress("quantize", done, total)
    return convert(model, arch, job, statistics, progress=on_layer)


def load(path: str | Path, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    """A pipeline from a folder, a hub id or ``bundled:NAME``, 16-bit or quantized by ditq.

    Args:
        dtype: of the parameters and of what is computed in floats; by default what diffusers chooses.
        kwargs: of ``DiffusionPipeline.from_pretrained``.

    Raises:
        UsageError: the folder is no diffusers pipeline, or has no transformer; no such bundled model.
        CheckpointError: its files are damaged, or do not fit their plan.
    """
    pipe = load_pipeline(resolve(path), dtype, **kwargs)
    if getattr(pipe, "transformer", None) is None:
        raise UsageError(f"{path} is a {type(pipe).__name__}, which has no transformer to quantize.")
    return pipe


def save(pipe: Any, out: str | Path, *, source: str | Path | None = None, overwrite: bool = False) -> Path:
    """Writes a pipeline to a new folder: all of it, or nothing.

    Args:
        source: where the pipeline came from; components that ditq does not touch are copied from there unchanged.
        overwrite: replaces a folder that is there.

    Raises:
        UsageError: the folder exists.
        DitqError: it cannot be written (read-only, full disk); nothing is left behind.
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
    options: Mapping[str, str | int] | None = None,
    condition: str | None = None,
    prompts: Sequence[str] | None = None,
    whole_pipeline: bool = False,
    architecture: str | Path | Architecture | None = None,
    allow_float: bool = False,
    seed: int | None = None,
    progress: Progress | None = None,
) -> str:
    """Copies a pipeline that ditq has quantized, with its blocks as graphs of another runtime beside the weights.

    ``DiffusionPipeline.from_pretrained(out)`` then runs them, inside the same pipeline. The checkpoint itself stays
    whole: ``with ditq.use_engine("torch")`` loads it without the graphs.

    Args:
        source: a folder.
        engine: "openvino".
        shapes: "dynamic" compiles the graphs once for calls of any size; "static" anew for each size that comes,
            which takes seconds and is faster from then on.
        attention: "bf16" computes its two products in bf16 where they are long (shapes="static" only), "f32" as
            everything else in float32; "auto" is bf16 on CPUs that have the instructions for it. "int8" rounds queries
            and keys to 8 bits, with static scales found by drawing ``prompts``, and is as "auto" otherwise.
        options: of the runtime by its own names, e.g. ``{"INFERENCE_NUM_THREADS": 4}``; kept in the config.
        condition: what an example call draws; any prompt or class will do.
        prompts, seed, progress: as in :func:`quantize`, for attention="int8" only; at most 16 prompts are drawn.
            Where a pipeline names its classes, these by default.
        whole_pipeline: the decoder of the VAE and T5 text encoders become graphs too, in floats.
        allow_float: takes layers that the runtime cannot execute on integers.

    Returns:
        How the layers are executed, as text.

    Raises:
        UsageError: an unknown engine or option, a source that is not a folder quantized by ditq, or an existing
            ``out``; prompts or a seed that attention of this kind has no use for.
        DitqError: the runtime is not available, or would execute a quantized layer in floats.
    """
    from ditq.engines import use_engine
    from ditq.openvino.pipeline import export_pipeline
    from ditq.openvino.properties import check_properties

    _check_export(engine, shapes, attention, prompts, seed)
    folder = resolve(source)
    plans = read_plans(folder) if isinstance(folder, Path) else {}
    if not isinstance(folder, Path) or not plans:
        raise UsageError(f"{source} is no folder with a pipeline that ditq has quantized; run ditq quantize first.")
    settings = {"name": engine, "shapes": shapes, "attention": attention, "options": dict(options or {})}
    with new_folder(out) as temporary:
        check_properties(options or {})
        with use_engine("torch"):
            pipe = load(folder)
        arch = architectures.load(architecture) if architecture else architectures.match(pipe.transformer)
        shutil.copytree(folder, temporary, dirs_exist_ok=True)
        return export_pipeline(
            pipe, arch, temporary, settings, quantized=list(plans), condition=condition, prompts=prompts,
            whole_pipeline=whole_pipeline, allow_float=allow_float, seed=seed or 0, progress=progress,
        )  # fmt: skip


def _check_export(engine: str, shapes: str, attention: str, prompts: Sequence[str] | None, seed: int | None) -> None:
    """Refuses what cannot be exported, and arguments of ``export`` that would have no effect."""
    if engine != "openvino":
        raise unknown("engine to export to", engine, ["openvino"])
    if shapes not in SHAPES:
        raise unknown("kind of shapes", shapes, SHAPES)
    if attention not in ATTENTIONS:
        raise unknown("precision of attention", attention, ATTENTIONS)
    if attention == "bf16" and shapes == "dynamic":
        raise UsageError("attention='bf16' needs shapes='static': graphs for all sizes compute it in float32.")
    check_prompts(prompts)
    if attention != "int8" and (prompts is not None or seed is not None):
        name = "prompts" if prompts is not None else "seed"
        raise UsageError(
            f"{name} has no effect with attention={attention!r}: only attention='int8' is calibrated. Leave it out."
        )


def search(
    pipe: Any,
    recipe: str | Path | Recipe = "qdit-w4a8",
    prompts: Sequence[str] = (),
    *,
    overrides: Sequence[str] = (),
    architecture: str | Path | Architecture | None = None,
    component: str | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 16,
    arguments: Mapping[str, Any] | None = None,
    **options: Any,
) -> SearchResult:
    """Finds a group size for every linear layer; carry ``result.plan`` out on a fresh pipeline with :func:`quantize`.

    Args:
        pipe: a 16-bit pipeline. It is used up: its transformers are left as the best candidates.
        recipe, overrides: formats and balance of the layers, see :func:`quantize`.
        prompts: what every candidate samples: prompts, or class names or numbers.
        component: which transformer of the pipeline; by default all, one after the other. The second is searched on
            what the first, left as its best candidate, hands over to it; ``result.plans`` has the plan of each.
        seed, steps, guidance_scale, batch_size, arguments: see :class:`ditq.sampling.Sampling`.
        options: of :func:`ditq.allocation.search`: strategy, trials, sizes, budget, fitness, storage ...

    Raises:
        UsageError, DitqError: see :func:`ditq.allocation.search`.
    """
    components = transformer_names(pipe) if component is None else [component]
    if len(components) > 1 and options.get("statistics") is not None:
        raise UsageError("Statistics are those of one transformer: say of which by component='transformer'.")
    for name in components:
        model = getattr(pipe, name, None)
        if not isinstance(model, nn.Module):
            raise UsageError(f"{type(pipe).__name__} has no {name}; it has {', '.join(transformer_names(pipe))}.")
        if getattr(model, "is_quantized", False):
            raise UsageError("This pipeline is quantized already; load the 16-bit one.")
        check_weights(model)
        model.eval()
    sampling = Sampling(seed, steps, guidance_scale, batch_size, dict(arguments or {}))
    loaded = load_recipe(recipe).override(list(overrides))
    results = []
    for name in components:
        model = getattr(pipe, name)
        arch = architectures.load(architecture) if architecture else architectures.match(model)
        results.append(allocation.search(pipe, arch, loaded, prompts, sampling, component=name, **options))
        attach(model, results[-1].candidate)
    return replace(results[0], others=tuple(results[1:]))


def _keep_labels(pipe: Any) -> None:
    """Class names would be lost on saving: DiTPipeline reads them from its index, but does not write them."""
    labels: dict[str, int] = getattr(pipe, "labels", None) or {}
    if labels and "id2label" not in pipe.config:
        names: dict[int, list[str]] = {}
        for name, i in labels.items():
            names.setdefault(i, []).append(name)
        pipe.register_to_config(id2label={str(i): ", ".join(n) for i, n in sorted(names.items())})


def check_weights(model: nn.Module) -> None:
    """Refuses a model with NaN or Inf in any parameter, by name."""
    for name, p in model.named_parameters():
        if p.is_floating_point() and not bool(torch.isfinite(p).all()):
            raise DitqError(f"Weight {name!r} of {type(model).__name__} contains NaN or Inf; nothing was quantized.")


def engine_of(model: nn.Module, plan: Plan) -> str:
    """Which engine runs which formats on the model's device, in words."""
    device = next(model.parameters()).device
    pairs = dict.fromkeys((x.weight, x.activation) for x in plan.quantized if x.weight and x.activation)
    chosen = {engines.choose(w, a, device).name for w, a in pairs}
    return f"{' and '.join(sorted(chosen)) or 'dequantized weights, 16-bit products'} on {device}"
