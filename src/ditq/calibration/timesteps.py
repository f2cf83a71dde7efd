"""Selects timesteps of the recorded trajectory."""

from __future__ import annotations

import torch
from torch import Tensor

# Mean and standard deviation as fractions of the trajectory, from the released command (--calib_t_mode normal).
_MEAN = _DEVIATION = 0.4


def normal_timesteps(count: int) -> Tensor:
    """The timesteps of PTQ4DM's normally distributed calibration (Shang et al. 2023, arXiv 2211.15736).

    t ~ N(0.4 T, (0.4 T)^2), clamped to the trajectory, where t = 0 is the last, cleanest step. Most timesteps lie in
    the clean half, few at the noisy end. The T values are evenly spaced quantiles of the distribution instead of
    random draws, so that the result does not depend on a seed.

    Returns:
        bool [count] in sampling order, the noisiest timestep first; at least one is true.
    """
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    steps = count * (_MEAN + _DEVIATION * torch.special.ndtri(quantiles))
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[count - 1 - steps.long().clamp(0, count - 1)] = True
    return chosen
