"""Weights of timesteps in the salience of channels: more for those whose channel order differs from the weights'."""

from __future__ import annotations

import torch
from torch import Tensor

from ditq.numerics.uniform import check_finite


def rank_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's rho: Pearson's correlation of ranks, where equal values share the mean of their ranks.

    Args:
        x: [T, K], each row of which is compared with y [K].

    Returns:
        float64 [T] in [-1, 1]; 0 if all values of either are equal.

    Raises:
        ValueError: the shapes do not fit, or a value is NaN or Inf.
    """
    if x.ndim != 2 or y.shape != x.shape[1:]:
        raise ValueError(f"x must be [T, K] and y [K], got shapes {tuple(x.shape)} and {tuple(y.shape)}")
    check_finite(x, "x")
    check_finite(y, "y")
    a, b = _centred_ranks(x), _centred_ranks(y[None].to(x.device))
    lengths = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b)
    # Centred ranks are halves of integers: their norm is 0 or at least 1/2.
    return ((a @ b[0]) / lengths.clamp_min(0.25)).clamp(-1, 1)


def salience_weights(x_absmax: Tensor, w_absmax: Tensor) -> Tensor:
    """eta_t = softmax_t(-rho(s(X^t), s(W))), the weights of the timesteps in PTQ4DiT's salience calibration.

    s(X) = sum_t eta_t s(X^t) then replaces max|X_j| (Wu et al. 2024, arXiv 2405.16005). Smoothing gains most if
    channels with large inputs have small weights; such timesteps get more weight, up to a factor of e^2.

    Args:
        x_absmax: [T, K], s(X^t): the largest |x| of each input channel at each timestep.
        w_absmax: [K], s(W): the largest |w| of each input channel.

    Returns:
        float64 [T], positive, with sum 1.

    Raises:
        ValueError: see :func:`rank_correlation`.
    """
    return torch.softmax(-rank_correlation(x_absmax, w_absmax), 0)


def _centred_ranks(x: Tensor) -> Tensor:
    """Ranks [T, K] of the values in each row of x, float64 of mean 0."""
    x = x.contiguous()
    ordered = x.sort(dim=1).values
    # The two searches count values below, and up to, each value: equal values share the mean of their ranks.
    below, until = torch.searchsorted(ordered, x), torch.searchsorted(ordered, x, right=True)
    return (below + until - x.shape[1]).double() / 2
