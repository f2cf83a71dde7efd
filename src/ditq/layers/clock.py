"""The timesteps of the current transformer call, for layers that depend on them."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def timestep_of(value: Tensor | float) -> float:
    """The timestep of a transformer call from its argument: a number, or the first element of a tensor."""
    return float(value.flatten()[0]) if isinstance(value, Tensor) else float(value)


_of_thread = threading.local()
"""The timesteps of each clock in this thread, see :class:`Clock`."""


class Clock(nn.Module):
    """Holds the timesteps of the current transformer call; one per model, set by a forward pre-hook.

    Every thread has its own current call. A thread that never called the model (one of autograd's that computes a
    checkpointed block again) reads the latest call of any thread.
    """

    def __init__(self) -> None:
        super().__init__()
        self.latest = torch.zeros(())
        self.argument = ""
        self._distinct: tuple[Tensor, tuple[float, ...]] | None = None

    @property
    def now(self) -> Tensor:
        """The timesteps of the current call, float32 on the CPU: one for all samples, [], or one each, [B, ...]."""
        calls: weakref.WeakKeyDictionary[Clock, Tensor] = getattr(_of_thread, "calls", weakref.WeakKeyDictionary())
        return calls.get(self, self.latest)

    @property
    def times(self) -> tuple[float, ...]:
        """The distinct timesteps of the current call; computed once for all layers that ask."""
        now, kept = self.now, self._distinct
        if kept is None or kept[0] is not now:
            kept = self._distinct = now, tuple(now.flatten().unique().tolist())
        return kept[1]

    def set(self, value: Tensor | float) -> None:
        """Starts a call at these timesteps."""
        if not hasattr(_of_thread, "calls"):
            _of_thread.calls = weakref.WeakKeyDictionary()
        times = torch.as_tensor(value).detach().to("cpu", torch.float32)
        _of_thread.calls[self] = self.latest = times.reshape(()) if times.numel() == 1 else times

    @contextmanager
    def at(self, value: Tensor | float) -> Iterator[None]:
        """Within it, the current call of this thread has this timestep only."""
        now = self.now
        self.set(value)
        try:
            yield
        finally:
            self.set(now)

    def attach(self, model: nn.Module, argument: str) -> None:
        """Reads ``argument`` (a number, or a tensor of timesteps) before every forward of ``model``."""
        self.argument = argument
        # A bound method, so that a deep copy of the model sets its own copy of the clock.
        model.register_forward_pre_hook(self._set, with_kwargs=True)

    def _set(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = kwargs.get(self.argument)
        if value is None and args:
            value = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)).get(self.argument)
        if value is None:
            raise ValueError(
                f"Layers of this model change with the timestep, and {type(module).__name__} was called without its "
                f"argument {self.argument!r}."
            )
        self.set(value)
