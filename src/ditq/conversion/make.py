"""Creates the quantized layer that a plan describes from a linear."""

from __future__ import annotations

from torch import Tensor, nn

from ditq.architectures import InputGroup
from ditq.calibration import GroupStatistics, Statistics
from ditq.conversion.branch import refined
from ditq.conversion.error import SEARCH_ROWS
from ditq.conversion.hessians import InputHessian
from ditq.conversion.rounding import round_weight
from ditq.conversion.scales import balanced, group_scale, static_scale
from ditq.layers import Clock, QuantizedLinear, TimestepLinear, with_steps
from ditq.layers.quantized_linear import nearest
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
        rows = None if inputs is None else inputs.rows()
        plan, one = _rounded(plan, linear, scale, static_scale(plan, inputs, scale), rows, hessian)
        layer = with_steps(one, plan, clock)
    return plan.model_copy(update={"incoherence": _incoherence(plan, linear, scale, inputs)}), layer


def _rounded(
    plan: LayerPlan,
    linear: nn.Linear,
    scale: Tensor | None,
    input_scale: Tensor | None,
    rows: Tensor | None,
    hessian: InputHessian | None = None,
) -> tuple[LayerPlan, QuantizedLinear]:
    """The plan with its rounding gain, and the layer: the branch if it has one, then the integers.

    Args:
        rows: sample of the inputs [R, K]; None if they are not known.
    """
    if plan.branch is None and hessian is None:
        return plan, QuantizedLinear.from_linear(linear, plan, smooth_scale=scale, input_scale=input_scale)
    weight = balanced(linear.weight.detach(), scale, plan.rotate, weight=True)
    factors = None
    if plan.branch is not None:
        if rows is not None:
            rows = rows[:: max(1, len(rows) // SEARCH_ROWS)].to(weight.device)
        down, up, weight = refined(weight, plan, scale, rows, None if input_scale is None else input_scale.to(weight))
        factors = (down, up)
    if hessian is not None:
        plan, quantized = round_weight(weight, plan, hessian)
    else:
        quantized = nearest(weight, plan)
    layer = QuantizedLinear.from_linear(
        linear, plan, smooth_scale=scale, input_scale=input_scale, quantized=quantized, branch=factors
    )
    return plan, layer


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
        rows = None if inputs is None else inputs.rows(between)
        ranges.append(_rounded(inner, linear, scale, input_scale, rows)[1])
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
