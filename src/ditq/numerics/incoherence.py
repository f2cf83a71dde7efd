"""Incoherence: the largest value relative to the norm, which determines the error of a uniform grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def incoherence(x: Tensor) -> Tensor:
    """The smallest mu of each row with max|x| <= mu ||x|| / sqrt(n), n the number of values (QuIP, ViDiT-Q).

    1 if all magnitudes are equal, sqrt(n) if only one value is not zero; about sqrt(2 ln n) for Gaussian values. Rows
    of zeros return 1.

    Args:
        x: [R, K], any real dtype; computed in float32.

    Returns:
        float32 [R].

    Raises:
        ValueError: ``x`` is not a matrix.
    """
    if x.ndim != 2:
        raise ValueError(f"x must be a matrix [R, K], got shape {tuple(x.shape)}")
    rows = x.float()
    if rows.shape[1] == 0:
        return torch.ones(rows.shape[0], dtype=torch.float32, device=x.device)
    largest = torch.linalg.vector_norm(rows, float("inf"), dim=-1, keepdim=True)
    # Dividing by the maximum first keeps squares from overflow and underflow; the norm is then at least 1.
    norm = torch.linalg.vector_norm(rows / torch.where(largest > 0, largest, 1.0), dim=-1)
    return torch.where(largest[:, 0] > 0, math.sqrt(rows.shape[1]) / norm, 1.0)


def channel_imbalance(x_absmax: Tensor) -> float:
    """max_j max|X_j| / mean_j max|X_j|: 1 if all channels have the same range, K if only one is not zero.

    Args:
        x_absmax: [K], the largest magnitude of each channel; all zeros return 1.

    Raises:
        ValueError: ``x_absmax`` is not a vector with at least one channel.
    """
    if x_absmax.ndim != 1 or x_absmax.numel() == 0:
        raise ValueError(f"x_absmax must be a vector [K] with K >= 1, got shape {tuple(x_absmax.shape)}")
    maxima = x_absmax.double()
    largest = float(maxima.max())
    return largest / float(maxima.mean()) if largest > 0 else 1.0
