"""Runs the pipeline on prompts batch by batch. Every finished batch is saved, so that a later run can resume."""

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

# Added to the seed of every calibration, so that it does not use the noise of a comparison with the same seed.
NOISE_OFFSET = 10_000

# Memory limit of the sampled input rows of all layers. In Latte-1 in float32, one row of every input takes 2.2 MB.
SAMPLE_BYTES = 2**30

# Packages of ditq that statistics depend on, besides those used for sampling.
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

    The result is deterministic under ``seed``. Memory is bounded: maxima are [timesteps, conditions, channels];
    samples have at most about ``settings.rows`` rows per group and :data:`SAMPLE_BYTES` in total. Whole calls are
    ``settings.calls`` per prompt, or more to reach :data:`ditq.calibration.capture.ROWS_PER_INPUT`.

    Args:
        pipe: a diffusers pipeline.
        architecture: of its transformer.
        prompts: prompts, or names or numbers of classes.
        settings: how to calibrate.
        component: name of the transformer whose inputs are recorded.
        seed: of the noise and of the sampled rows.
        cache: folder of finished batches; by default ``calibration`` in :func:`ditq.sampling.cache_root`. They lie in
            a subfolder named by a hash of everything they depend on, so several runs may share the folder.
        resume: reads finished batches from the cache; otherwise all batches are computed and saved again.
        progress: called with (batches done, total batches).

    Raises:
        UsageError: see :func:`ditq.sampling.condition_list` and :func:`ditq.sampling.sample`.
        CheckpointError: a file of the cache is damaged.
        DitqError: NaN or Inf in an activation, a layer that is never called, or a cache folder that cannot be written.
    """
    prompts = condition_list(prompts)[: settings.prompts]
    size = _batch_size(pipe, settings)
    sampling = Sampling(seed + NOISE_OFFSET, settings.steps, settings.guidance_scale, size, settings.arguments)
    prompt_batches = [[prompts[i] for i in numbers] for numbers in batches(pipe, prompts, size)]
    model = getattr(pipe, component)
    groups = architecture.groups(model)
    key = _key(pipe, component, architecture, prompts, settings, sampling.seed)
    folder = _folder(cache or cache_root() / "calibration", key)
    max_rows = min(settings.rows, SAMPLE_BYTES // _row_bytes(model, groups))
    rows = max(1, max_rows // (len(prompt_batches) * settings.steps * 2))
    parts: list[Statistics] = []
    done = 0
    for i, batch in enumerate(prompt_batches):
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
            progress(i + 1, len(prompt_batches))
    return merge(parts)


def _batch_size(pipe: Any, settings: Calibration) -> int:
    """The batch size of the settings, or a default.

    The default is 8 images. ``auto`` takes 2^16 latent numbers per batch, 8 to 32 images, since small batches leave
    a processor idle. For videos both take 2^17 latent numbers, 1 to 8 videos, or one video if the settings have
    arguments of their own or the transformer's config has no size.
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


def _row_bytes(model: nn.Module, groups: Sequence[InputGroup]) -> int:
    """Bytes of one input row of every group, summed over groups."""
    size = next(model.parameters()).element_size()
    return sum(group.linears[0].module.in_features for group in groups) * size


def _key(
    pipe: Any, component: str, architecture: Architecture, prompts: list[str], settings: Calibration, seed: int
) -> str:
    """A hash of everything that statistics depend on.

    That is the whole pipeline except the weights of its decoder: scheduler, text encoders, tokenizers and both
    experts, of which one may already be quantized. It also covers the versions of the libraries and the code of ditq,
    the recorded transformer and its architecture file, and prompts, settings and seed.
    """
    digest = hashlib.sha256(fingerprint(pipe, code=CODE, unread={"vae"}).encode())
    # All timesteps are recorded; `timesteps` only selects among them later.
    recording_settings = settings.model_dump(mode="json", exclude={"timesteps"})
    content = [component, architecture.model_dump(mode="json"), prompts, recording_settings, seed]
    digest.update(json.dumps(content, sort_keys=True, default=repr).encode())
    return digest.hexdigest()[:16]


def _folder(root: Path, key: str) -> Path:
    """The folder of one key, created if it is missing. Its files are kept, since another run may be reading them."""
    folder = root / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DitqError(
            f"Cannot create the calibration cache {folder}: {error.strerror or error}. Choose another folder with "
            "cache=PATH (--cache PATH), or set DITQ_CACHE."
        ) from error
    return folder


@torch.no_grad()
def watch(model: nn.Module, arch: Architecture, run: Callable[[nn.Module], None], calls: int, seed: int) -> Statistics:
    """Statistics of the inputs of a bare transformer's layers while ``run`` calls it."""
    capture = Capture(arch, arch.groups(model), rows=64, seed=seed, calls=calls)
    with capture.watching(model):
        run(model)
    return capture.statistics()
