"""Small trained diffusion transformers, their prompts, and a classifier that evaluates their images.

The models are plain diffusers pipeline folders: ``DiffusionPipeline.from_pretrained(path(name))`` loads one. The
networks are plain transformers folders. This package only returns paths; it imports neither torch nor diffusers.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["names", "network", "networks", "path", "prompts"]

SPLITS = ("calibration", "evaluation")

# The package is always a folder, because wheels are unpacked at installation.
_ROOT = Path(str(files(__name__)))


def names() -> list[str]:
    """The bundled models, sorted: every pipeline folder under ``models/``."""
    return sorted(index.parent.name for index in (_ROOT / "models").glob("*/model_index.json"))


def path(name: str) -> Path:
    """The pipeline folder of one bundled model.

    Raises:
        ValueError: no model has this name.
    """
    return _folder("model", name, names())


def networks() -> list[str]:
    """The bundled feature networks, sorted: every model folder under ``networks/``."""
    return sorted(config.parent.name for config in (_ROOT / "networks").glob("*/config.json"))


def network(name: str) -> Path:
    """The folder of one bundled feature network.

    Raises:
        ValueError: no network has this name.
    """
    return _folder("network", name, networks())


def prompts(name: str, split: str) -> list[str]:
    """The prompts (or class names) of a model.

    Args:
        name: the model.
        split: ``calibration`` or ``evaluation``, which share no concept.

    Raises:
        ValueError: the split is unknown, or the model has no prompts.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    known = {file.stem.removesuffix(f"-{split}"): file for file in (_ROOT / "prompts").glob(f"*-{split}.txt")}
    if name not in known:
        raise ValueError(f"no {split} prompts are bundled for {name!r}; known: {', '.join(sorted(known)) or 'none'}")
    return known[name].read_text(encoding="utf-8").splitlines()


def _folder(kind: str, name: str, known: list[str]) -> Path:
    if name not in known:
        raise ValueError(f"no bundled {kind} is named {name!r}; known: {', '.join(known) or 'none'}")
    return _ROOT / f"{kind}s" / name
