"""Runs the pipeline on prompts, batch by batch; every finished batch is a file that a later run starts from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditq.architectures import Architecture, InputGroup
from ditq.calibration.capture import Capture
from ditq.calibration.statistics import Statistics, merge
from ditq.errors import DitqError
from ditq.recipe import Calibration
from ditq.sampling import Sampling, batches, cache_root, condition_list, draws_videos, fingerprint, sample

# Added to the seed of every calibration, so that it never sees the noise that the same seed compares models with.
NOISE_OFFSET = 10_000

# What the samples of all layers' inputs may take together. A Latte-1 in float32 has 2.2 MB in a row of each.
SAMPLE_BYTES = 2**30

# Packages of ditq that statistics depend on, besides those that sample.
CODE = ("calibration", "trace")

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
        cache: folder of finished batches, in a subfolder named after everything they depend on; by default
            ``calibration`` in :func:`ditq.sampling.cache_root`. Several runs may share it.
        resume: take finished batches from the cache; else all are computed again and replace those there.
        progress: called with (batches done, batches in all).

    Raises:
        UsageError: see :func:`ditq.sampling.condition_list` and :func:`ditq.sampling.sample`.
        CheckpointError: a file of the cache is damaged.
        DitqError: NaN or Inf in an activation, a layer that is never called, or a cache that cannot be written.
    """
    prompts = condition_list(prompts)[: settings.prompts]
    size = _batch_size(pipe, settings)
    sampling = Sampling(seed + NOISE_OFFSET, settings.steps, settings.guidance_scale, size, settings.arguments)
    together = [[prompts[i] for i in numbers] for numbers in batches(pipe, prompts, size)]
    model = getattr(pipe, component)
    groups = architecture.groups(model)
    key = _key(pipe, component, architecture, prompts, settings, sampling.seed)
    folder = _folder(cache or cache_root() / "calibration", key)
    most = min(settings.rows, SAMPLE_BYTES // _bytes_of_a_row(model, groups))
    rows = max(1, most // (len(together) * settings.steps * 2))
    parts: list[Statistics] = []
    done = 0
    for i, batch in enumerate(together):
        path = folder / f"batch-{i:05d}.safetensors"
        if resume and path.exists():
            parts.append(Statistics.load(path))
        else:
            capture = Capture(architecture, groups, rows, sampling.seed + i, settings.calls, len(prompts))
            with capture.watching(model):
                sample(pipe, architecture, batch, sampling.shifted(done).batch(len(batch)), decode=False)
            parts.append(capture.statistics())
            parts[-1].save(path)
        done += len(batch)
        if progress:
            progress(i + 1, len(together))
    return merge(parts)


def _batch_size(pipe: Any, settings: Calibration) -> int:
    """As asked; else 8 images, or by ``auto`` as many as have 2^16 latent numbers, from 8 to 32: small batches leave
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
    pipe: Any, component: str, architecture: Architecture, prompts: list[str], settings: Calibration, seed: int
) -> str:
    """A name that changes with everything that statistics depend on.

    That is the whole pipeline (scheduler, text encoders, tokenizers, both experts, of which one may be quantized by
    now), but not the weights of its decoder; the versions of the libraries and of ditq's own code; which transformer
    is watched, and by which architecture file; prompts, settings and seed.
    """
    digest = hashlib.sha256(fingerprint(pipe, code=CODE, unread={"vae"}).encode())
    watched = settings.model_dump(mode="json", exclude={"timesteps"})  # all are recorded, whichever count
    content = [component, architecture.model_dump(mode="json"), prompts, watched, seed]
    digest.update(json.dumps(content, sort_keys=True, default=repr).encode())
    return digest.hexdigest()[:16]


def _folder(root: Path, key: str) -> Path:
    """The folder of one key, made if it is missing. Nothing in it is deleted: another run may be reading it."""
    folder = root / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DitqError(
            f"The calibration cache {folder} cannot be made: {error.strerror or error}. Choose another folder with "
            "cache=PATH (--cache PATH), or set DITQ_CACHE."
        ) from error
    return folder


@torch.no_grad()
def watch(model: nn.Module, arch: Architecture, run: Callable[[nn.Module], None], calls: int, seed: int) -> Statistics:
    """Statistics of what a bare transformer sees while ``run`` calls it."""
    capture = Capture(arch, arch.groups(model), rows=64, seed=seed, calls=calls)
    with capture.watching(model):
        run(model)
    return capture.statistics()
