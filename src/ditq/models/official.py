"""Loads checkpoints with the tensor names of their original repositories into classes of ditq and diffusers.

Missing and unexpected tensors are errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditq.errors import CheckpointError, unknown

_OPEN_SORA = ((r"(.*attn\w*)\.[qkv]", r"\1.qkv"), (r"(.*cross_attn)\.[kv]_linear", r"\1.kv_linear"))
_BLOCK = r"transformer_blocks\.(\d+)\."


def _latte_block(match: re.Match[str]) -> str:
    """The original name of a module in a block: Latte has one list, with spatial and temporal blocks in turn."""
    kind, pair, module = match.groups()
    return f"blocks.{2 * int(pair) + (kind == 'temporal')}.{re.sub(r'^attn[.][qkv]$', 'attn.qkv', module)}"


# Names of a class's modules and their names in the original repository. Several modules with one original name are the
# rows of one tensor (q, k and v), or copies of it (the time embedder in every block of DiT).
ORIGINAL: dict[str, tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]] = {
    "STDiT": _OPEN_SORA,
    "STDiT3": _OPEN_SORA,
    "OpenSoraVAE": (),
    "Latte": ((r"(spatial|temporal)_blocks\.(\d+)\.(.*)", _latte_block),),
    "LatteTransformer3DModel": (),
    "DiTTransformer2DModel": (
        (r"pos_embed\.proj", "x_embedder.proj"),
        (_BLOCK + r"norm1\.emb\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
        (_BLOCK + r"norm1\.emb\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
        (_BLOCK + r"norm1\.emb\.class_embedder\.embedding_table", "y_embedder.embedding_table"),
        (_BLOCK + r"norm1\.linear", r"blocks.\1.adaLN_modulation.1"),
        (_BLOCK + r"attn1\.to_[qkv]", r"blocks.\1.attn.qkv"),
        (_BLOCK + r"attn1\.to_out\.0", r"blocks.\1.attn.proj"),
        (_BLOCK + r"ff\.net\.0\.proj", r"blocks.\1.mlp.fc1"),
        (_BLOCK + r"ff\.net\.2", r"blocks.\1.mlp.fc2"),
        (r"proj_out_1", "final_layer.adaLN_modulation.1"),
        (r"proj_out_2", "final_layer.linear"),
    ),
}
# Tensors that a checkpoint may lack. These classes compute positions for the size that they are called with.
POSITIONS = ("pos_embed", "pos_embed_temporal", "pos_embed.pos_embed", "temp_pos_embed", "temp_embed")
OPTIONAL = ("rope.freqs", "shift", "scale")


def official(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The original names of a model's tensors, each with the tensors of the model that it contains, in order.

    Raises:
        UsageError: the original names of this class are not known.
    """
    kind = type(model).__name__
    if kind not in ORIGINAL:
        raise unknown("class with original checkpoints", kind, ORIGINAL)
    by_original: dict[str, list[str]] = {}
    for name in model.state_dict():
        module, dot, last = name.rpartition(".")
        names = (re.sub(pattern, new, module) for pattern, new in ORIGINAL[kind] if re.fullmatch(pattern, module))
        by_original.setdefault(next(names, module) + dot + last, []).append(name)
    return {original: tuple(names) for original, names in by_original.items()}


@torch.no_grad()
def load_official(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies the tensors of a checkpoint into ``model``.

    A tensor may have its original name (``attn.qkv``) or the model's name (``attn.q``).

    Raises:
        UsageError: the original names of this class are not known.
        CheckpointError: a tensor is missing, unexpected, or of another shape. The message names it, and nothing was
            copied.
    """
    state = model.state_dict()
    values: dict[str, Tensor] = {}
    known = set(POSITIONS)
    for original, parts in official(model).items():
        known |= {original, *parts}
        if original in tensors:
            values |= dict(_split(original, tensors[original], parts, state))
        else:
            for part in parts:
                if part in tensors:
                    values |= dict(_split(part, tensors[part], (part,), state))
                elif part not in OPTIONAL:
                    alternative = f" (or {original!r})" if original != part else ""
                    raise CheckpointError(
                        f"The checkpoint lacks tensor {part!r}{alternative} of {type(model).__name__}."
                    )
    unexpected = sorted(set(tensors) - known)
    if unexpected:
        raise CheckpointError(
            f"The checkpoint holds tensor {unexpected[0]!r}, which {type(model).__name__} does not have."
        )
    for part, value in values.items():
        state[part].copy_(value)


def _split(
    name: str, tensor: Tensor, parts: tuple[str, ...], state: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors ``parts`` from one tensor of the checkpoint: its rows, or copies of it."""
    shape = tuple(state[parts[0]].shape)
    copied = len({part.rsplit(".", 2)[0] for part in parts}) > 1  # to modules of different blocks
    expected = shape if copied else (len(parts) * shape[0], *shape[1:])
    if tuple(tensor.shape) != expected:
        raise CheckpointError(f"Tensor {name!r} has shape {tuple(tensor.shape)}; the model expects {expected}.")
    yield from zip(parts, [tensor] * len(parts) if copied else tensor.chunk(len(parts)), strict=True)


def from_official(kind: Any, path: str | Path, **config: Any) -> Any:
    """Loads a model of class ``kind`` from safetensors files with original names.

    Pickles (.pth) are not read. The error explains how to convert one that you trust.

    Args:
        kind: STDiT, STDiT3 or OpenSoraVAE of ``ditq.models.opensora``, Latte of ``ditq.models.latte_class``, or
            DiTTransformer2DModel or LatteTransformer3DModel of diffusers.
        path: the file, or the index of several files (``model.safetensors.index.json``).
        config: the model's configuration where it differs from the class's defaults.

    Raises:
        CheckpointError: see :func:`load_official`; or the file is damaged or not a safetensors file.
    """
    model = kind(**config)
    load_official(model, _read(Path(path)))
    return model.eval()


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.name.endswith(".safetensors.index.json"):
        try:
            files = sorted({path.parent / name for name in json.loads(path.read_text())["weight_map"].values()})
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{path} is not an index of safetensors files ({error!r}).") from error
    elif path.suffix == ".safetensors":
        files = [path]
    else:
        raise CheckpointError(
            f"{path} is not a safetensors file. ditq reads no pickles, because they can run code. Convert a file that "
            'you trust: tensors = torch.load(path, weights_only=True); tensors = tensors.get("ema", tensors); '
            'save_file(tensors, "model.safetensors") of safetensors.torch.'
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}): missing, truncated or damaged.") from error
    return tensors
