"""Records the inputs of a transformer's linear layers with forward pre-hooks, one per input group."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ditq.architectures import Architecture, Condition, InputGroup
from ditq.calibration.statistics import GroupStatistics, Statistics
from ditq.errors import DitqError
from ditq.trace.arguments import bound
from ditq.trace.calls import Recorder, attended, call_time
from ditq.trace.hooks import Before, all_hooked, hooked

# Rows that the kept calls hold per input channel of each linear, if the trajectories are long enough. A Hessian of
# K channels from R rows is off by about sqrt(K / R). The papers use more: Q-DiT on DiT-XL/2 has 28 rows per channel,
# from 256 images of 256 tokens. The 64 images of 16 tokens of a bundled model give only 2 with one call each.
ROWS_PER_INPUT = 16

CONDITIONS: tuple[Condition, ...] = ("conditional", "unconditional")
"""The order of conditions in statistics."""


class Capture:
    """Collects the statistics of one pipeline run.

    Args:
        architecture: of the transformer.
        groups: input groups to record.
        rows: number of rows of each input to keep per transformer call and condition.
        seed: chooses those rows and the calls that are kept whole.
        calls: smallest number of calls per sample that are kept whole; more are kept if :data:`ROWS_PER_INPUT`
            needs them. 0 keeps none.
        samples: number of samples over all runs; None: only those of this batch.
    """

    def __init__(
        self,
        architecture: Architecture,
        groups: list[InputGroup],
        rows: int,
        seed: int,
        calls: int = 1,
        samples: int | None = None,
    ) -> None:
        self.architecture, self.groups, self.rows, self.seed = architecture, groups, rows, seed
        self.timesteps: list[float] = []
        self.calls = 0
        self._recorder, self._samples, self._calls_needed = Recorder(architecture, calls, seed), samples, 0.0
        self._mask: Tensor | None = None
        self._batch = 0
        self._turn = 0  # index of the call within its timestep, if guidance uses separate calls
        self._absmax: dict[str, dict[tuple[int, int], Tensor]] = {g.name: {} for g in groups}
        self._rows: dict[str, list[Tensor]] = {g.name: [] for g in groups}
        self._times: dict[str, list[float]] = {g.name: [] for g in groups}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Collects statistics inside the ``with`` block."""
        observers = (
            hooked(model.get_submodule(tensor.name), self._observer(group, tensor))
            for group in self.groups
            for tensor in group.tensors
        )
        with hooked(model, self._begin_call), all_hooked(observers):
            yield

    def _begin_call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = bound(model, type(model).__name__, args, kwargs)
        time = call_time(self.architecture, call)
        if not self.timesteps or self.timesteps[-1] != time:
            self.timesteps.append(time)
            self._turn = -1
        self._turn = (self._turn + 1) % max(1, len(self.architecture.guidance.order))
        if self.calls == 1 and self._recorder.keep:
            slots = self._recorder.slots
            needed = math.ceil(self._calls_needed * slots / (self._samples or slots))
            self._recorder.keep = max(self._recorder.keep, needed)
        self.calls += 1
        self._recorder.record(call, time)
        self._batch = len(call[self.architecture.forward.sample])
        mask = self.architecture.forward.text_mask
        self._mask = call.get(mask) if mask else None

    def _observer(self, group: InputGroup, tensor: InputGroup) -> Before:
        def observe(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0].detach()
            if self.calls == 1 and group.input.online != "text":  # text is the same at every timestep
                self._calls_needed = max(self._calls_needed, ROWS_PER_INPUT * x.shape[-1] ** 2 / x.numel())
            masks = {} if self._mask is None else self._conditions(self._mask)
            for condition, part in self._conditions(x).items():
                self._record(group.name, condition, attended(part, masks.get(condition), tensor.text))

        return observe

    def _conditions(self, x: Tensor) -> dict[int, Tensor]:
        """The conditional (0) and the unconditional (1) half of a batch, or all of it by the condition of its call.

        The first axis of ``x`` may be longer than the batch, if frames or positions of a video are folded into it;
        the batch is then its slower part. If it is not a multiple of the batch, all rows count as conditional.
        """
        guidance = self.architecture.guidance
        if guidance.style == "calls":
            return {CONDITIONS.index(guidance.order[self._turn]): x}
        if guidance.style != "batch" or len(guidance.order) != 2 or self._batch % 2 or x.shape[0] % self._batch:
            return {0: x}
        halves = dict(zip(guidance.order, x.chunk(2), strict=True))
        return {i: halves[condition] for i, condition in enumerate(CONDITIONS)}

    def _record(self, name: str, condition: int, rows: Tensor) -> None:
        """Adds rows [R, K] of the current call; R is 0 if a condition has no text."""
        largest = rows.abs().amax(0).float().cpu() if len(rows) else torch.zeros(rows.shape[1])
        if not torch.isfinite(largest).all():
            raise DitqError(f"The input of layer {name!r} contains NaN or Inf at timestep {self.timesteps[-1]:g}.")
        key = (len(self.timesteps) - 1, condition)
        previous = self._absmax[name].get(key)
        self._absmax[name][key] = largest if previous is None else torch.maximum(previous, largest)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.calls) % 2**63)
        chosen = torch.randperm(len(rows), generator=generator)[: self.rows]
        self._rows[name].append(rows[chosen.to(rows.device)].cpu())
        self._times[name] += [self.timesteps[-1]] * len(chosen)

    def statistics(self) -> Statistics:
        """The collected statistics.

        Raises:
            DitqError: a group was never called.
        """
        groups = {}
        for group in self.groups:
            maxima = self._absmax[group.name]
            if not maxima:
                raise DitqError(f"Layer {group.name!r} was never called during calibration.")
            conditions = sorted({condition for _, condition in maxima})
            zeros = torch.zeros_like(next(iter(maxima.values())))  # for a timestep without one of the conditions
            absmax = torch.stack(
                [torch.stack([maxima.get((t, c), zeros) for c in conditions]) for t in range(len(self.timesteps))]
            )
            self._rows[group.name] = [torch.cat(self._rows[group.name])]  # frees the parts
            groups[group.name] = GroupStatistics(
                absmax, self._rows[group.name][0], torch.tensor(self._times[group.name])
            )
        return Statistics(torch.tensor(self.timesteps), groups, self._recorder.calls())
