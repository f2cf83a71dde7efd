"""Smoothing: X W^T = (X / s) (W s)^T, which moves the range of a channel from the activation to the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ditq.numerics.uniform import check_finite

# The largest factor between s and its mean: larger ones would push 16-bit weights or norm parameters out of range.
_LIMIT = 1e4


def smoothing_scale(x_absmax: Tensor, w_absmax: Tensor, alpha: float, *, power_of_two: bool = False) -> Tensor:
    """s_j = max|X_j|^alpha / max|W_:,j|^(1 - alpha) (SmoothQuant eq. 4; the static part of ViDiT-Q's balancing).

    s is normalized to a geometric mean of 1. Scales per token and per output channel absorb a common factor, and so do
    static ones that are computed after smoothing. Stored magnitudes do not: with a mean of 1, X / s and W s stay in
    the accurate range of 16-bit formats. A channel with a zero maximum gets s = 1.

    Args:
        x_absmax: [K], the largest |x| of each input channel.
        w_absmax: [K], the largest |w| of each input channel, over all layers that share the input.
        alpha: 0 leaves the difficulty in the activation, 1 moves all of it into the weight.
        power_of_two: 2^round(log2 s), so that dividing and multiplying by s is exact in any float format;
            the geometric mean is then 1 up to rounding.

    Returns:
        float32 [K], positive; between 1e-4 and 1e4 before the final normalization.

    Raises:
        ValueError: ``alpha`` is outside [0, 1], the shapes differ, or a maximum is negative, NaN or Inf.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if x_absmax.ndim != 1 or w_absmax.shape != x_absmax.shape:
        raise ValueError(
            f"x_absmax and w_absmax must be vectors of one length, "
            f"got shapes {tuple(x_absmax.shape)} and {tuple(w_absmax.shape)}"
        )
    for name, maxima in (("x_absmax", x_absmax), ("w_absmax", w_absmax)):
        check_finite(maxima, name)
        if bool((maxima < 0).any()):
            raise ValueError(f"{name} must not be negative, got {float(maxima.min())}")
    x, w = x_absmax.double(), w_absmax.to(device=x_absmax.device, dtype=torch.float64)
    known = (x > 0) & (w > 0)
    if not bool(known.any()):
        return torch.ones_like(x, dtype=torch.float32)
    # Logarithms in float64: a power of a small maximum divided by that of a large one may leave the range of float32.
    exponent = alpha * x[known].log2() - (1 - alpha) * w[known].log2()
    # Centre, clamp, centre again: a common factor must not move all channels to one limit.
    limit = torch.tensor(_LIMIT, dtype=torch.float64, device=x.device).log2()
    exponent = (exponent - exponent.mean()).clamp(-limit, limit)
    exponent = exponent - exponent.mean()
    if power_of_two:
        exponent = exponent.round()
    s = torch.ones_like(x)
    s[known] = exponent.exp2()
    return s.float()
