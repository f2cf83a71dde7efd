"""Fitness of a candidate; by default, the error of its predictions against the 16-bit model on the same latents."""

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
    """Scores a candidate; smaller is better.

    Attributes:
        name: part of a study's identity, so it must change with everything that changes the score.
        score: function of the results of the 16-bit model and of the candidate, for the same conditions and seeds.
        sees: the results that ``score`` receives. ``outputs``: a list of transformer outputs, one for every kept call
            of the 16-bit model's sampling, on the same inputs. ``latents``: :class:`ditq.sampling.Samples` without
            images. ``pictures``: samples with images.
    """

    name: str
    score: Callable[[Any, Any], float]
    sees: Literal["outputs", "latents", "pictures"] = "pictures"


def prediction_error_db(reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """Error of the transformer's predictions along the 16-bit model's trajectory, in dB.

    The mean of 10 log10(||e' - e||^2 / ||e||^2) over rows of the batch (both halves of the guidance) and steps.
    Errors do not propagate between steps, while a sampled trajectory amplifies them at random. So this needs far fewer
    images than :func:`latent_error_db` to separate two candidates. Infinite if a candidate returns NaN or Inf.
    """
    return _mean_db([_ratios(a, b) for a, b in zip(reference, outputs, strict=True)])


def latent_error_db(reference: Samples, candidate: Samples) -> float:
    """Error of the final latents in dB: the mean of 10 log10(||z' - z||^2 / ||z||^2) over images.

    This is the negative of the latent SQNR that ``ditq compare`` reports. The mean is over logarithms, so that a
    single image with a diverging trajectory does not dominate. Infinite if a candidate generates NaN or Inf.
    """
    return _mean_db([_ratios(reference.latents, candidate.latents)])


def _ratios(a: Tensor, b: Tensor) -> Tensor:
    """||b - a||^2 / ||a||^2 of every row, float64 [n]."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    return (b - a).square().sum(1) / a.square().sum(1).clamp_min(1e-30)


def _mean_db(ratios: Sequence[Tensor]) -> float:
    all_ratios = torch.cat(list(ratios))
    if not bool(torch.isfinite(all_ratios).all()):
        return math.inf
    return float((10 * all_ratios.clamp_min(1e-10).log10()).mean())


PREDICTION = Fitness("prediction error, dB", prediction_error_db, "outputs")
LATENT = Fitness("latent error, dB", latent_error_db, "latents")


@contextmanager
def kept_moments(model: nn.Module, architecture: Architecture, moments: int, seed: int) -> Iterator[Recorder]:
    """Keeps transformer calls at ``moments`` random timesteps per sample; one batch may be sampled inside."""
    recorder = Recorder(architecture, moments, seed)

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = bound(model, type(model).__name__, args, kwargs)
        recorder.record(call, call_time(architecture, call))

    with hooked(model, keep):
        yield recorder


@torch.no_grad()
def outputs_of(model: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    """The current outputs of the transformer for kept calls."""
    return [model(**on_device(call, model), return_dict=False)[0] for call in calls]
