"""Damage to pictures that a classifier should look past: what diffusion, quantization and codecs do to them.

All functions take ``x`` [n, 3, H, W] in [0, 1] and a generator, and return pictures of the same shape and range.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812


def warp(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Mirrors, turns, scales, shears and shifts; white flows in."""
    n = len(x)
    angle, shear = 0.12 * torch.randn(2, n, generator=rng)
    sx, sy = (0.18 * torch.randn(2, n, generator=rng)).clamp(-0.4, 0.4).exp()
    flip = torch.randint(0, 2, (n,), generator=rng) * 2.0 - 1
    tx, ty = (0.12 * torch.randn(2, n, generator=rng)).clamp(-0.3, 0.3)
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack([flip * cos * sx, (shear - sin) * sx, tx, flip * sin * sy, cos * sy, ty], 1).view(n, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return 1 - F.grid_sample(1 - x, grid, align_corners=False)


def recolour(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Contrast, brightness, saturation and a gain of each channel."""
    n = len(x)
    contrast, saturation = (0.2 * torch.randn(2, n, 1, 1, 1, generator=rng)).exp()
    gain = (0.07 * torch.randn(n, 3, 1, 1, generator=rng)).exp()
    shift = 0.06 * torch.randn(n, 1, 1, 1, generator=rng)
    grey = x.mean(1, keepdim=True)
    return (((grey + (x - grey) * saturation) * gain - 0.5) * contrast + 0.5 + shift).clamp(0, 1)


def blur(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Loses resolution: down to 20 .. 48 pixels and up again, one size for the batch."""
    size = int(torch.randint(20, 49, (), generator=rng))
    small = F.interpolate(x, size=size, mode="bilinear", antialias=True)
    return F.interpolate(small, size=x.shape[-2:], mode="bilinear")


def noise(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    sigma = 0.12 * torch.rand(len(x), 1, 1, 1, generator=rng)
    return (x + sigma * torch.randn(x.shape, generator=rng)).clamp(0, 1)


def posterize(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    levels = torch.randint(2, 12, (len(x), 1, 1, 1), generator=rng)
    return (x * levels).round() / levels


def block_code(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """What JPEG does to 8 x 8 blocks: cosine transform, rounding that is coarser for high frequencies, and back."""
    k = torch.arange(8.0)
    dct = torch.cos((k[None, :] + 0.5) * k[:, None] * torch.pi / 8) * 0.5
    dct[0] *= 0.5**0.5
    n, c, h, w = x.shape
    blocks = x.view(n, c, h // 8, 8, w // 8, 8).transpose(3, 4)  # [n, c, rows, columns, 8, 8]
    step = (1 + k[:, None] + k[None, :]) * (0.01 + 0.07 * torch.rand(n, 1, 1, 1, 1, 1, generator=rng))
    coded = dct.T @ ((dct @ blocks @ dct.T / step).round() * step) @ dct
    return coded.transpose(3, 4).reshape(x.shape).clamp(0, 1)


def erase(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Hides a square of 10 .. 28 pixels under a random colour."""
    n, size = len(x), x.shape[-1]
    at = torch.arange(size)
    corner = torch.randint(0, size - 10, (2, n, 1), generator=rng)
    side = torch.randint(10, 29, (n, 1), generator=rng)
    rows, columns = ((at >= corner) & (at < corner + side)).unbind(0)
    colour = torch.rand(n, 3, 1, 1, generator=rng)
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], colour, x)


def augment(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Every picture is warped; each of the other changes meets its share of the batch."""
    x = warp(x, rng)
    for change, share in (
        (recolour, 0.7),
        (blur, 0.25),
        (block_code, 0.2),
        (posterize, 0.15),
        (noise, 0.25),
        (erase, 0.3),
    ):
        chosen = torch.rand(len(x), 1, 1, 1, generator=rng) < share
        x = torch.where(chosen, change(x, rng), x)
    return x
