"""The timesteps of a sampling run, as the transformers of a pipeline get them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ditq.architectures import Architecture
from ditq.components import transformers
from ditq.layers.clock import timestep_of
from ditq.sampling.sample import sample
from ditq.sampling.sampling import Sampling
from ditq.trace.arguments import bound, leaves


@torch.no_grad()
def trajectory_timesteps(pipe: Any, architecture: Architecture, condition: str, sampling: Sampling) -> list[float]:
    """The timesteps of all transformers' calls in the order of the steps, each once.

    Timesteps depend on the scheduler and on the size of the image, not on what the transformer computes: it runs once
    for each kind of call, and later calls get that result.

    Args:
        pipe: a diffusers pipeline.
        architecture: of its transformers.
        condition: a prompt or class.
        sampling: steps, guidance scale and arguments.
    """
    times: list[float] = []

    def note(time: float) -> None:
        if time not in times:
            times.append(time)

    with ExitStack() as stack:
        for model in transformers(pipe).values():
            stack.enter_context(_called_once(model, architecture, note))
        sample(pipe, architecture, [condition], sampling.batch(1), decode=False)
    return times


@contextmanager
def _called_once(model: nn.Module, architecture: Architecture, note: Callable[[float], None]) -> Iterator[None]:
    """Within it, calls of ``model`` with tensors of known sizes return the earlier result."""
    results: dict[Any, Any] = {}
    forward = model.forward
    had = "forward" in model.__dict__

    @functools.wraps(forward)  # pipelines ask for the signature
    def once(*args: Any, **kwargs: Any) -> Any:
        call = bound(model, type(model).__name__, args, kwargs)
        time = call.get(architecture.forward.time)
        note(-1.0 if time is None else timestep_of(time))
        kind = _kind(call)
        if kind not in results:
            results[kind] = forward(*args, **kwargs)
        return results[kind]

    model.forward = once
    try:
        yield
    finally:
        if had:
            model.forward = forward
        else:
            del model.__dict__["forward"]


def _kind(call: dict[str, Any]) -> Sequence[Any]:
    return tuple((name, tuple(value.shape)) for name, value in leaves(call).items() if isinstance(value, Tensor))
