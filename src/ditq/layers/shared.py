"""The integers of an input that several layers read (q, k and v), made once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ditq.layers.deferred import version
from ditq.numerics import Quantized


@dataclass
class _Entry:
    """``served``: the layers that have had them. One that comes again has a new call of the model, and a new input."""

    x: weakref.ref[Tensor]
    version: int
    capturing: bool
    key: Hashable
    codes: Quantized
    served: list[object] = field(default_factory=list)


class SharedInput:
    """Holds the integers of one input at a time, and only while that input lives; one of these for a whole model."""

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def get(self, x: Tensor, key: Hashable, layer: object, make: Callable[[], Quantized]) -> Quantized:
        """The integers of ``x``: those that another layer made of it under this key, or new ones.

        New ones always for tensors of inference mode, whose changes in place torch does not count.

        Args:
            key: says how they are made: equal for layers that make the same of equal inputs.
        """
        entry, now, capturing = self._entry, version(x), _capturing(x)
        if now is None:
            return make()
        if (
            entry is not None
            and entry.x() is x
            and (entry.key, entry.version, entry.capturing) == (key, now, capturing)
            and not any(one is layer for one in entry.served)
        ):
            entry.served.append(layer)
            return entry.codes
        codes = make()
        self._entry = _Entry(weakref.ref(x, self._forget), now, capturing, key, codes, [layer])
        return codes

    def _forget(self, dead: weakref.ref[Tensor]) -> None:
        if self._entry is not None and self._entry.x is dead:
            self._entry = None

    def __deepcopy__(self, memo: dict[int, object]) -> SharedInput:
        memo[id(self)] = copied = SharedInput()
        return copied

    def __reduce__(self) -> tuple[type[SharedInput], tuple[()]]:
        return SharedInput, ()


def _capturing(x: Tensor) -> bool:
    """Whether kernels are recorded and not run: what was made before is made again by no replay."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
