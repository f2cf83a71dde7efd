"""What a search chooses: a group size, or the bits of weights or activations, for layers, blocks or roles."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ditq.allocation.costs import grouped
from ditq.errors import UsageError
from ditq.plan import ALWAYS, MIN_GROUP_SIZE, LayerPlan, StepFormat

# Q-DiT's set; all divide the 1152 and 4608 input channels of DiT-XL.
SIZES = (32, 64, 128, 192, 288)

Unit = Literal["layer", "block", "role"]
UNITS = ("layer", "block", "role")

KEPT = "kept in 16 bit by the search"
"""The reason of a layer for which 16 bit were chosen."""


@dataclass(frozen=True)
class Segment:
    """A part of the sampling trajectory: the timesteps between ``begin`` and ``end``, and its share of the steps."""

    begin: float
    end: float
    share: float

    def __str__(self) -> str:
        if self.end >= ALWAYS or self.begin <= -ALWAYS:
            if self.end >= ALWAYS and self.begin <= -ALWAYS:
                return "all timesteps"
            return f"t > {self.begin:.4g}" if self.begin > -ALWAYS else f"t < {self.end:.4g}"
        return f"t {self.end:.4g}-{self.begin:.4g}"


def segments_of(steps: Sequence[float], count: int) -> tuple[Segment, ...]:
    """``count`` parts of a sampling run with as equal numbers of steps as possible, in its order.

    Borders are half-way between the timesteps of neighbouring steps; the first and the last segment are open, so that
    another number of steps falls into the same ranges.

    Args:
        steps: the timesteps of the run, as the transformer gets them, rising or falling.

    Raises:
        UsageError: more segments than steps, or fewer than one.
    """
    if not 1 <= count <= len(steps):
        raise UsageError(f"A run of {len(steps)} steps has 1 to {len(steps)} segments, got {count}.")
    cuts = [round(i * len(steps) / count) for i in range(count + 1)]
    borders = [(steps[cut - 1] + steps[cut]) / 2 for cut in cuts[1:-1]]
    falls = steps[0] > steps[-1]
    ends = [ALWAYS, *borders, -ALWAYS] if falls else [-ALWAYS, *borders, ALWAYS]
    out = []
    for i, (a, b) in enumerate(zip(ends, ends[1:], strict=False)):
        begin, end = (float(np.float32(x)) for x in sorted((a, b)))
        if begin > -ALWAYS:  # ranges include both ends, and may not overlap
            begin = float(np.nextafter(np.float32(begin), np.float32(np.inf)))
        out.append(Segment(begin, end, (cuts[i + 1] - cuts[i]) / len(steps)))
    return tuple(out)


@dataclass(frozen=True)
class Gene:
    """One choice of a search.

    Attributes:
        name: of the layer, block or role; with the segment, if it has one.
        plans: by choice, the plans of its layers, the most costly choice first.
        segment: the timesteps whose activations it decides; None: it decides the whole plan.
    """

    name: str
    plans: Mapping[int | str, tuple[LayerPlan, ...]]
    segment: Segment | None = None

    @property
    def share(self) -> float | None:
        return None if self.segment is None else self.segment.share

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        """Its layers, with the plans of the most costly choice."""
        return next(iter(self.plans.values()))


@dataclass(frozen=True)
class Choices:
    """What is chosen. Exactly one of ``sizes``, ``weights`` and ``activations`` (None and empty: group sizes).

    Attributes:
        sizes: group sizes of weights and activations; each layer takes those that divide its input channels. None:
            those of :data:`SIZES` that divide the input channels of at least one layer.
        weights: bits of the weights, of 2 to 8 and 16 (kept: the layer stays as it is).
        activations: bits of the activations, of 2 to 8 and 16.
        unit: what shares a choice.
        segments: of the trajectory, each with its own bits of activations.
    """

    sizes: tuple[int, ...] | None = None
    weights: tuple[int, ...] = ()
    activations: tuple[int, ...] = ()
    unit: Unit = "layer"
    segments: tuple[Segment, ...] = field(default=())

    def __post_init__(self) -> None:
        if (self.sizes is not None) + bool(self.weights) + bool(self.activations) > 1:
            raise UsageError("A search chooses group sizes, bits of weights, or bits of activations: one at a time.")
        if self.unit not in UNITS:
            raise UsageError(f"The unit of a choice must be layer, block or role, got {self.unit!r}.")
        for name, bits in (("weights", self.weights), ("activations", self.activations)):
            wrong = [b for b in bits if not (2 <= b <= 8 or b == 16)]
            if wrong:
                raise UsageError(f"Bits of {name} must be 2 to 8, or 16 (not quantized); got {wrong[0]}.")
        if self.segments and not self.activations:
            raise UsageError("Segments of the trajectory have their own activations: pass bits of activations too.")

    @property
    def of_sizes(self) -> bool:
        """Whether group sizes are chosen."""
        return not self.weights and not self.activations

    def genes(self, layers: Sequence[LayerPlan]) -> tuple[Gene, ...]:
        """The genes for these quantized layers, in their order.

        Raises:
            UsageError: a group size does not fit; the activations of a layer are static, or it has timestep ranges,
                or a branch.
        """
        for layer in layers:
            _check_formats(layer)
        if self.of_sizes:
            return _size_genes(layers, self.sizes)
        bits = sorted(set(self.weights or self.activations), reverse=True)
        make = with_weight_bits if self.weights else with_activation_bits
        letter = "w" if self.weights else "a"
        genes = []
        for name, members in self._units(layers).items():
            plans: dict[int | str, tuple[LayerPlan, ...]] = {
                f"{letter}{b}": tuple(make(layer, b) for layer in members) for b in bits
            }
            if not self.segments:
                genes.append(Gene(name, plans))
            genes += [Gene(f"{name}, {segment}", plans, segment) for segment in self.segments]
        return tuple(genes)

    def _units(self, layers: Sequence[LayerPlan]) -> dict[str, list[LayerPlan]]:
        keys: dict[Unit, Callable[[LayerPlan], str]] = {
            "layer": lambda layer: layer.name,
            "block": lambda layer: block_of(layer.name),
            "role": lambda layer: layer.role,
        }
        units: dict[str, list[LayerPlan]] = {}
        for layer in layers:
            units.setdefault(keys[self.unit](layer), []).append(layer)
        return units


def block_of(name: str) -> str:
    """The block of a layer by its name (``"transformer_blocks.3"``); the layer's own name outside of blocks."""
    match = re.match(r"(.+?\.\d+)\.", name)
    return match[1] if match else name


def with_weight_bits(layer: LayerPlan, bits: int) -> LayerPlan:
    """The plan of ``layer`` with weights of ``bits`` bits; with 16 the layer is kept: no integers, no balance."""
    if bits == 16:
        return LayerPlan(
            name=layer.name, role=layer.role, in_features=layer.in_features, out_features=layer.out_features,
            bias=layer.bias, reason=KEPT,
        )  # fmt: skip
    assert layer.weight is not None
    return layer.model_copy(update={"weight": layer.weight.with_bits(bits)})


def with_activation_bits(layer: LayerPlan, bits: int) -> LayerPlan:
    """The plan of ``layer`` with activations of ``bits`` bits; with 16 its input is not quantized."""
    if bits == 16:
        return layer.model_copy(update={"activation": None})
    if layer.activation is None:
        raise UsageError(
            f"Layer {layer.name!r} has activations in 16 bit, so there is no grid whose bits could be chosen. Choose "
            "a recipe with quantized activations (NAME-wXa8)."
        )
    return layer.model_copy(update={"activation": layer.activation.with_bits(bits)})


def with_segments(parts: Sequence[tuple[Gene, LayerPlan]]) -> LayerPlan:
    """One plan from those of a layer's segments: ranges with equal activations are joined, and one alone is no range.

    The layer's own activation, for timesteps outside of all ranges, is the most precise one.
    """
    plans = [plan for _, plan in parts]
    best = max(plans, key=lambda plan: plan.activation_bits)
    steps: list[StepFormat] = []
    for gene, plan in parts:
        assert gene.segment is not None
        begin, end = sorted((gene.segment.begin, gene.segment.end))
        joined = steps[-1] if steps and steps[-1].activation == plan.activation else None
        if joined is not None:
            begin, end = min(begin, joined.begin), max(end, joined.end)
            steps.pop()
        steps.append(StepFormat(begin=begin, end=end, activation=plan.activation))
    return best.model_copy(update={"steps": tuple(steps) if steps[1:] else None})


def _size_genes(layers: Sequence[LayerPlan], sizes: Sequence[int] | None) -> tuple[Gene, ...]:
    widths = sorted({layer.in_features for layer in layers})
    ordered = sorted(set(sizes)) if sizes else [g for g in SIZES if any(width % g == 0 for width in widths)]
    for size in ordered:
        if size < MIN_GROUP_SIZE or all(width % size for width in widths):
            raise UsageError(
                f"Group size {size} divides no layer: layers have {_listed(widths)} input channels, and a group "
                f"has at least {MIN_GROUP_SIZE}. Possible are {_listed(_divisors(widths))}."
            )
    genes = []
    for layer in layers:
        possible = [g for g in ordered if layer.in_features % g == 0]
        if not possible:
            raise UsageError(
                f"None of the group sizes {_listed(ordered)} divides the {layer.in_features} input channels of "
                f"layer {layer.name!r}; add one of {_listed(_divisors([layer.in_features]))}."
            )
        genes.append(Gene(layer.name, {size: (grouped(layer, size),) for size in possible}))
    return tuple(genes)


def _check_formats(layer: LayerPlan) -> None:
    if layer.timesteps:
        raise UsageError(
            f"Layer {layer.name!r} has separate weights for each timestep range; search without timestep ranges."
        )
    if layer.branch is not None:
        raise UsageError(
            f"Layer {layer.name!r} has a low-rank branch, which a search does not compute for each choice; search "
            "with --set branch=null."
        )
    if layer.activation is not None and not layer.activation.dynamic:
        raise UsageError(
            f"Layer {layer.name!r} has static activation scales; the search needs dynamic ones. Use "
            "--set activations.granularity=token --set activations.dynamic=true."
        )


def _divisors(widths: Sequence[int]) -> list[int]:
    """Multiples of 16 that divide at least one of the widths; kernels need multiples of 16."""
    return sorted({g for width in widths for g in range(16, width + 1, 16) if width % g == 0})


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
