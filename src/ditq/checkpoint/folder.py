"""Finds, loads and saves pipelines on disk, and reads their plans."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditq.checkpoint.header import sort_metadata
from ditq.checkpoint.variants import check_variant, weight_files
from ditq.components import NAMES, transformer_names
from ditq.errors import CheckpointError, DitqError, UsageError
from ditq.files import make_writable, new_folder
from ditq.plan import Plan
from ditq.reading import cut, read_json, short

if TYPE_CHECKING:
    import torch


def resolve(path: str | Path) -> Path | str:
    """The folder of a pipeline argument; a hub id is returned as a string.

    Raises:
        UsageError: an unknown bundled model, a folder without ``model_index.json``, or no such folder.
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
                f"{folder} is not a diffusers pipeline: it has no model_index.json. Pass the folder that "
                "save_pretrained wrote, not its transformer subfolder."
            )
        return folder
    if folder.exists() or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise UsageError(f"There is no pipeline at {text!r}: pass a folder, a hub id (owner/name) or bundled:NAME.")
    return text


def local(path: str | Path, verb: str) -> Path:
    """The folder of a pipeline argument, see :func:`resolve`; for verbs that do not download.

    Raises:
        UsageError: as :func:`resolve`, or it is no folder here, though it may be a hub id.
    """
    folder = resolve(path)
    if not isinstance(folder, Path):
        raise UsageError(
            f"{verb} reads folders only, and {str(path)!r} is none here; if it is a hub id, download it first with "
            f"`hf download {path} --local-dir DIR`, then {verb} DIR."
        )
    return folder


def read_plan(folder: Path, component: str = "transformer", variant: str | None = None) -> Plan | None:
    """The plan of a transformer in a pipeline's folder, or None if it is not quantized by ditq.

    Args:
        variant: of the weights that will be loaded.

    Raises:
        UsageError: the folder has no such component.
        CheckpointError: the config or the plan is not valid.
    """
    path = folder / component / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder} has no {component}/config.json.")
    config = read_json(path, CheckpointError)
    if not isinstance(config, dict) or not isinstance(config.get("quantization_config", {}), (dict, type(None))):
        raise CheckpointError(f"{path} is not the config of a model: damaged.")
    fields = dict(config.get("quantization_config") or {})
    if fields.pop("quant_method", None) != "ditq":
        from ditq.checkpoint.verify import refuse_unplanned

        refuse_unplanned(weight_files(path.parent, variant))
        return None
    fields.pop("engine", None)  # not a field of the plan
    return Plan.from_dict(fields)


def read_plans(folder: Path, variant: str | None = None) -> dict[str, Plan]:
    """The plans of all quantized transformers in a pipeline's folder, by component.

    Raises:
        UsageError, CheckpointError: see :func:`read_plan`. A second transformer is optional.
    """
    present = [name for name in NAMES if name == NAMES[0] or (folder / name / "config.json").is_file()]
    plans = {name: read_plan(folder, name, variant) for name in present}
    return {name: plan for name, plan in plans.items() if plan is not None}


def load_pipeline(folder: Path | str, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    """Loads a pipeline from a folder or a hub id, see :func:`resolve`.

    The quantized transformers of a folder are verified before anything is loaded.

    Raises:
        CheckpointError: the files are damaged, or do not match their plan.
    """
    from diffusers import DiffusionPipeline

    from ditq.architectures import pipeline_class
    from ditq.checkpoint.registration import register
    from ditq.checkpoint.verify import once, verify

    register()
    kind = DiffusionPipeline
    variant = kwargs.get("variant")
    with once():
        if isinstance(folder, Path):
            index = _bounded_configs(folder)
            if isinstance(index, dict):  # else diffusers raises a clear error below
                kind = pipeline_class(str(index.get("_class_name")))
                check_variant(folder, index, variant, kwargs)
            for component, plan in read_plans(folder, variant).items():
                if component not in kwargs:
                    verify(weight_files(folder / component, variant), plan)
        try:
            return kind.from_pretrained(folder, **({"dtype": dtype} if dtype else {}), **kwargs)
        except DitqError:
            raise
        except Exception as error:  # every library raises its own for files that do not fit together
            if type(error).__name__ == "UnpicklingError":  # torch's text advises to run the code in the file
                raise CheckpointError(
                    f"{folder} has weights in a pickle (.bin), which is damaged or holds more than tensors. It is not "
                    "loaded, because a pickle can run any code. Get the weights as safetensors."
                ) from error
            reason = cut(f"{type(error).__name__}: {error}", 600)
            if isinstance(folder, str) and variant is None and "no file named" in reason:
                reason += " If it has weights of a variant only, pass e.g. variant='fp16' (--variant fp16)."
            raise CheckpointError(f"{folder} cannot be loaded as a diffusers pipeline: {reason}") from error


def _bounded_configs(folder: Path) -> Any:
    """The content of ``model_index.json``, after all configs that diffusers will read are known to be small JSON.

    Raises:
        CheckpointError: a config is damaged, too large or nested too deeply.
    """
    for path in sorted(folder.glob("*/*config.json")):
        read_json(path, CheckpointError)
    path = folder / "model_index.json"
    index = read_json(path, CheckpointError)
    for name, entry in index.items() if isinstance(index, dict) else ():
        pair = isinstance(entry, list) and len(entry) == 2
        if not pair and (folder / name).is_dir():  # diffusers would look for a component of this name on the hub
            raise CheckpointError(f"{path}: {name} is {short(entry)}, not a library and a class: damaged.")
    return index


def save_pipeline(pipe: Any, out: str | Path, source: str | Path | None = None, overwrite: bool = False) -> None:
    """Writes a pipeline to a new folder.

    Args:
        pipe: the pipeline.
        out: the folder to create.
        source: the original pipeline. If it is a folder, all components but the transformers are copied from it, save
            those whose weights it has as a variant only: they would be found by ``variant=`` alone.
        overwrite: whether an existing ``out`` is replaced.

    Raises:
        UsageError, DitqError: see :func:`ditq.files.new_folder`.
    """
    origin = resolve(source) if source is not None else None
    with new_folder(out, overwrite=overwrite) as folder:
        pipe.save_pretrained(folder, safe_serialization=True)
        for name in transformer_names(pipe):
            for file in (folder / name).glob("*.safetensors"):
                sort_metadata(file)
        for component in sorted(origin.iterdir()) if isinstance(origin, Path) else ():
            copy = folder / component.name
            if (
                component.is_dir()
                and component.name not in transformer_names(pipe)
                and copy.is_dir()
                and (weight_files(component, None) or not weight_files(copy, None))
            ):
                shutil.rmtree(copy)
                shutil.copytree(component, copy)
                make_writable(copy)


def keep_labels(pipe: Any) -> None:
    """Adds the class names to the pipeline's config: DiTPipeline reads them from its index, but does not save them."""
    labels: dict[str, int] = getattr(pipe, "labels", None) or {}
    if labels and "id2label" not in pipe.config:
        names: dict[int, list[str]] = {}
        for name, i in labels.items():
            names.setdefault(i, []).append(name)
        pipe.register_to_config(id2label={str(i): ", ".join(n) for i, n in sorted(names.items())})
