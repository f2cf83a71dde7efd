"""The verbs: quantize, load, save. Thin; what they do is in the folders below."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
from ditq.components import transformer_names
from ditq.conversion import convert, draft, quantize_model
from ditq.errors import CheckpointError, DitqError, UsageError, unknown
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
    overrides: Sequence[str] = (),
    seed: int = 0,
    architecture: str | Path | Architecture | None = None,
    component: str = "transformer",
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
        overrides: ``key=value`` assignments to recipe fields.
        architecture: name or YAML file, where the transformer's class is not known to ditq.
        component: which transformer of the pipeline, see :func:`transformers`. The second is calibrated on what the
            first, quantized or not, hands over to it.
        cache, resume: see :func:`ditq.calibration.calibrate`.
        progress: called with (stage, done, total).

    Raises:
        UsageError: an unknown recipe or architecture, no prompts where calibration is needed, or a
            transformer that is quantized already.
        DitqError: NaN or Inf in weights or activations; nothing to quantize.
    """
    model: Any = pipe if isinstance(pipe, nn.Module) else getattr(pipe, component, None)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"quantize() takes a diffusers pipeline with a {component}, or a transformer; got {type(pipe).__name__}."
        )
    if getattr(model, "is_quantized", False):
        raise UsageError(f"This {type(model).__name__} is quantized already; load the 16-bit model.")
    arch = architectures.load(architecture) if architecture else architectures.match(model)
    check_weights(model)
    plan_given = recipe if isinstance(recipe, Plan) else None
    wanted = None if isinstance(recipe, Plan) else load_recipe(recipe)
    if wanted is not None and overrides:
        wanted = wanted.override(list(overrides))
    elif overrides:
        raise UsageError("A Plan is explicit; overrides change recipes only.")
    if wanted is not None:
        draft(model, arch, wanted)  # refuses formats that do not fit the layers before calibration takes its time
    seconds: dict[str, float] = {}
    model.eval()

    asked = wanted or plan_given
    if statistics is None and asked is not None and asked.needs_calibration:
        begin = time.perf_counter()
        settings = wanted.calibration if wanted else calibration or Calibration()
        if not asked.needs_calls:
            settings = settings.model_copy(update={"calls": 0})
        if pipe is not model and prompts is not None:
            if not [p for p in prompts if str(p).strip()]:
                raise UsageError("There are no calibration prompts: the list is empty.")
            statistics = calibrate(
                pipe, arch, prompts, settings, component=component, seed=seed, cache=cache, resume=resume,
                progress=None if progress is None else lambda done, total: progress("calibrate", done, total),
            )  # fmt: skip
        elif calibrate_with is not None:
            capture = Capture(arch, arch.groups(model), rows=64, seed=seed, calls=settings.calls)
            with capture.watching(model), torch.no_grad():
                calibrate_with(model)
            statistics = capture.statistics()
            del capture  # it holds every layer, also when its float weights are not needed any more
        else:
            raise UsageError(
                f"{'Recipe ' + repr(wanted.name) if wanted else 'This plan'} needs calibration: pass prompts=[...]"
                + ("." if pipe is not model else ", or for a bare transformer calibrate_with=function.")
            )
        seconds["calibrate"] = time.perf_counter() - begin

    begin = time.perf_counter()
    if wanted is not None:
        plan = quantize_model(model, arch, wanted, statistics, seed=seed, progress=progress)
    else:
        assert plan_given is not None
        plan = convert(model, arch, plan_given, statistics)
    seconds["quantize"] = time.perf_counter() - begin
    attach(model, plan)
    _keep_labels(pipe)
    return Result(model, plan, seconds, engine_of(model, plan))


def transformers(pipe: Any) -> list[str]:
    """Names of a pipeline's transformers: most have one, Wan 2.2 A14B an expert for high and one for low noise."""
    return [name for name in ("transformer", "transformer_2") if getattr(pipe, name, None) is not None]


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


def load(path: str | Path, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    """A pipeline from a folder, a hub id or ``bundled:NAME``, 16-bit or quantized by ditq.

    Raises:
        UsageError: the folder is no diffusers pipeline, or has no transformer; no such bundled model.
        CheckpointError: its files are damaged, or do not fit their plan.
    """
    import json

    from diffusers import DiffusionPipeline

    from ditq.checkpoint.registration import register
    from ditq.checkpoint.verify import verify

    register()
    folder = resolve(path)
    if isinstance(folder, Path):
        plan = read_plan(folder)
        if plan is not None:
            verify(sorted((folder / "transformer").glob("*.safetensors")), plan)
    kind = DiffusionPipeline
    if isinstance(folder, Path):
        with suppress(OSError, ValueError, AttributeError):  # diffusers says what is wrong with it
            kind = architectures.pipeline_class(
                json.loads((folder / "model_index.json").read_text()).get("_class_name")
            )
    try:
        pipe = kind.from_pretrained(folder, **({"dtype": dtype} if dtype else {}), **kwargs)
    except DitqError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be loaded as a diffusers pipeline: {error}") from error
    if getattr(pipe, "transformer", None) is None:
        raise UsageError(f"{path} is a {type(pipe).__name__}, which has no transformer to quantize.")
    return pipe


def resolve(path: str | Path) -> Path | str:
    """The folder that a pipeline argument means; a hub id stays a string.

    Raises:
        UsageError: an unknown bundled model, or a folder without ``model_index.json``.
    """
    text = str(path)
    if text.startswith("bundled:"):
        try:
            import ditq_bundled
        except ImportError as error:
            raise UsageError("Bundled models are a separate package: pip install 'ditq[demo]'.") from error
        try:
            return Path(ditq_bundled.path(text.removeprefix("bundled:")))
        except ValueError as error:
            raise UsageError(str(error)) from error
    folder = Path(text)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UsageError(
                f"{folder} is no diffusers pipeline: it has no model_index.json. Give the folder that "
                "save_pretrained wrote, not its transformer subfolder."
            )
        return folder
    if folder.exists() or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise UsageError(f"There is no pipeline at {text!r}: give a folder, a hub id (owner/name) or bundled:NAME.")
    return text


def read_plan(folder: Path) -> Plan | None:
    """The plan of a checkpoint folder, None where its transformer is not quantized by ditq.

    Raises:
        CheckpointError: there is a plan but it is not valid.
    """
    import json

    path = folder / "transformer" / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder} has no transformer/config.json.")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): damaged.") from error
    if not isinstance(config, dict) or not isinstance(config.get("quantization_config", {}), (dict, type(None))):
        raise CheckpointError(f"{path} is not the config of a model: damaged.")
    fields = dict(config.get("quantization_config") or {})
    if fields.pop("quant_method", None) != "ditq":
        return None
    fields.pop("engine", None)  # how it is executed is not what was planned
    return Plan.from_dict(fields)


def save(pipe: Any, out: str | Path, *, source: str | Path | None = None, overwrite: bool = False) -> Path:
    """Writes a pipeline to a new folder: all of it, or nothing.

    Args:
        source: where the pipeline came from; components that ditq does not touch are copied from there unchanged.

    Raises:
        UsageError: the folder exists.
        DitqError: it cannot be written (read-only, full disk); nothing is left behind.
    """
    with new_folder(out, overwrite=overwrite) as folder:
        pipe.save_pretrained(folder, safe_serialization=True)
        origin = resolve(source) if source is not None else None
        if isinstance(origin, Path):
            for component in origin.iterdir():
                kept = component.is_dir() and component.name not in transformers(pipe)
                if kept and (folder / component.name).is_dir():
                    shutil.rmtree(folder / component.name)
                    shutil.copytree(component, folder / component.name)
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
    seed: int = 0,
    progress: Progress | None = None,
) -> str:
    """Copies a pipeline that ditq has quantized, with its blocks as graphs of another runtime beside the weights.

    ``DiffusionPipeline.from_pretrained(out)`` then runs them, inside the same pipeline. The checkpoint itself stays
    whole: ``with ditq.use_engine("torch")`` loads it without the graphs.

    Args:
        source: a folder.
        shapes: "dynamic" compiles the graphs once for calls of any size; "static" anew for each size that comes,
            which takes seconds and is faster from then on.
        attention: "bf16" computes its two products in bf16 where they are long (shapes="static" only), "f32" as
            everything else in float32; "auto" is bf16 on CPUs that have the instructions for it. "int8" rounds queries
            and keys to 8 bits, with static scales found by drawing ``prompts``, and is as "auto" otherwise.
        options: of the runtime by its own names, e.g. ``{"INFERENCE_NUM_THREADS": 4}``; kept in the config.
        condition: what an example call draws; any prompt or class will do.
        prompts, seed, progress: as in :func:`quantize`, for attention="int8"; at most 16 prompts are drawn. Where a
            pipeline names its classes, these by default.
        whole_pipeline: the decoder of the VAE and T5 text encoders become graphs too, in floats.
        allow_float: takes layers that the runtime cannot execute on integers.

    Returns:
        How the layers are executed, as text.

    Raises:
        UsageError: an unknown engine, a source that is not a folder quantized by ditq, or an existing ``out``.
        DitqError: the runtime is not available, or would execute a quantized layer in floats.
    """
    import json

    from ditq.checkpoint.backend import DitqConfig
    from ditq.engines import use_engine
    from ditq.openvino import attention_ranges, components
    from ditq.openvino import export as openvino
    from ditq.sampling import first_call

    if engine != "openvino":
        raise unknown("engine to export to", engine, ["openvino"])
    if shapes not in SHAPES:
        raise unknown("kind of shapes", shapes, SHAPES)
    if attention not in ATTENTIONS:
        raise unknown("precision of attention", attention, ATTENTIONS)
    if attention == "bf16" and shapes == "dynamic":
        raise UsageError("attention='bf16' needs shapes='static': graphs for all sizes compute it in float32.")
    folder = resolve(source)
    if not isinstance(folder, Path) or (plan := read_plan(folder)) is None:
        raise UsageError(f"{source} is no folder with a pipeline that ditq has quantized; run ditq quantize first.")
    runtime = {"name": engine, "shapes": shapes, "attention": attention, "options": dict(options or {})}
    config = DitqConfig(plan, engine=runtime)
    with new_folder(out) as temporary:
        with use_engine("torch"):
            pipe = load(folder)
        arch = architectures.load(architecture) if architecture else architectures.match(pipe.transformer)
        labels = getattr(pipe, "labels", None) or {}
        example = condition or (next(iter(labels), "0") if arch.pipeline.condition == "class_labels" else "a picture")
        shutil.copytree(folder, temporary, dirs_exist_ok=True)
        graphs = temporary / "transformer" / engine
        shutil.rmtree(graphs, ignore_errors=True)
        graphs.mkdir()
        largest = None
        if attention == "int8":
            drawn = list(prompts or list(labels)[:: max(1, len(labels) // 16)])[:16]
            if not drawn:
                raise UsageError("attention='int8' finds scales by drawing: pass prompts=[...] (--prompts FILE).")
            largest = attention_ranges.drawn(pipe, arch, drawn, seed=seed, progress=progress)
        report = openvino.export(
            pipe.transformer, arch, first_call(pipe, arch, [example]), graphs,
            largest=largest, allow_float=allow_float,
        )  # fmt: skip
        path = temporary / "transformer" / "config.json"
        content = json.loads(path.read_text())
        content["quantization_config"] = config.to_dict()
        path.write_text(json.dumps(content, indent=2) + "\n")
        rest = components.export_components(pipe, temporary, {**runtime, "attention": "f32"}) if whole_pipeline else {}
    lines = [f"{name}: {f'stays in torch: {why}' if why else 'in floats'}." for name, why in rest.items()]
    return "\n".join([report.summary(), *lines])


def check_output(out: str | Path) -> None:
    """Fails now rather than after the work, where ``out`` exists or its parent cannot be written."""
    with new_folder(out, keep=False):
        pass


@contextmanager
def new_folder(out: str | Path, *, overwrite: bool = False, keep: bool = True) -> Iterator[Path]:
    """A temporary folder beside ``out`` that becomes ``out`` if everything inside succeeds, and vanishes if not.

    ``keep=False`` lets it vanish in any case. Folders above ``out`` are made, and removed again if left empty.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise UsageError(f"The output folder {out} exists already. Choose another, or delete it first.")
    temporary: Path | None = None
    made = [parent for parent in (out.parent, *out.parent.parents) if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        temporary.chmod(0o755)
        yield temporary
        if keep:
            if out.exists():
                shutil.rmtree(out)
            os.rename(temporary, out)
            temporary = None
    except OSError as error:
        raise DitqError(f"Cannot write {out}: {error.strerror or error}. Nothing was left behind.") from error
    except Exception as error:
        # safetensors reports a full disk as an error of its own.
        if type(error).__name__ == "SafetensorError":
            raise DitqError(f"Cannot write {out}: {error}. Nothing was left behind.") from error
        raise
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # not made, or not empty
                parent.rmdir()
