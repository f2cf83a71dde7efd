"""Deferred (lazy) results, so that an engine can fuse a layer with the operations after it.

A norm is fused with its modulation and the quantizer, a linear layer with its nonlinearity, or with its gate and the
residual it is added to. Any other use of a deferred result computes it step by step, as without deferring.

Results are deferred only in eager code without gradients, and only on a device with an engine that fuses
(``engines.fuses``). A compiler fuses by itself.

A deferred result reads its inputs later than the code that created it. So it keeps their versions, which torch
increments with every change in place, and raises if one has changed in the meantime. Tensors of inference mode have no
version: results computed from them are not deferred. Pipelines of diffusers run under ``torch.no_grad``, which keeps
versions.
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


def can_defer(x: Tensor) -> bool:
    """Whether results computed from ``x`` may be deferred."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and not torch.is_inference_mode_enabled()
        and type(x) in (Tensor, nn.Parameter, Deferred)
        and (type(x) is Deferred or not x.is_inference())
        and engines.fuses(x.device)
        and not torch.is_autocast_enabled(x.device.type)  # results have another dtype there
    )


def offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate or diffusers may move or cast the weights when ``forward`` returns."""
    return "_hf_hook" in module.__dict__ or "_diffusers_hook" in module.__dict__


def version(x: Tensor) -> int | None:
    """The number of changes of ``x`` in place; None if torch does not count them (inference mode).

    A deferred tensor has version 0 until its result is changed: computing it does not count as a change.
    """
    if type(x) is Deferred:
        return x.changes()
    try:
        return x._version
    except RuntimeError:  # "Inference tensors do not track version counter"
        return None


class Read(NamedTuple):
    """A tensor that is read later, with its version at the time of the call; ``what`` names it in errors."""

    what: str
    tensor: Tensor
    version: int | None

    def unchanged(self) -> bool:
        return version(self.tensor) == self.version


def read(what: str, tensor: Tensor) -> Read:
    return Read(what, tensor, version(tensor))


class Product:
    """The integer product of one call of a layer, run once.

    It runs fused with a gate and a residual, or alone for all other uses. A fused result does not contain the product.
    If code uses the layer's output after it was added to a residual, the product runs again. ``again`` is called
    first, so that the layer stops deferring.

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
        """The sum residual + gate * y [M, N], or None if the product has run already."""
        if self._alone is not None or self._fused:
            return None
        y = self._run(gate, residual)
        self._fused = True
        return y


@dataclass(frozen=True)
class Output:
    """The output of a linear layer, optionally times a gate [samples, N]."""

    product: Product
    gate: Tensor | None = None


@dataclass(frozen=True)
class Half:
    """The first or second half of the columns of ``x`` [M, 2 K], optionally after a nonlinearity."""

    x: Tensor
    second: bool
    function: str = ""


Work = Norm | Activation | Output | Half


class Deferred(Tensor):
    """A tensor with shape, dtype and device, whose values :meth:`value` computes.

    Args:
        work: description of the result for an engine that fuses; its rows are those of the result.
        compute: the result itself, or a function that computes it.
        reads: the tensors that ``compute`` reads.
        before: the deferred tensor that ``compute`` starts from.
        fused_reads: the tensors that ``work`` reads; None: those of ``compute`` and of all steps before it.
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
        deferred = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        deferred._work, deferred._reads, deferred._before = work, tuple(reads), before
        if fused_reads is None:
            fused_reads = (*(() if before is None else before._fused_reads), *reads)
        deferred._fused_reads = tuple(fused_reads)
        deferred._compute = None if isinstance(compute, Tensor) else compute
        if isinstance(compute, Tensor):
            deferred._value, deferred._computed_version = compute, compute._version
        return deferred

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @property
    def work(self) -> Work | None:
        """The work that an engine may fuse in place of :meth:`value`; None if tensors have changed in the meantime."""
        return self._work if self._untouched() and all(r.unchanged() for r in self._fused_reads) else None

    def value(self) -> Tensor:
        """The tensor, computed once.

        Raises:
            DitqError: a tensor that it is computed from was changed in place.
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
        """The number of changes of the result in place."""
        return 0 if self._compute is not None else self._value._version - self._computed_version

    def _untouched(self) -> bool:
        return self.changes() == 0 and (self._before is None or self._before._untouched())

    def then(
        self, work: Work, compute: Callable[[Tensor], Tensor], *reads: Read, shape: Sequence[int] | None = None,
        fused_reads: Sequence[Read] | None = None,
    ) -> Deferred:  # fmt: skip
        """The deferred result of one more step."""

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
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        step = _STEPS.get(func)
        if step is not None and kwargs.keys() <= _KEYWORDS[step] and not torch.compiler.is_compiling():
            result = step(func, *args, **kwargs)
            if result is not None:
                return result
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
        "result that needs it was computed. ditq defers norms and linear layers, to fuse them with the next "
        "operation. Use the result first, change a copy (`x = x * 2` instead of `x.mul_(2)`), or run the model in "
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
    """A norm that defers its output, to be fused with the quantizer of the next linear layer."""

    def forward(self, input: Tensor) -> Tensor:
        can = can_defer(input) and not offloaded(self)
        if can and len(self.normalized_shape) == 1 and _has_version(self.weight, self.bias):
            return normed(self, input.value() if isinstance(input, Deferred) else input)
        return super().forward(input)


def _has_version(*tensors: Tensor | None) -> bool:
    """Whether torch counts the changes of all these tensors."""
    return not any(t is not None and t.is_inference() for t in tensors)


# ------------------------------------- the steps; each returns None if it does not apply


def _times(func: Any, input: Any, other: Any) -> Tensor | None:
    """Multiplication by the factor of a modulation or by a gate, or of a value half by its activated gate half."""
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
    """Addition of the shift of a modulation, or of the residual, which runs the fused layer."""
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
    """``other`` as [samples, K] if it has one row per sample of x [..., K] (equally many rows each); else None."""
    if (
        not isinstance(other, Tensor)
        or torch.promote_types(x.dtype, other.dtype) != x.dtype
        or not _has_version(other)
    ):
        return None
    missing = x.ndim - other.ndim
    if missing < 0 or not other.ndim or other.shape[-1] != x.shape[-1]:
        return None
    shape = (1,) * missing + tuple(other.shape[:-1])
    same = next((i for i, (n, m) in enumerate(zip(shape, x.shape, strict=False)) if n != m), len(shape))
    if any(n != 1 for n in shape[same:]):
        return None
    return other.reshape(math.prod(shape), other.shape[-1])


def _activated(func: Any, x: Any, name: str) -> Tensor | None:
    work = x.work
    if isinstance(work, Output) and work.gate is None:
        y = x.value()
        # The activation reads the computed output, and no longer the inputs of the layer.
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
    """Splits into the value and the gate of a gated nonlinearity."""
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
    """Views that keep the rows and change the leading dimensions."""
    viewed = func(torch.empty(input.shape, dtype=input.dtype, device="meta"), *args, **kwargs)
    shape, work = viewed.shape, input.work
    if not shape or shape[-1] != input.shape[-1] or viewed.dtype != input.dtype:
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
_METADATA = {
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
"""Keyword arguments that a step supports. A call with any other, such as ``out``, is not deferred."""
