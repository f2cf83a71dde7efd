"""Runs a diffusers pipeline on a list of conditions, one seed each; keeps the images and the latents of every step."""

from __future__ import annotations

import importlib.util
import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    """Images or videos that one pipeline generated for a list of conditions.

    Attributes:
        conditions: prompts, or names or numbers of classes.
        seeds: the noise seed of each condition.
        images: PIL images in the order of the conditions; for a video model, lists of frames.
        trajectory: float32 [n, steps, ...], the latents after every sampling step, in the layout of the scheduler.
        timesteps: the timestep of every step.
        seconds: wall time of each image, text encoder and decoder included: the time of its batch over its size.
        fingerprint: of the pipeline; empty if no cache was used.
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


def check_conditions(conditions: Any) -> None:
    r"""Refuses what would be read as a list of other things than prompts.

    Raises:
        UsageError: a single string, whose letters would be the prompts, or an open file, whose lines end in ``\n``.
    """
    if hasattr(conditions, "readlines"):
        raise UsageError(
            "prompts must be a list of strings, got an open file: pass prompts=[line.strip() for line in file]."
        )
    if isinstance(conditions, str | bytes):
        raise UsageError(
            f"prompts must be a list of strings, got the string {conditions!r}: pass prompts=[{conditions!r}]."
        )
    if not isinstance(conditions, Iterable):
        raise UsageError(f"prompts must be a list of strings, got {conditions!r}.")


def condition_list(conditions: Sequence[str]) -> list[str]:
    """Prompts or classes as a list, checked.

    Raises:
        UsageError: see :func:`check_conditions`; the list is empty, or one prompt is blank.
    """
    check_conditions(conditions)
    chosen = list(conditions)
    if not chosen:
        raise UsageError("There are no prompts. Pass at least one, or a file with one prompt per line.")
    for i, condition in enumerate(chosen):
        if not str(condition).strip():
            raise UsageError(f"Prompt {i + 1} of {len(chosen)} is empty: {condition!r}. Remove it or fill it in.")
        try:
            str(condition).encode()
        except UnicodeEncodeError as error:  # bytes of a command line that the terminal's encoding does not know
            raise UsageError(
                f"Prompt {i + 1} of {len(chosen)} is not Unicode text: {condition!r}. Write it into a file in UTF-8 "
                "(--prompts FILE), or set the terminal to UTF-8 (LC_ALL=C.UTF-8)."
            ) from error
    return chosen


def resolve_conditions(pipe: Any, architecture: Architecture, conditions: Sequence[str]) -> list[Any]:
    """The pipeline's argument for each condition: the prompt itself, or the number of a class.

    Raises:
        UsageError: see :func:`condition_list`; or the pipeline does not have a class of that name.
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
                f"This pipeline does not have a class {condition!r}."
                + (f" Close: {', '.join(close)}." if close else "")
                + f" It has {len(labels)} class names; class numbers are accepted too."
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
    """Generates one image or video per condition; number i starts from the noise of seed ``sampling.seed + i``.

    Args:
        pipe: a diffusers pipeline.
        architecture: of its transformer.
        conditions: prompts, or names or numbers of classes.
        sampling: seed, steps, guidance scale, batch size and further arguments of the pipeline's call.
        on_batch: called with the number of images of every finished batch.
        cache: samples of the same pipeline, condition, seed, sampler, batch size and number of threads are read from
            it. New samples are added after every batch, so an interrupted run resumes there. A batch with a missing
            sample is generated as a whole: a smaller one would round differently.
        decode: False skips the decoder: images are None, and nothing is cached.

    Raises:
        UsageError: see :func:`resolve_conditions` and :func:`call_arguments`.
    """
    if not decode:
        cache, sampling = None, replace(sampling, arguments={**sampling.arguments, "output_type": "latent"})
    conditions = condition_list(conditions)
    resolved = resolve_conditions(pipe, architecture, conditions)
    seeds = list(range(sampling.seed, sampling.seed + len(resolved)))
    plan = batches(pipe, resolved, sampling.batch_size)
    done: dict[int, Sample] = {}
    keys: dict[int, str] = {}
    identity = ""
    if cache is not None:
        identity = fingerprint(pipe)
        for batch in plan:
            keys |= {i: cache.key(identity, resolved[i], seeds[i], sampling.sampler, len(batch)) for i in batch}
        done = {i: hit for i, key in keys.items() if (hit := cache.get(key)) is not None}
        if on_batch and done:
            on_batch(len(done))
    with quiet(pipe):
        for batch in plan:
            missing = [i for i in batch if i not in done]
            if not missing:
                continue
            kwargs = call_arguments(pipe, architecture, [resolved[i] for i in batch], sampling)
            kwargs["generator"] = [torch.Generator("cpu").manual_seed(seeds[i]) for i in batch]
            before = time.perf_counter()
            with torch.no_grad(), recorded_steps(pipe, len(batch)) as recorded:
                output = pipe(**kwargs)
            seconds = (time.perf_counter() - before) / len(batch)
            trajectory = torch.stack(recorded.latents, dim=1)
            images = _images(output) if decode else [None] * len(batch)
            for row, (i, image) in enumerate(zip(batch, images, strict=True)):
                done[i] = Sample(image, trajectory[row], recorded.timesteps, seconds)
                if cache is not None:
                    cache.put(keys[i], done[i])
            if on_batch:
                on_batch(len(missing))
    samples = [done[i] for i in range(len(resolved))]
    return Samples(
        list(conditions), seeds, [s.image for s in samples], torch.stack([s.trajectory for s in samples]),
        samples[0].timesteps, [s.seconds for s in samples], identity,
    )  # fmt: skip


def batches(pipe: Any, conditions: Sequence[Any], batch_size: int) -> list[list[int]]:
    """Indices of the conditions of each pipeline call, in their order. Most pipelines batch any conditions.

    LattePipeline does not mask its text, so it batches only prompts with the same number of tokens.
    """
    by_length: dict[int, list[int]] = {}
    for i, condition in enumerate(conditions):
        length = 0
        if _cuts_single_texts(pipe):
            length = len(pipe.tokenizer(pipe._text_preprocessing(condition, _cleans_captions(pipe))[0]).input_ids)
        by_length.setdefault(length, []).append(i)
    return [group[i : i + batch_size] for group in by_length.values() for i in range(0, len(group), batch_size)]


def _cuts_single_texts(pipe: Any) -> bool:
    """Whether the pipeline is LattePipeline: it cuts a single prompt to its tokens but pads several to 120.

    The padding changes the videos.
    """
    return "mask_feature" in inspect.signature(pipe.__call__).parameters


def _cleans_captions(pipe: Any) -> bool:
    """Whether the pipeline removes web addresses and the like from prompts by default, and has the packages for it."""
    default = inspect.signature(pipe.__call__).parameters["clean_caption"].default
    return bool(default and importlib.util.find_spec("bs4") and importlib.util.find_spec("ftfy"))


@torch.no_grad()
def _texts_as_single(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """Embeddings of prompts that were encoded one by one, stacked: [B, tokens, channels]."""
    pairs = [pipe.encode_prompt(prompt, clean_caption=_cleans_captions(pipe)) for prompt in prompts]
    positive, negative = (torch.cat(texts) for texts in zip(*pairs, strict=True))
    return {"prompt_embeds": positive, "negative_prompt_embeds": negative}


def _images(output: Any) -> list[Any]:
    """The images of an image pipeline's output; of a video pipeline's, lists of frames."""
    if hasattr(output, "images"):
        return list(output.images)
    return [[Image.fromarray(f) if not isinstance(f, Image.Image) else f for f in video] for video in output.frames]


def call_arguments(
    pipe: Any,
    architecture: Architecture,
    batch: list[Any],
    sampling: Sampling,
) -> dict[str, Any]:
    """Keyword arguments of one pipeline call, except its generators. A setting of None keeps the pipeline's default.

    Args:
        pipe: a diffusers pipeline.
        architecture: of its transformer.
        batch: resolved conditions of one call, see :func:`batches`.
        sampling: its ``arguments`` override those chosen here.

    Raises:
        UsageError: one sampling step with a PixArt pipeline.
    """
    if sampling.steps == 1 and "PixArt" in type(pipe).__name__:
        raise UsageError("PixArt pipelines need at least 2 sampling steps, got 1.")
    accepted = inspect.signature(pipe.__call__).parameters
    kwargs: dict[str, Any] = {architecture.pipeline.condition: batch}
    if sampling.steps is not None:
        kwargs["num_inference_steps"] = sampling.steps
    if sampling.guidance_scale is not None:
        kwargs["guidance_scale"] = sampling.guidance_scale
    if "use_resolution_binning" in accepted and pipe.transformer.config.sample_size not in (32, 64, 128):
        # By default PixArt's pipelines round every size to one of their published resolutions.
        kwargs["use_resolution_binning"] = False
    if "video_length" in accepted:  # LattePipeline's default size is not the transformer's
        kwargs |= {"video_length": pipe.transformer.config.video_length, "height": None, "width": None}
    if getattr(accepted.get("output_type"), "default", "pil") != "pil":  # Wan's default is arrays
        kwargs["output_type"] = "pil"
    masked = architecture.forward.text_mask and "prompt_template" not in accepted
    if "max_sequence_length" in accepted and masked and getattr(pipe, "tokenizer", None) is not None:
        # Masked padding does not change the image, but 120 text tokens cost more than those of a small image.
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
    """Disables the pipeline's own progress bar inside the ``with`` block."""
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
    """Records the first ``n`` rows that every scheduler step returns; pipelines return only the last step.

    Some pipelines (DiT) step both halves of a guided batch; the first ``n`` rows are always the images.
    """
    scheduler = pipe.scheduler
    step = scheduler.step
    recorded = Recorded([], [])

    def recording(model_output: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        result = step(model_output, timestep, *args, **kwargs)
        recorded.latents.append((result[0] if isinstance(result, tuple) else result.prev_sample)[:n].float().cpu())
        recorded.timesteps.append(float(timestep))
        return result

    # Pipelines inspect the signature of step before they call it.
    recording.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]
    scheduler.step = recording
    try:
        yield recorded
    finally:
        del scheduler.step
