"""Keeps whole transformer calls at a few timesteps of every sample, for methods that replay the blocks (GPTQ)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ditq.architectures import Architecture
from ditq.errors import DitqError
from ditq.layers.clock import timestep_of
from ditq.trace.arguments import filled, leaves

Call = dict[str, Any]
"""Arguments of a call by name."""


class Recorder:
    """Keeps ``keep`` calls of each sample of a batch, at random timesteps without replacement (reservoir sampling).

    A sample is one slot of the batch. Under guidance a kept timestep (a *moment*) has both conditions, as a batch of
    two or as two calls. Q-DiT's code calibrates on one random timestep of each of 256 samples. ``keep`` may be raised
    until the second timestep begins; 0 keeps nothing.
    """

    def __init__(self, architecture: Architecture, keep: int, seed: int) -> None:
        self.architecture, self.keep = architecture, keep
        self._generator = torch.Generator().manual_seed(seed)
        self._kept: dict[int, list[list[Call]]] = {}  # by slot: moments of one or two calls
        self._count: dict[int, int] = {}  # by slot: number of moments so far
        self._current: dict[int, list[Call]] = {}  # by slot, of those that keep it: the current moment
        self._time, self._current_calls = float("nan"), 0
        self.times: list[float] = []  # every timestep, in the order of its first call

    @property
    def slots(self) -> int:
        """Number of samples in the batch; 0 before the first call."""
        return len(self._kept)

    def record(self, call: Mapping[str, Any], time: float) -> None:
        """Adds a call (arguments by name) at a timestep."""
        if time not in self.times:
            self.times.append(time)
        if not self.keep:
            return
        call = {name: value for name, value in call.items() if name != "return_dict"}
        sample = call.get(self.architecture.forward.sample)
        if not isinstance(sample, Tensor):
            raise DitqError(f"The transformer was called without its argument {self.architecture.forward.sample!r}.")
        guidance = self.architecture.guidance
        in_one = guidance.style == "batch" and len(guidance.order) == 2 and len(sample) % 2 == 0
        slots = len(sample) // 2 if in_one else len(sample)
        if time != self._time or self._current_calls == (2 if guidance.style == "calls" else 1):
            self._time, self._current_calls = time, 0
            self._current = {slot: moment for slot in range(slots) if (moment := self._begin(slot)) is not None}
        self._current_calls += 1
        flat = {name: value for name, value in leaves(call).items() if isinstance(value, Tensor)}
        shared = {name: value.detach().cpu() for name, value in flat.items() if not _batched(value, sample)}
        for slot, moment in self._current.items():
            rows = torch.tensor([slot, slot + slots] if in_one else [slot])
            sliced = {n: v.detach()[rows.to(v.device)].cpu() for n, v in flat.items() if n not in shared}
            moment.append(filled(dict(call), {**sliced, **shared}))

    def _begin(self, slot: int) -> list[Call] | None:
        """An empty list for the calls of a new moment, which may replace an earlier one; None if it is not kept."""
        kept, count = self._kept.setdefault(slot, []), self._count.get(slot, 0)
        self._count[slot] = count + 1
        moment: list[Call] = []
        if len(kept) < self.keep:
            kept.append(moment)
            return moment
        index = int(torch.randint(0, count + 1, (), generator=self._generator))
        if index >= self.keep:
            return None
        kept[index] = moment
        return moment

    def calls(self) -> list[Call]:
        """The kept calls, sample by sample; tensors on the CPU."""
        return [call for _, calls in self.by_slot() for call in calls]

    def by_slot(self) -> list[tuple[int, list[Call]]]:
        """The kept calls of each slot."""
        return [(slot, [call for moment in self._kept[slot] for call in moment]) for slot in sorted(self._kept)]


def call_time(architecture: Architecture, call: Mapping[str, Any]) -> float:
    """The timestep of the first sample of a call; -1 if the call has none."""
    value = call.get(architecture.forward.time)
    return -1.0 if value is None else timestep_of(value)


def _batched(value: Tensor, sample: Tensor) -> bool:
    return value.ndim > 0 and len(value) == len(sample)


def merged(
    calls: Sequence[Call], architecture: Architecture, *, any_time: bool = False, elements: int = 2**17
) -> list[Call]:
    """Merges calls into fewer, larger batches; only calls of one timestep and of equal sizes are merged.

    Args:
        calls: recorded calls.
        architecture: of the transformer.
        any_time: also merges different timesteps, for models that take one timestep per row.
        elements: largest number of elements in the sample of a batch, which bounds memory.
    """
    batches: list[list[Call]] = []
    for call in calls:
        size = call[architecture.forward.sample].numel()
        for batch in batches:
            if size * (len(batch) + 1) <= elements and _fit(batch[0], call, architecture, any_time):
                batch.append(call)
                break
        else:
            batches.append([call])
    return [_joined(batch, architecture) for batch in batches]


def _fit(a: Call, b: Call, architecture: Architecture, any_time: bool) -> bool:
    if not any_time and call_time(architecture, a) != call_time(architecture, b):
        return False
    leaves_a, leaves_b = leaves(a), leaves(b)
    sample = a[architecture.forward.sample]
    return leaves_a.keys() == leaves_b.keys() and all(
        _alike(leaves_a[name], leaves_b[name], sample, b[architecture.forward.sample]) for name in leaves_a
    )


def _alike(a: Any, b: Any, sample: Tensor, other: Tensor) -> bool:
    """Whether two leaves are equal or can be concatenated along the batch."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b)
    if _batched(a, sample) and _batched(b, other):
        return a.shape[1:] == b.shape[1:] and a.dtype == b.dtype
    return torch.equal(a, b)


def _joined(batch: list[Call], architecture: Architecture) -> Call:
    first, sample = batch[0], batch[0][architecture.forward.sample]
    parts = [leaves(call) for call in batch]
    batched = [n for n, v in parts[0].items() if isinstance(v, Tensor) and _batched(v, sample)]
    joined: Call = filled(first, {name: torch.cat([part[name] for part in parts]) for name in batched})
    return joined


def attended(x: Tensor, mask: Tensor | None, text: Literal["all", "last"] | None) -> Tensor:
    """Rows [R, K] of an input [..., K], without the rows of padded text, which attention ignores.

    Args:
        x: [..., K].
        mask: [B, length], nonzero for text; None keeps all rows.
        text: which rows of ``x`` [B, rows, K] are text, see ``InputGroup.text``.
    """
    rows = x.reshape(-1, x.shape[-1])
    if mask is None or text is None:
        return rows
    kept = mask.to(x.device) > 0
    if text == "last" and x.ndim == 3 and kept.ndim == 2 and x.shape[1] > kept.shape[1]:
        kept = nn.functional.pad(kept, (x.shape[1] - kept.shape[1], 0), value=True)
    return rows[kept.reshape(-1)] if kept.numel() == len(rows) else rows


def to_plain(call: Call, prefix: str) -> tuple[Any, dict[str, Tensor]]:
    """A call as JSON and tensors, whose names begin with ``prefix``.

    Raises:
        DitqError: an argument is neither a tensor nor a plain value.
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value
            return {"tensor": name}
        if isinstance(value, Mapping):
            return {"dict": {key: plain(inner, f"{name}.{key}") for key, inner in value.items()}}
        if isinstance(value, (tuple, list)):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [plain(inner, f"{name}.{i}") for i, inner in enumerate(value)]}
        if value is not None and not isinstance(value, (bool, int, float, str)):
            raise DitqError(f"Argument {name.partition('.')[2]!r} of the transformer cannot be saved: {value!r}.")
        return {"value": value}

    return plain(call, prefix), tensors


def from_plain(content: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`to_plain`."""
    ((kind, value),) = content.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: from_plain(inner, tensors) for key, inner in value.items()}
    if kind in ("tuple", "list"):
        return (tuple if kind == "tuple" else list)(from_plain(inner, tensors) for inner in value)
    return value
