"""The VAE of Open-Sora v1.2.

Stable Diffusion XL's VAE encodes single frames; causal convolutions then reduce four frames to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn import functional as F

from ditq.models.module import ModelMixin

TIME = 4  # frames that become one, by two convolutions with stride 2
SPATIAL_SCALE = 0.18215  # Stable Diffusion 1's scale, which Open-Sora also uses with the VAE of XL


class CausalConv3d(nn.Module):
    """A convolution of [B, C, T, H, W], padded with zeros, to T / stride frames; no frame depends on later ones."""

    def __init__(self, channels: int, out: int, kernel: int = 3, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, out, kernel, stride=(stride, 1, 1), bias=bias)
        self.padding = (*[kernel // 2] * 4, kernel - stride, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding))


class ResBlock(nn.Module):
    def __init__(self, channels: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = CausalConv3d(channels, out, bias=False)
        self.norm2 = nn.GroupNorm(groups, out)
        self.conv2 = CausalConv3d(out, out, bias=False)
        self.conv3 = CausalConv3d(channels, out, kernel=1, bias=False) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.conv3(x) + self.conv2(F.silu(self.norm2(y)))


def _res_blocks(channels: int, out: int, count: int, groups: int) -> nn.Sequential:
    return nn.Sequential(*(ResBlock(channels if i == 0 else out, out, groups) for i in range(count)))


class Encoder(nn.Module):
    """[B, latents, T, H, W] to means and logarithms of variances [B, 2 latents, T / 4, H, W]."""

    def __init__(self, latents: int, widths: Sequence[int], count: int, groups: int) -> None:
        super().__init__()
        first, last = widths[0], widths[-1]
        self.conv_in = CausalConv3d(latents, first, bias=False)
        self.block_res_blocks = nn.ModuleList(
            _res_blocks(before, width, count, groups)
            for before, width in zip([first, *widths[:-1]], widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, width, stride=2) if halves else nn.Identity()
            for width, halves in zip(widths[:-1], _halves(widths), strict=True)
        )
        self.res_blocks = _res_blocks(last, last, count, groups)
        self.norm1 = nn.GroupNorm(groups, last)
        self.conv2 = CausalConv3d(last, 2 * latents, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for blocks, conv in zip(self.block_res_blocks, [*self.conv_blocks, nn.Identity()], strict=True):
            x = conv(blocks(x))
        return self.conv2(F.silu(self.norm1(self.res_blocks(x))))


class Decoder(nn.Module):
    """[B, latents, T, H, W] to [B, latents, 4 T, H, W]. Lists have the encoder's order and run from the end."""

    def __init__(self, latents: int, widths: Sequence[int], count: int, groups: int) -> None:
        super().__init__()
        first, last = widths[0], widths[-1]
        self.conv1 = CausalConv3d(latents, last)
        self.res_blocks = _res_blocks(last, last, count, groups)
        self.block_res_blocks = nn.ModuleList(
            _res_blocks(before, width, count, groups)
            for before, width in zip([*widths[1:], last], widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, 2 * width) if doubles else nn.Identity()
            for width, doubles in zip(widths[1:], _halves(widths), strict=True)
        )
        self.norm1 = nn.GroupNorm(groups, first)
        self.conv_out = CausalConv3d(first, latents)

    def forward(self, x: Tensor) -> Tensor:
        x = self.res_blocks(self.conv1(x))
        stages = zip(self.block_res_blocks, [nn.Identity(), *self.conv_blocks], strict=True)
        for blocks, conv in reversed(list(stages)):
            x = blocks(x)
            if isinstance(conv, CausalConv3d):
                # Neighbouring channels become two frames: [B, C 2, T, ...] to [B, C, T 2, ...].
                x = conv(x).unflatten(1, (-1, 2)).transpose(2, 3).flatten(2, 3)
        return self.conv_out(F.silu(self.norm1(x)))


def _halves(widths: Sequence[int]) -> list[bool]:
    """Whether the number of frames is halved between two consecutive widths: at the last two changes."""
    return [i >= len(widths) - 3 for i in range(len(widths) - 1)]


class TemporalVAE(nn.Module):
    def __init__(self, latents: int, widths: Sequence[int], count: int, groups: int) -> None:
        super().__init__()
        self.encoder = Encoder(latents, widths, count, groups)
        self.quant_conv = CausalConv3d(2 * latents, 2 * latents, kernel=1)
        self.post_quant_conv = CausalConv3d(latents, latents, kernel=1)
        self.decoder = Decoder(latents, widths, count, groups)

    def encode(self, x: Tensor) -> Tensor:
        """Frames [B, C, T, H, W], zero-padded in front to a multiple of 4, to moments [B, 2 C, ceil(T / 4), H, W]."""
        return self.quant_conv(self.encoder(F.pad(x, (0, 0, 0, 0, -x.shape[2] % TIME, 0))))

    def decode(self, z: Tensor, frames: int) -> Tensor:
        """Decodes latents [B, C, ceil(frames / 4), H, W] and returns the last ``frames`` frames."""
        return self.decoder(self.post_quant_conv(z))[:, :, -frames % TIME :]


class OpenSoraVAE(ModelMixin, ConfigMixin):
    """Encodes 8 x 8 pixels of four frames to one vector; the defaults are OpenSora-VAE-v1.2.

    Args:
        block_out_channels, layers_per_block, norm_num_groups: of the spatial VAE, see diffusers' ``AutoencoderKL``.
        temporal_channels, temporal_layers, temporal_groups: of the temporal VAE: widths of its stages, blocks in each,
            and groups of their norms.
        latent_shift, latent_scale: for each channel; the transformer's input is (z - shift) / scale.
        micro_frame_size: frames in one call of the temporal VAE, counted from the first.
        micro_batch_size: frames in one call of the spatial VAE.
    """

    shift: Tensor
    scale: Tensor

    @register_to_config
    def __init__(
        self,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        temporal_channels: tuple[int, ...] = (128, 256, 256, 512),
        temporal_layers: int = 4,
        temporal_groups: int = 32,
        latent_shift: tuple[float, ...] = (-0.10, 0.34, 0.27, 0.98),
        latent_scale: tuple[float, ...] = (3.85, 2.32, 2.33, 3.06),
        micro_frame_size: int = 17,
        micro_batch_size: int = 4,
    ) -> None:
        super().__init__()
        latents, stages = len(latent_shift), len(block_out_channels)
        spatial = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * stages, up_block_types=("UpDecoderBlock2D",) * stages,
            block_out_channels=tuple(block_out_channels), layers_per_block=layers_per_block, latent_channels=latents,
            norm_num_groups=norm_num_groups, scaling_factor=SPATIAL_SCALE,
        )  # fmt: skip
        self.spatial_vae = nn.ModuleDict({"module": spatial})
        self.temporal_vae = TemporalVAE(latents, temporal_channels, temporal_layers, temporal_groups)
        self.register_buffer("shift", torch.tensor(latent_shift)[None, :, None, None, None])
        self.register_buffer("scale", torch.tensor(latent_scale)[None, :, None, None, None])

    @property
    def spatial(self) -> Any:
        """The spatial VAE, diffusers' ``AutoencoderKL``."""
        return self.spatial_vae["module"]

    def latent_frames(self, frames: int) -> int:
        """The number of latent frames of ``frames`` frames."""
        size = self.config["micro_frame_size"]
        return frames // size * -(-size // TIME) + -(-(frames % size) // TIME)

    def encode(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents [B, C, T', H / 8, W / 8] of a video [B, 3, T, H, W] in [-1, 1], sampled with ``generator``."""

        def encode_images(images: Tensor) -> Tensor:
            return self.spatial.encode(images).latent_dist.sample(generator) * SPATIAL_SCALE

        frames = self._by_image(video, encode_images)
        parts = []
        for part in frames.split(self.config["micro_frame_size"], dim=2):
            mean, log_variance = self.temporal_vae.encode(part).chunk(2, dim=1)
            noise = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            parts.append(mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise)
        return (torch.cat(parts, dim=2) - self.shift) / self.scale

    def decode(self, latents: Tensor, num_frames: int) -> Tensor:
        """A video [B, 3, num_frames, H, W] in about [-1, 1] from latents [B, C, T', H / 8, W / 8].

        Raises:
            ValueError: ``num_frames`` does not match the number of latent frames.
        """
        if self.latent_frames(num_frames) != latents.shape[2]:
            raise ValueError(
                f"{num_frames} frames have {self.latent_frames(num_frames)} latent frames, got {latents.shape[2]}"
            )
        size = self.config["micro_frame_size"]
        z = latents * self.scale.to(latents.dtype) + self.shift.to(latents.dtype)
        parts = [
            self.temporal_vae.decode(part, min(size, num_frames - i * size))
            for i, part in enumerate(z.split(self.latent_frames(size), dim=2))
        ]
        return self._by_image(
            torch.cat(parts, dim=2), lambda x: self.spatial.decode(x / SPATIAL_SCALE, return_dict=False)[0]
        )

    def _by_image(self, video: Tensor, function: Any) -> Tensor:
        """Applies a function of images to all frames of [B, C, T, H, W], in small batches."""
        batches = video.transpose(1, 2).flatten(0, 1).split(self.config["micro_batch_size"])
        return torch.cat([function(batch) for batch in batches]).unflatten(0, (len(video), -1)).transpose(1, 2)
