"""Runs a diffusers pipeline on a list of conditions, one seed each; keeps images and every step's latents."""

from __future__ import annotations

import importlib.util
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ditq.architectures import Architecture
from ditq.errors import UsageError
from ditq.sampling.cache import PictureCache, Sample
from ditq.sampling.fingerprint import fingerprint
from ditq.sampling.sampling import DEFAULT, Sampling


@dataclass
class Samples:
    """What one pipeline drew for a list of conditions.

    Attributes:
        images: images (PIL) in the order of the conditions; for a video model lists of frames.
        trajectory: float32 [n, steps, ...], the latents after every sampling step, as the sampler has them.
        timesteps: of the steps.
        seconds: wall time of each image, text encoder and decoder included: that of its batch, divided.
        fingerprint: of the pipeline, where a cache asked for it.
    """

    conditions: list[str]
    seeds: list[int]
    images: list[Any]
    trajectory: Tensor
    timesteps: list[float]
    seconds: list[float]
    fingerprint: str = ""

    @property
    def latents(self) -> Tensor:
        """float32 [n, ...], the final latents before decoding."""
        return self.trajectory[:, -1]

    @property
    def is_video(self) -> bool:
        """Whether ``images`` are lists of frames."""
        return not isinstance(self.images[0], Image.Image)


def condition_list(conditions: Sequence[str]) -> list[str]:
    """Prompts or classes as a list, checked.

    Raises:
        UsageError: a single string, which would be taken for a list of its letters; there is none, or one is blank.
    """
    if isinstance(conditions, str):
        raise UsageError(
            f"prompts must be a list of strings, got the string {conditions!r}: pass prompts=[{conditions!r}]."
        )
    chosen = list(conditions)
    if not chosen:
        raise UsageError("There are no prompts. Give at least one, or a file with one prompt a line.")
    for i, condition in enumerate(chosen):
        if not str(condition).strip():
            raise UsageError(f"Prompt {i + 1} of {len(chosen)} is empty: {condition!r}. Leave it out, or write one.")
    return chosen


def resolve_conditions(pipe: Any, architecture: Architecture, conditions: Sequence[str]) -> list[Any]:
    """What the pipeline takes for each condition: the prompt itself, or the number of a class.

    Raises:
        UsageError: see :func:`condition_list`; or the pipeline has no class of that name.
    """
    conditions = condition_list(conditions)
    if architecture.pipeline.condition == "prompt":
        return list(conditions)
    labels: dict[str, int] = getattr(pipe, "labels", None) or {}
    out = []
    for condition in conditions:
        if str(condition).isdigit():
            out.append(int(condition))
        elif condition in labels:
            out.append(labels[condition])
        else:
            import difflib

            close = difflib.get_close_matches(condition, labels, n=3)
            raise UsageError(
                f"This pipeline knows no class {condition!r}."
                + (f" Close: {', '.join(close)}." if close else "")
                + f" It has {len(labels)} class names; a class number works too."
            )
    return out


def sample(
    pipe: Any,
    architecture: Architecture,
    conditions: Sequence[str],
    sampling: Sampling = DEFAULT,
    *,
    on_batch: Callable[[int], None] | None = None,
    cache: PictureCache | None = None,
    decode: bool = True,
) -> Samples:
    """One image or video for each condition; number i starts from the noise of seed ``sampling.seed + i``.

    Args:
        conditions: prompts, or names or numbers of classes.
        on_batch: called with the number of images of every finished batch.
        cache: what it holds for this pipeline, condition, seed and sampler is not sampled again, whatever the batch
            size was; new images are added batch by batch, so that an interrupted run goes on from there.
        decode: False skips the decoder of pipelines that can do without: images are None, and not cached.

    Raises:
        UsageError: see :func:`resolve_conditions` and :func:`call_arguments`.
    """
    if not decode:
        cache, sampling = None, replace(sampling, arguments={**sampling.arguments, "output_type": "latent"})
    conditions = condition_list(conditions)
    resolved = resolve_conditions(pipe, architecture, conditions)
    seeds = list(range(sampling.seed, sampling.seed + len(resolved)))
    done: dict[int, Sample] = {}
    keys: list[str] = []
    identity = ""
    if cache is not None:
        identity = fingerprint(pipe)
        keys = [cache.key(identity, c, s, sampling.sampler) for c, s in zip(resolved, seeds, strict=True)]
        done = {i: hit for i, key in enumerate(keys) if (hit := cache.get(key)) is not None}
        if on_batch and done:
            on_batch(len(done))
    missing = [i for i in range(len(resolved)) if i not in done]
    with quiet(pipe):
        for numbers in batches(pipe, [resolved[i] for i in missing], sampling.batch_size):
            batch = [missing[n] for n in numbers]
            kwargs = call_arguments(pipe, architecture, [resolved[i] for i in batch], sampling)
            kwargs["generator"] = [torch.Generator("cpu").manual_seed(seeds[i]) for i in batch]
            before = time.perf_counter()
            with torch.no_grad(), recorded_steps(pipe, len(batch)) as recorded:
                output = pipe(**kwargs)
            seconds = (time.perf_counter() - before) / len(batch)
            trajectory = torch.stack(recorded.latents, dim=1)
            pictures = _pictures(output) if decode else [None] * len(batch)
            for row, (i, picture) in enumerate(zip(batch, pictures, strict=True)):
                done[i] = Sample(picture, trajectory[row], recorded.timesteps, seconds)
                if cache is not None:
                    cache.put(keys[i], done[i])
            if on_batch:
                on_batch(len(batch))
    drawn = [done[i] for i in range(len(resolved))]
    return Samples(
        list(conditions), seeds, [d.picture for d in drawn], torch.stack([d.trajectory for d in drawn]),
        drawn[0].timesteps, [d.seconds for d in drawn], identity,
    )  # fmt: skip


def batches(pipe: Any, conditions: Sequence[Any], batch_size: int) -> list[list[int]]:
    """Numbers of conditions that one call of the pipeline draws, in their order; most take any together.

    LattePipeline has no mask for its text, so only prompts of as many tokens go together.
    """
    alike: dict[int, list[int]] = {}
    for i, condition in enumerate(conditions):
        length = 0
        if _cuts_single_texts(pipe):
            length = len(pipe.tokenizer(pipe._text_preprocessing(condition, _cleans_captions(pipe))[0]).input_ids)
        alike.setdefault(length, []).append(i)
    return [group[i : i + batch_size] for group in alike.values() for i in range(0, len(group), batch_size)]


def _cuts_single_texts(pipe: Any) -> bool:
    """LattePipeline: a single prompt is cut to its tokens, several are padded to 120, which draws other videos."""
    return "mask_feature" in inspect.signature(pipe.__call__).parameters


def _cleans_captions(pipe: Any) -> bool:
    """Whether the pipeline takes web addresses and the like out of prompts: by default, if it has what it takes."""
    asked = inspect.signature(pipe.__call__).parameters["clean_caption"].default
    return bool(asked and importlib.util.find_spec("bs4") and importlib.util.find_spec("ftfy"))


@torch.no_grad()
def _texts_as_single(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """What the pipeline makes of each prompt by itself, side by side: [B, tokens, channels]."""
    pairs = [pipe.encode_prompt(prompt, clean_caption=_cleans_captions(pipe)) for prompt in prompts]
    positive, negative = (torch.cat(texts) for texts in zip(*pairs, strict=True))
    return {"prompt_embeds": positive, "negative_prompt_embeds": negative}


def _pictures(output: Any) -> list[Any]:
    """Images of an image pipeline, lists of frames of a video pipeline."""
    if hasattr(output, "images"):
        return list(output.images)
    return [[Image.fromarray(f) if not isinstance(f, Image.Image) else f for f in video] for video in output.frames]


def call_arguments(
    pipe: Any,
    architecture: Architecture,
    batch: list[Any],
    sampling: Sampling,
) -> dict[str, Any]:
    """Keyword arguments of one pipeline call but its noise; what is None is left to the pipeline's default.

    Args:
        batch: resolved conditions that go together in one call, see :func:`batches`.
        sampling: its ``arguments`` override what is chosen here.

    Raises:
        UsageError: PixArt in one step.
    """
    if sampling.steps == 1 and "PixArt" in type(pipe).__name__:
        raise UsageError("PixArt's pipelines cannot sample in one step; ask for at least 2.")
    accepted = inspect.signature(pipe.__call__).parameters
    kwargs: dict[str, Any] = {architecture.pipeline.condition: batch}
    if sampling.steps is not None:
        kwargs["num_inference_steps"] = sampling.steps
    if sampling.guidance_scale is not None:
        kwargs["guidance_scale"] = sampling.guidance_scale
    if "use_resolution_binning" in accepted and pipe.transformer.config.sample_size not in (32, 64, 128):
        # PixArt's pipelines round every size to tables of their published resolutions, by default.
        kwargs["use_resolution_binning"] = False
    if "video_length" in accepted:  # LattePipeline has sizes of its own, unless it is told not to
        kwargs |= {"video_length": pipe.transformer.config.video_length, "height": None, "width": None}
    if getattr(accepted.get("output_type"), "default", "pil") != "pil":  # Wan's gives arrays
        kwargs["output_type"] = "pil"
    masked = architecture.forward.text_mask and "prompt_template" not in accepted
    if "max_sequence_length" in accepted and masked and getattr(pipe, "tokenizer", None) is not None:
        # Masked padding changes no image, but 120 text tokens cost more than a small image's own.
        longest = max(len(ids) for ids in pipe.tokenizer([str(c) for c in batch]).input_ids)
        limit = accepted["max_sequence_length"].default
        kwargs["max_sequence_length"] = min(limit, -(-longest // 8) * 8)
    if "clean_caption" in accepted and not _cleans_captions(pipe):
        kwargs["clean_caption"] = False
    if _cuts_single_texts(pipe):
        kwargs |= {**_texts_as_single(pipe, kwargs["prompt"]), "prompt": None, "negative_prompt": None}
    return {**kwargs, **sampling.arguments}


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """No progress bar of the pipeline's own inside."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe._progress_bar_config = before


@dataclass
class Recorded:
    """Latents [n, ...] float32 after every step, and the timesteps."""

    latents: list[Tensor]
    timesteps: list[float]


@contextmanager
def recorded_steps(pipe: Any, n: int) -> Iterator[Recorded]:
    """Keeps what every step of the scheduler returns for the first ``n`` rows: pipelines return only the last.

    Some pipelines (DiT) step both halves of a guided batch; the first ``n`` rows are the images in any case.
    """
    scheduler = pipe.scheduler
    step = scheduler.step
    recorded = Recorded([], [])

    def recording(model_output: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        result = step(model_output, timestep, *args, **kwargs)
        recorded.latents.append((result[0] if isinstance(result, tuple) else result.prev_sample)[:n].float().cpu())
        recorded.timesteps.append(float(timestep))
        return result

    # Pipelines look at the signature of step before they call it.
    recording.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]
    scheduler.step = recording
    try:
        yield recorded
    finally:
        del scheduler.step
