"""STDiT of Open-Sora v1.0: every block attends within frames, across frames, and to the text."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ditq.models import blocks as nn_
from ditq.models.module import ModelMixin as ModelMixin
from ditq.models.opensora.frame import STDiTBase


class STDiTBlock(nn.Module):
    """One block. All blocks share ``time`` [B, 6 channels].

    Temporal attention reads the stream without norm, shift and scale.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = nn_.Attention(width, heads)
        self.attn_temp = nn_.Attention(width, heads)
        self.cross_attn = nn_.CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn_.Mlp(width, int(width * mlp_ratio), width)
        self.scale_shift_table = nn.Parameter(torch.randn(nn_.CHUNKS, width) / width**0.5)

    def forward(
        self, x: Tensor, text: Tensor, time: Tensor, mask: Tensor | None, frames: int, positions: Tensor | None
    ) -> Tensor:
        """x: [B, frames positions, channels]; positions: [frames, channels], added before the temporal attention."""
        b = len(x)
        table = self.scale_shift_table + time.unflatten(-1, (nn_.CHUNKS, -1))
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = table.chunk(nn_.CHUNKS, dim=1)
        spatial = self.attn(nn_.by_frame(self.norm1(x) * (1 + scale) + shift, frames))
        x = x + gate * nn_.from_frames(spatial, b)
        temporal = nn_.by_position(x, frames)
        temporal = self.attn_temp(temporal if positions is None else temporal + positions)
        x = x + gate * nn_.from_positions(temporal, b)
        x = x + self.cross_attn(x, text, mask)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


class STDiT(STDiTBase):
    """Open-Sora v1.0's transformer; the defaults are STDiT-XL/2.

    Args:
        input_size: frames, height and width of the training latents.
        space_scale, time_scale: units of the positions: 0.5 and 1 for 16 x 256 x 256, 1 and 1 for 16 x 512 x 512.
    """

    _no_split_modules = ["STDiTBlock"]
    _repeated_blocks = ["STDiTBlock"]

    @register_to_config
    def __init__(
        self,
        input_size: tuple[int, int, int] = (16, 32, 32),
        in_channels: int = 4,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        caption_channels: int = 4096,
        model_max_length: int = 120,
        space_scale: float = 0.5,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self._add_layers(in_channels, patch_size, hidden_size, caption_channels, model_max_length)
        self.blocks = nn.ModuleList(STDiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Noise and variance [B, 2 C, T, H, W] of latents [B, C, T, H, W].

        Args:
            timestep: [B].
            encoder_hidden_states: T5's output [B, length, caption channels].
            encoder_attention_mask: [B, length], not 0 where there is text; None means all text.
        """
        config: Any = self.config
        t, h, w = self._grid(hidden_states)
        device = hidden_states.device
        x = self._embedded(hidden_states, *(torch.arange(n, device=device) / config.space_scale for n in (h, w)))
        positions = nn_.positions_1d(x.shape[-1], torch.arange(t, device=device) / config.time_scale).to(x.dtype)
        vector = self.t_embedder(timestep.expand(len(x)), x.dtype)
        time, text = self.t_block(vector), self.y_embedder(encoder_hidden_states)
        for i, block in enumerate(self.blocks):
            x = block(x, text, time, encoder_attention_mask, t, positions if i == 0 else None)
        return self._output(x, vector, hidden_states, return_dict)
