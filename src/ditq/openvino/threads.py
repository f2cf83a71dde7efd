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
    before = threading.local()  # torch's setting is per thread

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        before.threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        torch.set_num_threads(before.threads)

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)  # also after an exception
