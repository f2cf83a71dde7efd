"""Checks the arguments of every verb. Arguments that are wrong, missing or without effect raise an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ditq.allocation import ACTIVATIONS, BY_SCORES, WEIGHTS, Bits, Choices, Evolution, Part
from ditq.allocation.budget import kind_of
from ditq.allocation.choices import UNITS, Unit
from ditq.allocation.scores import LATENT_ERROR
from ditq.allocation.search import STRATEGIES
from ditq.calibration import Statistics
from ditq.components import transformer_names
from ditq.errors import DitqError, UsageError, unknown
from ditq.openvino.options import ATTENTIONS, SHAPES, STEPS
from ditq.plan import Plan
from ditq.recipe import Calibration, Recipe
from ditq.recipe import load as load_recipe
from ditq.sampling.sample import check_conditions
from ditq.sampling.sampling import check_seed


def float_transformer(pipe: Any, component: str | None) -> nn.Module:
    """The 16-bit transformer to quantize.

    Raises:
        UsageError: ``pipe`` is neither a pipeline with this component nor a transformer, or it is quantized already.
    """
    if isinstance(pipe, nn.Module) and component is not None:
        raise UsageError(
            f"component={component!r} chooses a transformer of a pipeline, but the transformer itself was passed, a "
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
    check_plain(model, name)
    return model


# Classes that hold a transformer, and the attribute that is the transformer.
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
# Hooks of diffusers that offload.
_GROUP_OFFLOADING = {"group_offloading", "lazy_prefetch_group_offloading"}


def check_plain(model: nn.Module, name: str) -> None:
    """Refuses a compiled, wrapped or offloaded transformer, before anything is changed.

    Its layers cannot be replaced: a compiled graph would go on with the old ones, and weights that are offloaded are
    elsewhere.

    Raises:
        UsageError: says how to get the plain transformer.
    """
    if inner := _WRAPPERS.get(type(model).__name__):
        raise UsageError(
            f"The {name} is a {type(model).__name__}, which wraps a {type(getattr(model, inner)).__name__}. Quantize "
            f"the inner one (pipe.{name} = pipe.{name}.{inner}), and compile or wrap it afterwards."
        )
    for path, module in model.named_modules():
        where = f"{name}.{path}" if path else name
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise UsageError(
                f"{where} is compiled, and would go on with the layers of 16 bit. Load the model without compile(), "
                "quantize it, and compile it afterwards."
            )
        if by := _offloaded_by(module):
            raise UsageError(
                f"{where} is offloaded (by {by}): its weights are elsewhere. Quantize before offloading: load the "
                "pipeline without it (or call pipe.remove_all_hooks(), which removes the hooks of accelerate), "
                "quantize, and enable offloading afterwards."
            )


def _offloaded_by(module: nn.Module) -> str:
    """What offloads the weights of a module; an empty text if nothing does."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False) or type(one).__name__ == "CpuOffload":
            return "accelerate"
    if _GROUP_OFFLOADING & set(getattr(getattr(module, "_diffusers_hook", None), "hooks", ())):
        return "diffusers"
    return "a device map" if any(p.is_meta for p in module.parameters(recurse=False)) else ""


def float_transformers(pipe: Any, component: str | None) -> dict[str, nn.Module]:
    """The 16-bit transformers of a pipeline by name; with ``component`` only that one.

    Raises:
        UsageError: the pipeline does not have this component, or a transformer is quantized already.
        DitqError: NaN or Inf in weights.
    """
    models = {}
    for name in transformer_names(pipe) if component is None else [component]:
        model = getattr(pipe, name, None)
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"{type(pipe).__name__} does not have a {name}; it has {', '.join(transformer_names(pipe))}."
            )
        if getattr(model, "is_quantized", False):
            raise UsageError("This pipeline is quantized already; load the 16-bit pipeline.")
        check_plain(model, name)
        check_weights(model)
        models[name] = model
    return models


def sensitivity_parts(weights: Sequence[int], activations: Sequence[int], unit: str) -> dict[Part, Choices]:
    """What ``sensitivity`` measures: choices by part.

    Raises:
        UsageError: no widths at all, a width out of range, or an unknown unit.
    """
    if unit not in UNITS:
        raise unknown("unit", unit, UNITS)
    for name, bits in (("weights", weights), ("activations", activations)):
        wrong = [b for b in bits if not 2 <= b <= 8]
        if wrong:
            raise UsageError(f"Bits of {name} to measure must be 2 to 8, got {wrong[0]}; 16 bit is the reference.")
    chosen = cast(Unit, unit)
    parts: dict[Part, Choices] = {}
    if weights:
        parts["weights"] = Choices(weights=tuple(weights), unit=chosen)
    if activations:
        parts["activations"] = Choices(activations=tuple(activations), unit=chosen)
    if not parts:
        raise UsageError("Nothing to measure: pass bits of weights or of activations, e.g. weights=[8, 4].")
    return parts


# Options of a search by sensitivity scores, besides those of every search.
OPTIONS_BY_SCORES = ("moments", "fitness", "rounding", "calibration", "progress")


def search_job(
    weights: Sequence[int],
    activations: Sequence[int],
    unit: str,
    segments: int,
    budget: float | str | Sequence[float | str] | None,
    strategy: str | Evolution | None,
    metrics: Mapping[str, str] | None,
    error: str | None,
    options: Mapping[str, Any],
) -> Bits | dict[str, Any]:
    """What ``search`` does: bits by scores, or keywords of :func:`ditq.allocation.search`.

    Raises:
        UsageError: a value that does not exist, or has no effect.
    """
    if isinstance(strategy, str) and strategy not in (*BY_SCORES, *STRATEGIES):
        raise unknown("strategy", strategy, [*BY_SCORES, *STRATEGIES])
    budgets = () if budget is None else (budget,) if isinstance(budget, str | float | int) else tuple(budget)
    kinds = {kind_of(one) for one in budgets if not str(one).startswith("uniform:")}
    given = bool(weights) or bool(activations)
    of_sizes = [name for name in ("sizes", "choices") if options.get(name) is not None]
    if given and of_sizes:
        raise UsageError(
            f"A search chooses bits (weights, activations) or {of_sizes[0]}, not both: leave one of them out."
        )
    if not given and not of_sizes:
        weights = WEIGHTS if kinds & {"bytes", "weights"} else ()
        activations = ACTIVATIONS if "activations" in kinds else ()
    by_scores = bool(weights or activations) and (strategy is None or strategy in BY_SCORES)
    if isinstance(strategy, str) and strategy in BY_SCORES and not by_scores:
        raise UsageError(
            f"Strategy {strategy!r} chooses bits: pass weights=[8, 4, 3] or activations=[8, 6, 4], and a budget."
        )
    if by_scores:
        chosen = cast(str, strategy or BY_SCORES[0])
        for name in options:
            if name not in OPTIONS_BY_SCORES:
                raise UsageError(
                    f"{name} has no effect with strategy {chosen!r}, which does not evaluate candidates: leave it "
                    "out, or search with strategy='evolution'."
                )
        return Bits(
            budgets, tuple(weights), tuple(activations), unit, segments, chosen, dict(metrics or {}),
            error or LATENT_ERROR,
        )  # fmt: skip
    for name, value, default in (
        ("segments", segments, 1), ("metrics", metrics or None, None), ("error", error, None),
    ):  # fmt: skip
        if value != default:
            raise UsageError(f"{name} has no effect with strategy {strategy or 'evolution'!r}: leave it out.")
    job: dict[str, Any] = {"strategy": strategy or "evolution", "budget": budgets or None}
    if weights or activations:
        if weights and activations:
            raise UsageError(
                f"Strategy {strategy!r} chooses bits of weights or of activations, one at a time; "
                f"{', '.join(BY_SCORES)} choose both."
            )
        if unit not in UNITS:
            raise unknown("unit", unit, UNITS)
        job["choices"] = Choices(weights=tuple(weights), activations=tuple(activations), unit=cast(Unit, unit))
    elif unit != "layer":
        raise UsageError("unit has no effect in a search of group sizes: leave it out.")
    return job


def job_of(recipe: str | Path | Recipe | Plan, overrides: str | Sequence[str]) -> Recipe | Plan:
    """The plan as it is, or the recipe with its overrides.

    Raises:
        UsageError: overrides for a plan, or a recipe or override that does not exist.
    """
    if not isinstance(recipe, Plan):
        return load_recipe(recipe).override(overrides)
    if overrides:
        raise UsageError("A Plan is explicit; overrides change recipes only.")
    return recipe


def seed_of(job: Recipe | Plan, seed: int | None) -> int:
    """The seed to use: that of the plan, or the argument for a recipe.

    Raises:
        UsageError: a seed was passed with a plan, or is out of range.
    """
    if seed is not None:
        check_seed(seed)
    if isinstance(job, Recipe):
        return seed or 0
    if seed is not None:
        raise UsageError(f"A Plan carries its own seed ({job.seed}); leave out seed={seed}.")
    return job.seed


def check_quantize(
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
    """Refuses arguments of ``quantize`` without effect, and missing ones.

    Args:
        bare: whether a transformer was passed instead of a pipeline.
        job: the recipe or plan.
        calibrating: whether calibration must run: statistics are needed but were not passed.
        prompts, calibrate_with, statistics, calibration, cache, resume: arguments of ``quantize``.

    Raises:
        UsageError: an argument has no effect or is missing.
    """
    check_prompts(prompts)
    if isinstance(job, Recipe) and calibration is not None:
        raise UsageError(
            "calibration= is for a Plan; a recipe has its own calibration settings. Change them with overrides, e.g. "
            "overrides=['calibration.steps=4']."
        )
    if statistics is not None and (prompts is not None or calibrate_with is not None or calibration is not None):
        raise UsageError(
            "statistics= are the result of a calibration: pass them alone, without prompts, calibrate_with or "
            "calibration."
        )
    if calibrate_with is not None and not bare:
        raise UsageError("calibrate_with= is for a bare transformer; a pipeline is calibrated with prompts=[...].")
    if prompts is not None and bare:
        raise UsageError("prompts= need a pipeline; calibrate a bare transformer with calibrate_with=function.")
    if (cache is not None or resume) and not (calibrating and prompts is not None):
        raise UsageError(
            "cache= and resume= have no effect: they are for calibration with prompts, which does not run here. "
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
    """Refuses a single string and an open file, see :func:`ditq.sampling.sample.check_conditions`."""
    if prompts is not None:
        check_conditions(prompts)


def check_export(
    engine: str, shapes: str, attention: str, steps: str, prompts: Sequence[str] | None, seed: int | None
) -> None:
    """Refuses unknown options of ``export``, and arguments without effect.

    Raises:
        UsageError: an unknown engine or option, or an argument without effect.
    """
    if engine != "openvino":
        raise unknown("engine to export to", engine, ["openvino"])
    if shapes not in SHAPES:
        raise unknown("kind of shapes", shapes, SHAPES)
    if attention not in ATTENTIONS:
        raise unknown("precision of attention", attention, ATTENTIONS)
    if steps not in STEPS:
        raise unknown("treatment of steps", steps, STEPS)
    if attention == "bf16" and shapes == "dynamic":
        raise UsageError("attention='bf16' needs shapes='static': dynamic graphs compute attention in float32.")
    check_prompts(prompts)
    if attention != "int8" and (prompts is not None or seed is not None):
        name = "prompts" if prompts is not None else "seed"
        raise UsageError(
            f"{name} has no effect with attention={attention!r}: only attention='int8' is calibrated. Leave it out."
        )


def check_weights(model: nn.Module) -> None:
    """Refuses a model with NaN or Inf in a parameter, or with 8-bit floats.

    Raises:
        DitqError: names the parameter.
    """
    for name, p in model.named_parameters():
        if p.is_floating_point() and p.dtype.itemsize < 2:
            raise UsageError(
                f"Weight {name!r} of {type(model).__name__} is {str(p.dtype).removeprefix('torch.')}, a dtype for "
                "storage only. Load the model with torch_dtype=torch.bfloat16, and quantize it before "
                "enable_layerwise_casting(); a model that is cast already cannot be cast back exactly."
            )
        if p.is_floating_point() and not bool(torch.isfinite(p).all()):
            raise DitqError(f"Weight {name!r} of {type(model).__name__} contains NaN or Inf; nothing was quantized.")
