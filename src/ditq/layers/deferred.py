"""Deferred results: of a norm for its modulation and quantizer, of a linear layer for its nonlinearity, or for the
gate and the residual it is added to. An engine that fuses does these in one pass; any other use computes what was
asked for, step by step, as it would have been without deferring.

Only in eager code without gradients, and only where such an engine runs (``engines.fuses``): a compiler fuses by
itself.

A deferred result reads its inputs later than the code says. So it keeps their versions, which torch counts up with
every change in place, and raises when one has changed since. Tensors of inference mode have no version: what is made
of them is computed at once. Pipelines of diffusers run under ``torch.no_grad``, which keeps versions.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils._pytree import tree_map_only

from ditq import engines
from ditq.engines.base import Activation, Norm
from ditq.errors import DitqError


def waits(x: Tensor) -> bool:
    """Whether what is made of ``x`` may be deferred."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and not torch.is_inference_mode_enabled()
        and type(x) in (Tensor, nn.Parameter, Deferred)
        and (type(x) is Deferred or not x.is_inference())
        and engines.fuses(x.device)
        and not torch.is_autocast_enabled(x.device.type)  # results have another dtype there
    )


def version(x: Tensor) -> int | None:
    """Counts the changes of ``x`` in place; None where torch does not count them (inference mode).

    A deferred tensor has the version 0 until its result is changed: computing it is no change.
    """
    if type(x) is Deferred:
        return x.changes()
    try:
        return x._version
    except RuntimeError:  # "Inference tensors do not track version counter"
        return None


class Read(NamedTuple):
    """A tensor that is read later, and its version at the time of the call; ``what`` names it in errors."""

    what: str
    tensor: Tensor
    version: int | None

    def unchanged(self) -> bool:
        return version(self.tensor) == self.version


def read(what: str, tensor: Tensor) -> Read:
    return Read(what, tensor, version(tensor))


class Product:
    """The integer product of one call of a layer, run once.

    It runs with a gate and a residual, or alone for all other uses. A fused result does not contain the product, so
    if code uses the layer's output after it was added to a residual, the product has to run again: ``again`` is
    called then, for the layer to defer no more.

    Args:
        run: ``run(gate, residual)`` computes residual + gate * y, [M, N].
    """

    def __init__(self, run: Callable[[Tensor | None, Tensor | None], Tensor], again: Callable[[], None]) -> None:
        self._run, self._again = run, again
        self._alone: Tensor | None = None
        self._fused = False

    def alone(self) -> Tensor:
        """The output y [M, N]."""
        if self._alone is None:
            if self._fused:
                self._again()
            self._alone = self._run(None, None)
        return self._alone

    def fused(self, gate: Tensor | None, residual: Tensor) -> Tensor | None:
        """The sum residual + gate * y [M, N], or None where the product has run already."""
        if self._alone is not None or self._fused:
            return None
        y = self._run(gate, residual)
        self._fused = True
        return y


@dataclass(frozen=True)
class Output:
    """The output of a linear layer, times a gate [samples, N] where there is one."""

    product: Product
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
        compute: the result itself, or a function that computes it.
        reads: what ``compute`` reads later.
        before: the deferred tensor that ``compute`` takes a step from.
        fused_reads: what ``work`` reads; None: what ``compute`` and all before it read.
    """

    _work: Work
    _compute: Callable[[], Tensor] | None
    _value: Tensor
    _computed_version: int
    _reads: tuple[Read, ...]
    _before: Deferred | None
    _fused_reads: tuple[Read, ...]

    @staticmethod
    def __new__(
        cls, work: Work, shape: Sequence[int], dtype: torch.dtype, device: torch.device,
        compute: Tensor | Callable[[], Tensor], reads: Sequence[Read] = (), before: Deferred | None = None,
        fused_reads: Sequence[Read] | None = None,
    ) -> Deferred:  # fmt: skip
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made._work, made._reads, made._before = work, tuple(reads), before
        if fused_reads is None:
            fused_reads = (*(() if before is None else before._fused_reads), *reads)
        made._fused_reads = tuple(fused_reads)
        made._compute = None if isinstance(compute, Tensor) else compute
        if isinstance(compute, Tensor):
            made._value, made._computed_version = compute, compute._version
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @property
    def work(self) -> Work | None:
        """What an engine may do in the place of :meth:`value`; None where that would not be the same any more."""
        return self._work if self._untouched() and all(r.unchanged() for r in self._fused_reads) else None

    def value(self) -> Tensor:
        """The tensor, computed once.

        Raises:
            DitqError: what it is computed from was changed in place.
        """
        if self._compute is not None:
            for r in self._reads:
                if not r.unchanged():
                    raise _changed(r.what, r.tensor)
            if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
                with torch.inference_mode(False), torch.no_grad():
                    value = self._compute()
            else:
                value = self._compute()
            self._value, self._computed_version = value, value._version
            self._compute, self._reads = None, ()
        return self._value

    def changes(self) -> int:
        """How often the result was changed in place."""
        return 0 if self._compute is not None else self._value._version - self._computed_version

    def _untouched(self) -> bool:
        return self.changes() == 0 and (self._before is None or self._before._untouched())

    def then(
        self, work: Work, compute: Callable[[Tensor], Tensor], *reads: Read, shape: Sequence[int] | None = None,
        fused_reads: Sequence[Read] | None = None,
    ) -> Deferred:  # fmt: skip
        """What one more step makes of it."""

        def step() -> Tensor:
            value = self.value()
            if self.changes():
                raise _changed("The result that it is computed from", value)
            return compute(value)

        return Deferred(
            work, self.shape if shape is None else shape, self.dtype, self.device, step, reads, self, fused_reads
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
        if step is not None and kwargs.keys() <= _KEYWORDS[step] and not torch.compiler.is_compiling():
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


def _changed(what: str, tensor: Tensor) -> DitqError:
    return DitqError(
        f"{what}, {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, was changed in place before a "
        "result that needs it was computed: ditq defers norms and linear layers, to run them in one kernel with what "
        "follows. Use the result first, change a copy (`x = x * 2` and not `x.mul_(2)`), or run the model in "
        "`with ditq.engines.fusion(False):`."
    )


def normed(norm: nn.LayerNorm, x: Tensor) -> Deferred:
    """The deferred output of ``norm`` for x [..., K]."""
    weight, bias, shape, eps = norm.weight, norm.bias, norm.normalized_shape, norm.eps
    work = Norm(x.reshape(-1, x.shape[-1]), eps, weight, bias, None, None)
    named = (("The input of a norm", x), ("The weight of a norm", weight), ("The bias of a norm", bias))
    reads = [read(what, t) for what, t in named if t is not None]
    return Deferred(work, x.shape, x.dtype, x.device, lambda: F.layer_norm(x, shape, weight, bias, eps), reads)


def output(
    run: Callable[[Tensor | None, Tensor | None], Tensor], x: Tensor, columns: int, again: Callable[[], None]
) -> Deferred:
    """The deferred output of a linear layer for x [..., K]; ``run`` and ``again`` as in :class:`Product`."""
    shape, product = (*x.shape[:-1], columns), Product(run, again)
    reads = [read("The input of a quantized layer", x)]
    return Deferred(Output(product), shape, x.dtype, x.device, lambda: product.alone().reshape(shape), reads)


class DeferredLayerNorm(nn.LayerNorm):
    """A norm that waits for the linear layer it feeds."""

    def forward(self, input: Tensor) -> Tensor:
        if waits(input) and len(self.normalized_shape) == 1 and _counted(self.weight, self.bias):
            return normed(self, input.value() if isinstance(input, Deferred) else input)
        return super().forward(input)


def _counted(*tensors: Tensor | None) -> bool:
    """Whether torch counts the changes of all of these."""
    return not any(t is not None and t.is_inference() for t in tensors)


# ------------------------------------------------------------- the steps; each may decline by returning None


def _times(func: Any, input: Any, other: Any) -> Tensor | None:
    """By the factor of a modulation or a gate, or of one half of the columns by the other, activated."""
    x, other = (input, other) if isinstance(input, Deferred) else (other, input)
    work = x.work
    if isinstance(other, Deferred):
        if not isinstance(work, Half) or not isinstance(other.work, Half) or other.work.x is not work.x:
            return None
        value, gate = (work, other.work) if not work.function else (other.work, work)
        if value.second or value.function or not gate.second or not gate.function:
            return None
        reads = read("The other half", other)
        return x.then(Activation(work.x, gate.function, True), lambda y: func(y, other.value()), reads)
    rows = _by_sample(x, other)
    if rows is None:
        return None
    if isinstance(work, Norm) and work.factor is None:
        return x.then(work._replace(factor=rows), lambda y: func(y, other), read("The factor of a norm", other))
    if isinstance(work, Output) and work.gate is None:
        return x.then(replace(work, gate=rows), lambda y: func(y, other), read("The gate of a layer", other))
    return None


def _plus(func: Any, input: Any, other: Any, alpha: float = 1) -> Tensor | None:
    """The shift of a modulation, or the residual, with which the layer is run at last."""
    x, other = (input, other) if isinstance(input, Deferred) else (other, input)
    if alpha != 1 or isinstance(other, Deferred) or not isinstance(other, Tensor):
        return None
    work = x.work
    if isinstance(work, Output) and other.shape == x.shape and other.dtype == x.dtype:
        y = work.product.fused(work.gate, other.reshape(-1, other.shape[-1]))
        return None if y is None else y.reshape(other.shape)
    if isinstance(work, Norm) and work.factor is not None and work.shift is None:
        rows = _by_sample(x, other)
        if rows is not None and len(rows) == len(work.factor):
            return x.then(work._replace(shift=rows), lambda y: func(y, other), read("The shift of a norm", other))
    return None


def _by_sample(x: Tensor, other: Any) -> Tensor | None:
    """``other`` as [samples, K], where it is one row for each of as many equal runs of rows of x [..., K]."""
    if not isinstance(other, Tensor) or torch.promote_types(x.dtype, other.dtype) != x.dtype or not _counted(other):
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
        # It reads what is computed now, and nothing that the layer read.
        return x.then(Activation(y.reshape(-1, y.shape[-1]), name, False), func, fused_reads=())
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
        Deferred(Half(rows, second), half.shape, half.dtype, half.device, half)
        for second, half in zip((False, True), halves, strict=True)
    )


def _shaped(func: Any, input: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """The same rows in another order of their indices."""
    made = func(torch.empty(input.shape, dtype=input.dtype, device="meta"), *args, **kwargs)
    shape, work = made.shape, input.work
    if not shape or shape[-1] != input.shape[-1] or made.dtype != input.dtype:
        return None
    if work is None or isinstance(work, Half):
        return None
    return input.then(work, lambda y: func(y, *args, **kwargs), shape=shape)


def _dropout(func: Any, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor | None:
    return None if training and p else input


def _divide(func: Any, input: Any, other: Any) -> Tensor | None:
    if type(other) not in (int, float) or other != 1 or not isinstance(input, Deferred) or input.work is None:
        return None
    return input.then(input.work, lambda y: func(y, other))


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

_KEYWORDS = {step: set(inspect.signature(step).parameters) for step in _STEPS.values()}
_KEYWORDS[_shaped] |= {"shape", "size", "dim", "sizes", "start_dim", "end_dim"}
"""Arguments by name that a step takes. With any other, such as ``out``, there is none."""
