"""Makes the quantized layer that a plan describes in the place of a linear."""

from __future__ import annotations

from torch import Tensor, nn

from ditq.architectures import InputGroup
from ditq.calibration import GroupStatistics, Statistics
from ditq.conversion.hessians import InputHessian
from ditq.conversion.rounding import round_weight
from ditq.conversion.scales import balanced, group_scale, static_scale
from ditq.layers import Clock, QuantizedLinear, TimestepLinear
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
    """The layer, and its plan completed by what rounding and balance achieved.

    Args:
        group: of the linear's input; None where its input is not known.
        scale: smoothing scale [K] of the group, or None.
        hessian: of the balanced input, where GPTQ rounds.
        clock: of the model, for layers with own integers per range of timesteps.
    """
    scale = scale if plan.smooth else None
    seen = statistics.groups.get(group.name) if statistics and group else None
    layer: nn.Module
    if plan.timesteps and group is not None:
        assert statistics is not None  # see checks.check
        layer = _timestep_layer(plan, linear, group, statistics, clock)
    else:
        quantized = None
        if hessian is not None:
            plan, quantized = round_weight(linear, plan, scale, hessian)
        layer = QuantizedLinear.from_linear(
            linear, plan, smooth_scale=scale, input_scale=static_scale(plan, seen, scale), quantized=quantized
        )
    return plan.model_copy(update={"incoherence": _incoherence(plan, linear, scale, seen)}), layer


def _timestep_layer(
    plan: LayerPlan, linear: nn.Linear, group: InputGroup, statistics: Statistics, clock: Clock
) -> TimestepLinear:
    seen = statistics.groups[group.name]
    inner = plan.model_copy(update={"timesteps": None})
    ranges = []
    for between in plan.timesteps or ():
        scale = None
        if plan.smooth:
            scale = group_scale(plan.smooth, group, seen, statistics.timesteps, between).to(linear.weight.device)
        input_scale = static_scale(inner, seen, scale, between)
        ranges.append(QuantizedLinear.from_linear(linear, inner, smooth_scale=scale, input_scale=input_scale))
    return TimestepLinear(plan, ranges, clock)


def _incoherence(
    plan: LayerPlan, linear: nn.Linear, scale: Tensor | None, seen: GroupStatistics | None
) -> Incoherence:
    w = linear.weight.detach().float()
    values = {
        "weight_before": incoherence(w).mean(),
        "weight_after": incoherence(balanced(w, scale, plan.rotate, weight=True)).mean(),
    }
    if seen is not None:
        x = seen.rows()[:512]
        after = balanced(x, None if scale is None else scale.cpu(), plan.rotate, weight=False)
        values |= {"input_before": incoherence(x).mean(), "input_after": incoherence(after).mean()}
    return Incoherence(**{key: round(float(value), 3) for key, value in values.items()})
