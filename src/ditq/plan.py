"""What will be done to each layer: tensor formats, layer plans, and the Plan that is saved with a checkpoint.

A Plan is resolved and explicit. It is validated when made and when read, prints as a table, sums to
memory and average bits, diffs against another plan, and hashes (the key of every cached trial).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ditq.errors import CheckpointError
from ditq.numerics.grid import Grid

FORMAT_VERSION = 1

MIN_GROUP_SIZE = 8
Timesteps = Literal["all", "normal"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


TensorFormat = Grid
"""Its name in ditq 0.1."""


class Smooth(_Frozen):
    """Static channel balancing: inputs divided and weight columns multiplied by one scale per input channel.

    ``folded`` names where 1/s went: into the producer of the input (``norm``, ``v``, ``glu``) or, ``None``,
    into the layer itself, which then divides at run time. ``salience`` is how max|X_j| in the scale is computed:
    the maximum over all timesteps, or PTQ4DiT's mean of the timesteps' maxima (``ditq.numerics.salience_weights``).
    """

    alpha: Annotated[float, Field(ge=0, le=1)]
    salience: Literal["max", "spearman"] = "max"
    power_of_two: bool = False
    folded: Literal["norm", "v", "glu"] | None = None


class Rotate(_Frozen):
    """Hadamard rotation of the input channels. ``block`` equal to the width is the full transform."""

    kind: Literal["hadamard"] = "hadamard"
    block: Annotated[int, Field(ge=2)]
    seed: Annotated[int, Field(ge=0)] = 0


class Gptq(_Frozen):
    """How GPTQ rounds: damping in parts of the Hessian's mean diagonal, order of the columns, columns at once.

    ``activation`` takes columns of large inputs first, with scales of groups from the weights as they were;
    ``natural`` finds the scales of a group when its first column is next. See ``ditq.numerics.gptq``.
    """

    damping: Annotated[float, Field(gt=0)] = 0.01
    order: Literal["natural", "activation"] = "natural"
    block: Annotated[int, Field(ge=1)] = 128


class Incoherence(_Frozen):
    """mu = max|x| sqrt(n) / ||x|| of a layer's weight rows and input tokens (means), before and after balancing."""

    weight_before: float
    weight_after: float
    input_before: float | None = None
    input_after: float | None = None


class LayerPlan(_Frozen):
    """What is done to one linear layer. ``weight`` None: it stays in 16 bit, ``reason`` says why.

    ``rounding_gain`` is by how many decibels GPTQ lowered the output error on its calibration inputs, compared
    with rounding to nearest; a layer that it could not improve is rounded to nearest, and ``reason`` says so.
    """

    name: Annotated[str, Field(min_length=1)]
    role: str
    in_features: Annotated[int, Field(ge=1)]
    out_features: Annotated[int, Field(ge=1)]
    bias: bool = True
    weight: Grid | None = None
    activation: Grid | None = None
    smooth: Smooth | None = None
    rotate: Rotate | None = None
    rounding: Literal["nearest", "gptq"] = "nearest"
    gptq: Gptq | None = None
    rounding_gain: float | None = None
    clip: Literal["minmax", "mse"] = "minmax"
    timesteps: tuple[tuple[int, int], ...] | None = None
    incoherence: Incoherence | None = None
    reason: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.weight is None:
            if self.rounding != "nearest":
                raise ValueError(f"layer {self.name!r} keeps 16-bit weights but plans how to round them")
            if self.activation or self.smooth or self.rotate or self.timesteps:
                raise ValueError(f"layer {self.name!r} keeps 16-bit weights but plans something for its inputs")
            return self
        if self.weight.granularity == "token" or self.weight.dynamic:
            raise ValueError(f"layer {self.name!r}: weights are static, per tensor, channel or group")
        for name, grid in (("weights", self.weight), ("activations", self.activation)):
            if grid is not None and grid.group_size is not None and grid.group_size < MIN_GROUP_SIZE:
                raise ValueError(
                    f"layer {self.name!r}: groups of {name} have at least {MIN_GROUP_SIZE} channels, got "
                    f"{grid.group_size}"
                )
        self.weight.groups(self.in_features)
        if self.activation is not None:
            if self.activation.granularity == "channel":
                raise ValueError(f"layer {self.name!r}: activations have no granularity 'channel' (input channels)")
            if not self.activation.dynamic and self.activation.granularity == "token":
                raise ValueError(f"layer {self.name!r}: static activation scales are per tensor or group")
            if not self.activation.dynamic and not self.activation.symmetric:
                raise ValueError(f"layer {self.name!r}: static activation scales are symmetric")
            self.activation.groups(self.in_features)
        if self.gptq is not None and self.rounding != "gptq":
            raise ValueError(f"layer {self.name!r} has settings of GPTQ but rounds to {self.rounding}")
        if self.rounding == "gptq" and self.timesteps:
            raise ValueError(f"layer {self.name!r}: GPTQ and own integers per range of timesteps do not go together")
        if self.rotate is not None and self.in_features % self.rotate.block:
            raise ValueError(f"layer {self.name!r}: rotation block {self.rotate.block} does not divide its inputs")
        for begin, end in self.timesteps or ():
            if begin > end:
                raise ValueError(f"layer {self.name!r}: timestep range [{begin}, {end}] is empty")
        return self

    @property
    def parameters(self) -> int:
        return self.in_features * self.out_features

    @property
    def weight_bits(self) -> int:
        return 16 if self.weight is None else self.weight.bits

    @property
    def activation_bits(self) -> int:
        return 16 if self.activation is None else self.activation.bits

    @property
    def balance(self) -> str:
        """Short words for smooth and rotate, e.g. ``"smooth 0.35 (norm) + hadamard 256"``."""
        parts = []
        if self.smooth:
            parts.append(f"smooth {self.smooth.alpha:g} ({self.smooth.folded or 'online'})")
        if self.rotate:
            parts.append(f"hadamard {self.rotate.block}")
        return " + ".join(parts) or "none"

    def stored_bytes(self) -> int:
        """Bytes of codes, scales, zero points and online smoothing scales; the bias in 16 bit."""
        if self.weight is None:
            return 2 * (self.parameters + (self.out_features if self.bias else 0))
        scales = math.prod(self.weight.scales(self.out_features, self.in_features))
        n = self.out_features * ((self.in_features * self.weight.bits + 7) // 8)
        n += scales * (4 if self.weight.symmetric else 5)
        if self.smooth and self.smooth.folded is None:
            n += 4 * self.in_features
        if self.activation and not self.activation.dynamic:
            n += 4 * self.activation.groups(self.in_features)
        n += 2 * self.out_features if self.bias else 0
        return n * (len(self.timesteps) if self.timesteps else 1)


class Fold(_Frozen):
    """A change of structure that lets a norm carry 1/s, so that a loader can rebuild it.

    ``norm`` gained a weight. Where its shift and scale come through an argument of the block that
    all blocks share (``argument``), the shift rows of that argument are multiplied by the buffer
    ``ditq_modulation`` of the block, in a forward pre-hook.
    """

    norm: str
    created: bool = True
    width: Annotated[int, Field(ge=1)]
    block: str | None = None
    argument: str | None = None
    chunks: Annotated[int, Field(ge=1)] = 6


class Plan(_Frozen):
    """The explicit plan of one transformer, and the single source of truth about a checkpoint.

    ``calibration_timesteps``: which timesteps of the calibration its scales come from.
    """

    format_version: Literal[1] = 1
    method: str
    recipe: str
    architecture: str
    seed: int = 0
    nominal_weight_bits: int
    nominal_activation_bits: int
    layers: tuple[LayerPlan, ...]
    folds: tuple[Fold, ...] = ()
    other_parameters: Annotated[int, Field(ge=0)] = 0
    storage_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    time_argument: str | None = None
    calibration_timesteps: Timesteps = "all"

    @field_validator("layers")
    @classmethod
    def _names_are_unique(cls, layers: tuple[LayerPlan, ...]) -> tuple[LayerPlan, ...]:
        names = [layer.name for layer in layers]
        twice = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
        if twice:
            raise ValueError(f"layers named twice: {', '.join(twice[:5])}")
        return layers

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
        """Whether carrying it out takes statistics of the inputs."""
        return any(
            layer.smooth is not None
            or layer.rounding == "gptq"
            or (layer.activation is not None and not layer.activation.dynamic)
            for layer in self.quantized
        )

    @property
    def needs_calls(self) -> bool:
        """Whether carrying it out takes whole calls of the transformer."""
        return any(layer.rounding == "gptq" for layer in self.quantized)

    @property
    def average_bits(self) -> float:
        """Bits of a weight, averaged over all parameters of the transformer, 16-bit ones included."""
        linear = sum(layer.parameters for layer in self.layers)
        total = sum(layer.weight_bits * layer.parameters for layer in self.layers) + 16 * self.other_parameters
        return total / max(1, linear + self.other_parameters)

    @property
    def average_activation_bits(self) -> float:
        """Bits of a linear layer's input, weighted by its multiply-accumulates per token."""
        linear = sum(layer.parameters for layer in self.layers)
        return sum(layer.activation_bits * layer.parameters for layer in self.layers) / max(1, linear)

    def memory(self) -> tuple[int, int]:
        """Bytes of the transformer's weights as planned, and in 16 bit."""
        biases = sum(layer.out_features for layer in self.layers if layer.bias)
        linear = sum(layer.parameters for layer in self.layers)
        other = 2 * (self.other_parameters - biases)
        other += sum({fold.block: 4 * fold.chunks * fold.width for fold in self.folds if fold.block}.values())
        return sum(layer.stored_bytes() for layer in self.layers) + other, 2 * (linear + self.other_parameters)

    def hash(self) -> str:
        """Sixteen hexadecimal digits that change with anything in the plan."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def diff(self, other: Plan) -> dict[str, tuple[str, str]]:
        """Layers that differ, as ``{name: (mine, other's)}`` in words."""
        mine, theirs = {x.name: x for x in self.layers}, {x.name: x for x in other.layers}
        words = lambda x: "absent" if x is None else f"{x.weight}, {x.activation}, {x.balance}"  # noqa: E731
        return {
            name: (words(mine.get(name)), words(theirs.get(name)))
            for name in [*mine, *(n for n in theirs if n not in mine)]
            if mine.get(name) != theirs.get(name)
        }

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1)

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """Validates a plan that someone else may have written.

        Raises:
            CheckpointError: it is not a plan, has a wrong field (which is named), or is newer than this ditq.
        """
        if not isinstance(data, dict):
            raise CheckpointError(f"A plan is a JSON object, got {type(data).__name__}.")
        version = data.get("format_version", FORMAT_VERSION)
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise CheckpointError(
                f"This plan has format_version {version}; this ditq reads up to {FORMAT_VERSION}. "
                f"Install a newer one: pip install 'ditq>=0.{version}'."
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise CheckpointError(f"The plan is not valid: {first_error(error)}.") from error


def first_error(error: ValidationError) -> str:
    """The first complaint of pydantic in one line: where, what is wrong, the value."""
    item = error.errors()[0]
    place = ".".join(str(part) for part in item["loc"]) or "plan"
    got = repr(item.get("input"))
    return f"{place}: {item['msg']} (got {got[:80]}{'…' if len(got) > 80 else ''})"
