"""Transformers of published sizes with random weights, and example inputs for them."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from _variants import Call, Case
from torch import nn

from ditq import architectures

WIDTH = {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "patch_size": 2}
# Class, config, blocks and side of the latents of the published model.
MODELS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "dit-xl": ("DiTTransformer2DModel", {**WIDTH, "attention_bias": True}, 28, 32),
    "pixart-sigma": (
        "PixArtTransformer2DModel",
        {**WIDTH, "cross_attention_dim": 1152, "caption_channels": 4096, "use_additional_conditions": False},
        28,
        64,
    ),
    "latte": (
        "LatteTransformer3DModel",
        {
            **WIDTH, "cross_attention_dim": 1152, "caption_channels": 4096, "attention_bias": True,
            "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False, "norm_eps": 1e-6, "video_length": 16,
        },
        28,
        32,
    ),
}  # fmt: skip
FRAMES = 16
TEXT_TOKENS = 120  # of which the prompt takes the first 30, the rest is masked


def make(name: str, blocks: int, side: int, batch: int, calls: int, seed: int = 0) -> Case:
    """A model whose gates and modulations are not those of a fresh one, where blocks would add nothing.

    Args:
        side: of the latents; a model has (side / 2)^2 tokens, Latte that in each of FRAMES frames.
        calls: how many calls for calibration, at timesteps spread over the schedule.
    """
    cls, config, _, _ = MODELS[name]
    torch.manual_seed(seed)
    model = getattr(diffusers, cls)(**config, num_layers=blocks, sample_size=side).eval().requires_grad_(False)
    _enliven(model)
    times = [500, *torch.linspace(990, 10, calls).int().tolist()]
    first, *others = [_call(name, side, batch, t) for t in times]
    return Case(model, architectures.match(model), first, others)


@torch.no_grad()
def _enliven(model: nn.Module) -> None:
    """Trained adaLN opens the gates and gives channels different ranges; noise of that size stands in for it.

    Published DiTs have one embedder of class and timestep, of which diffusers keeps a copy in every block.
    """
    for name, p in model.named_parameters():
        if name.endswith(("norm1.linear.bias", "adaln_single.linear.bias", "scale_shift_table")):
            p.normal_(0, 0.5)
        elif name.endswith(".bias"):
            p.normal_(0, 0.02)
    blocks = model.get_submodule("transformer_blocks")
    for block in blocks:
        if hasattr(getattr(block, "norm1", None), "emb"):
            block.norm1.emb.load_state_dict(blocks[0].norm1.emb.state_dict())


def _call(name: str, side: int, batch: int, timestep: int) -> Call:
    call: dict[str, Any] = {"hidden_states": torch.randn(batch, 4, side, side)}
    time = torch.full((batch,), timestep)
    if name == "dit-xl":
        return {**call, "timestep": time, "class_labels": torch.randint(0, 1001, (batch,))}
    if name == "latte":
        call["hidden_states"] = torch.randn(batch, 4, FRAMES, side, side)
    mask = torch.ones(batch, TEXT_TOKENS)
    mask[:, 30:] = 0
    text = {"encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, 4096), "timestep": time}
    if name == "latte":  # its pipeline gives no mask: it cuts the text of a prompt to its tokens
        text["encoder_hidden_states"] = text["encoder_hidden_states"][:, :30]
        return {**call, **text}
    return {
        **call, **text, "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip
