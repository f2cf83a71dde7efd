"""Runs the pipeline on prompts, batch by batch; every finished batch is a file that a later run starts from."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditq.architectures import Architecture, InputGroup
from ditq.calibration.capture import Capture
from ditq.calibration.statistics import Statistics, merge
from ditq.recipe import Calibration
from ditq.sampling import batches, cache_root, draws_videos, sample

# Added to the seed of every calibration, so that it never sees the noise that the same seed compares models with.
NOISE_OFFSET = 10_000

# What the samples of all layers' inputs may take together. A Latte-1 in float32 has 2.2 MB in a row of each.
SAMPLE_BYTES = 2**30

Progress = Callable[[int, int], None]


def calibrate(
    pipe: Any,
    architecture: Architecture,
    prompts: Sequence[str],
    settings: Calibration,
    *,
    component: str = "transformer",
    seed: int = 0,
    cache: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Statistics:
    """Statistics of every input group over the sampling trajectories of ``prompts``.

    Deterministic under ``seed``. Memory is bounded: maxima are [timesteps, conditions, channels], samples at most
    about ``settings.rows`` rows a group and :data:`SAMPLE_BYTES` in all, whole calls ``settings.calls`` a prompt
    or what :data:`ditq.calibration.capture.ROWS_PER_INPUT` asks for.

    Args:
        component: which transformer of the pipeline is watched.
        cache: where finished batches are kept, below a name of everything that matters; by default
            ``calibration`` in :func:`ditq.sampling.cache_root`.
        resume: take finished batches from the cache instead of starting over.
        progress: called with (batches done, batches in all).
    """
    seed += NOISE_OFFSET
    prompts = list(prompts)[: settings.prompts]
    size = _batch_size(pipe, settings)
    together = [[prompts[i] for i in numbers] for numbers in batches(pipe, prompts, size)]
    model, experts = getattr(pipe, component), (pipe.transformer, getattr(pipe, "transformer_2", None))
    groups = architecture.groups(model)
    folder = (cache or cache_root() / "calibration") / _key(
        model, architecture, prompts, settings, seed, others=[x for x in experts if x is not None and x is not model]
    )
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    most = min(settings.rows, SAMPLE_BYTES // _bytes_of_a_row(model, groups))
    rows = max(1, most // (len(together) * settings.steps * 2))
    parts: list[Statistics] = []
    drawn = 0
    for i, batch in enumerate(together):
        path = folder / f"batch-{i:05d}.safetensors"
        if path.exists():
            parts.append(Statistics.load(path))
        else:
            capture = Capture(architecture, groups, rows, seed + i, settings.calls, len(prompts))
            with capture.watching(model):
                sample(
                    pipe, architecture, batch, seed=seed + drawn, steps=settings.steps,
                    guidance_scale=settings.guidance_scale, batch_size=len(batch), decode=False,
                    **settings.arguments,
                )  # fmt: skip
            parts.append(capture.statistics())
            parts[-1].save(path)
        drawn += len(batch)
        if progress:
            progress(i + 1, len(together))
    return merge(parts)


def _batch_size(pipe: Any, settings: Calibration) -> int:
    """As asked; else 8 pictures, or by ``auto`` as many as have 2^16 latent numbers, from 8 to 32: small batches leave
    a processor waiting. Of videos as many as have 2^17, up to 8, and one where their size is not the transformer's.
    """
    if isinstance(settings.batch_size, int):
        return settings.batch_size
    config, video = pipe.transformer.config, draws_videos(pipe)
    side, frames = getattr(config, "sample_size", None), getattr(config, "video_length", None)
    if not isinstance(side, int) or settings.arguments or (video and not frames):
        return 1 if video else 8
    if not video and settings.batch_size is None:
        return 8
    numbers = config.in_channels * side**2 * (frames or 1)
    return min(max(2**17 // numbers, 1), 8) if video else min(max(2**16 // numbers, 8), 32)


def _bytes_of_a_row(model: nn.Module, groups: Sequence[InputGroup]) -> int:
    """Of the inputs of every group together, one row each."""
    size = next(model.parameters()).element_size()
    return sum(group.linears[0].module.in_features for group in groups) * size


def _key(
    model: nn.Module,
    architecture: Architecture,
    prompts: list[str],
    settings: Calibration,
    seed: int,
    others: Sequence[nn.Module] = (),
) -> str:
    """A name for the cache that changes with the weights, the prompts and every setting.

    ``others`` draw as well, and may be quantized by now.
    """
    digest = hashlib.sha256()
    # One number a tensor is enough to tell two models apart, and cheap on large ones.
    for one in (model, *others):
        for name, p in one.named_parameters():
            digest.update(f"{name} {tuple(p.shape)} {p.dtype} {p.detach().double().sum().item()!r}".encode())
    for one in others:
        plan = getattr(getattr(getattr(one, "config", None), "quantization_config", None), "plan", None)
        digest.update(plan.hash().encode() if plan else b"16 bit")
    watched = settings.model_dump(mode="json", exclude={"timesteps"})  # all are recorded, whichever count
    digest.update(json.dumps([architecture.name, prompts, watched, seed]).encode())
    digest.update(torch.__version__.encode())
    return digest.hexdigest()[:16]
