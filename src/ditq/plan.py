"""What is done to each layer: tensor formats, layer plans, and the Plan that is saved with a checkpoint.

A Plan is resolved and explicit. It is validated when it is created and when it is read. It computes memory and average
bits, the difference from another plan, and a hash (the key of every cached trial).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from ditq import digests
from ditq.errors import CheckpointError
from ditq.numerics.grid import Grid
from ditq.numerics.hadamard import REGULAR, Rotation, RotationKind
from ditq.reading import LARGEST_INTEGER, cut, short

FORMAT_VERSION = 1

MODULATION = "ditq_modulation"
"""Name of a block's buffer that carries 1/s for the shifts in its modulation argument, see :class:`Fold`."""

MIN_GROUP_SIZE = 8

# Limits of what a plan may describe, so that a damaged one is refused before anything is allocated for it.
MOST_LAYERS = 10_000
MOST_RANGES = 100  # of timesteps, of one layer
MOST_PARTS = 50_000  # layers, each counted once per range
MOST_FEATURES = 2**24
MOST_PARAMETERS = 2**48
MOST_REFINEMENTS = 1000  # of a branch

ALWAYS = 1e9
"""A timestep beyond all schedules: the open end of a range of timesteps."""

Timesteps = Literal["all", "normal"]
Number = int | float
Float = Literal["bfloat16", "float16", "float32"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


TensorFormat = Grid
"""The name of Grid in ditq 0.1."""


class Smooth(_Frozen):
    """Static channel balancing: one scale per input channel divides the inputs and multiplies the weight columns.

    ``folded`` names the producer of the input that 1/s was folded into (``norm``, ``v``, ``glu``). With ``None`` the
    layer itself divides at run time. ``salience`` is how max|X_j| in the scale is computed: the maximum over all
    timesteps, or PTQ4DiT's weighted mean of the timesteps' maxima (``ditq.numerics.salience_weights``).
    """

    alpha: Annotated[float, Field(ge=0, le=1)]
    salience: Literal["max", "spearman"] = "max"
    power_of_two: bool = False
    folded: Literal["norm", "v", "glu"] | None = None


class Rotate(_Frozen):
    """Hadamard rotation of the input channels. ``block`` equal to the width is the full transform.

    ``regular`` is that of ConvRot: blocks of a regular matrix of order 4, 16, 64 or 256, without random signs.
    """

    kind: RotationKind = "hadamard"
    block: Annotated[int, Field(ge=2, le=MOST_FEATURES)]
    seed: Annotated[int, Field(ge=0, le=LARGEST_INTEGER)] = 0

    @model_validator(mode="after")
    def _regular_has_no_signs(self) -> Self:
        if self.kind == "regular" and self.block not in REGULAR:
            raise ValueError(f"blocks of a regular rotation are 4, 16, 64 or 256, got {self.block}")
        if self.kind == "regular" and self.seed:
            raise ValueError(f"a regular rotation has no random signs: its seed must be 0, got {self.seed}")
        return self

    def rotation(self, size: int) -> Rotation:
        """The rotation of an input of ``size`` channels."""
        return Rotation(size, self.block, self.seed, self.kind)

    def __str__(self) -> str:
        return f"{'regular ' if self.kind == 'regular' else ''}hadamard {self.block}"


class Gptq(_Frozen):
    """How GPTQ rounds: damping relative to the Hessian's mean diagonal, order of the columns, columns per block.

    ``activation`` rounds columns of large inputs first, and computes the scales of groups from the original weights;
    ``natural`` computes the scales of a group when it reaches its first column. See ``ditq.numerics.gptq``.
    """

    damping: Annotated[float, Field(gt=0)] = 0.01
    order: Literal["natural", "activation"] = "natural"
    block: Annotated[int, Field(ge=1, le=MOST_FEATURES)] = 128


class Branch(_Frozen):
    """A low-rank product beside the integers, y += (x D^T) U^T; D is [rank, K] and U [N, rank], stored in ``dtype``.

    The first ``svd`` of the ranks hold the largest singular values of the balanced weight (SVDQuant), and the integers
    its residual. ``iterations``: at most so many refinements of them, see ``ditq.conversion.branch``. The other ranks
    are those of LoRA adapters fused into the layer, whose numbers are in the checkpoint only.
    """

    rank: Annotated[int, Field(ge=1, le=MOST_FEATURES)]
    dtype: Float = "bfloat16"
    svd: Annotated[int, Field(ge=0, le=MOST_FEATURES)] = 0
    iterations: Annotated[int, Field(ge=0, le=MOST_REFINEMENTS)] = 0

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.svd > self.rank:
            raise ValueError(f"svd must be at most the rank of the branch, {self.rank}, got {self.svd}")
        if self.iterations and not self.svd:
            raise ValueError("iterations refine the singular values of a branch: they need svd")
        return self

    @model_serializer(mode="wrap")
    def _serialized(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A branch of adapters alone is written, and hashed, as before the other fields existed."""
        fields: dict[str, Any] = handler(self)
        if not self.svd:
            fields.pop("svd", None)
            fields.pop("iterations", None)
        return fields


class Incoherence(_Frozen):
    """mu = max|x| sqrt(n) / ||x|| of a layer's weight rows and input tokens (means), before and after balancing."""

    weight_before: float
    weight_after: float
    input_before: float | None = None
    input_after: float | None = None


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that a checkpoint must have.

    Attributes:
        dtype: torch's name of it.
        range: the smallest and the largest integer allowed; None: any of the dtype.
        signed: whether floats may have any sign; if not, they are scales, positive. All are finite.
    """

    shape: tuple[int, ...]
    dtype: Literal["uint8", "int8", "bfloat16", "float16", "float32"]
    range: tuple[int, int] | None = None
    signed: bool = False

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * {"float32": 4, "bfloat16": 2, "float16": 2}.get(self.dtype, 1)


class StepFormat(_Frozen):
    """The activation grid at the timesteps from ``begin`` to ``end``, both included; None: inputs in 16 bit."""

    begin: Annotated[float, Field(ge=-ALWAYS, le=ALWAYS)]
    end: Annotated[float, Field(ge=-ALWAYS, le=ALWAYS)]
    activation: Grid | None = None


class LayerPlan(_Frozen):
    """What is done to one linear layer. With ``weight`` None it stays in 16 bit, and ``reason`` says why.

    ``rounding_gain``: by how many decibels GPTQ lowered the output error on its calibration inputs, compared with
    rounding to nearest. A layer that GPTQ could not improve is rounded to nearest, and ``reason`` says so.

    ``timesteps``: ranges with integers and scales of their own; ``range_weights``: the weight grid of each range, if
    they differ (``weight`` is the most precise one). Every range is a copy of the weights, and is counted as one.

    ``steps``: activation grids by timestep. The integers of the weights are the same at all of them, so they cost no
    memory. Outside of all ranges ``activation`` applies, the most precise one.
    """

    name: Annotated[str, Field(min_length=1)]
    role: str
    in_features: Annotated[int, Field(ge=1, le=MOST_FEATURES)]
    out_features: Annotated[int, Field(ge=1, le=MOST_FEATURES)]
    bias: bool = True
    weight: Grid | None = None
    activation: Grid | None = None
    smooth: Smooth | None = None
    rotate: Rotate | None = None
    branch: Branch | None = None
    rounding: Literal["nearest", "gptq"] = "nearest"
    gptq: Gptq | None = None
    rounding_gain: float | None = None
    clip: Literal["minmax", "mse"] = "minmax"
    timesteps: Annotated[tuple[tuple[Number, Number], ...], Field(max_length=MOST_RANGES)] | None = None
    range_weights: Annotated[tuple[Grid, ...], Field(max_length=MOST_RANGES)] | None = None
    steps: Annotated[tuple[StepFormat, ...], Field(min_length=1, max_length=MOST_RANGES)] | None = None
    incoherence: Incoherence | None = None
    reason: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.weight is None:
            if self.rounding != "nearest":
                raise ValueError(f"layer {self.name!r} keeps 16-bit weights, but its plan has a rounding")
            if self.activation or self.smooth or self.rotate or self.timesteps or self.steps or self.range_weights:
                raise ValueError(f"layer {self.name!r} keeps 16-bit weights, but its plan changes its inputs")
            if self.branch:
                raise ValueError(f"layer {self.name!r} keeps 16-bit weights, but its plan has a branch")
            return self
        for weight in (self.weight, *(self.range_weights or ())):
            self._check_weight(weight)
        for activation in (self.activation, *(step.activation for step in self.steps or ())):
            if activation is not None:
                self._check_activation(activation)
        if self.gptq is not None and self.rounding != "gptq":
            raise ValueError(f"layer {self.name!r} has GPTQ settings, but its rounding is {self.rounding!r}")
        if self.rounding == "gptq" and self.timesteps:
            raise ValueError(f"layer {self.name!r}: GPTQ cannot be combined with integers per timestep range")
        if self.rotate is not None and self.in_features % self.rotate.block:
            raise ValueError(
                f"layer {self.name!r}: rotation block {self.rotate.block} must divide its {self.in_features} inputs"
            )
        if self.branch is not None and self.branch.svd > min(self.in_features, self.out_features):
            raise ValueError(
                f"layer {self.name!r} has {self.in_features} inputs and {self.out_features} outputs, so its branch "
                f"cannot hold {self.branch.svd} singular values"
            )
        for begin, end in self.timesteps or ():
            if begin > end:
                raise ValueError(f"layer {self.name!r}: timestep range [{begin}, {end}] is empty")
        self._check_range_weights()
        self._check_steps()
        return self

    def _check_weight(self, grid: Grid) -> None:
        if grid.granularity == "token" or grid.dynamic:
            raise ValueError(f"layer {self.name!r}: weights are static, per tensor, channel or group")
        self._check_groups("weights", grid)

    def _check_activation(self, grid: Grid) -> None:
        if grid.granularity == "channel":
            raise ValueError(f"layer {self.name!r}: activations have no granularity 'channel' (input channels)")
        if not grid.dynamic and grid.granularity == "token":
            raise ValueError(f"layer {self.name!r}: static activation scales are per tensor or group")
        if not grid.dynamic and not grid.symmetric:
            raise ValueError(f"layer {self.name!r}: static activation scales are symmetric")
        if grid.full:
            raise ValueError(f"layer {self.name!r}: full is for weights, not for activations")
        if not grid.dynamic and grid.levels != "uniform":
            raise ValueError(f"layer {self.name!r}: activations with levels {grid.levels!r} have dynamic scales")
        self._check_groups("activations", grid)

    def _check_groups(self, name: str, grid: Grid) -> None:
        if grid.group_size is not None and grid.group_size < MIN_GROUP_SIZE:
            raise ValueError(
                f"layer {self.name!r}: groups of {name} must have at least {MIN_GROUP_SIZE} channels, got "
                f"{grid.group_size}"
            )
        grid.groups(self.in_features)

    def _check_range_weights(self) -> None:
        if self.range_weights is None:
            return
        if len(self.range_weights) != len(self.timesteps or ()):
            raise ValueError(
                f"layer {self.name!r} has {len(self.timesteps or ())} timestep ranges and {len(self.range_weights)} "
                "weight grids for them"
            )
        if self.weight is not None and self.weight.bits != max(grid.bits for grid in self.range_weights):
            raise ValueError(f"layer {self.name!r}: its weight grid must be the most precise one of its ranges")

    def _check_steps(self) -> None:
        if self.steps is None:
            return
        if self.timesteps:
            raise ValueError(f"layer {self.name!r} has timestep ranges, whose activations cannot have steps too")
        grids = [self.activation, *(step.activation for step in self.steps)]
        if any(grid is not None and not grid.dynamic for grid in grids):
            raise ValueError(f"layer {self.name!r}: static activation scales cannot change with the timestep")
        if any((16 if grid is None else grid.bits) > self.activation_bits for grid in grids):
            raise ValueError(f"layer {self.name!r}: its activation must be the most precise one of its steps")
        ordered = sorted(self.steps, key=lambda step: step.begin)
        for step in ordered:
            if step.begin > step.end:
                raise ValueError(f"layer {self.name!r}: the steps from {step.begin:g} to {step.end:g} are none")
        for step, later in zip(ordered, ordered[1:], strict=False):
            if step.end >= later.begin:
                raise ValueError(f"layer {self.name!r}: two of its steps are at timestep {later.begin:g}")

    @model_serializer(mode="wrap")
    def _serialized(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plans without these fields are written, and hashed, as before the fields existed."""
        fields: dict[str, Any] = handler(self)
        for name in ("branch", "range_weights", "steps"):
            if getattr(self, name) is None:
                fields.pop(name, None)
        return fields

    @property
    def parameters(self) -> int:
        return self.in_features * self.out_features

    @property
    def branch_parameters(self) -> int:
        copies = len(self.prefixes)  # every timestep range holds its own
        return 0 if self.branch is None else copies * self.branch.rank * (self.in_features + self.out_features)

    @property
    def weight_bits(self) -> int:
        """Of its most precise timestep range, if they differ."""
        return 16 if self.weight is None else self.weight.bits

    @property
    def activation_bits(self) -> int:
        """Of its most precise steps, if they differ."""
        return 16 if self.activation is None else self.activation.bits

    def average_weight_bits(self, trajectory: Sequence[float] = ()) -> float:
        """Bits of the weights averaged over the timesteps of a sampling run; without one, over the ranges."""
        if self.range_weights is None or self.timesteps is None:
            return float(self.weight_bits)
        bits = [grid.bits for grid in self.range_weights]
        if not trajectory:
            return sum(bits) / len(bits)
        return sum(bits[range_of(time, self.timesteps)] for time in trajectory) / len(trajectory)

    def average_activation_bits(self, trajectory: Sequence[float] = ()) -> float:
        """Bits of the inputs averaged over the timesteps of a sampling run; without one, over the steps."""
        if self.steps is None:
            return float(self.activation_bits)
        widths = [16 if step.activation is None else step.activation.bits for step in self.steps]
        if not trajectory:
            return sum(widths) / len(widths)
        grids = [self.activation_at(time) for time in trajectory]
        return sum(16 if grid is None else grid.bits for grid in grids) / len(grids)

    @property
    def activations(self) -> tuple[Grid | None, ...]:
        """All grids of its inputs, the most precise one first."""
        grids = {self.activation: None} | dict.fromkeys(step.activation for step in self.steps or ())
        return tuple(sorted(grids, key=lambda grid: -(16 if grid is None else grid.bits)))

    def activation_at(self, time: float) -> Grid | None:
        """The grid of the inputs at a timestep; None: 16 bit."""
        inside = (step for step in self.steps or () if step.begin <= time <= step.end)
        step = next(inside, None)
        return self.activation if step is None else step.activation

    def in_range(self, number: int) -> LayerPlan:
        """The plan of one of its timestep ranges alone."""
        weight = self.weight if self.range_weights is None else self.range_weights[number]
        return self.model_copy(update={"timesteps": None, "range_weights": None, "weight": weight})

    @property
    def balance(self) -> str:
        """Smoothing, rotation and branch in a few words, e.g. ``"smooth 0.35 + hadamard 256"``."""
        parts = []
        if self.smooth:
            folded = f" ({self.smooth.folded})" if self.smooth.folded else ""  # in checkpoints of ditq 0.1
            parts.append(f"smooth {self.smooth.alpha:g}{folded}")
        if self.rotate:
            parts.append(str(self.rotate))
        if self.branch:
            parts.append(f"branch of rank {self.branch.rank}")
        return " + ".join(parts) or "none"

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Prefixes of its tensors' names in a checkpoint: ``NAME.``, or one for each timestep range."""
        if not self.timesteps:
            return (f"{self.name}.",)
        return tuple(f"{self.name}.ranges.{i}." for i in range(len(self.timesteps)))

    def tensors(self) -> dict[str, StoredTensor]:
        """The tensors of one quantized layer except its bias; none if it stays in 16 bit.

        This is the only definition: memory, the loader's buffers and the check of a checkpoint follow from it. A layer
        with timestep ranges has them for each range, see :meth:`in_range`.
        """
        if self.weight is None:
            return {}
        n, k, bits = self.out_features, self.in_features, self.weight.bits
        scales = self.weight.scales(n, k)
        out = {
            "qweight": StoredTensor((n, (k * bits + 7) // 8), "uint8"),
            "weight_scale": StoredTensor(scales, "float32", signed=self.weight.full),
        }
        if not self.weight.symmetric:
            half = 2 ** (bits - 1)
            out["weight_zero_point"] = StoredTensor(scales, "int8", (-half, half - 1))
        if self.smooth is not None and self.smooth.folded is None:
            out["smooth_scale"] = StoredTensor((k,), "float32")
        if self.activation is not None and not self.activation.dynamic:
            out["input_scale"] = StoredTensor((1, self.activation.groups(k)), "float32")
        if self.branch is not None:
            out["branch_down"] = StoredTensor((self.branch.rank, k), self.branch.dtype, signed=True)
            out["branch_up"] = StoredTensor((n, self.branch.rank), self.branch.dtype, signed=True)
        return out

    def stored_bytes(self) -> int:
        """Bytes of its tensors in a checkpoint; the bias, and a weight that is not quantized, in 16 bit.

        If the model's class keeps them in float32, :meth:`Plan.memory` adds the other half.
        """
        bias = 2 * self.out_features if self.bias else 0
        if self.weight is None:
            return 2 * self.parameters + bias
        return sum(tensor.bytes for tensor in self.stored().values()) + len(self.prefixes) * bias

    def stored(self) -> dict[str, StoredTensor]:
        """The tensors of all its timestep ranges by full name, except biases."""
        if self.timesteps is None:
            return {f"{self.name}.{name}": tensor for name, tensor in self.tensors().items()}
        return {
            prefix + name: tensor
            for i, prefix in enumerate(self.prefixes)
            for name, tensor in self.in_range(i).tensors().items()
        }


class Fold(_Frozen):
    """A change of structure that lets a norm carry 1/s. A loader rebuilds it from this record.

    ``norm`` gained a weight. If its shift and scale come from an argument of the block that all blocks share
    (``argument``), a forward pre-hook multiplies the shift rows of that argument by the block's buffer
    ``ditq_modulation``.
    """

    norm: str
    created: bool = True
    width: Annotated[int, Field(ge=1)]
    block: str | None = None
    argument: str | None = None
    chunks: Annotated[int, Field(ge=1)] = 6


class Plan(_Frozen):
    """The explicit plan of one transformer, and the single source of truth about a checkpoint.

    ``calibration_timesteps``: the timesteps of the calibration that the scales come from. ``trajectory``: the
    timesteps of the sampling run that steps and time averages refer to, in its order. ``float32_parameters``: how many
    parameters besides integer weights are stored in float32, because the model's class keeps them so: those of kept
    layers, biases of quantized ones, and others. Checkpoints of ditq 0.1 do not say (0).
    """

    format_version: Literal[1] = 1
    method: str
    recipe: str
    architecture: str
    seed: int = 0
    nominal_weight_bits: int
    nominal_activation_bits: int
    layers: Annotated[tuple[LayerPlan, ...], Field(max_length=MOST_LAYERS)]
    folds: tuple[Fold, ...] = ()
    other_parameters: Annotated[int, Field(ge=0, le=MOST_PARAMETERS)] = 0
    storage_dtype: Float = "bfloat16"
    time_argument: str | None = None
    calibration_timesteps: Timesteps = "all"
    trajectory: Annotated[tuple[float, ...], Field(max_length=MOST_LAYERS)] | None = None
    float32_parameters: Annotated[int, Field(ge=0, le=MOST_PARAMETERS)] = 0

    @model_serializer(mode="wrap")
    def _serialized(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plans without these fields are written, and hashed, as before the fields existed."""
        fields: dict[str, Any] = handler(self)
        if self.trajectory is None:
            fields.pop("trajectory", None)
        if not self.float32_parameters:
            fields.pop("float32_parameters", None)
        return fields

    @field_validator("layers")
    @classmethod
    def _names_are_unique(cls, layers: tuple[LayerPlan, ...]) -> tuple[LayerPlan, ...]:
        duplicates = sorted(name for name, count in Counter(layer.name for layer in layers).items() if count > 1)
        if duplicates:
            raise ValueError(f"layers named twice: {', '.join(cut(name, 60) for name in duplicates[:5])}")
        if (parts := sum(len(layer.timesteps or (0,)) for layer in layers)) > MOST_PARTS:
            raise ValueError(f"layers with {parts} timestep ranges in total; at most {MOST_PARTS} are allowed")
        return layers

    @model_validator(mode="before")
    @classmethod
    def _lists_are_short(cls, data: Any) -> Any:
        """Before their items are validated, one by one."""
        for name, value in data.items() if isinstance(data, dict) else ():
            if isinstance(value, list | tuple) and len(value) > MOST_LAYERS:
                raise ValueError(f"{cut(str(name), 40)} has {len(value)} items; at most {MOST_LAYERS} are allowed")
        return data

    def __iter__(self) -> Iterator[LayerPlan]:  # type: ignore[override]
        return iter(self.layers)

    def __getitem__(self, name: str) -> LayerPlan:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    @property
    def quantized(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.weight is not None)

    @property
    def kept(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.weight is None)

    @property
    def needs_calibration(self) -> bool:
        """Whether the plan needs statistics of the inputs."""
        return any(
            layer.smooth is not None
            or layer.rounding == "gptq"
            or (layer.branch is not None and layer.branch.iterations > 0)
            or (layer.activation is not None and not layer.activation.dynamic)
            for layer in self.quantized
        )

    @property
    def needs_calls(self) -> bool:
        """Whether the plan needs recorded calls of the transformer."""
        return any(layer.rounding == "gptq" for layer in self.quantized)

    @property
    def follows_timesteps(self) -> bool:
        """Whether layers change with the timestep."""
        return any(layer.timesteps or layer.steps for layer in self.quantized)

    @property
    def average_bits(self) -> float:
        """Average bits per parameter of the float transformer; numbers kept in 16 bit, and branches, count as 16.

        Weights that change with the timestep count as the average over time.
        """
        linear = sum(layer.parameters for layer in self.layers)
        in_16_bit = self.other_parameters + sum(layer.branch_parameters for layer in self.layers)
        times = self.trajectory or ()
        total = sum(layer.average_weight_bits(times) * layer.parameters for layer in self.layers) + 16 * in_16_bit
        return total / max(1, linear + self.other_parameters)

    @property
    def average_activation_bits(self) -> float:
        """Average bits of the linear layers' inputs over time, weighted by multiply-accumulates per token."""
        linear, times = sum(layer.parameters for layer in self.layers), self.trajectory or ()
        total = sum(layer.average_activation_bits(times) * layer.parameters for layer in self.layers)
        return total / max(1, linear)

    def fold_tensors(self) -> dict[str, StoredTensor]:
        """The tensors of the folds by full name: one factor for the modulation of each block."""
        return {
            f"{fold.block}.{MODULATION}": StoredTensor((fold.chunks * fold.width,), "float32")
            for fold in self.folds
            if fold.block
        }

    def tensors(self) -> dict[str, StoredTensor]:
        """All tensors that a checkpoint of this plan adds to the model's own parameters, by full name."""
        out = self.fold_tensors()
        for layer in self.quantized:
            out |= layer.stored()
        return out

    def memory(self) -> tuple[int, int]:
        """Bytes of the transformer's tensors as a checkpoint stores them, and with every parameter in 16 bit.

        The first is exact. Files are larger by their headers: names, shapes and checksums of the tensors.
        """
        biases = sum(layer.out_features for layer in self.layers if layer.bias)
        linear = sum(layer.parameters for layer in self.layers)
        other = 2 * (self.other_parameters - biases + self.float32_parameters)
        other += sum(tensor.bytes for tensor in self.fold_tensors().values())
        return sum(layer.stored_bytes() for layer in self.layers) + other, 2 * (linear + self.other_parameters)

    def hash(self) -> str:
        """Sixteen hexadecimal digits, a digest of the whole plan."""
        return digests.of_json(self.model_dump(mode="json"))

    def binding(self) -> str:
        """The digest that binds tensors to this plan: a checkpoint stores it beside their checksums.

        Unlike :meth:`hash` it skips fields with their default value, so a field that a later ditq adds, with the
        behaviour of before as its default, does not change it. The default of a field must never change.
        """
        # Read again as a loader does: a plan changed by model_copy may hold 1 where the file's plan holds 1.0.
        read = type(self).model_validate(self.model_dump(mode="json"))
        return digests.of_json(read.model_dump(mode="json", exclude_defaults=True))

    def diff(self, other: Plan) -> dict[str, tuple[str, str]]:
        """Layers that differ, as ``{name: (this plan's, the other's)}`` in words."""
        layers, others = {x.name: x for x in self.layers}, {x.name: x for x in other.layers}
        words = lambda x: "absent" if x is None else f"{x.weight}, {x.activation}, {x.balance}"  # noqa: E731
        return {
            name: (words(layers.get(name)), words(others.get(name)))
            for name in [*layers, *(n for n in others if n not in layers)]
            if layers.get(name) != others.get(name)
        }

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1)

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """Validates a plan from an untrusted source.

        Raises:
            CheckpointError: it is not a plan, has an invalid field (which is named), or is newer than this ditq.
        """
        if not isinstance(data, dict):
            raise CheckpointError(f"A plan must be a JSON object, got {type(data).__name__}.")
        version = data.get("format_version", FORMAT_VERSION)
        if isinstance(version, int) and version > FORMAT_VERSION:
            version = short(version)
            raise CheckpointError(
                f"This plan has format_version {version}; this ditq reads up to {FORMAT_VERSION}. "
                f"Install a newer one: pip install 'ditq>=0.{version}'."
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise CheckpointError(f"The plan is not valid: {first_error(error)}.") from error


def range_of(time: float, ranges: Sequence[tuple[float, float]]) -> int:
    """The number of the range that a timestep is in; between two ranges, of the nearest one."""
    distances = [max(begin - time, time - end, 0.0) for begin, end in ranges]
    return distances.index(min(distances))


def first_error(error: ValidationError) -> str:
    """The first wrong field in one sentence: its name, what it must be, the value. Not in pydantic's words."""
    items = error.errors(include_url=False)
    path = _field(items[0]["loc"])
    same = [item for item in items if _field(item["loc"]) == path]  # a union has an error for each of its types
    own = next((item for item in same if item["type"] in ("value_error", "assertion_error")), None)
    value = f"got {short(items[0].get('input'))}"
    if own is not None:
        reason = cut(str(own["ctx"]["error"]))
        prefix = f"{path}: " if path else ""
        return f"{prefix}{reason}" + (f" ({value})" if "got" not in reason and path else "")
    if items[0]["type"] == "missing":
        return f"{path} is missing"
    if items[0]["type"] == "extra_forbidden":
        return f"{path} is not a field, {value}"
    expected = dict.fromkeys(_expected(item["type"], item.get("ctx", {}), item["msg"]) for item in same)
    return f"{path or 'it'} must be {' or '.join(expected)}, {value}"


def _field(location: tuple[int | str, ...]) -> str:
    """The dotted name of a field, without the names that pydantic gives to the types of a union."""
    union = re.compile(r"(constrained-)?(int|float|str|bool|none|tuple|list|dict)(\[.*\])?|literal\[.*\]|function-.*")
    return ".".join(cut(str(part), 60) for part in location[:12] if isinstance(part, int) or not union.fullmatch(part))


def _expected(kind: str, context: dict[str, Any], message: str) -> str:
    """What a field must be, for a type of pydantic's errors and its context."""
    bounds = {
        "greater_than_equal": "at least {ge}", "greater_than": "more than {gt}", "less_than_equal": "at most {le}",
        "less_than": "less than {lt}", "literal_error": "{expected}", "enum": "{expected}",
        "too_short": "a list of at least {min_length} items", "too_long": "a list of at most {max_length} items",
        "string_too_short": "a string of at least {min_length} characters", "finite_number": "a finite number",
    }  # fmt: skip
    if kind in bounds:
        return bounds[kind].format(**context)
    kinds = {"int": "an integer", "float": "a number", "bool": "true or false", "string": "a string",
             "tuple": "a list", "list": "a list", "dict": "a mapping", "mapping": "a mapping", "model": "a mapping",
             "none": "null"}  # fmt: skip
    return kinds.get(kind.partition("_")[0], cut(message))
