"""Recipes: formats for roles, balance, rounding, options. A few lines of YAML, validated.

The recipes that come with ditq are families: one file each, in ``recipes/``, that fits any width. ``viditq-w4a8`` is
family ``viditq`` with 4-bit weights and 8-bit activations; ``a16`` leaves activations in 16 bit.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)  # fmt: skip

from ditq import patterns
from ditq.errors import UsageError, unknown, warn
from ditq.numerics import Grid
from ditq.numerics.hadamard import REGULAR, RotationKind, is_supported
from ditq.plan import MOST_FEATURES, MOST_RANGES, MOST_REFINEMENTS, Float, Gptq, Timesteps, first_error
from ditq.reading import parse_yaml, read_yaml, short

MOST_ALPHAS = 100
Label = Annotated[str, Field(max_length=patterns.LONGEST)]
Names = Annotated[tuple[Label, ...], Field(max_length=patterns.MOST)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _booleans_are_no_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        # Pydantic would read true as 1.
        if isinstance(value, bool) and "bool" not in str(cls.model_fields[info.field_name or ""].annotation):
            raise ValueError(f"true and false are no values of this field, got {value!r}")
        return value


def _weights(grid: Grid | None) -> Grid | None:
    if grid is not None and grid.granularity == "token":
        raise ValueError("granularity of weights must be 'tensor', 'channel' or 'group', got 'token'")
    if grid is not None and grid.dynamic:
        raise ValueError("weights are static: dynamic must be false, got true")
    return grid


def _activations(grid: Grid | None) -> Grid | None:
    if grid is None:
        return grid
    if grid.granularity == "channel":
        raise ValueError("granularity of activations must be 'tensor', 'token' or 'group', got 'channel'")
    if not grid.dynamic and grid.granularity == "token":
        raise ValueError(
            "granularity of static activations must be 'tensor' or 'group', got 'token'; or set dynamic to true"
        )
    if not grid.dynamic and not grid.symmetric:
        raise ValueError("static activations are symmetric: symmetric must be true, got false; or set dynamic to true")
    if grid.full:
        raise ValueError("full is for weights: full must be false for activations, got true")
    if not grid.dynamic and grid.levels != "uniform":
        raise ValueError(f"activations with levels {grid.levels!r} are dynamic: dynamic must be true, got false")
    return grid


Weights = Annotated[Grid, AfterValidator(_weights)]
Activations = Annotated[Grid, AfterValidator(_activations)]


class RoleFormats(_Strict):
    """Formats of the layers with a matching role or name; ``weights: null`` keeps them in 16 bit."""

    weights: Weights | None
    activations: Activations | None = None


class Balance(_Strict):
    """How the input of a layer is balanced before it is quantized; ``ditq.conversion.balance`` carries it out.

    Attributes:
        smooth: divide each input channel by a static scale, and multiply the weight's column by it.
        rotate: Hadamard rotation of the input channels, after smoothing.
        rotation: its kind. ``hadamard``: as wide as possible, with random signs (QuaRot). ``regular``: blocks of 4,
            16, 64 or 256 channels by a regular Hadamard matrix, without signs (ConvRot).
        choose: ``always`` applies all of the above; ``error`` tries every combination of them, none included, on
            calibration inputs, and keeps the one with the smallest output error for each input group.
        alpha: migration strength of the smoothing scale, 0 to 1. Of several values, ditq keeps the one with the
            smallest error.
        salience: how the magnitude of an input channel is computed: ``max`` over the timesteps, or ``spearman``,
            PTQ4DiT's weighted mean of the timesteps' maxima.
        where: balance ``all`` inputs, or only the ``foldable`` ones, whose producer can carry the smoothing scale.
        power_of_two: round smoothing scales to powers of two.
        block: width of the rotation; 0: the widest with a known Hadamard matrix of its kind.
        timesteps: ranges [first, last] with separate smoothing scales and integers.
    """

    smooth: bool = False
    rotate: bool = False
    rotation: RotationKind = "hadamard"
    choose: Literal["error", "always"] = "always"
    alpha: float | tuple[float, ...] = 0.5
    salience: Literal["max", "spearman"] = "max"
    where: Literal["all", "foldable"] = "all"
    power_of_two: bool = False
    block: Annotated[int, Field(ge=0)] = 0
    timesteps: Annotated[tuple[tuple[int, int], ...], Field(min_length=1, max_length=MOST_RANGES)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_folded(cls, data: Any) -> Any:
        """Accepts ``fold`` of ditq 0.1, which could fold smoothing scales into norms."""
        if not isinstance(data, dict) or "fold" not in data:
            return data
        if not isinstance(data["fold"], bool):
            raise ValueError(f"balance.fold must be true or false, got {short(data['fold'])}")
        if data["fold"]:
            warn(
                "balance.fold=true has no effect any more: layers divide their input by the smoothing scale while "
                "they quantize it, at no cost. Remove it."
            )
        return {key: value for key, value in data.items() if key != "fold"}

    @field_validator("alpha", mode="before")
    @classmethod
    def _alphas_are_fractions(cls, alpha: Any) -> Any:
        values = alpha if isinstance(alpha, list | tuple) else [alpha]
        numbers = [a for a in values if isinstance(a, int | float) and not isinstance(a, bool) and 0 <= a <= 1]
        if not values or len(numbers) < len(values) or len(values) > MOST_ALPHAS:
            raise ValueError(
                f"must be a number from 0 to 1, or a list of at most {MOST_ALPHAS} such numbers, got {short(alpha)}"
            )
        return alpha

    @field_validator("block")
    @classmethod
    def _block_has_a_matrix(cls, block: int) -> int:
        if block and (
            not 2 <= block <= 2**16 or not is_supported(block)
        ):  # finding a matrix of a huge width takes ages
            powers = "2, 4, 8, 16, 32, 64, 128, 256 ..., or another width with a known Hadamard matrix"
            raise ValueError(f"must be 0 (the widest possible) or {powers}, got {block}")
        return block

    @model_validator(mode="after")
    def _block_is_regular(self) -> Balance:
        if self.rotation == "regular" and self.block not in (0, *REGULAR):
            raise ValueError(
                f"block must be 0 (the widest possible), 4, 16, 64 or 256 for regular rotations, got {self.block}"
            )
        return self

    @field_validator("timesteps")
    @classmethod
    def _ranges_ascend(cls, ranges: tuple[tuple[int, int], ...] | None) -> tuple[tuple[int, int], ...] | None:
        for first, last in ranges or ():
            if first > last or first < 0:
                raise ValueError(
                    f"a range is [first, last] with 0 <= first <= last, e.g. [{max(last, 0)}, {max(first, last, 0)}]; "
                    f"got [{first}, {last}]"
                )
        return ranges

    @property
    def alphas(self) -> tuple[float, ...]:
        return self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)


class SideBranch(_Strict):
    """A low-rank branch beside the integers of each layer (SVDQuant); ``ditq.conversion.branch`` carries it out.

    Attributes:
        rank: how many singular values of the balanced weight it holds. Layers with fewer inputs or outputs have fewer.
        dtype: of its numbers.
        iterations: refinements of branch and integers in turn, at most; they end when one does not lower the output
            error on calibration inputs.
    """

    rank: Annotated[int, Field(ge=1, le=MOST_FEATURES)] = 32
    dtype: Float = "bfloat16"
    iterations: Annotated[int, Field(ge=0, le=MOST_REFINEMENTS)] = 0


class Calibration(_Strict):
    """How much of the sampling trajectory calibration records.

    Attributes:
        prompts: the largest number of prompts that are used.
        batch_size: prompts that are sampled together. Default: 8 images; ``auto``: up to 32 small images. Videos: as
            many as fit in 2^17 latent numbers, at most 8.
        steps, guidance_scale: of the sampler; ``guidance_scale`` null is the pipeline's default.
        rows: the largest number of input rows that are kept of each layer.
        calls: random timesteps of each prompt's trajectory at which whole transformer calls are recorded, both halves
            of the guidance included; GPTQ replays them block by block. With few prompts or tokens more calls are
            recorded (``ditq.calibration.capture.ROWS_PER_INPUT``); 0 records none.
        arguments: of the pipeline's call, e.g. ``{height: 256, width: 256, num_frames: 17}``.
        timesteps: those that ranges, scales and input rows come from: ``all``, or ``normal``, PTQ4DM's skewed normal
            distribution.
    """

    prompts: Annotated[int, Field(ge=1)] = 32
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    steps: Annotated[int, Field(ge=1)] = 20
    guidance_scale: float | None = None
    rows: Annotated[int, Field(ge=16)] = 2048
    calls: Annotated[int, Field(ge=0)] = 1
    arguments: dict[str, Any] = {}
    timesteps: Timesteps = "all"


class StepPolicy(_Strict):
    """The first and the last steps of a sampling run, which get higher precision.

    The words are those of the ``diffusion_step_policy`` that serving engines read.

    Attributes:
        type: the first and the last N steps.
        index_space: what is counted: iterations of the denoising loop.
        first_steps, last_steps: how many; of a run with another number of steps, the same part of the trajectory.
    """

    schema_version: Literal[1] = 1
    type: Literal["first_last_n"] = "first_last_n"
    index_space: Literal["denoising_loop_iteration"] = "denoising_loop_iteration"
    first_steps: Annotated[int, Field(ge=0)] = 0
    last_steps: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _has_steps(self) -> StepPolicy:
        if self.first_steps + self.last_steps == 0:
            raise ValueError("a step policy needs first_steps or last_steps of at least 1")
        return self


class Recipe(_Strict):
    """A quantization recipe.

    Attributes:
        method, paper: labels for tables and reports, without effect.
        weights, activations: formats of every quantized layer.
        keep: roles (or role prefixes) that stay in 16 bit.
        keep_layers: regular expressions of layer names that stay in 16 bit, see :mod:`ditq.patterns`.
        roles: formats of single roles, e.g. ``ffn.down``, in place of ``weights`` and ``activations``.
        layers: formats of layers by regular expressions of their names, in place of those of their roles; the first
            that matches counts.
        balance: transforms of the inputs.
        branch: a 16-bit branch of low rank beside the integers; None: none. Can be combined with any balance and
            rounding.
        calibration: the calibration data.
        clip: range of the weights, ``minmax`` or ``mse`` (searched by squared error).
        rounding: of the weights, ``nearest`` or ``gptq`` (block by block, on inputs from the already quantized blocks;
            ``gptq`` holds its settings). Can be combined with any balance.
        fit_groups: if ``group_size`` does not divide the inputs of a layer, use the largest divisor below it;
            without this it is an error.
        diffusion_step_policy: the first and last steps of the sampling run (of ``calibration.steps`` steps) that get
            more bits than the others.
        step_activations: bits of the inputs at those steps, 2 to 8 or 16; 8 if ``step_weights`` is not set. Layers
            that have as many already do not change.
        step_weights: bits of the weights at those steps, 2 to 8: further copies of the weights, which count.
    """

    version: Literal[1] = 1
    name: Label = "custom"
    description: str = ""
    method: Label = "custom"
    paper: str = ""
    weights: Weights
    activations: Activations | None
    keep: Names = ("embedder", "final", "modulation")
    keep_layers: Names = ()
    roles: dict[str, RoleFormats] = {}
    layers: Annotated[dict[Label, RoleFormats], Field(max_length=patterns.MOST)] = {}
    balance: Balance = Balance()
    branch: SideBranch | None = None
    calibration: Calibration = Calibration()
    clip: Literal["minmax", "mse"] = "minmax"
    rounding: Literal["nearest", "gptq"] = "nearest"
    gptq: Gptq = Gptq()
    fit_groups: bool = False
    diffusion_step_policy: StepPolicy | None = None
    step_activations: Annotated[int, Field(ge=2, le=16)] | None = None
    step_weights: Annotated[int, Field(ge=2, le=8)] | None = None

    @field_validator("step_activations")
    @classmethod
    def _width_exists(cls, bits: int | None) -> int | None:
        if bits is not None and 8 < bits < 16:
            raise ValueError(f"must be 2 to 8, or 16 (not quantized), got {bits}")
        return bits

    @model_validator(mode="after")
    def _ranges_are_of_one_kind(self) -> Recipe:
        if self.diffusion_step_policy is None or self.step_weights is None:
            return self
        if self.step_activations is not None:
            raise ValueError("step_weights and step_activations cannot be combined: leave one of them out")
        if self.balance.timesteps is not None or self.rounding == "gptq":
            other = "balance.timesteps" if self.balance.timesteps is not None else "rounding=gptq"
            raise ValueError(f"step_weights cannot be combined with {other}")
        return self

    @field_validator("keep_layers")
    @classmethod
    def _patterns_compile(cls, keep_layers: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(patterns.check, keep_layers))

    @field_validator("layers")
    @classmethod
    def _names_compile(cls, layers: dict[str, RoleFormats]) -> dict[str, RoleFormats]:
        for pattern in layers:
            patterns.check(pattern)
        return layers

    @property
    def needs_calibration(self) -> bool:
        """Whether statistics of activations are needed to quantize."""
        static = [self.activations, *(r.activations for r in (*self.roles.values(), *self.layers.values()))]
        return (
            self.balance.smooth
            or (self.balance.choose == "error" and self.balance.rotate)
            or self.rounding == "gptq"
            or (self.branch is not None and self.branch.iterations > 0)
            or any(a is not None and not a.dynamic for a in static)
        )

    @property
    def at_steps(self) -> tuple[int | None, int | None]:
        """Bits of the weights and of the inputs at the steps of the policy; None: as at the others."""
        activations = self.step_activations
        return self.step_weights, 8 if self.step_weights is None and activations is None else activations

    @property
    def needs_calls(self) -> bool:
        """Whether calibration records whole calls of the transformer, to replay its blocks."""
        return self.rounding == "gptq"

    def formats(self, name: str, role: str) -> tuple[Grid | None, Grid | None, str]:
        """Weight format, activation format and, for a layer kept in 16 bit, the reason."""
        for prefix in self.keep:
            if role == prefix or role.startswith(prefix + "."):
                return None, None, f"role {role} is kept in 16 bit"
        for pattern in self.keep_layers:
            if patterns.search(pattern, name):
                return None, None, f"keep_layers: {pattern}"
        for pattern, formats in self.layers.items():
            if patterns.search(pattern, name):
                return _formats(formats, f"layers: {pattern}")
        if (own := self.own(role)) is not None:
            return _formats(own, f"the recipe keeps role {role} in 16 bit")
        return self.weights, self.activations, ""

    def own(self, role: str) -> RoleFormats | None:
        """The formats of this role in ``roles``, or of the narrowest role there that contains it."""
        prefixes = [prefix for prefix in self.roles if role == prefix or role.startswith(prefix + ".")]
        return self.roles[max(prefixes, key=len)] if prefixes else None

    def override(self, assignments: str | Sequence[str]) -> Recipe:
        """A copy with ``key=value`` assignments applied; keys are dotted, values are YAML.

        Raises:
            UsageError: an assignment has no ``=``, names no field of a recipe, or would have no effect.
        """
        assignments = [assignments] if isinstance(assignments, str) else assignments
        data = self.model_dump(mode="json")
        data["balance"]["fold"] = False  # a field of ditq 0.1, see Balance
        for formats in (data, *data["roles"].values(), *data["layers"].values()):
            for kind in ("weights", "activations"):
                if formats[kind] is not None:
                    formats[kind] = {"levels": "uniform", "full": False} | formats[kind]  # which grids leave out
        # Mappings that take any key; validation decides.
        open_mappings = {id(data["roles"]), id(data["layers"]), id(data["calibration"]["arguments"])}
        for assignment in assignments:
            key, equals, value = assignment.partition("=")
            if not equals:
                raise UsageError(f"--set takes key=value, got {assignment!r}.")
            target, parts = data, _path(key.strip())
            for i, part in enumerate(parts):
                if not isinstance(target, dict) or (part not in target and id(target) not in open_mappings):
                    raise unknown("recipe field", key, _fields(self.model_dump(mode="json")))
                if i < len(parts) - 1:
                    if target.get(part) is None:
                        target[part] = {}
                        open_mappings.add(id(target[part]))
                    target = target[part]
            target[parts[-1]] = parse_yaml(value, f"--set {short(assignment)}: the value", UsageError)
        changed = parse(data, "--set")
        changed.check_effect([assignment.partition("=")[0].strip() for assignment in assignments], "--set ")
        return changed

    def check_effect(self, keys: Iterable[str], source: str) -> None:
        """Refuses fields that this recipe would ignore.

        Args:
            keys: dotted names of the fields that were set, e.g. ``balance.alpha``.
            source: prefix of a field's name in the error.

        Raises:
            UsageError: a field has no effect; the message says what to change. Calibration settings of a recipe that
                needs no calibration cause a warning only, so that one list of settings serves several recipes.
        """
        idle = self._idle()
        for key in keys:
            for field, remedy in idle.items():
                if key == field or key.startswith(f"{field}."):
                    message = f"{source}{key} has no effect in recipe {self.name!r}: {remedy}."
                    if not field.startswith("calibration"):
                        raise UsageError(message)
                    warn(message)

    def _idle(self) -> dict[str, str]:
        """Fields without effect in this recipe, each with the change that would give it one."""
        rules, idle = self.balance, dict[str, str]()
        if not rules.smooth:
            remedy = "it needs balance.smooth=true"
            idle |= {f"balance.{name}": remedy for name in ("alpha", "salience", "power_of_two")}
        if not rules.rotate:
            idle |= dict.fromkeys(("balance.block", "balance.rotation"), "it needs balance.rotate=true")
        if not rules.smooth and not rules.rotate:
            remedy = "it needs balance.smooth=true or balance.rotate=true"
            idle |= {f"balance.{name}": remedy for name in ("choose", "where")}
        if self.activations is None or not (rules.smooth or not self.activations.dynamic):
            idle["balance.timesteps"] = "it needs balance.smooth=true, or static activations"
        if self.rounding != "gptq":
            idle |= {"gptq": "it needs rounding=gptq", "calibration.calls": "it needs rounding=gptq"}
        formats = [self.weights, self.activations]
        own = (*self.roles.values(), *self.layers.values())
        formats += [fmt for of_own in own for fmt in (of_own.weights, of_own.activations)]
        if not any(fmt is not None and fmt.group_size for fmt in formats):
            idle["fit_groups"] = "no format has groups"
        if not self.needs_calibration and self.diffusion_step_policy is None:
            idle["calibration"] = "it needs no calibration"
        if self.diffusion_step_policy is None:
            remedy = "it needs diffusion_step_policy, e.g. diffusion_step_policy={first_steps: 2, last_steps: 1}"
            idle |= dict.fromkeys(("step_activations", "step_weights"), remedy)
        labels = {"method": "a label that decides nothing; set balance.* or rounding instead", "name": "a label",
                  "paper": "a label", "description": "a label"}  # fmt: skip
        return idle | labels


def _formats(own: RoleFormats, reason: str) -> tuple[Grid | None, Grid | None, str]:
    """The formats of a role or a layer; the reason if it is kept in 16 bit."""
    if own.weights is None:
        return None, None, reason
    return own.weights, own.activations, ""


def _path(key: str) -> list[str]:
    """The parts of a dotted key; the name of a role, dotted itself, is one part."""
    if match := re.fullmatch(r"roles\.(.+?)((?:\.(?:weights|activations)(?:\..+)?)?)", key):
        return ["roles", match[1], *match[2].split(".")[1:]]
    return key.split(".")


def _fields(data: dict[str, Any], prefix: str = "") -> list[str]:
    out = []
    for key, value in data.items():
        out += _fields(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"]
    return out


def parse(data: Any, source: str) -> Recipe:
    """Validates a recipe read from ``source``."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        where = "" if source == "--set" else f" in {source}"
        raise UsageError(f"The recipe{where} is not valid: {first_error(error)}.") from error


class Family(_Strict):
    """A recipe for any width: a file of ``recipes/``.

    Attributes:
        name: of the file.
        for_whom: who should use it, in a few words.
        cost: measured on ``bundled:emoji-t2i`` at w4a8, see benchmarks/quality/recipe_cost.py.
        widths: those measured in ditq's tables; any other from w2a2 to w8a16 works too.
        fields: of the recipe, without bits.
        at_most_4_bits: fields that replace those of ``fields`` for weights of 4 bits or fewer.
    """

    name: str
    for_whom: str
    cost: str = ""
    widths: tuple[str, ...]
    at_most_4_bits: dict[str, Any] = {}
    fields: dict[str, Any]

    def recipe(self, weight_bits: int, activation_bits: int) -> Recipe:
        """The recipe of one width; 16 activation bits leave activations unquantized."""
        fields = {**self.fields, **(self.at_most_4_bits if weight_bits <= 4 else {})}
        fields["name"] = f"{self.name}-w{weight_bits}a{activation_bits}"
        fields["weights"] = {"bits": weight_bits, **fields["weights"]}
        fields["activations"] = None if activation_bits == 16 else {"bits": activation_bits, **fields["activations"]}
        return parse(fields, f"recipe {fields['name']}")


@cache
def families() -> dict[str, Family]:
    """The recipes that come with ditq, by name."""
    by_name = {}
    for path in sorted((p for p in (resources.files("ditq") / "recipes").iterdir()), key=lambda p: p.name):
        if path.name.endswith(".yaml"):
            name, data = path.name.removesuffix(".yaml"), parse_yaml(path.read_text("utf-8"), path.name, UsageError)
            family = {key: data.pop(key) for key in ("for_whom", "cost", "widths", "at_most_4_bits") if key in data}
            by_name[name] = Family(name=name, fields=data, **family)
    return by_name


def names() -> list[str]:
    """All recipes measured in ditq's tables; other widths of the same families work too."""
    return sorted(f"{name}-{width}" for name, family in families().items() for width in family.widths)


def _bundled(name: str) -> Recipe | None:
    """The recipe of this name; None if no family has it.

    Raises:
        UsageError: the family exists, but the width is missing or not supported.
    """
    match = re.fullmatch(r"(.+?)(?:-w(\d{1,3})a(\d{1,3}))?", name)
    if match is None or match[1] not in families():
        return None
    family = families()[match[1]]
    if match[2] is None:
        raise UsageError(
            f"Recipe {name!r} needs a width: {name}-wXaY, with X = 2 to 8 bits for weights and Y = 2 to 8 or 16 for "
            f"activations. Measured: {', '.join(f'{name}-{width}' for width in family.widths)}."
        )
    weight_bits, activation_bits = int(match[2]), int(match[3])
    if not 2 <= weight_bits <= 8 or not (2 <= activation_bits <= 8 or activation_bits == 16):
        raise UsageError(
            f"Recipe {name!r}: weights take 2 to 8 bits and activations 2 to 8 or 16, got w{weight_bits}"
            f"a{activation_bits}."
        )
    return family.recipe(weight_bits, activation_bits)


# Fields that the method of a recipe file implied in ditq 0.1, and that the file must set now.
_IMPLIED = {
    "smoothquant": ("balance", "smooth", True),
    "ptq4dit": ("balance", "smooth", True),
    "quarot": ("balance", "rotate", True),
    "gptq": ("rounding", "", "gptq"),
}


def load(recipe: str | Path | Recipe) -> Recipe:
    """A recipe by name (``viditq-w4a8``), from a YAML file, or unchanged if it is a recipe already.

    Raises:
        UsageError: no such recipe (the message lists the families), or an invalid one.

    Example:
        >>> recipe = load("viditq-w4a8").override(["balance.rotate=false", "clip=minmax"])
        >>> recipe.weights.bits, recipe.balance.rotate, recipe.needs_calibration
        (4, False, True)
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not str(recipe).endswith((".yaml", ".yml")):
        bundled = _bundled(str(recipe))
        if bundled is None:
            known = [f"{name}-wXaY" for name in families()]
            close = difflib.get_close_matches(str(recipe), [*names(), *families()], n=1)
            raise UsageError(
                f"Unknown recipe {str(recipe)!r}.{f' Did you mean {close[0]!r}?' if close else ''} Known: "
                f"{', '.join(known)} (X = 2 to 8, Y = 2 to 8 or 16; e.g. viditq-w4a8, rtn-w8a8), or the "
                "path of a .yaml file."
            )
        return bundled
    path = Path(recipe)
    if not path.is_file():
        raise UsageError(f"There is no recipe file {path}.")
    data = read_yaml(path, UsageError)
    if not isinstance(data, dict):
        raise UsageError(f"{path} must hold a mapping, got {type(data).__name__}.")
    data.setdefault("name", path.stem)
    loaded = parse(data, str(path))
    loaded.check_effect(_changed(data, loaded), f"{path}: ")
    _check_implied(loaded, path)
    return loaded


def _changed(data: dict[str, Any], recipe: Recipe) -> list[str]:
    """Dotted names of the fields that a file sets to something else than the default; labels do not count.

    ditq 0.1 printed recipes with all defaults, and such a file asks for nothing that it would not get.
    """
    required = {"weights": recipe.weights, "activations": recipe.activations}
    default = Recipe.model_validate(required).model_dump(mode="json")
    actual = recipe.model_dump(mode="json")
    labels = {"version", "name", "description", "method", "paper"}
    keys = [key for key in _fields(data) if key.partition(".")[0] not in labels]
    return [key for key in keys if _value(actual, key) != _value(default, key)]


def _value(data: Any, key: str) -> Any:
    for part in _path(key):
        data = data.get(part) if isinstance(data, dict) else None
    return data


def _check_implied(recipe: Recipe, path: Path) -> None:
    """Refuses a file of ditq 0.1 that leaves a field to its method, see :data:`_IMPLIED`."""
    section, field, value = _IMPLIED.get(recipe.method, ("", "", None))
    if not section:
        return
    actual = getattr(recipe.balance, field) if section == "balance" else recipe.rounding
    if actual != value:
        spelling = f"{section}: {{{field}: true}}" if field else f"{section}: {value}"
        raise UsageError(
            f"{path}: method {recipe.method!r} is a label without effect. Add `{spelling}`, or change the label."
        )
