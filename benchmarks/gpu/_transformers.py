"""Whole transformers of published sizes with random weights, and the inputs of one denoising step for each."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ditq import architectures

TEXT = 120  # tokens, of which the prompt takes the first 30; the rest is masked


class Whole(NamedTuple):
    """A transformer to measure.

    Attributes:
        blocks: the names of its stacks, by which rivals choose what to replace and compilers what to compile.
        depth: the name of the argument that says how many blocks, how many there are, and how many are measured.
        config: of the class; in a dry run that of the architecture file's example.
        size: of the latents of a call with classifier-free guidance; ``tiny``: in a dry run.
    """

    architecture: str
    title: str
    blocks: tuple[str, ...]
    depth: tuple[str, int, int]
    config: dict[str, Any]
    size: tuple[int, ...]
    tiny: tuple[int, ...]

    def build(self, device: torch.device, dtype: torch.dtype, dry: bool, blocks: int | None = None) -> nn.Module:
        """In evaluation mode, without gradients; ``blocks``: how many, if not as many as are measured."""
        found = architectures.load(self.architecture)
        name, _, measured = self.depth
        config = self.config
        if dry:
            assert found.example is not None
            config = found.example.config
        with torch.device(device):
            model = found.model_class()(**{**config, name: 2 if dry else blocks or measured})
        enliven(model)
        for stack in self.blocks:  # the first block reads what an embedder gives, which lies otherwise in memory
            model.get_submodule(stack)[0].register_forward_pre_hook(_contiguous)
        return model.to(dtype).eval().requires_grad_(False)

    def call(self, device: torch.device, dtype: torch.dtype, dry: bool) -> dict[str, Any]:
        """Arguments of one call."""
        size = self.tiny if dry else self.size
        made: dict[str, Any] = {"hidden_states": torch.randn(size), "timestep": torch.full((size[0],), 500)}
        width, length = (64, 6) if dry else (4096, 226 if self.architecture == "cogvideox" else TEXT)
        if self.architecture == "dit":
            made["class_labels"] = torch.randint(0, 10, (size[0],))
        else:
            made["encoder_hidden_states"] = torch.randn(size[0], length, width)
        if self.architecture in ("pixart", "stdit"):
            mask = torch.ones(size[0], length)
            mask[:, length // 4 :] = 0
            made["encoder_attention_mask"] = mask
        if self.architecture == "pixart":
            made["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        if self.architecture == "cogvideox" and dry:
            made["image_rotary_emb"] = (torch.randn(3 * 16, 32), torch.randn(3 * 16, 32))
        return moved(made, device, dtype)


def moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Tensors on the device, floats in ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, dict):
        return {k: moved(v, device, dtype) for k, v in value.items()}
    return tuple(moved(v, device, dtype) for v in value) if isinstance(value, tuple) else value


def _contiguous(block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.contiguous() if isinstance(a, Tensor) else a for a in arguments)


@torch.no_grad()
def enliven(model: nn.Module) -> None:
    """Gates and modulations of a fresh model are such that its blocks add nothing; noise of a trained one's size."""
    for name, p in model.named_parameters():
        if name.endswith(("norm1.linear.bias", "norm2.linear.bias", "adaln_single.linear.bias", "scale_shift_table")):
            p.normal_(0, 0.5)
        elif name.endswith(".bias"):
            p.normal_(0, 0.02)


def published(architecture: str, size: str) -> dict[str, Any]:
    """The config of a public checkpoint, of the architecture file."""
    return architectures.load(architecture).sizes[size]


def wholes() -> dict[str, Whole]:
    """By name; the first two are those of the acceptance."""
    stack = ("transformer_blocks",)
    return {
        "pixart": Whole(
            "pixart", "PixArt-Sigma 1024, 2 x 4096 tokens", stack, ("num_layers", 28, 28),
            published("pixart", "PixArt-Sigma-XL/2"), (2, 4, 128, 128), (2, 4, 8, 8),
        ),
        "stdit": Whole(
            "stdit", "STDiT 16 x 512 x 512, 2 x 16384 tokens", ("blocks",), ("depth", 28, 28),
            {**published("stdit", next(iter(architectures.load("stdit").sizes))), "input_size": (16, 64, 64)},
            (2, 4, 16, 64, 64), (2, 4, 3, 8, 8),
        ),
        "dit": Whole(
            "dit", "DiT-XL/2 256, 16 x 256 tokens", stack, ("num_layers", 28, 28), published("dit", "DiT-XL/2"),
            (16, 4, 32, 32), (2, 4, 8, 8),
        ),
        "latte": Whole(
            "latte", "Latte 16 x 512 x 512, 2 x 16384 tokens", (*stack, "temporal_transformer_blocks"),
            ("num_layers", 28, 8), published("latte", "Latte-1"), (2, 4, 16, 64, 64), (2, 4, 3, 8, 8),
        ),
        "cogvideox": Whole(
            "cogvideox", "CogVideoX-2B 49 x 480 x 720, 2 x 17776 tokens", stack, ("num_layers", 30, 6),
            published("cogvideox", "CogVideoX-2b"), (2, 13, 16, 60, 90), (2, 3, 4, 8, 8),
        ),
    }  # fmt: skip
