"""Quantizes an input that several layers read (q, k and v) only once."""

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
    """``served``: the layers that have read the codes. A second read by a layer means a new call of the model."""

    x: weakref.ref[Tensor]
    version: int
    capturing: bool
    key: Hashable
    codes: Quantized
    served: list[object] = field(default_factory=list)


class SharedInput:
    """Caches the integers of one input at a time, and only while that input exists; one instance per model."""

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def get(self, x: Tensor, key: Hashable, layer: object, make: Callable[[], Quantized]) -> Quantized:
        """The integers of ``x``: cached ones that another layer computed under this key, or new ones.

        Integers of inference tensors are never cached, since torch does not count their changes in place.

        Args:
            key: equal for layers that quantize equal inputs to equal integers.
            layer: the layer that reads them.
            make: computes new ones.
        """
        entry, current, capturing = self._entry, version(x), _capturing(x)
        if current is None:
            return make()
        if (
            entry is not None
            and entry.x() is x
            and (entry.key, entry.version, entry.capturing) == (key, current, capturing)
            and not any(reader is layer for reader in entry.served)
        ):
            entry.served.append(layer)
            return entry.codes
        codes = make()
        self._entry = _Entry(weakref.ref(x, self._forget), current, capturing, key, codes, [layer])
        return codes

    def _forget(self, dead: weakref.ref[Tensor]) -> None:
        entry = self._entry  # another thread may replace it
        if entry is not None and entry.x is dead:
            self._entry = None

    def __deepcopy__(self, memo: dict[int, object]) -> SharedInput:
        memo[id(self)] = copied = SharedInput()
        return copied

    def __reduce__(self) -> tuple[type[SharedInput], tuple[()]]:
        return SharedInput, ()


def _capturing(x: Tensor) -> bool:
    """Whether a CUDA graph records kernels. A replay does not recompute integers from before the recording."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
