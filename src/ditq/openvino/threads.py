"""One torch thread for models with small graphs.

OpenVINO and torch each have a thread pool. Idle threads spin for a while and block cores for the other pool. Around a
graph of a few milliseconds torch has microseconds of work, and a second thread costs more than it saves: a step of
``bundled:emoji-t2i`` on two cores takes a third longer with two torch threads.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn


def one_thread(model: nn.Module) -> None:
    """Makes torch run this model's forward in one thread; outside of it the number of threads is restored."""
    hooks = _OneThread()
    # Bound methods, so that copies of the model have hooks of their own.
    model.register_forward_pre_hook(hooks.enter)
    model.register_forward_hook(hooks.leave, always_call=True)  # also after an exception


class _OneThread:
    """The hooks of one model, and the number of threads to restore."""

    def __init__(self) -> None:
        self._before = threading.local()  # torch's setting is per thread

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._before.threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        torch.set_num_threads(self._before.threads)

    def __reduce__(self) -> tuple[type[_OneThread], tuple[()]]:
        return _OneThread, ()
