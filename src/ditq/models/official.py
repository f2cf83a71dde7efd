"""Checkpoints with the names of their original repositories, into our classes and diffusers'; nothing missing."""

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


def _latte_block(found: re.Match[str]) -> str:
    """Latte has one list of blocks, a spatial and a temporal one in turn."""
    kind, pair, module = found.groups()
    return f"blocks.{2 * int(pair) + (kind == 'temporal')}.{re.sub(r'^attn[.][qkv]$', 'attn.qkv', module)}"


# Names of a class's modules and what the original repository calls them. Several with one original name are rows of
# one tensor, one below the other (q, k and v), or copies of it (the time embedder in every block of DiT).
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
# What a checkpoint may have or not: these classes make positions for the size that they are called with.
POSITIONS = ("pos_embed", "pos_embed_temporal", "pos_embed.pos_embed", "temp_pos_embed", "temp_embed")
OPTIONAL = ("rope.freqs", "shift", "scale")


def official(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The original name of every tensor of a model, and which of its own tensors that holds, in order.

    Raises:
        UsageError: nothing is known about checkpoints of this class.
    """
    kind = type(model).__name__
    if kind not in ORIGINAL:
        raise unknown("class with original checkpoints", kind, ORIGINAL)
    found: dict[str, list[str]] = {}
    for name in model.state_dict():
        module, dot, last = name.rpartition(".")
        names = (re.sub(pattern, new, module) for pattern, new in ORIGINAL[kind] if re.fullmatch(pattern, module))
        found.setdefault(next(names, module) + dot + last, []).append(name)
    return {name: tuple(own) for name, own in found.items()}


@torch.no_grad()
def load_official(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies the tensors of a checkpoint into ``model``: original names (``attn.qkv``) or its own (``attn.q``).

    Raises:
        UsageError: nothing is known about checkpoints of this class.
        CheckpointError: a tensor is missing, has another shape, or is none of the model's; it is named, and nothing
            was copied.
    """
    state = model.state_dict()
    taken: dict[str, Tensor] = {}
    known = set(POSITIONS)
    for name, own in official(model).items():
        known |= {name, *own}
        if name in tensors:
            taken |= dict(_parts(name, tensors[name], own, state))
        else:
            for part in own:
                if part in tensors:
                    taken |= dict(_parts(part, tensors[part], (part,), state))
                elif part not in OPTIONAL:
                    also = f" (or {name!r})" if name != part else ""
                    raise CheckpointError(f"The checkpoint lacks tensor {part!r}{also} of {type(model).__name__}.")
    surplus = sorted(set(tensors) - known)
    if surplus:
        raise CheckpointError(
            f"The checkpoint holds tensor {surplus[0]!r}, which {type(model).__name__} does not have."
        )
    for part, value in taken.items():
        state[part].copy_(value)


def _parts(
    name: str, tensor: Tensor, own: tuple[str, ...], state: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    shape = tuple(state[own[0]].shape)
    copied = len({part.rsplit(".", 2)[0] for part in own}) > 1  # to modules of different blocks
    wanted = shape if copied else (len(own) * shape[0], *shape[1:])
    if tuple(tensor.shape) != wanted:
        raise CheckpointError(f"Tensor {name!r} is {tuple(tensor.shape)}; the model's is {wanted}.")
    yield from zip(own, [tensor] * len(own) if copied else tensor.chunk(len(own)), strict=True)


def from_official(kind: Any, path: str | Path, **config: Any) -> Any:
    """A model of class ``kind`` from a safetensors file with original names.

    Args:
        kind: STDiT, STDiT3 or OpenSoraVAE of ``ditq.models.opensora``, Latte of
            ``ditq.models.latte_class``, or DiTTransformer2DModel or LatteTransformer3DModel of diffusers.
        path: the file; of several, their index (``model.safetensors.index.json``).
        config: of the model, where it differs from the class's defaults.

    Files that hold pickles (.pth) are not read; convert them where you trust them, see the error.

    Raises:
        CheckpointError: see :func:`load_official`; or the file is none of safetensors, or damaged.
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
            f"{path} is not a safetensors file, and ditq reads no pickles, which can run code. Convert one that you "
            'trust: tensors = torch.load(path, weights_only=True); tensors = tensors.get("ema", tensors); '
            'save_file(tensors, "model.safetensors") of safetensors.torch.'
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}): missing, truncated or damaged.") from error
    return tensors
