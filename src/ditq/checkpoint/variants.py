"""Variants of weights: files such as ``diffusion_pytorch_model.fp16.safetensors``, as diffusers names them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ditq.errors import UsageError

_SHARD = r"(?:-\d{5}-of-\d{5})?"  # diffusers has written it before and after the variant
_WEIGHTS = re.compile(rf"[^.]+?{_SHARD}(?:\.(?P<variant>[^.]+?){_SHARD})?\.(?:safetensors|bin)")


def weight_files(component: Path, variant: str | None) -> list[Path]:
    """The safetensors files that diffusers loads: those of the variant, or the plain ones if it has none."""
    files = sorted(component.glob("*.safetensors"))
    chosen = [file for file in files if variant and _variant_of(file) == variant]
    return chosen or [file for file in files if not _variant_of(file)]


def has_variant(folder: Path, variant: str) -> bool:
    """Whether any component of a pipeline's folder has weights of this variant."""
    return any(_variant_of(file) == variant for file in folder.glob("*/*"))


def check_variant(folder: Path, index: Mapping[str, Any], variant: str | None, passed: Collection[str] = ()) -> None:
    """Refuses a variant that a pipeline's folder does not have, and the lack of one where it has nothing else.

    Args:
        folder: of the pipeline.
        index: the content of its ``model_index.json``.
        variant: None for the plain files.
        passed: components that are not loaded from the folder.

    Raises:
        UsageError: names the variants that there are.
    """
    found = {
        name: {_variant_of(file) for file in (folder / name).iterdir() if _WEIGHTS.fullmatch(file.name)}
        for name in sorted(index)
        if name not in passed and (folder / name).is_dir()
    }
    known = sorted({kind for kinds in found.values() for kind in kinds if kind})
    lacking = [name for name, kinds in found.items() if kinds and not kinds & {variant, None}]
    if lacking and known:
        raise UsageError(
            f"{folder / lacking[0]} has no weights {f'of variant {variant!r}' if variant else 'without a variant'}, "
            f"only those of {' and '.join(map(repr, sorted(found[lacking[0]] - {None}, key=str)))}: pass "
            f"{' or '.join(f'variant={name!r} (--variant {name})' for name in known)}."
        )
    if variant is not None and variant not in known:
        others = f"pass one of {', '.join(known)}, or leave it out" if known else "it has no variants, so leave it out"
        raise UsageError(f"{folder} has no weights of variant {variant!r}: {others}.")


def _variant_of(file: Path) -> str | None:
    match = _WEIGHTS.fullmatch(file.name)
    return match["variant"] if match else None
