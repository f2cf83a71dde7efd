"""Records the first call of a pipeline's transformer, as an example of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ditq.architectures import Architecture
from ditq.sampling.sample import batches, call_arguments, quiet, resolve_conditions
from ditq.sampling.sampling import Sampling
from ditq.trace.calls import Call
from ditq.trace.hooks import hooked

# The number of steps changes only the timestep of the first call.
_SHORT = Sampling(steps=2)


class _Recorded(Exception):  # noqa: N818 - stops a pipeline call early, not an error
    pass


def example_condition(pipe: Any, architecture: Architecture) -> str:
    """A prompt or class that the pipeline takes; any will do where only sizes or timesteps matter."""
    if architecture.pipeline.condition != "class_labels":
        return "an image"
    return next(iter(getattr(pipe, "labels", None) or {}), "0")


@torch.no_grad()
def first_call(pipe: Any, architecture: Architecture, conditions: Sequence[str], sampling: Sampling = _SHORT) -> Call:
    """The keyword arguments of the first call of a pipeline's transformer. The call itself does not run.

    Args:
        pipe: a diffusers pipeline.
        architecture: of its transformer.
        conditions: prompts, or names or numbers of classes. Only those that fit in the first batch are used.
        sampling: steps, guidance scale and arguments; its seed and batch size are not used.
    """
    recorded: list[Call] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorded.append({**dict(zip([architecture.forward.sample], args, strict=False)), **kwargs})
        raise _Recorded

    resolved = resolve_conditions(pipe, architecture, conditions)
    first = [resolved[i] for i in batches(pipe, resolved, len(resolved))[0]]
    with hooked(pipe.transformer, stop, first=True), quiet(pipe), suppress(_Recorded):
        pipe(**call_arguments(pipe, architecture, first, sampling))
    return recorded[0]
