"""One thread for what torch computes around a small graph.

OpenVINO and torch each have a pool of threads, which spin for a while after their work and so keep cores from each
other. Around a graph of a few milliseconds torch has microseconds of work, and loses more by a second thread than it
wins: a step of ``bundled:emoji-t2i`` on two cores takes a third longer with two.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn


def one_thread(model: nn.Module) -> None:
    """From now on torch runs this model's forward in one thread, and is as it was outside of it."""
    before = threading.local()  # torch's number belongs to a thread

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        before.threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        torch.set_num_threads(before.threads)

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)  # also where the call fails
