"""``QuantizedLinear``: packed integer weights, their scales, and one ``forward`` that runs on an engine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ditq import engines
from ditq.engines import QuantizedWeight
from ditq.engines.base import Activation, Engine, FusingEngine, Norm, balance
from ditq.errors import warn
from ditq.layers.deferred import Deferred, can_defer, offloaded, output
from ditq.layers.read_only import ReadOnly
from ditq.layers.shared import SharedInput
from ditq.numerics import Grid, Quantized, pack, quantize, rotate, search_clip_ratio, unrotate, warm, warm_levels
from ditq.plan import Branch, LayerPlan


class QuantizedLinear(nn.Linear):
    """A linear layer with integer weights, and with integer inputs unless its plan keeps them in 16 bit.

    y = Q(x / s R) Q(W s R)^T + b with the smoothing scale s and the rotation R of the plan, both optional. In
    checkpoints of ditq 0.1, s may be folded into the producer of x: the layer's input is x / s already.

    A branch, if the plan has one, adds (x D^T) U^T in floating point: the largest singular values of the weight, LoRA
    adapters that were fused, or both.

    It subclasses ``nn.Linear`` and has a dequantizing property ``weight``, so that adapters (PEFT) accept it; it does
    not have a weight parameter. Its buffers are those of :meth:`ditq.plan.LayerPlan.tensors`.

    Attributes:
        engine: the name of the engine to run on; None: the registry's choice. ``use_engine`` takes precedence.
        shared: cache of the integers of an input that several layers read; ``group`` names these layers.
        defers: whether the next operation may be fused with it (a nonlinearity, or a gate and a residual).
    """

    engine: str | None = None
    shared: SharedInput | None = None
    group: str = ""
    defers: bool = False

    qweight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    smooth_scale: Tensor
    input_scale: Tensor
    branch_down: Tensor
    branch_up: Tensor
    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(
        self, plan: LayerPlan, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        nn.Module.__init__(self)
        if plan.weight is None:
            raise ValueError(f"layer {plan.name!r} stays in 16 bit by its plan")
        self.plan = plan
        self.in_features, self.out_features = plan.in_features, plan.out_features
        self.dtype = dtype
        for name, stored in plan.tensors().items():
            self.register_buffer(name, torch.empty(stored.shape, dtype=getattr(torch, stored.dtype), device=device))
        if plan.bias:
            self.bias = nn.Parameter(torch.empty(plan.out_features, dtype=dtype, device=device), requires_grad=False)
        else:
            self.register_parameter("bias", None)
        self.rotation = None if plan.rotate is None else plan.rotate.rotation(plan.in_features)
        self.warm()

    def warm(self) -> None:
        """Prepares constants on the layer's device, so that the layer can be compiled before its first call."""
        device = self.qweight.device
        if device.type == "meta":
            return
        if self.rotation is not None:
            warm(self.rotation, device)
        for grid in (self.plan.weight, *self.plan.activations):
            if grid is not None and grid.levels == "normal":
                warm_levels(grid.bits, device)

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Linear,
        plan: LayerPlan,
        *,
        smooth_scale: Tensor | None = None,
        input_scale: Tensor | None = None,
        quantized: Quantized | None = None,
        branch: tuple[Tensor, Tensor] | None = None,
    ) -> QuantizedLinear:
        """Quantizes the weights of ``linear`` once, as planned.

        Args:
            smooth_scale: s [K] of the plan's smoothing: the weight's columns are multiplied by it.
            input_scale: static activation scales (of the balanced input), a scalar, or [1, G] for groups.
            quantized: the balanced weight, if already rounded; None: it is rounded to nearest.
            branch: D [r, K] and U [N, r] of the plan's branch; ``quantized`` is what they leave of the weight.

        Raises:
            ValueError: a scale that the plan needs is missing; or the plan does not round to nearest, or has a branch,
                and ``quantized`` or ``branch`` is missing.
        """
        if plan.branch is not None and (branch is None or quantized is None):
            raise ValueError(f"layer {plan.name!r} has a branch: pass branch=, and the integers of the residual")
        layer = cls(plan, dtype=linear.weight.dtype, device=linear.weight.device)
        fmt = plan.weight
        assert fmt is not None
        if quantized is None:
            if plan.rounding != "nearest":
                raise ValueError(f"layer {plan.name!r} rounds its weight by {plan.rounding}: pass quantized=")
            weight = linear.weight.float()
            if smooth_scale is not None:
                weight = weight * smooth_scale
            quantized = nearest(weight if layer.rotation is None else rotate(weight, layer.rotation), plan)
        layer.qweight.copy_(pack(quantized.codes, fmt))
        layer.weight_scale.copy_(quantized.scale)
        if quantized.zero_point is not None:
            layer.weight_zero_point.copy_(quantized.zero_point)
        if "smooth_scale" in layer._buffers:
            if smooth_scale is None:
                raise ValueError(f"layer {plan.name!r} smooths its input and needs a smooth_scale")
            layer.smooth_scale.copy_(smooth_scale)
        if "input_scale" in layer._buffers:
            if input_scale is None:
                raise ValueError(f"layer {plan.name!r} has static activations and needs an input_scale")
            layer.input_scale.copy_(input_scale)
        if branch is not None:
            layer.branch_down.copy_(branch[0])
            layer.branch_up.copy_(branch[1])
        if linear.bias is not None and layer.bias is not None:
            layer.bias.copy_(linear.bias)
        return layer

    @classmethod
    def like(cls, layer: QuantizedLinear, plan: LayerPlan) -> Self:
        """A layer with the integers of ``layer``, shared, whose plan differs in its inputs only."""
        other = cls.__new__(cls)
        other.__dict__.update(layer.__dict__)
        other._buffers, other._parameters = dict(layer._buffers), dict(layer._parameters)
        other.plan = plan
        return other

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The packed weight in the form that engines take."""
        assert self.plan.weight is not None
        zero_point = self._buffers.get("weight_zero_point")
        return QuantizedWeight(self.qweight, self.weight_scale, zero_point, self.in_features, self.plan.weight)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight [N, K] for the input of this layer, branch included; it cannot be changed."""
        if self.plan.smooth is not None and self.plan.smooth.folded is not None and _called_by_peft():
            warn(
                "This checkpoint of ditq 0.1 folded smoothing scales into other layers: an adapter sees other inputs "
                "than in the float model, so adapters made for that have another effect here. Quantize the float "
                "model again with this ditq, which folds nothing."
            )
        return ReadOnly.of(self.float_weight())

    def float_weight(self) -> Tensor:
        """The same as a plain tensor."""
        weight = self._rounded_weight()
        if self.plan.branch is None:
            return weight
        return weight + (self.branch_up.float() @ self.branch_down.float()).to(weight.dtype)

    def _rounded_weight(self) -> Tensor:
        """The weight that the integers stand for [N, K], for the input of this layer."""
        engine = engines.choose(self.plan.weight, None, self.qweight.device)  # type: ignore[arg-type]
        weight = engine.dequantize_weight(self.quantized_weight)
        if self.rotation is not None:
            weight = unrotate(weight, self.rotation)
        if "smooth_scale" in self._buffers:
            weight = weight / self.smooth_scale
        return weight.to(self.dtype)

    @property
    def activation(self) -> Grid | None:
        """The grid of the inputs of the current call; None: 16 bit."""
        return self.plan.activation

    def balance(self, x: Tensor) -> Tensor:
        """The input after online smoothing and rotation, float32 [..., K]."""
        return balance(x, self._buffers.get("smooth_scale"), self.rotation)

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        y = self._rounded_forward(x)
        if self.plan.branch is None:
            return y
        return y + F.linear(F.linear(x, self.branch_down.to(x.dtype)), self.branch_up.to(x.dtype)).to(y.dtype)

    @torch.no_grad()
    def add_branch(self, down: Tensor, up: Tensor, dtype: str) -> None:
        """Adds (x down^T) up^T, [r, K] and [N, r], to the output; a branch that exists grows by r.

        Args:
            dtype: torch's name of the dtype to store a new branch in.
        """
        branch = self.plan.branch
        stored = getattr(torch, dtype if branch is None else branch.dtype)
        down, up = (t.detach().to(self.qweight.device, stored) for t in (down, up))
        if branch is not None:
            down, up = torch.cat([self.branch_down, down]), torch.cat([self.branch_up, up], dim=1)
        fields = {"dtype": dtype} if branch is None else dict(branch)
        self.plan = self.plan.model_copy(update={"branch": Branch(**{**fields, "rank": len(down)})})
        self.register_buffer("branch_down", down.contiguous())
        self.register_buffer("branch_up", up.contiguous())

    def _rounded_forward(self, x: Tensor) -> Tensor:
        """The output without the branch."""
        if self.activation is None:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self._rounded_weight().to(x.dtype), bias)
        if torch.is_grad_enabled() and x.requires_grad:
            return cast(Tensor, _StraightThrough.apply(x, self))
        return self.integer_forward(x)

    @torch.no_grad()
    def integer_forward(self, x: Tensor) -> Tensor:
        """The forward pass by integer products, without gradients."""
        if self.defers and self.plan.branch is None and can_defer(x) and not offloaded(self):
            return output(partial(self._run, x), x, self.out_features, self._stop_deferring)
        return self._run(x).reshape(*x.shape[:-1], self.out_features)

    def _stop_deferring(self) -> None:
        self.defers = False

    @torch.no_grad()
    def _run(self, x: Tensor, gate: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """y, or residual + gate * y, [M, N]."""
        fmt, activation = self.plan.weight, self.activation
        assert fmt is not None and activation is not None
        engine = engines.choose(fmt, activation, x.device, self.engine)
        if self.shared is None or torch.compiler.is_compiling():
            codes = self._quantized(engine, x)
        else:
            key = (self.group, engine.name, activation, self.rotation, "smooth_scale" in self._buffers)
            codes = self.shared.get(x, key, self, lambda: self._quantized(engine, x))
        if gate is None and residual is None:
            return engine.linear(codes, self.quantized_weight, self.bias, x.dtype)
        if isinstance(engine, FusingEngine):
            return engine.gated_linear(codes, self.quantized_weight, self.bias, x.dtype, gate, residual)
        y = engine.linear(codes, self.quantized_weight, self.bias, x.dtype)
        y = y if gate is None else (y.unflatten(0, (len(gate), -1)) * gate[:, None]).flatten(0, 1)
        return y if residual is None else residual + y

    def _quantized(self, engine: Engine, x: Tensor) -> Quantized:
        """The integers [M, K] of x [..., K]."""
        activation, smooth, scale = (
            self.activation,
            self._buffers.get("smooth_scale"),
            self._buffers.get("input_scale"),
        )
        assert activation is not None
        if isinstance(x, Deferred):
            if isinstance(engine, FusingEngine) and isinstance(x.work, Norm | Activation):
                codes = engine.quantize_result(x.work, smooth, self.rotation, activation, scale)
                if codes is not None:
                    return codes
            x = x.value()
        return engine.quantize_input(x.reshape(-1, self.in_features), smooth, self.rotation, activation, scale)

    @torch.no_grad()
    def dequantize(self) -> nn.Linear:
        """A plain ``nn.Linear`` with the dequantized weight; a folded scale stays folded."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.float_weight(), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return linear

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # Scales stay float32 whatever dtype the model is cast to: those of int8 weights become subnormal in fp16
        # below a range of 0.008, and bf16 keeps three digits. A branch stays as it is stored.
        floats = {id(b) for b in self._buffers.values() if b is not None and b.is_floating_point()}

        def move_only(t: Tensor) -> Tensor:
            out = fn(t)
            return t.to(out.device) if id(t) in floats and out.dtype != t.dtype else out

        super()._apply(move_only, recurse)
        probe = fn(torch.empty(0, dtype=self.dtype, device="cpu"))
        self.dtype = probe.dtype
        self.warm()
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weight={self.plan.weight}, activation={self.plan.activation or '16 bit'}, balance={self.plan.balance}"
        )


class _StraightThrough(torch.autograd.Function):
    """Rounding has no gradient; the input gets the gradient of the dequantized weight, so that adapters can train."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return layer.integer_forward(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer._rounded_weight().to(gradient.dtype), None


def _called_by_peft() -> bool:
    """Whether the property that calls this is read by PEFT, which does so when it adds an adapter."""
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("peft.")


def nearest(weight: Tensor, plan: LayerPlan) -> Quantized:
    """The balanced ``weight`` [N, K] in the plan's format, each number at the nearest code."""
    fmt = plan.weight
    assert fmt is not None
    return quantize(weight, fmt, clip_ratio=search_clip_ratio(weight, fmt) if plan.clip == "mse" else 1.0)
