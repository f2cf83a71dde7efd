"""What both generations of STDiT have around their blocks."""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ditq.models import blocks as nn_
from ditq.models.module import ModelMixin


class Around(ModelMixin, ConfigMixin):
    """Embedders of patches, time and text before the blocks, and the final layer after them."""

    def _surround(self, channels: int, patch: tuple[int, int, int], width: int, text: int, length: int) -> None:
        """Makes them.

        Args:
            channels: of the latents; width: of the tokens; text, length: T5's channels and tokens.
        """
        patch = (patch[0], patch[1], patch[2])  # a list in a config that was read from a file
        self.x_embedder = nn_.PatchEmbed(patch, channels, width)
        self.t_embedder = nn_.ScalarEmbed(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, nn_.CHUNKS * width))
        self.y_embedder = nn_.CaptionEmbed(text, width, length)
        self.final_layer = nn_.FinalLayer(width, patch[0] * patch[1] * patch[2] * 2 * channels)

    def _grid(self, latents: Tensor) -> tuple[int, int, int]:
        """How many patches latents [B, C, T, H, W] have along each axis."""
        t, h, w = (-(-n // p) for n, p in zip(latents.shape[2:], self.x_embedder.patch, strict=True))
        return t, h, w

    def _embedded(self, latents: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Tokens [B, T' H' W', width] with the positions of their rows and columns."""
        x = self.x_embedder(latents)
        places = nn_.positions_2d(x.shape[-1], rows, columns).to(x.dtype)
        return x + places.repeat(x.shape[1] // len(places), 1)

    def _output(self, x: Tensor, time: Tensor, latents: Tensor, return_dict: bool) -> Any:
        """What the tokens say, [B, 2 C, T, H, W], without the padding of the patches."""
        config: Any = self.config
        x = nn_.to_video(self.final_layer(x, time), self._grid(latents), self.x_embedder.patch, 2 * config.in_channels)
        out = x[:, :, : latents.shape[2], : latents.shape[3], : latents.shape[4]]
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)
