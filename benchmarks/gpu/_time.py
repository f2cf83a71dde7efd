"""Times calls on a GPU, and keeps the time budget of the whole run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Clock:
    """Minutes that a run may take."""

    def __init__(self, minutes: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._end = now() + 60 * minutes

    def left(self) -> float:
        """Seconds, negative when over."""
        return self._end - self._now()


class Times(NamedTuple):
    """Milliseconds: median, smallest, and the distance between the quartiles."""

    median: float
    smallest: float
    spread: float
    runs: int


def summary(values: Sequence[float]) -> Times:
    """Raises ValueError without values."""
    if not values:
        raise ValueError("there is nothing to summarize")
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Times(statistics.median(values), min(values), high - low, len(values))


def copies(used: int, cache: int, most: int = 32) -> int:
    """How many sets of arguments of ``used`` bytes it takes to fill a cache twice: each call finds its own cold."""
    return max(1, min(most, -(-2 * cache // max(1, used))))


def argument_sets(make: Callable[[], tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """As many results of ``make`` as :func:`copies` says."""
    first = make()
    used = sum(t.nbytes for t in first if isinstance(t, Tensor))
    if first[0].device.type == "cpu":
        return [first]
    cache = torch.cuda.get_device_properties(first[0].device).L2_cache_size
    return [first, *(make() for _ in range(copies(used, cache) - 1))]


def timed(call: Callable[..., Any], sets: Sequence[tuple[Any, ...]], runs: int = 30, warmup: int = 3) -> Times:
    """Times between CUDA events around each call; the GPU is kept waiting first, so that launches are never late.

    Without a GPU (a dry run) one call by the clock.
    """
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        call(*sets[0])
        return summary([1e3 * (time.perf_counter() - begin)])
    for i in range(warmup):
        call(*sets[i % len(sets)])
    torch.cuda.synchronize()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    torch.cuda._sleep(20_000_000)
    for i, (begin, end) in enumerate(events):
        begin.record()
        call(*sets[i % len(sets)])
        end.record()
    torch.cuda.synchronize()
    return summary([begin.elapsed_time(end) for begin, end in events])
