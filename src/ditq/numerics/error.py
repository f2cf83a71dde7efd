"""Errors of approximations, summed in float64, so that many small ones are not lost as in a float32 sum."""

from __future__ import annotations

import math

from torch import Tensor


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise ratio in dB, 10 log10(||reference||^2 / ||reference - approximation||^2).

    Inf if both are equal, -inf if only the reference is zero. Six dB are about one bit.

    Args:
        reference: any shape, any real dtype.
        approximation: the same shape.

    Raises:
        ValueError: the shapes differ.
    """
    signal, noise = _powers(reference, approximation)
    if noise == 0:
        return math.inf
    return 10 * (math.log10(signal) - math.log10(noise)) if signal != 0 else -math.inf


def relative_error(reference: Tensor, approximation: Tensor) -> float:
    """||reference - approximation|| / ||reference||; 0 if both are equal, inf if only the reference is zero.

    Args:
        reference: any shape, any real dtype.
        approximation: the same shape.

    Raises:
        ValueError: the shapes differ.
    """
    signal, noise = _powers(reference, approximation)
    if noise == 0:
        return 0.0
    return math.sqrt(noise) / math.sqrt(signal) if signal != 0 else math.inf


def _powers(reference: Tensor, approximation: Tensor) -> tuple[float, float]:
    """Sums of squares of the signal and of the error."""
    if reference.shape != approximation.shape:
        raise ValueError(
            f"approximation must have the shape of the reference, {tuple(reference.shape)}, "
            f"got {tuple(approximation.shape)}"
        )
    signal = reference.detach().double()
    noise = signal - approximation.detach().to(device=signal.device, dtype=signal.dtype)
    return float(signal.square().sum()), float(noise.square().sum())
