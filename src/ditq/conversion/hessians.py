"""Hessians for GPTQ: block by block, each on the outputs of the already quantized blocks before it.

The Hessian of a linear is that of its balanced input (smoothed, rotated), which is what its integer weight is
multiplied with; all Hessians of one block are found in one pass over the kept calls, as in the GPTQ and Q-DiT
code.
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
    """2 X^T X, float32 [K, K], of the balanced inputs X that some layers share, and what they share of its inverse."""

    matrix: Tensor
    _factors: dict[Gptq, Tensor] = field(default_factory=dict)

    def factor(self, settings: Gptq) -> Tensor:
        """See :func:`ditq.numerics.inverse_factor`; found once."""
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

    The caller quantizes a block before it asks for the next one, whose Hessians then take the place of the last.

    Args:
        groups: of each block of the model, whose norms and value projections are folded already; those of blocks
            that are done may be taken out, and their float weights with them.
        scales: smoothing scale of each group, by its name.
        calls: kept calls of the transformer, see :class:`ditq.calibration.Statistics`.
        prepare: see :class:`BlockWalk`.
    """
    rounded = {
        block for block, own in groups.items()
        if any(plans[linear.name].rounding == "gptq" for group in own for linear in group.linears)
    }  # fmt: skip
    together = not any(_looks_beyond_rows(plan) for plan in plans.values())
    walk = BlockWalk(model, list(groups), merged(calls, architecture, any_time=together), prepare)
    for name in walk.order:
        hessians: Hessians = {}
        if rounded:  # some block from here on
            walk.enter(name)
        if name in rounded:
            rounded.remove(name)
            hessians = _hessians(walk, architecture, groups[name], plans, scales)
        yield name, hessians
        hessians.clear()


def _looks_beyond_rows(plan: LayerPlan) -> bool:
    """Whether what a layer makes of one row depends on the time, or on the other rows of its call."""
    own_range = plan.activation is not None and plan.activation.dynamic and plan.activation.granularity == "tensor"
    return bool(plan.timesteps) or own_range


def _hessians(
    walk: BlockWalk,
    architecture: Architecture,
    groups: Sequence[InputGroup],
    plans: Mapping[str, LayerPlan],
    scales: Mapping[str, Tensor | None],
) -> Hessians:
    """Hessians of the balanced inputs of the layers of one block; layers of the same input and balance share one."""
    found: Hessians = {}
    mask: list[Tensor | None] = [None]
    with _observed(groups, plans, scales, found, mask):
        for call in walk.run():
            argument = architecture.forward.text_mask
            mask[0] = call.get(argument) if argument else None
    return found


@contextmanager
def _observed(
    groups: Sequence[InputGroup],
    plans: Mapping[str, LayerPlan],
    scales: Mapping[str, Tensor | None],
    found: Hessians,
    mask: list[Tensor | None],
) -> Iterator[None]:
    """Inside, inputs of linears add to their Hessians, and linears behind a folded norm compute what they should."""

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
                        online = scale if plan.smooth and plan.smooth.folded is None else None
                        yield hooked(linear.module, _observer(shared[key].matrix, plan, online, mask, tensor.text))
                    found[linear.name] = shared[key]
                if plan.smooth and plan.smooth.folded and scale is not None:
                    yield hooked(linear.module, _unfolded(scale))

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


def _unfolded(scale: Tensor) -> Before:
    """The input as it was: the weight is multiplied by the scale only when it is quantized."""

    def multiply(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (args[0] * scale.to(args[0].dtype), *args[1:]), kwargs

    return multiply
