"""Hessians for GPTQ: block by block, each on the outputs of the already quantized blocks before it.

The Hessian of a linear is that of its balanced input (smoothed, rotated), by which its integer weight is multiplied.
One pass over the recorded calls computes all Hessians of a block, as in the GPTQ and Q-DiT code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ditq.architectures import Architecture, InputGroup
from ditq.conversion.scales import balanced
from ditq.numerics import add_inputs, inverse_factor
from ditq.plan import Gptq, LayerPlan
from ditq.trace.blocks import BlockWalk
from ditq.trace.calls import Call, attended, merged
from ditq.trace.hooks import Before, all_hooked, hooked


@dataclass(eq=False)
class InputHessian:
    """2 X^T X, float32 [K, K], of balanced inputs X that layers share, and the cached factors of its inverse."""

    matrix: Tensor
    _factors: dict[Gptq, Tensor] = field(default_factory=dict)

    def factor(self, settings: Gptq) -> Tensor:
        """See :func:`ditq.numerics.inverse_factor`; computed once."""
        if settings not in self._factors:
            self._factors[settings] = inverse_factor(self.matrix, settings.damping, settings.order)
        return self._factors[settings]


Hessians = dict[str, InputHessian]


def walk_blocks(
    model: nn.Module,
    architecture: Architecture,
    groups: Mapping[str, Sequence[InputGroup]],
    plans: Mapping[str, LayerPlan],
    scales: Mapping[str, Tensor | None],
    calls: Sequence[Call],
    prepare: Callable[[Call], None],
) -> Iterator[tuple[str, Hessians]]:
    """Each block in the order of its call, with the Hessians of its layers that GPTQ rounds.

    The caller quantizes a block before it takes the next one. The Hessians of a block are freed then.

    Args:
        groups: of each block of the model. The caller may remove those of finished blocks, to free their weights.
        scales: smoothing scale of each group, by name.
        calls: recorded calls of the transformer, see :class:`ditq.calibration.Statistics`.
        prepare: see :class:`BlockWalk`.
    """
    rounded = {
        block for block, of_block in groups.items()
        if any(plans[linear.name].rounding == "gptq" for group in of_block for linear in group.linears)
    }  # fmt: skip
    rows_only = not any(_depends_on_call(plan) for plan in plans.values())
    walk = BlockWalk(model, list(groups), merged(calls, architecture, any_time=rows_only), prepare)
    for name in walk.order:
        hessians: Hessians = {}
        if rounded:  # this block or a later one
            walk.enter(name)
        if name in rounded:
            rounded.remove(name)
            hessians = _hessians(walk, architecture, groups[name], plans, scales)
        yield name, hessians
        hessians.clear()


def _depends_on_call(plan: LayerPlan) -> bool:
    """Whether the output for one row depends on the timestep, or on the other rows of the call."""
    range_of_call = plan.activation is not None and plan.activation.dynamic and plan.activation.granularity == "tensor"
    return bool(plan.timesteps or plan.steps) or range_of_call


def _hessians(
    walk: BlockWalk,
    architecture: Architecture,
    groups: Sequence[InputGroup],
    plans: Mapping[str, LayerPlan],
    scales: Mapping[str, Tensor | None],
) -> Hessians:
    """Hessians of the balanced inputs of the layers of one block; layers of the same input and balance share one."""
    hessians: Hessians = {}
    mask: list[Tensor | None] = [None]
    with _observed(groups, plans, scales, hessians, mask):
        for call in walk.run():
            argument = architecture.forward.text_mask
            mask[0] = call.get(argument) if argument else None
    return hessians


@contextmanager
def _observed(
    groups: Sequence[InputGroup],
    plans: Mapping[str, LayerPlan],
    scales: Mapping[str, Tensor | None],
    hessians: Hessians,
    mask: list[Tensor | None],
) -> Iterator[None]:
    """Inside, inputs of linears are added to ``hessians``."""

    def hooks() -> Iterator[AbstractContextManager[None]]:
        for scale, tensor in ((scales[group.name], tensor) for group in groups for tensor in group.tensors):
            shared: dict[Any, InputHessian] = {}
            for linear in tensor.linears:
                plan = plans[linear.name]
                if plan.rounding == "gptq":
                    key = (plan.smooth, plan.rotate)
                    if key not in shared:
                        width = plan.in_features
                        shared[key] = InputHessian(torch.zeros(width, width, device=linear.module.weight.device))
                        smooth = scale if plan.smooth else None
                        yield hooked(linear.module, _observer(shared[key].matrix, plan, smooth, mask, tensor.text))
                    hessians[linear.name] = shared[key]

    with all_hooked(hooks()):
        yield


def _observer(
    hessian: Tensor,
    plan: LayerPlan,
    scale: Tensor | None,
    mask: list[Tensor | None],
    text: Literal["all", "last"] | None,
) -> Before:
    def observe(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = attended(args[0], mask[0], text)
        add_inputs(hessian, balanced(rows, scale, plan.rotate, weight=False))

    return observe
