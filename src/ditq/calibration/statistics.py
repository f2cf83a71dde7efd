"""Calibration statistics per input group, timestep and condition: saved as safetensors, and merged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ditq.calibration.timesteps import normal_timesteps
from ditq.digests import tensor_bytes
from ditq.errors import CheckpointError, DitqError
from ditq.files import atomic
from ditq.plan import Timesteps
from ditq.reading import cut
from ditq.trace.calls import Call, from_plain, to_plain

# Version of the file format; other versions are refused.
VERSION = 2

# Prefix of the names of tensors that belong to calls. No layer name begins with it.
_CALLS = "calls/"
# Tensors of a group, in the order of the attributes of GroupStatistics.
_PARTS = ("absmax", "sample", "sample_time")


@dataclass
class GroupStatistics:
    """Statistics of the tensor that one group of linears reads.

    Attributes:
        absmax: float32 [T, C, K], the largest |x| per timestep, condition (C = 2 under guidance:
            conditional, unconditional) and channel.
        sample: [R, K], a bounded sample of rows in the model's dtype.
        sample_time: float32 [R], the timestep of each row.
    """

    absmax: Tensor
    sample: Tensor
    sample_time: Tensor

    def timestep_absmax(self, timesteps: Tensor, between: tuple[float, float] | None = None) -> Tensor:
        """Largest |x| of each timestep and channel, float32 [T, K], over all conditions (``timesteps`` [T])."""
        chosen = self.absmax
        if between is not None:
            inside = (timesteps >= between[0]) & (timesteps <= between[1])
            chosen = chosen[inside] if inside.any() else chosen
        return chosen.amax(1)

    def channel_absmax(self, timesteps: Tensor, between: tuple[float, float] | None = None) -> Tensor:
        """Largest |x| of each channel, float32 [K], over all conditions and timesteps (``timesteps`` [T])."""
        return self.timestep_absmax(timesteps, between).amax(0)

    def rows(self, between: tuple[float, float] | None = None) -> Tensor:
        """The sample [R, K] as float32, restricted to a range of timesteps if it has rows in that range."""
        if between is not None:
            inside = (self.sample_time >= between[0]) & (self.sample_time <= between[1])
            if inside.any():
                return self.sample[inside].float()
        return self.sample.float()


@dataclass
class Statistics:
    """Statistics of all groups of one model.

    Attributes:
        timesteps: float32 [T], in sampling order.
        groups: statistics by the group's name.
        calls: transformer calls that were kept whole: arguments by name, tensors on the CPU.
    """

    timesteps: Tensor
    groups: dict[str, GroupStatistics]
    calls: list[Call] = field(default_factory=list)

    def at(self, timesteps: Timesteps) -> Statistics:
        """The statistics of selected timesteps, see :class:`ditq.recipe.Calibration`; calls are kept as they are."""
        if timesteps == "all":
            return self
        chosen = normal_timesteps(len(self.timesteps))
        groups = {}
        for name, group in self.groups.items():
            rows = torch.isin(group.sample_time, self.timesteps[chosen])
            groups[name] = GroupStatistics(group.absmax[chosen], group.sample[rows], group.sample_time[rows])
        return Statistics(self.timesteps[chosen], groups, self.calls)

    def save(self, path: Path) -> None:
        """Writes one safetensors file with a checksum, atomically: a killed run does not leave a partial file.

        Raises:
            DitqError: the file cannot be written; or a call has an argument that cannot be stored.
        """
        tensors = {"timesteps": self.timesteps}
        for name, group in self.groups.items():
            for part in _PARTS:
                tensors[f"{name}/{part}"] = getattr(group, part)
        calls = []
        for i, call in enumerate(self.calls):
            content, stored = to_plain(call, f"{_CALLS}{i}")
            calls.append(content)
            tensors |= stored
        info = {"version": VERSION, "calls": calls, "sha256": _checksum(tensors, calls)}
        # Calls of one timestep may share tensors, which safetensors refuses. Samples, the large ones, never do.
        content = {k: v.clone().contiguous() if k.startswith(_CALLS) else v.contiguous() for k, v in tensors.items()}
        try:
            with atomic(path) as temporary:
                save_file(content, temporary, metadata={"ditq": json.dumps(info)})
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DitqError(
                f"Cannot write {path}: {reason}. Free some space, or choose another folder with cache=PATH "
                "(--cache PATH), or set DITQ_CACHE."
            ) from error

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Reads and validates a file written by :meth:`save`.

        Raises:
            CheckpointError: the file is damaged, or was not written by :meth:`save`.
        """
        try:
            with safe_open(path, framework="pt") as stored:
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
                info = json.loads(stored.metadata()["ditq"])
            if info["version"] != VERSION:
                raise ValueError(f"its version is {info['version']}")
            if info["sha256"] != _checksum(tensors, info["calls"]):
                raise ValueError("its checksum differs")
            calls = [from_plain(call, tensors) for call in info["calls"]]
            timesteps = tensors.pop("timesteps")
            names = dict.fromkeys(key.rpartition("/")[0] for key in tensors if not key.startswith(_CALLS))
            groups = {n: GroupStatistics(*(tensors[f"{n}/{part}"] for part in _PARTS)) for n in names}
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"The calibration file {path} is damaged, or was not written by this version of ditq "
                f"({type(error).__name__}: {cut(str(error))}). Delete it and run again."
            ) from error
        return cls(timesteps, groups, calls)


def _checksum(tensors: Mapping[str, Tensor], calls: list[Any]) -> str:
    """SHA-256 over the names, shapes, dtypes and numbers of all tensors, and over the plain part of the calls."""
    digest = hashlib.sha256(json.dumps(calls).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def merge(parts: Sequence[Statistics]) -> Statistics:
    """Merges the statistics of several batches of prompts: the maxima of maxima; samples and calls concatenated.

    Removes the groups from ``parts`` one after the other, so that only one group is in memory twice.
    """
    first = parts[0]
    groups = {}
    for name in list(first.groups):
        group_parts = [part.groups.pop(name) for part in parts]
        groups[name] = GroupStatistics(
            torch.stack([g.absmax for g in group_parts]).amax(0),
            torch.cat([g.sample for g in group_parts]),
            torch.cat([g.sample_time for g in group_parts]),
        )
    return Statistics(first.timesteps, groups, [call for part in parts for call in part.calls])
