"""How good a candidate is: by default, how near its predictions are to the 16-bit model's on the same latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ditq.architectures import Architecture
from ditq.sampling import Samples
from ditq.trace.arguments import bound
from ditq.trace.blocks import on_device
from ditq.trace.calls import Call, Recorder, call_time
from ditq.trace.hooks import hooked


@dataclass(frozen=True)
class Fitness:
    """A number for what a candidate does; smaller is better.

    Attributes:
        name: belongs to a study's identity, so it changes with everything that changes the number.
        score: of what the 16-bit model gave and what the candidate gave, for the same conditions and seeds.
        sees: what is given. ``outputs``: a list with the transformer's output for every kept call of the 16-bit
            model's sampling, on the inputs that it had. ``latents``: :class:`ditq.sampling.Samples` without images.
            ``pictures``: the same with images.
    """

    name: str
    score: Callable[[Any, Any], float]
    sees: Literal["outputs", "latents", "pictures"] = "pictures"


def prediction_error_db(reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """Error of what the transformer predicts along the 16-bit model's trajectory, in dB.

    The mean of 10 log10(||e' - e||^2 / ||e||^2) over rows of the batch (both halves of the guidance) and steps.
    Errors do not travel from step to step here, where a trajectory amplifies them at random; so it takes far fewer
    images than :func:`latent_error_db` to tell two candidates apart. Infinite where a candidate gives NaN or Inf.
    """
    return _mean_db([_ratios(a, b) for a, b in zip(reference, outputs, strict=True)])


def latent_error_db(reference: Samples, drawn: Samples) -> float:
    """Error of the final latents in dB: the mean of 10 log10(||z' - z||^2 / ||z||^2) over images.

    The negative of the latent SQNR that ``ditq compare`` reports. The mean of logarithms, so that no single image
    whose trajectory ends elsewhere decides. Infinite where a candidate draws NaN or Inf.
    """
    return _mean_db([_ratios(reference.latents, drawn.latents)])


def _ratios(a: Tensor, b: Tensor) -> Tensor:
    """||b - a||^2 / ||a||^2 of every row, float64 [n]."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    return (b - a).square().sum(1) / a.square().sum(1).clamp_min(1e-30)


def _mean_db(ratios: Sequence[Tensor]) -> float:
    together = torch.cat(list(ratios))
    if not bool(torch.isfinite(together).all()):
        return math.inf
    return float((10 * together.clamp_min(1e-10).log10()).mean())


PREDICTION = Fitness("prediction error, dB", prediction_error_db, "outputs")
LATENT = Fitness("latent error, dB", latent_error_db, "latents")


@contextmanager
def kept_moments(model: nn.Module, architecture: Architecture, moments: int, seed: int) -> Iterator[Recorder]:
    """Keeps the transformer's calls of that many random timesteps of every sample of the one batch drawn inside."""
    recorder = Recorder(architecture, moments, seed)

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = bound(model, type(model).__name__, args, kwargs)
        recorder.record(call, call_time(architecture, call))

    with hooked(model, keep):
        yield recorder


@torch.no_grad()
def outputs_of(model: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    """What the transformer gives now for kept calls."""
    return [model(**on_device(call, model), return_dict=False)[0] for call in calls]
