"""Tensors of the official checkpoints, by their names, into our modules; nothing missing, nothing misshaped."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditq.errors import CheckpointError

# Official names of linears that hold several of ours, one below the other.
FUSED = {"qkv": ("q", "k", "v"), "kv_linear": ("k_linear", "v_linear")}
# What a checkpoint may have or not: the model makes positions for the size that it is called with.
POSITIONS = ("pos_embed", "pos_embed_temporal")
OPTIONAL = ("rope.freqs",)


def official(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The official name of every tensor of a model, and which of its own tensors that holds, in order."""
    parts = {part: (fused, i) for fused, names in FUSED.items() for i, part in enumerate(names)}
    found: dict[str, dict[int, str]] = {}
    for name in model.state_dict():
        match = re.fullmatch(r"(.*attn\w*\.)(\w+)(\.(?:weight|bias))", name)
        fused, place = parts.get(match[2], (match[2], 0)) if match else ("", 0)
        found.setdefault(f"{match[1]}{fused}{match[3]}" if match else name, {})[place] = name
    return {name: tuple(own[i] for i in sorted(own)) for name, own in found.items()}


@torch.no_grad()
def load_official(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies the tensors of a checkpoint into ``model``: official names (``attn.qkv``) or split ones (``attn.q``).

    Raises:
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
        raise CheckpointError(f"The checkpoint holds tensor {surplus[0]!r}, which {type(model).__name__} has not.")
    for part, value in taken.items():
        state[part].copy_(value)


def _parts(
    name: str, tensor: Tensor, own: tuple[str, ...], state: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    first = state[own[0]].shape
    wanted = (len(own) * first[0], *first[1:])
    if tuple(tensor.shape) != wanted:
        raise CheckpointError(f"Tensor {name!r} is {tuple(tensor.shape)}; the model's is {wanted}.")
    yield from zip(own, tensor.chunk(len(own)), strict=True)


def from_official(kind: Any, path: str | Path, **config: Any) -> Any:
    """A model of class ``kind`` from a safetensors file with official names.

    Files that hold pickles (.pth) are not read; convert them where you trust them:
    ``save_file(torch.load(path, weights_only=True), "model.safetensors")``.

    Raises:
        CheckpointError: see :func:`load_official`; or the file is none of safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if Path(path).suffix != ".safetensors":
        raise CheckpointError(
            f"{path} is not a safetensors file. Convert a .pth that you trust: "
            'save_file(torch.load(path, weights_only=True), "model.safetensors").'
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): truncated or damaged.") from error
    model = kind(**config)
    load_official(model, tensors)
    return model.eval()
