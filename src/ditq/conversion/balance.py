"""Chooses the balance of each input group: smoothing, rotation, both or neither.

One function serves every method: SmoothQuant (Xiao et al. 2023, eq. 4), QuaRot's online rotation (Ashkboos et al.
2024), PTQ4DiT (Wu et al. 2024) and ViDiT-Q's static-dynamic channel balancing (Zhao et al. 2025) differ only in their
:class:`ditq.recipe.Balance`. ViDiT-Q sets alpha and the balanced layers by hand; ``choose: error`` selects both for
each input group, by the output error on calibration inputs.

To add a kind of rotation, extend :func:`rotate_of`, ``Rotate.kind`` of the plan and ``ditq.numerics.hadamard``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ditq.architectures import InputGroup
from ditq.calibration import GroupStatistics
from ditq.conversion.error import SEARCH_ROWS, output_error
from ditq.conversion.scales import group_scale
from ditq.errors import UsageError
from ditq.numerics import is_supported, largest_block, largest_regular_block
from ditq.numerics.hadamard import REGULAR
from ditq.plan import LayerPlan, Rotate, Smooth
from ditq.recipe import Balance

Option = tuple[Smooth | None, Rotate | None]


def rotate_of(width: int, rules: Balance, seed: int) -> Rotate:
    """The widest rotation of the rules' kind for ``width`` inputs, or the one with the block size of the rules.

    Raises:
        UsageError: the block does not divide the width, or has no known Hadamard matrix.
    """
    block = rules.block
    if rules.rotation == "regular":
        widest = largest_regular_block(width)
        if widest is None or (block and width % block):
            what = f"balance.block={block}" if block else "balance.rotation=regular, in blocks of at least 4,"
            possible = ", ".join(str(b) for b in REGULAR if width % b == 0)
            raise UsageError(
                f"{what} does not fit an input of {width} channels; "
                + (f"possible: {possible}, or 0 for the widest." if possible else "use balance.rotation=hadamard.")
            )
        return Rotate(kind="regular", block=block or widest)
    if block and (width % block or not is_supported(block)):
        fits = [b for b in range(2, width + 1) if width % b == 0 and is_supported(b)]
        raise UsageError(
            f"balance.block={block} does not fit an input of {width} channels; possible: "
            f"{', '.join(map(str, fits))}, or 0 for the widest."
        )
    return Rotate(block=block or (width if is_supported(width) else largest_block(width)), seed=seed)


def options(group: InputGroup, width: int, rules: Balance, seed: int) -> list[Option]:
    """The combinations that the rules allow for the input of ``group``; never empty. The first one wins ties."""
    if rules.where == "foldable" and group.input.foldable is None:
        return [(None, None)]
    smooths = [
        Smooth(alpha=alpha, salience=rules.salience, power_of_two=rules.power_of_two)
        for alpha in (rules.alphas if rules.smooth else ())
    ]
    rotation = rotate_of(width, rules, seed) if rules.rotate else None
    complete: list[Option] = [(smooth, rotation) for smooth in smooths] or [(None, rotation)]
    if rules.choose == "always":
        return complete
    allowed: list[Option] = [(None, None), *((smooth, None) for smooth in smooths)]
    if rotation is not None:
        allowed += [(None, rotation), *((smooth, rotation) for smooth in smooths)]
    return allowed


def choose_balance(
    group: InputGroup,
    layers: Sequence[LayerPlan],
    rules: Balance,
    statistics: GroupStatistics | None,
    timesteps: Tensor | None,
    seed: int,
) -> Option:
    """Smoothing and rotation of the input of ``group``: the allowed combination with the smallest output error.

    Args:
        layers: draft plans of the group's linears that are quantized (at least one).
        statistics: of the input; None if the recipe needs no calibration.
        timesteps: float32 [T], the timesteps of ``statistics.absmax``.

    Raises:
        UsageError: the choice needs calibration and there is none.
    """
    possible = options(group, layers[0].in_features, rules, seed)
    if len(possible) == 1 and possible[0][0] is None:
        return possible[0]
    if statistics is None or timesteps is None:
        raise UsageError("Smoothing needs calibration: pass prompts, or a calibration cache.")
    if len(possible) == 1:
        return possible[0]
    x = statistics.rows()
    x = x[:: max(1, len(x) // SEARCH_ROWS)].to(group.linears[0].module.weight.device)
    errors, exact = [], dict[str, Tensor]()
    for smooth, rotation in possible:
        scale = None if smooth is None else group_scale(smooth, group, statistics, timesteps)
        errors.append(output_error(x, group, layers, scale, rotation, exact))
    return possible[errors.index(min(errors))]
