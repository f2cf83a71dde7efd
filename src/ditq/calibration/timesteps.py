"""Which timesteps of the recorded trajectory count."""

from __future__ import annotations

import torch
from torch import Tensor

# Of the released command (--calib_t_mode normal): mean and standard deviation in parts of the trajectory.
_MEAN = _DEVIATION = 0.4


def normal_timesteps(count: int) -> Tensor:
    """The timesteps of PTQ4DM's normally distributed calibration (Shang et al. 2023, arXiv 2211.15736).

    t ~ N(0.4 T, (0.4 T)^2), clamped to the trajectory, t = 0 being the last, cleanest step: more of the clean half,
    few of the noisy end. T values are drawn, evenly over the quantiles of the distribution instead of at random, so
    that nothing depends on a seed.

    Returns:
        bool [count] in sampling order, the noisiest timestep first; at least one is true.
    """
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    steps = count * (_MEAN + _DEVIATION * torch.special.ndtri(quantiles))
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[count - 1 - steps.long().clamp(0, count - 1)] = True
    return chosen
