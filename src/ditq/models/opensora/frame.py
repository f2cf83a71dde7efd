"""The embedders and the final layer that STDiT and STDiT3 share."""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ditq.models import blocks as nn_
from ditq.models.module import ModelMixin


class STDiTBase(ModelMixin, ConfigMixin):
    """The base class of both transformers: embedders of patches, time and text, and the final layer."""

    def _add_layers(self, channels: int, patch: tuple[int, int, int], width: int, text: int, length: int) -> None:
        """Creates the embedders and the final layer.

        Args:
            channels: of the latents.
            patch: frames, height and width of a patch.
            width: channels of the tokens.
            text: channels of T5's output.
            length: the number of T5's tokens.
        """
        patch = (patch[0], patch[1], patch[2])  # a config that was read from a file has a list
        self.x_embedder = nn_.PatchEmbed(patch, channels, width)
        self.t_embedder = nn_.ScalarEmbed(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, nn_.CHUNKS * width))
        self.y_embedder = nn_.CaptionEmbed(text, width, length)
        self.final_layer = nn_.FinalLayer(width, patch[0] * patch[1] * patch[2] * 2 * channels)

    def _grid(self, latents: Tensor) -> tuple[int, int, int]:
        """The number of patches of latents [B, C, T, H, W] along each axis."""
        t, h, w = (-(-n // p) for n, p in zip(latents.shape[2:], self.x_embedder.patch, strict=True))
        return t, h, w

    def _embedded(self, latents: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Tokens [B, T' H' W', width] with the positions of their rows and columns."""
        x = self.x_embedder(latents)
        positions = nn_.positions_2d(x.shape[-1], rows, columns).to(x.dtype)
        return x + positions.repeat(x.shape[1] // len(positions), 1)

    def _output(self, x: Tensor, time: Tensor, latents: Tensor, return_dict: bool) -> Any:
        """The output [B, 2 C, T, H, W] from the tokens, without the padding of the patches."""
        config: Any = self.config
        x = nn_.to_video(self.final_layer(x, time), self._grid(latents), self.x_embedder.patch, 2 * config.in_channels)
        out = x[:, :, : latents.shape[2], : latents.shape[3], : latents.shape[4]]
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)
