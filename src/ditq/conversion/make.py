"""Creates the quantized layer that a plan describes from a linear."""

from __future__ import annotations

from torch import Tensor, nn

from ditq.architectures import InputGroup
from ditq.calibration import GroupStatistics, Statistics
from ditq.conversion.hessians import InputHessian
from ditq.conversion.rounding import round_weight
from ditq.conversion.scales import balanced, group_scale, static_scale
from ditq.layers import Clock, QuantizedLinear, TimestepLinear, with_steps
from ditq.numerics import incoherence
from ditq.plan import Incoherence, LayerPlan


def make_layer(
    plan: LayerPlan,
    linear: nn.Linear,
    group: InputGroup | None,
    scale: Tensor | None,
    statistics: Statistics | None,
    hessian: InputHessian | None,
    clock: Clock,
) -> tuple[LayerPlan, nn.Module]:
    """The completed plan (rounding gain, incoherence) and the layer.

    Args:
        group: of the linear's input; None for a linear outside of the stacks.
        scale: smoothing scale [K] of the group, or None.
        hessian: of the balanced input, if GPTQ rounds the weight.
        clock: of the model, for layers that change with the timestep.
    """
    scale = scale if plan.smooth else None
    inputs = statistics.groups.get(group.name) if statistics and group else None
    layer: nn.Module
    if plan.timesteps:
        layer = _timestep_layer(plan, linear, group, statistics, clock)
    else:
        quantized = None
        if hessian is not None:
            plan, quantized = round_weight(linear, plan, scale, hessian)
        layer = QuantizedLinear.from_linear(
            linear, plan, smooth_scale=scale, input_scale=static_scale(plan, inputs, scale), quantized=quantized
        )
        layer = with_steps(layer, plan, clock)
    return plan.model_copy(update={"incoherence": _incoherence(plan, linear, scale, inputs)}), layer


def _timestep_layer(
    plan: LayerPlan, linear: nn.Linear, group: InputGroup | None, statistics: Statistics | None, clock: Clock
) -> TimestepLinear:
    inputs = statistics.groups.get(group.name) if statistics and group else None
    ranges = []
    for i, between in enumerate(plan.timesteps or ()):
        inner = plan.in_range(i)
        scale = None
        if plan.smooth:
            assert statistics is not None and group is not None and inputs is not None  # see checks.check
            scale = group_scale(plan.smooth, group, inputs, statistics.timesteps, between).to(linear.weight.device)
        input_scale = static_scale(inner, inputs, scale, between)
        ranges.append(QuantizedLinear.from_linear(linear, inner, smooth_scale=scale, input_scale=input_scale))
    return TimestepLinear(plan, ranges, clock)


def _incoherence(
    plan: LayerPlan, linear: nn.Linear, scale: Tensor | None, inputs: GroupStatistics | None
) -> Incoherence:
    w = linear.weight.detach().float()
    values = {
        "weight_before": incoherence(w).mean(),
        "weight_after": incoherence(balanced(w, scale, plan.rotate, weight=True)).mean(),
    }
    if inputs is not None:
        x = inputs.rows()[:512]
        after = balanced(x, None if scale is None else scale.cpu(), plan.rotate, weight=False)
        values |= {"input_before": incoherence(x).mean(), "input_after": incoherence(after).mean()}
    return Incoherence(**{key: round(float(value), 3) for key, value in values.items()})
