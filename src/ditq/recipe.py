"""What the user asks for: a method, formats for roles, options. A few lines of YAML, validated."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ditq.errors import UsageError, unknown
from ditq.plan import Gptq, TensorFormat, Timesteps, first_error


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RoleFormats(_Strict):
    """Formats of the layers whose role matches; ``weights: null`` keeps them in 16 bit."""

    weights: TensorFormat | None
    activations: TensorFormat | None = None


class Balance(_Strict):
    """Which transforms a method may apply to a layer's input, and how the choice is made.

    ``choose: error`` tries every allowed combination on calibration inputs and keeps the one with the
    smallest output error, layer group by layer group; ``choose: always`` applies all that is allowed.
    ``alpha`` is one number, or a list to choose from by error.
    """

    smooth: bool = False
    rotate: bool = False
    choose: Literal["error", "always"] = "always"
    alpha: float | tuple[float, ...] = 0.5
    fold: bool = True
    power_of_two: bool = False
    block: Annotated[int, Field(ge=0)] = 0
    timesteps: tuple[tuple[int, int], ...] | None = None

    @property
    def alphas(self) -> tuple[float, ...]:
        return self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)


class Calibration(_Strict):
    """How much of the sampling trajectory is looked at.

    ``rows`` bounds the sample of every layer's input, ``calls`` is how many timesteps, chosen at random, of each
    prompt's trajectory are kept whole, both halves of the guidance included, for what must run blocks again: at
    least so many, more where prompts or tokens are few (``ditq.calibration.capture.ROWS_PER_INPUT``); 0 keeps none.
    ``batch_size`` is how many prompts are drawn at once: by default 8 pictures, with ``auto`` up to 32 small ones;
    either way as many videos as have 2^17 latent numbers, at most 8.
    ``arguments`` go to the pipeline's call as they are, e.g. ``{height: 256, width: 256, num_frames: 17}``.
    ``timesteps`` says which ones count in ranges, scales and the sample: ``all``, or those that PTQ4DM would draw
    from a skewed normal distribution, ``normal``.
    """

    prompts: Annotated[int, Field(ge=1)] = 32
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    steps: Annotated[int, Field(ge=1)] = 20
    guidance_scale: float | None = None
    rows: Annotated[int, Field(ge=16)] = 2048
    calls: Annotated[int, Field(ge=0)] = 1
    arguments: dict[str, Any] = {}
    timesteps: Timesteps = "all"


class Recipe(_Strict):
    """A quantization recipe.

    Attributes:
        method: name of a file in ``ditq.methods``.
        weights, activations: formats of every quantized layer.
        keep: roles (or role prefixes) that stay in 16 bit.
        keep_layers: regular expressions of layer names that stay in 16 bit.
        roles: formats that differ for some roles, e.g. ``ffn.down``.
        balance: transforms of the inputs; calibration: what the method looks at.
        clip: range of the weights, ``minmax`` or ``mse`` (searched by squared error).
        rounding: of the weights, ``nearest`` or ``gptq`` (block by block, on inputs from the quantized blocks
            before; ``gptq`` holds its settings). It goes with any method and balance.
        fit_groups: where ``group_size`` does not divide the inputs of a layer, the largest divisor below it
            is taken; otherwise it is an error.
    """

    version: Literal[1] = 1
    name: str = "custom"
    description: str = ""
    method: str
    weights: TensorFormat
    activations: TensorFormat | None
    keep: tuple[str, ...] = ("embedder", "final", "modulation")
    keep_layers: tuple[str, ...] = ()
    roles: dict[str, RoleFormats] = {}
    balance: Balance = Balance()
    calibration: Calibration = Calibration()
    clip: Literal["minmax", "mse"] = "minmax"
    rounding: Literal["nearest", "gptq"] = "nearest"
    gptq: Gptq = Gptq()
    fit_groups: bool = False

    @field_validator("keep_layers")
    @classmethod
    def _patterns_compile(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return patterns

    @property
    def needs_calibration(self) -> bool:
        """Whether the method looks at activations before it can quantize."""
        static = [self.activations, *(r.activations for r in self.roles.values())]
        return (
            self.balance.smooth
            or self.balance.choose == "error"
            or self.rounding == "gptq"
            or any(a is not None and not a.dynamic for a in static)
        )

    @property
    def needs_calls(self) -> bool:
        """Whether calls of the transformer are kept whole: blocks must be run again."""
        return self.rounding == "gptq"

    def formats(self, name: str, role: str) -> tuple[TensorFormat | None, TensorFormat | None, str]:
        """Weight format, activation format and, where it is kept in 16 bit, the reason."""
        for prefix in self.keep:
            if role == prefix or role.startswith(prefix + "."):
                return None, None, f"role {role} is kept in 16 bit"
        for pattern in self.keep_layers:
            if re.search(pattern, name):
                return None, None, f"keep_layers: {pattern}"
        if (own := self.own(role)) is not None:
            reason = f"the recipe keeps role {role} in 16 bit" if own.weights is None else ""
            return own.weights, own.activations if own.weights else None, reason
        return self.weights, self.activations, ""

    def own(self, role: str) -> RoleFormats | None:
        """The formats that the recipe gives to this role, or to the narrowest one that holds it."""
        prefixes = [prefix for prefix in self.roles if role == prefix or role.startswith(prefix + ".")]
        return self.roles[max(prefixes, key=len)] if prefixes else None

    def override(self, assignments: list[str]) -> Recipe:
        """A copy with ``key=value`` assignments applied; keys are dotted, values are YAML.

        Raises:
            UsageError: an assignment has no ``=`` or names no field of a recipe.
        """
        data = self.model_dump(mode="json")
        # Mappings that take any key; validation has the last word.
        made = {id(data["roles"]), id(data["calibration"]["arguments"])}
        for assignment in assignments:
            key, equals, value = assignment.partition("=")
            if not equals:
                raise UsageError(f"--set takes key=value, got {assignment!r}.")
            target, parts = data, _path(key.strip())
            for i, part in enumerate(parts):
                if not isinstance(target, dict) or (part not in target and id(target) not in made):
                    raise unknown("recipe field", key, _fields(data))
                if i < len(parts) - 1:
                    if target.get(part) is None:
                        target[part] = {}
                        made.add(id(target[part]))
                    target = target[part]
            try:
                target[parts[-1]] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise UsageError(f"--set {assignment!r}: the value is not YAML ({error}).") from error
        return parse(data, "--set")


def _path(key: str) -> list[str]:
    """The parts of a dotted key; the name of a role, dotted itself, is one part."""
    if match := re.fullmatch(r"roles\.(.+?)((?:\.(?:weights|activations)(?:\..+)?)?)", key):
        return ["roles", match[1], *match[2].split(".")[1:]]
    return key.split(".")


def _fields(data: dict[str, Any], prefix: str = "") -> list[str]:
    out = []
    for key, value in data.items():
        out += _fields(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [prefix + key]
    return out


def parse(data: Any, source: str) -> Recipe:
    """Validates a recipe read from ``source``."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UsageError(f"The recipe in {source} is not valid: {first_error(error)}.") from error


@cache
def _bundled() -> dict[str, Any]:
    folder = resources.files("ditq") / "recipes"
    return {p.name.removesuffix(".yaml"): p for p in folder.iterdir() if p.name.endswith(".yaml")}


def names() -> list[str]:
    """The recipes that come with ditq."""
    return sorted(_bundled())


def load(recipe: str | Path | Recipe) -> Recipe:
    """A recipe by name, from a YAML file, or as it is.

    Raises:
        UsageError: no such recipe (the known ones are listed), or not a valid one.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if str(recipe) in _bundled():
        text, source = _bundled()[str(recipe)].read_text(), f"recipe {recipe}"
    elif str(recipe).endswith((".yaml", ".yml")):
        path = Path(recipe)
        if not path.is_file():
            raise UsageError(f"There is no recipe file {path}.")
        text, source = path.read_text(), str(path)
    else:
        raise unknown("recipe", recipe, _bundled(), "Or give the path of a .yaml file.")
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{source} is not YAML: {error}.") from error
    if not isinstance(data, dict):
        raise UsageError(f"{source} must hold a mapping, got {type(data).__name__}.")
    data.setdefault("name", Path(str(recipe)).stem)
    return parse(data, source)
