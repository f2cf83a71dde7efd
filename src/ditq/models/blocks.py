"""Building blocks for transformers that diffusers does not provide.

Modules are named as in the original checkpoints, except that q, k and v are separate linear layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNKS = 6  # shift, scale, gate of the attention, then of the MLP


class RMSNorm(nn.Module):
    """RMS norm over the channels of a head. It casts to the input's dtype before multiplying by the weight."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class Attention(nn.Module):
    """Self-attention of [batch, tokens, channels]; ``rope`` are the frequencies [head / 2] of rotary positions."""

    def __init__(self, width: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.q_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        q, k, v = (split(linear(x), self.heads) for linear in (self.q, self.k, self.v))
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotated(q, rope), rotated(k, rope)
        return self.proj(joined(F.scaled_dot_product_attention(q, k, v)))


class CrossAttention(nn.Module):
    """Cross-attention of tokens [B, tokens, channels] to text [B, length, channels] where ``mask`` [B, length] > 0."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear, self.k_linear, self.v_linear = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (split(y, self.heads) for y in (self.q_linear(x), self.k_linear(text), self.v_linear(text)))
        attn_mask = None if mask is None else (mask > 0)[:, None, None, :]
        return self.proj(joined(F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)))


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int, out: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PatchEmbed(nn.Module):
    """[B, C, T, H, W] to tokens [B, T' H' W', channels]. Sides are padded with zeros to a multiple of the patch."""

    def __init__(self, patch: tuple[int, int, int], channels: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv3d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        t, h, w = (-size % p for size, p in zip(x.shape[2:], self.patch, strict=True))
        return self.proj(F.pad(x, (0, w, 0, h, 0, t))).flatten(2).transpose(1, 2)


class PatchEmbed2d(nn.Module):
    """Images [B, C, H, W] to tokens [B, H' W', channels]."""

    def __init__(self, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class ScalarEmbed(nn.Module):
    """Numbers [B] to vectors [B, channels], by 128 cosines and 128 sines."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies // 2
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        steps = torch.arange(self.frequencies, dtype=torch.float32, device=x.device) / self.frequencies
        angles = x.float()[:, None] * torch.exp(-math.log(10000) * steps)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))


class CaptionEmbed(nn.Module):
    """Text [B, length, T5's channels] to [B, length, channels]; ``y_embedding`` replaces the text without a prompt."""

    y_embedding: Tensor

    def __init__(self, channels: int, width: int, length: int) -> None:
        super().__init__()
        self.y_proj = Mlp(channels, width, width)
        self.register_buffer("y_embedding", torch.randn(length, channels) / channels**0.5)

    def forward(self, text: Tensor) -> Tensor:
        return self.y_proj(text)


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + time[:, None]).chunk(2, dim=1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


def split(x: Tensor, heads: int) -> Tensor:
    """[B, n, channels] to [B, heads, n, channels of a head]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """The inverse of :func:`split`."""
    return x.transpose(1, 2).flatten(2)


def rotated(x: Tensor, frequencies: Tensor) -> Tensor:
    """Rotary positions of [..., n, d]: rotates pairs of neighbouring channels by position times frequency [d / 2]."""
    angles = torch.arange(x.shape[-2], device=x.device).float()[:, None] * frequencies.float()
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def by_frame(x: Tensor, frames: int) -> Tensor:
    """[B, T S, c] to [B T, S, c]."""
    return x.unflatten(1, (frames, -1)).flatten(0, 1)


def by_position(x: Tensor, frames: int) -> Tensor:
    """[B, T S, c] to [B S, T, c]."""
    return x.unflatten(1, (frames, -1)).transpose(1, 2).flatten(0, 1)


def from_frames(x: Tensor, batch: int) -> Tensor:
    """The inverse of :func:`by_frame`."""
    return x.unflatten(0, (batch, -1)).flatten(1, 2)


def from_positions(x: Tensor, batch: int) -> Tensor:
    """The inverse of :func:`by_position`."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(1, 2)


def positions_1d(width: int, positions: Tensor) -> Tensor:
    """Embeddings [n, width] of positions [n]: sines, then cosines, in float32."""
    frequencies = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64, device=positions.device) / (width / 2))
    angles = positions.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def positions_2d(width: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Embeddings [rows columns, width] of a grid, row by row: half the channels for the column, half for the row."""
    column_embeddings = positions_1d(width // 2, columns).repeat(len(rows), 1)
    row_embeddings = positions_1d(width // 2, rows).repeat_interleave(len(columns), dim=0)
    return torch.cat([column_embeddings, row_embeddings], dim=-1)


def to_video(x: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int], channels: int) -> Tensor:
    """Tokens [B, T' H' W', patch channels] to [B, channels, T, H, W]."""
    (t, h, w), (pt, ph, pw) = grid, patch
    x = x.reshape(-1, t, h, w, pt, ph, pw, channels).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.reshape(-1, channels, t * pt, h * ph, w * pw)
