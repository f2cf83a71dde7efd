"""The Latte of the paper's tables (arXiv 2401.03048): DiT blocks that attend within and across frames in turn."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ditq.models import blocks as nn_
from ditq.models.module import ModelMixin


class LatteBlock(nn.Module):
    """DiT's block (adaLN-zero): each block computes its own shifts, scales and gates from the time vector."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = nn_.Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn_.Mlp(width, int(width * mlp_ratio), width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, nn_.CHUNKS * width))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: [B N, tokens, channels], N frames or positions of each of B samples; time: [B, channels]."""
        table = self.adaLN_modulation(time).repeat_interleave(len(x) // len(time), dim=0)[:, None]
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = table.chunk(nn_.CHUNKS, dim=2)
        x = x + gate * self.attn(self.norm1(x) * (1 + scale) + shift)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


class LabelEmbed(nn.Module):
    """Embeddings of classes; the last row is the embedding of "no class"."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class LatteFinalLayer(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: [B, tokens, channels]; time: [B, channels]."""
        shift, scale = self.adaLN_modulation(time)[:, None].chunk(2, dim=2)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class Latte(ModelMixin, ConfigMixin):
    """Latte without text; the defaults are Latte-XL/2 for UCF-101.

    Spatial and temporal blocks are in two lists, and are executed in turn.

    Args:
        input_size: height and width of the training latents.
        num_frames: frames of the training latents.
        depth: the number of all blocks, which must be even.
        num_classes: None makes the model unconditional (FaceForensics, SkyTimelapse, Taichi-HD).
    """

    _no_split_modules = ["LatteBlock"]
    _repeated_blocks = ["LatteBlock"]

    @register_to_config
    def __init__(
        self,
        input_size: int = 32,
        num_frames: int = 16,
        in_channels: int = 4,
        patch_size: int = 2,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int | None = 101,
    ) -> None:
        super().__init__()
        if depth % 2:
            raise ValueError(f"depth must be even, a spatial and a temporal block in turn, got {depth}")
        self.x_embedder = nn_.PatchEmbed2d(patch_size, in_channels, hidden_size)
        self.t_embedder = nn_.ScalarEmbed(hidden_size)
        self.y_embedder = None if num_classes is None else LabelEmbed(num_classes, hidden_size)
        self.spatial_blocks, self.temporal_blocks = (
            nn.ModuleList(LatteBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth // 2)) for _ in range(2)
        )
        self.final_layer = LatteFinalLayer(hidden_size, patch_size**2 * 2 * in_channels)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> Any:
        """Noise and variance [B, 2 C, F, H, W] of latents [B, C, F, H, W], whose sides are multiples of a patch.

        Args:
            timestep: [B].
            class_labels: int64 [B]; ``num_classes`` means no class. An unconditional model ignores it.

        Raises:
            ValueError: a conditional model was called without labels.
        """
        config: Any = self.config
        b, _, frames, height, width = hidden_states.shape
        patch, d, device = config.patch_size, config.hidden_size, hidden_states.device
        h, w = height // patch, width // patch
        x = self.x_embedder(hidden_states.transpose(1, 2).flatten(0, 1))  # [B F, positions, channels]
        rows, columns, steps = (torch.arange(n, device=device).float() for n in (h, w, frames))
        x = x + nn_.positions_2d(d, rows, columns).to(x.dtype)
        time = self.t_embedder(timestep.expand(b), x.dtype)
        if self.y_embedder is not None:
            if class_labels is None:
                raise ValueError(f"class_labels must be given: this model has {config.num_classes} classes")
            time = time + self.y_embedder(class_labels)
        positions = nn_.positions_1d(d, steps).to(x.dtype)
        for i, (spatial, temporal) in enumerate(zip(self.spatial_blocks, self.temporal_blocks, strict=True)):
            x = nn_.from_frames(spatial(x, time), b)  # [B, F positions, channels]
            x = nn_.by_position(x, frames)
            x = temporal(x + positions if i == 0 else x, time)
            x = nn_.by_frame(nn_.from_positions(x, b), frames)
        x = self.final_layer(nn_.from_frames(x, b), time)
        out = nn_.to_video(x, (frames, h, w), (1, patch, patch), 2 * config.in_channels)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)
