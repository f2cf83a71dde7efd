"""STDiT3 of Open-Sora v1.2: spatial and temporal blocks in turn, each with text; sizes and frame rate are inputs."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ditq.models import blocks as nn_
from ditq.models.module import ModelMixin as ModelMixin
from ditq.models.opensora.frame import STDiTBase


class STDiT3Block(nn.Module):
    """One block. All blocks share ``time`` [B, 6 channels]. With ``rope`` [head / 2] the block is a temporal one."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = nn_.Attention(width, heads, qk_norm)
        self.cross_attn = nn_.CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn_.Mlp(width, int(width * mlp_ratio), width)
        self.scale_shift_table = nn.Parameter(torch.randn(nn_.CHUNKS, width) / width**0.5)

    def forward(
        self, x: Tensor, text: Tensor, time: Tensor, mask: Tensor | None, frames: int, rope: Tensor | None
    ) -> Tensor:
        """x: [B, frames positions, channels]."""
        b = len(x)
        table = self.scale_shift_table + time.unflatten(-1, (nn_.CHUNKS, -1))
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = table.chunk(nn_.CHUNKS, dim=1)
        modulated = self.norm1(x) * (1 + scale) + shift
        if rope is None:
            attended = nn_.from_frames(self.attn(nn_.by_frame(modulated, frames)), b)
        else:
            attended = nn_.from_positions(self.attn(nn_.by_position(modulated, frames), rope), b)
        x = x + gate * attended
        x = x + self.cross_attn(x, text, mask)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


class Rope(nn.Module):
    """The frequencies [head / 2], stored in the checkpoint as ``rope.freqs``."""

    freqs: Tensor

    def __init__(self, head: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 10000.0 ** (-torch.arange(0, head, 2).float() / head))


class STDiT3(STDiTBase):
    """Open-Sora v1.2's transformer; the defaults are STDiT3-XL/2.

    Masks of frames (image and video conditions) are not supported.

    Args:
        input_sq_size: side in pixels of the square images whose positions are 0, 1, 2, ...
    """

    _no_split_modules = ["STDiT3Block"]
    _repeated_blocks = ["STDiT3Block"]

    @register_to_config
    def __init__(
        self,
        input_sq_size: int = 512,
        in_channels: int = 4,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        caption_channels: int = 4096,
        model_max_length: int = 300,
        qk_norm: bool = True,
    ) -> None:
        super().__init__()
        self._add_layers(in_channels, patch_size, hidden_size, caption_channels, model_max_length)
        self.fps_embedder = nn_.ScalarEmbed(hidden_size)
        self.rope = Rope(hidden_size // num_heads)
        self.spatial_blocks, self.temporal_blocks = (
            nn.ModuleList(STDiT3Block(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(depth))
            for _ in range(2)
        )

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        fps: Tensor | None = None,
        height: Tensor | None = None,
        width: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Velocity and variance [B, 2 C, T, H, W] of latents [B, C, T, H, W].

        Args:
            timestep: [B], 0 to 1000.
            encoder_hidden_states, encoder_attention_mask: see :class:`ditq.models.opensora.STDiT`.
            fps: [B], frames per second; default 24.
            height, width: [B], in pixels, the same for all; default eight times the latents'.
        """
        config: Any = self.config
        t, h, w = self._grid(hidden_states)
        pixels = [
            float(side.flatten()[0]) if side is not None else 8.0 * n
            for side, n in zip((height, width), hidden_states.shape[3:], strict=True)
        ]
        unit = (pixels[0] * pixels[1]) ** 0.5 / config.input_sq_size
        base = round((h * w) ** 0.5)
        device = hidden_states.device
        x = self._embedded(hidden_states, *(torch.arange(n, device=device) / unit * (base / n) for n in (h, w)))
        rate = torch.full((len(x),), 24.0, device=device) if fps is None else fps.expand(len(x))
        vector = self.t_embedder(timestep.expand(len(x)), x.dtype) + self.fps_embedder(rate, x.dtype)
        time, text = self.t_block(vector), self.y_embedder(encoder_hidden_states)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = spatial(x, text, time, encoder_attention_mask, t, None)
            x = temporal(x, text, time, encoder_attention_mask, t, self.rope.freqs)
        return self._output(x, vector, hidden_states, return_dict)
