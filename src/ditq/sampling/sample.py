"""Runs a diffusers pipeline on a list of conditions, one seed each, and keeps pictures and final latents."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ditq.architectures import Architecture
from ditq.errors import UsageError


@dataclass
class Samples:
    """What one run of a pipeline drew.

    Attributes:
        images: pictures in the order of the conditions.
        latents: float32 [n, ...], the final latents before decoding (scaled as the sampler has them).
    """

    conditions: list[str]
    seeds: list[int]
    images: list[Image.Image]
    latents: Tensor


def resolve_conditions(pipe: Any, architecture: Architecture, conditions: Sequence[str]) -> list[Any]:
    """What the pipeline takes for each condition: the prompt itself, or the number of a class.

    Raises:
        UsageError: there is none, one is empty, or the pipeline knows no class of that name.
    """
    if not conditions:
        raise UsageError("There are no prompts. Give at least one, or a file with one prompt a line.")
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
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
    **overrides: Any,
) -> Samples:
    """Draws one picture for each condition; picture i starts from the noise of seed ``seed + i``.

    The noise of a picture does not depend on the batch size. ``overrides`` go to the pipeline's call.
    """
    resolved = resolve_conditions(pipe, architecture, conditions)
    images: list[Image.Image] = []
    latents: list[Tensor] = []
    with quiet(pipe), recorded_latents(pipe, latents):
        for begin in range(0, len(resolved), batch_size):
            batch = resolved[begin : begin + batch_size]
            kwargs = call_arguments(pipe, architecture, batch, steps=steps, guidance_scale=guidance_scale)
            seeds = range(seed + begin, seed + begin + len(batch))
            generators = [torch.Generator("cpu").manual_seed(s) for s in seeds]
            with torch.no_grad():
                images += pipe(**{**kwargs, "generator": generators, **overrides}).images
            if on_batch:
                on_batch(len(batch))
    seeds_all = list(range(seed, seed + len(resolved)))
    return Samples(list(conditions), seeds_all, images, torch.cat(latents) if latents else torch.empty(0))


def call_arguments(
    pipe: Any,
    architecture: Architecture,
    batch: list[Any],
    *,
    steps: int | None,
    guidance_scale: float | None,
) -> dict[str, Any]:
    """Keyword arguments of one pipeline call; what is None is left to the pipeline's default."""
    if steps == 1 and "PixArt" in type(pipe).__name__:
        raise UsageError("PixArt's pipelines cannot sample in one step; ask for at least 2.")
    accepted = inspect.signature(pipe.__call__).parameters
    kwargs: dict[str, Any] = {architecture.pipeline.condition: batch}
    if steps is not None:
        kwargs["num_inference_steps"] = steps
    if guidance_scale is not None:
        kwargs["guidance_scale"] = guidance_scale
    if "use_resolution_binning" in accepted and pipe.transformer.config.sample_size not in (32, 64, 128):
        # PixArt's pipelines round every size to tables of their published resolutions, by default.
        kwargs["use_resolution_binning"] = False
    if "max_sequence_length" in accepted and getattr(pipe, "tokenizer", None) is not None:
        # Masked padding changes no picture, but 120 text tokens cost more than a small picture's own.
        longest = max(len(ids) for ids in pipe.tokenizer([str(c) for c in batch]).input_ids)
        limit = accepted["max_sequence_length"].default
        kwargs["max_sequence_length"] = min(limit, -(-longest // 8) * 8)
    if "clean_caption" in accepted and not (importlib.util.find_spec("bs4") and importlib.util.find_spec("ftfy")):
        kwargs["clean_caption"] = False
    return kwargs


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """No progress bar of the pipeline's own inside."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe._progress_bar_config = before


@contextmanager
def recorded_latents(pipe: Any, into: list[Tensor]) -> Iterator[None]:
    """Appends what reaches the decoder, undoing the VAE's scaling factor: not every pipeline can return latents."""
    vae = pipe.vae
    decode = vae.decode

    def recording(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        into.append(z.detach().float().cpu() * vae.config.scaling_factor)
        return decode(z, *args, **kwargs)

    vae.decode = recording
    try:
        yield
    finally:
        del vae.decode
