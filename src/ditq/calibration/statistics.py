"""Statistics one can hold: per input group, per timestep, per condition; saved as safetensors, and merged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ditq.calibration.timesteps import normal_timesteps
from ditq.errors import CheckpointError
from ditq.files import atomic
from ditq.plan import Timesteps
from ditq.trace.calls import Call, from_plain, to_plain

# Before the names of tensors of calls; no layer is called so.
_CALLS = "calls/"


@dataclass
class GroupStatistics:
    """Of the tensor that one group of linears reads.

    Attributes:
        absmax: float32 [T, C, K], the largest |x| per timestep, condition (C = 2 under guidance:
            conditional, unconditional) and channel.
        sample: [R, K], a bounded sample of rows in the model's dtype.
        sample_time: float32 [R], the timestep of each row.
    """

    absmax: Tensor
    sample: Tensor
    sample_time: Tensor

    def timestep_absmax(self, timesteps: Tensor, between: tuple[int, int] | None = None) -> Tensor:
        """Largest |x| of each timestep and channel, float32 [T, K], over all conditions (``timesteps`` [T])."""
        chosen = self.absmax
        if between is not None:
            inside = (timesteps >= between[0]) & (timesteps <= between[1])
            chosen = chosen[inside] if inside.any() else chosen
        return chosen.amax(1)

    def channel_absmax(self, timesteps: Tensor, between: tuple[int, int] | None = None) -> Tensor:
        """Largest |x| of each channel, float32 [K], over all conditions and timesteps (``timesteps`` [T])."""
        return self.timestep_absmax(timesteps, between).amax(0)

    def rows(self, between: tuple[int, int] | None = None) -> Tensor:
        """The sample [R, K] as float32, restricted to a range of timesteps if it has any row there."""
        if between is not None:
            inside = (self.sample_time >= between[0]) & (self.sample_time <= between[1])
            if inside.any():
                return self.sample[inside].float()
        return self.sample.float()


@dataclass
class Statistics:
    """All groups of one model, by the group's name; ``timesteps`` float32 [T] in sampling order.

    ``calls`` of the transformer that were kept whole: its arguments by name, tensors on the CPU.
    """

    timesteps: Tensor
    groups: dict[str, GroupStatistics]
    calls: list[Call] = field(default_factory=list)

    def at(self, timesteps: Timesteps) -> Statistics:
        """Those of the timesteps that count, see :class:`ditq.recipe.Calibration`; calls are kept as they are."""
        if timesteps == "all":
            return self
        chosen = normal_timesteps(len(self.timesteps))
        groups = {}
        for name, group in self.groups.items():
            rows = torch.isin(group.sample_time, self.timesteps[chosen])
            groups[name] = GroupStatistics(group.absmax[chosen], group.sample[rows], group.sample_time[rows])
        return Statistics(self.timesteps[chosen], groups, self.calls)

    def save(self, path: Path) -> None:
        """Writes one safetensors file, under another name first: a killed run leaves no half of one."""
        tensors = {"timesteps": self.timesteps}
        for name, group in self.groups.items():
            tensors[f"{name}/absmax"] = group.absmax
            tensors[f"{name}/sample"] = group.sample
            tensors[f"{name}/sample_time"] = group.sample_time
        calls = []
        for i, call in enumerate(self.calls):
            content, own = to_plain(call, f"{_CALLS}{i}")
            calls.append(content)
            tensors |= own
        # Calls of one moment may share tensors, which the format does not; samples, the large ones, never do.
        content = {k: v.clone().contiguous() if k.startswith(_CALLS) else v.contiguous() for k, v in tensors.items()}
        with atomic(path) as temporary:
            save_file(content, temporary, metadata={"ditq": json.dumps({"version": 1, "calls": calls})})

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Reads and validates a file written by :meth:`save`.

        Raises:
            CheckpointError: the file is damaged or is not one of ours.
        """
        try:
            with safe_open(path, framework="pt") as stored:
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
                content = json.loads((stored.metadata() or {}).get("ditq", "{}"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"The calibration file {path} cannot be read ({error}). Delete it and run again."
            ) from error
        try:
            calls = [from_plain(call, tensors) for call in content.get("calls", [])]
            timesteps = tensors.pop("timesteps")
            tensors = {key: value for key, value in tensors.items() if not key.startswith(_CALLS)}
            names = dict.fromkeys(key.rpartition("/")[0] for key in tensors)
            groups = {
                n: GroupStatistics(*(tensors[f"{n}/{part}"] for part in ("absmax", "sample", "sample_time")))
                for n in names
            }
        except KeyError as error:
            raise CheckpointError(f"The calibration file {path} lacks {error}. Delete it and run again.") from error
        for name, group in groups.items():
            if (
                group.absmax.ndim != 3
                or group.absmax.shape[0] != len(timesteps)
                or group.sample.shape != (len(group.sample_time), group.absmax.shape[2])
            ):
                raise CheckpointError(
                    f"The calibration file {path} has wrong shapes for {name!r}. Delete it and run again."
                )
        return cls(timesteps, groups, calls)


def merge(parts: Sequence[Statistics]) -> Statistics:
    """Statistics of several batches of prompts as one: maxima of maxima, samples and calls side by side.

    Takes the groups out of ``parts``, one after the other: no sample is in memory twice.
    """
    first = parts[0]
    groups = {}
    for name in list(first.groups):
        all_of = [part.groups.pop(name) for part in parts]
        groups[name] = GroupStatistics(
            torch.stack([g.absmax for g in all_of]).amax(0),
            torch.cat([g.sample for g in all_of]),
            torch.cat([g.sample_time for g in all_of]),
        )
    return Statistics(first.timesteps, groups, [call for part in parts for call in part.calls])
