"""Results that wait: of a norm for its modulation and quantizer, of a linear layer for its nonlinearity, or for the
gate and the residual it is added to. An engine that fuses does these in one pass; any other use computes what was
asked for, step by step, as it would have been without waiting.

Only in eager code without gradients, and only where such an engine runs (``engines.fuses``): a compiler fuses by
itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils._pytree import tree_map_only

from ditq import engines
from ditq.engines.base import Activation, Norm


def waits(x: Tensor) -> bool:
    """Whether what is made of ``x`` may wait."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and type(x) in (Tensor, nn.Parameter, Deferred)
        and engines.fuses(x.device)
    )


@dataclass(frozen=True)
class Output:
    """What a linear layer gives: ``run(gate, residual)`` computes residual + gate * y, [M, N]."""

    run: Callable[[Tensor | None, Tensor | None], Tensor]
    gate: Tensor | None = None


@dataclass(frozen=True)
class Half:
    """The first or second half of the columns of ``x`` [M, 2 K], after a nonlinearity where there is one."""

    x: Tensor
    second: bool
    function: str = ""


Work = Norm | Activation | Output | Half


class Deferred(Tensor):
    """A tensor of which only shape, dtype and device are known until :meth:`value` computes it.

    Args:
        work: what an engine needs to know to go on from here; its rows are those of the result.
        compute: the result itself.
    """

    _work: Work
    _compute: Callable[[], Tensor] | None
    _value: Tensor

    @staticmethod
    def __new__(
        cls, work: Work, shape: Sequence[int], dtype: torch.dtype, device: torch.device, compute: Callable[[], Tensor]
    ) -> Deferred:
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made._work, made._compute = work, compute
        return made

    def __init__(self, *args: Any) -> None:
        pass

    @property
    def work(self) -> Work:
        return self._work

    def value(self) -> Tensor:
        """The tensor, computed once."""
        if self._compute is not None:
            self._value = self._compute()
            self._compute = None
        return self._value

    def then(self, work: Work, compute: Callable[[Tensor], Tensor], shape: Sequence[int] | None = None) -> Deferred:
        """What one more step makes of it."""
        return Deferred(
            work, self.shape if shape is None else shape, self.dtype, self.device, lambda: compute(self.value())
        )  # fmt: skip

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        step = _STEPS.get(func)
        if step is not None and not torch.compiler.is_compiling():
            found = step(func, *args, **kwargs)
            if found is not None:
                return found
        args, kwargs = tree_map_only(Deferred, Deferred.value, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(Deferred, Deferred.value, (args, kwargs or {}))
        return func(*args, **kwargs)


def normed(norm: nn.LayerNorm, x: Tensor) -> Deferred:
    """What ``norm`` gives of x [..., K]."""
    work = Norm(x.reshape(-1, x.shape[-1]), norm.eps, norm.weight, norm.bias, None, None)
    return Deferred(work, x.shape, x.dtype, x.device, lambda: nn.LayerNorm.forward(norm, x))


def output(run: Callable[[Tensor | None, Tensor | None], Tensor], x: Tensor, columns: int) -> Deferred:
    """What a linear layer gives of x [..., K]; ``run`` as in :class:`Output`."""
    shape = (*x.shape[:-1], columns)
    return Deferred(Output(run), shape, x.dtype, x.device, lambda: run(None, None).reshape(shape))


class DeferredLayerNorm(nn.LayerNorm):
    """A norm that waits for the linear layer it feeds."""

    def forward(self, input: Tensor) -> Tensor:
        if waits(input) and len(self.normalized_shape) == 1:
            return normed(self, input.value() if isinstance(input, Deferred) else input)
        return super().forward(input)


# ------------------------------------------------------------- the steps; each may decline by returning None


def _times(func: Any, a: Any, b: Any) -> Tensor | None:
    """By the factor of a modulation or a gate, or of one half of the columns by the other, activated."""
    x, other = (a, b) if isinstance(a, Deferred) else (b, a)
    work = x.work
    if isinstance(other, Deferred):
        if not isinstance(work, Half) or not isinstance(other.work, Half) or other.work.x is not work.x:
            return None
        value, gate = (work, other.work) if not work.function else (other.work, work)
        if value.second or value.function or not gate.second or not gate.function:
            return None
        return x.then(Activation(work.x, gate.function, True), lambda y: func(y, other.value()))
    rows = _by_sample(x, other)
    if rows is None:
        return None
    if isinstance(work, Norm) and work.factor is None:
        return x.then(work._replace(factor=rows), lambda y: func(y, other))
    if isinstance(work, Output) and work.gate is None:
        return x.then(replace(work, gate=rows), lambda y: func(y, other))
    return None


def _plus(func: Any, a: Any, b: Any, alpha: float = 1) -> Tensor | None:
    """The shift of a modulation, or the residual, with which the layer is run at last."""
    x, other = (a, b) if isinstance(a, Deferred) else (b, a)
    if alpha != 1 or isinstance(other, Deferred) or not isinstance(other, Tensor):
        return None
    work = x.work
    if isinstance(work, Output) and x._compute is not None and other.shape == x.shape and other.dtype == x.dtype:
        return work.run(work.gate, other.reshape(-1, other.shape[-1])).reshape(other.shape)
    if isinstance(work, Norm) and work.factor is not None and work.shift is None:
        rows = _by_sample(x, other)
        if rows is not None and len(rows) == len(work.factor):
            return x.then(work._replace(shift=rows), lambda y: func(y, other))
    return None


def _by_sample(x: Tensor, other: Any) -> Tensor | None:
    """``other`` as [samples, K], where it is one row for each of as many equal runs of rows of x [..., K]."""
    if not isinstance(other, Tensor) or torch.promote_types(x.dtype, other.dtype) != x.dtype:
        return None
    ahead = x.ndim - other.ndim
    if ahead < 0 or not other.ndim or other.shape[-1] != x.shape[-1]:
        return None
    shape = (1,) * ahead + tuple(other.shape[:-1])
    same = next((i for i, (n, m) in enumerate(zip(shape, x.shape, strict=False)) if n != m), len(shape))
    if any(n != 1 for n in shape[same:]):
        return None
    return other.reshape(math.prod(shape), other.shape[-1])


def _activated(func: Any, x: Any, name: str) -> Tensor | None:
    work = x.work
    if isinstance(work, Output) and work.gate is None:
        y = x.value()
        return x.then(Activation(y.reshape(-1, y.shape[-1]), name, False), func)
    if isinstance(work, Half) and not work.function:
        return x.then(replace(work, function=name), func)
    return None


def _gelu(func: Any, input: Any, approximate: str = "none") -> Tensor | None:
    name = {"none": "gelu", "tanh": "gelu_tanh"}[approximate]
    return _activated(lambda y: func(y, approximate=approximate), input, name)


def _silu(func: Any, input: Any, inplace: bool = False) -> Tensor | None:
    return None if inplace else _activated(func, input, "silu")


def _chunk(func: Any, input: Any, chunks: int, dim: int = 0) -> tuple[Tensor, ...] | None:
    """Into the value and the gate of a gated nonlinearity."""
    work = input.work
    if chunks != 2 or dim not in (-1, input.ndim - 1) or input.shape[-1] % 2 or not isinstance(work, Output):
        return None
    if work.gate is not None:
        return None
    y = input.value()
    rows, halves = y.reshape(-1, y.shape[-1]), func(y, 2, dim)
    return tuple(
        Deferred(Half(rows, second), half.shape, half.dtype, half.device, lambda half=half: half)
        for second, half in zip((False, True), halves, strict=True)
    )


def _shaped(func: Any, input: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """The same rows in another order of their indices."""
    shape = func(torch.empty(input.shape, device="meta"), *args, **kwargs).shape
    if not shape or shape[-1] != input.shape[-1] or isinstance(input.work, Half):
        return None
    return input.then(input.work, lambda y: func(y, *args, **kwargs), shape)


def _dropout(func: Any, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor | None:
    return None if training and p else input


def _divide(func: Any, input: Any, other: Any) -> Tensor | None:
    return input if type(other) in (int, float) and other == 1 and isinstance(input, Deferred) else None


_FIELDS = ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "layout")
_LOOKS = {
    *(getattr(Tensor, name).__get__ for name in _FIELDS),
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point,
}  # fmt: skip

_STEPS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((Tensor.mul, torch.mul), _times),
    **dict.fromkeys((Tensor.add, torch.add), _plus),
    **dict.fromkeys((Tensor.div, torch.div), _divide),
    **dict.fromkeys((Tensor.chunk, torch.chunk), _chunk),
    **dict.fromkeys(
        (Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten, Tensor.unflatten), _shaped
    ),
    F.gelu: _gelu,
    F.silu: _silu,
    F.dropout: _dropout,
}
