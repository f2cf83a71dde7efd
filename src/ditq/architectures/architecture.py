"""The schema of an architecture file, and the groups and roles of linears that follow from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module, resources
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import nn

from ditq import patterns
from ditq.errors import UsageError
from ditq.plan import first_error
from ditq.reading import parse_yaml, read_yaml, short

Condition = Literal["conditional", "unconditional"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Input(_Strict):
    """The producer of the tensor that a group of linears reads, exactly one of:

    ``norm``: a norm, optionally modulated by ``linear`` (a module of the block) or by ``argument`` (of the block's
    forward, shared by all blocks). Of its ``chunks`` chunks, those numbered in ``shift`` are shifts.
    ``v``: attention over these value projections; those that a model does not have are ignored.
    ``glu``: the first half of this linear's outputs, times an activation of the second half.
    ``online``: an operation that cannot carry a scale. ``joined`` is attention concatenated with an activation.
    """

    norm: str | None = None
    linear: str | None = None
    argument: str | None = None
    chunks: int = Field(default=6, ge=1)
    shift: tuple[int, ...] = ()
    v: tuple[str, ...] = ()
    glu: str | None = None
    online: Literal["activation", "residual", "text", "joined"] | None = None

    @model_validator(mode="after")
    def _one_producer(self) -> Self:
        if sum((self.norm is not None, bool(self.v), self.glu is not None, self.online is not None)) != 1:
            raise ValueError("an input must name exactly one of norm, v, glu, online")
        if self.linear and self.argument:
            raise ValueError("a norm is modulated by a linear of the block or by an argument, not by both")
        return self

    @property
    def foldable(self) -> Literal["norm", "v", "glu"] | None:
        """The kind of producer that a static scale can be folded into; None if there is none."""
        return "norm" if self.norm else "v" if self.v else "glu" if self.glu else None

    @property
    def carriers(self) -> tuple[str, ...]:
        """Linears whose outputs (all, or the first half) carry the scale of a ``v`` or ``glu`` input."""
        return self.v or ((self.glu,) if self.glu else ())


class Group(_Strict):
    """Linears of a block that read the same tensor, with the role of each.

    ``separate``: each linear reads a tensor of its own, but they share a scale, since it is folded into a common
    producer (the values of both streams of a joint attention).
    ``text``: where the text tokens are in a sequence of image and text tokens. Sequences of text only are recognized
    by their roles.
    ``has``, ``lacks``: the group exists only in blocks that have, or do not have, this module.
    """

    input: Input
    linears: dict[str, str]
    separate: bool = False
    text: Literal["last"] | None = None
    has: str | None = None
    lacks: str | None = None


class Forward(_Strict):
    """Names of the transformer's forward arguments."""

    sample: str
    time: str
    text: str | None = None
    text_mask: str | None = None


class Guidance(_Strict):
    """How classifier-free guidance calls the transformer: halves of a batch, separate calls, or an embedded scale."""

    style: Literal["batch", "calls", "embedded"]
    order: tuple[Condition, ...] = ()


class Pipeline(_Strict):
    """The pipeline classes of diffusers that run the transformer, and their argument for the condition."""

    condition: Literal["prompt", "class_labels"]
    classes: tuple[str, ...] = ()


class Example(_Strict):
    """A tiny model of this family and inputs for it, with which the tests check every architecture file."""

    config: dict[str, Any]
    inputs: dict[str, dict[str, Any]]


FUSED = ("to_qkv", "to_kv", "to_added_qkv")
"""Names that diffusers gives to fused projections."""


@dataclass(frozen=True)
class Linear:
    """One linear layer of a model: its full name and its role."""

    name: str
    role: str
    module: nn.Linear


@dataclass(frozen=True)
class InputGroup:
    """Linears of one block that share an input tensor, and therefore a smoothing scale."""

    block: str
    input: Input
    linears: tuple[Linear, ...]
    separate: bool = False
    text_last: bool = False

    @property
    def text(self) -> Literal["all", "last"] | None:
        """Which rows of a sequence are text tokens: all, the last ones, or none."""
        role = self.linears[0].role
        if self.input.online == "text" or ".txt." in role or role.startswith("refiner."):
            return "all"
        return "last" if self.text_last else None

    @property
    def name(self) -> str:
        """The name of the first linear."""
        return self.linears[0].name

    @property
    def tensors(self) -> tuple[InputGroup, ...]:
        """One group for each input tensor: this group, unless its linears read separate tensors."""
        if not self.separate:
            return (self,)
        return tuple(replace(self, linears=(linear,), separate=False) for linear in self.linears)


class Architecture(_Strict):
    """One model family.

    ``module``: the module of its classes. ``sizes``: configs of public checkpoints, where they differ from the class
    defaults. ``note``: limits of the support for this family.
    """

    name: str
    module: str = "diffusers"
    classes: tuple[str, ...]
    note: str = ""
    stacks: dict[str, tuple[Group, ...]]
    table: str | None = None
    other: dict[str, str] = {}
    forward: Forward
    guidance: Guidance
    pipeline: Pipeline
    sizes: dict[str, dict[str, Any]] = {}
    example: Example | None = None

    @field_validator("other")
    @classmethod
    def _patterns_compile(cls, other: dict[str, str]) -> dict[str, str]:
        if len(other) > patterns.MOST:
            raise ValueError(f"{len(other)} regular expressions; at most {patterns.MOST} are allowed")
        for pattern in other:
            patterns.check(pattern)
        return other

    def model_class(self) -> Any:
        """The first of the classes."""
        return getattr(import_module(self.module), self.classes[0])

    def groups(self, model: nn.Module) -> list[InputGroup]:
        """All input groups of the stacks, in the order of the blocks.

        Raises:
            UsageError: the model does not have a layer of the file, or it is not an ``nn.Linear``.
        """
        return list(self._groups(model))

    def _groups(self, model: nn.Module) -> Iterator[InputGroup]:
        for stack, groups in self.stacks.items():
            blocks: Any = _get(model, stack, self.name)
            for i, block in enumerate(blocks):
                for group in groups:
                    if (group.has and not present(block, group.has)) or (group.lacks and present(block, group.lacks)):
                        continue
                    names = {f"{stack}.{i}.{path}": role for path, role in group.linears.items()}
                    linears = tuple(Linear(n, role, _linear(model, n, self.name)) for n, role in names.items())
                    yield InputGroup(f"{stack}.{i}", group.input, linears, group.separate, group.text == "last")

    def linears(self, model: nn.Module) -> list[Linear]:
        """Every ``nn.Linear`` of the model with its role.

        Raises:
            UsageError: a linear has no role in the architecture file, or two.
        """
        linears = [linear for group in self.groups(model) for linear in group.linears]
        grouped = {linear.name for linear in linears}
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear) or name in grouped:
                continue
            if is_fused(model, name):
                if leftover(model, name):
                    continue
                raise UsageError(
                    f"Layer {name!r} is a fused projection. Call unfuse_qkv_projections() first; quantized layers "
                    "share the integers of their input without it."
                )
            roles = {role for pattern, role in self.other.items() if patterns.search(pattern, name)}
            if len(roles) != 1:
                raise UsageError(
                    f"Linear layer {name!r} has {len(roles) or 'no'} role in architecture {self.name!r}; "
                    "add it to 'stacks' or 'other' of the architecture file (see CONTRIBUTING.md, Add a model)."
                )
            linears.append(Linear(name, roles.pop(), module))
        return linears


def is_fused(model: nn.Module, name: str) -> bool:
    """Whether diffusers made the linear ``name`` from several projections of an attention."""
    parent, _, child = name.rpartition(".")
    return child in FUSED and bool(getattr(model.get_submodule(parent), "fused_projections", False))


def leftover(model: nn.Module, name: str) -> bool:
    """Whether a fused projection is one that diffusers left in a module that computes unfused again."""
    attention: Any = model.get_submodule(name.rpartition(".")[0])
    return not hasattr(attention, "unfuse_projections") and "Fused" not in type(attention.processor).__name__


def drop_leftovers(model: nn.Module) -> None:
    """Removes the fused projections that nothing computes any more, so that they are not saved."""
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, nn.Linear) and is_fused(model, name) and leftover(model, name):
            attention: Any = model.get_submodule(parent)
            delattr(attention, child)
            attention.fused_projections = False


def present(model: nn.Module, name: str) -> bool:
    """Whether the model has this submodule; one that is None does not count."""
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _get(model: nn.Module, name: str, architecture: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise UsageError(
            f"Architecture {architecture!r} names {name!r}, which this {type(model).__name__} does not have."
        ) from error


def _linear(model: nn.Module, name: str, architecture: str) -> nn.Linear:
    module = _get(model, name, architecture)
    if not isinstance(module, nn.Linear):
        raise UsageError(
            f"Architecture {architecture!r} names {name!r}, which is a {type(module).__name__}, not an nn.Linear "
            "(unfuse fused projections and unload adapters first)."
        )
    return module


def _parse(content: Any, source: str) -> Architecture:
    try:
        return Architecture.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"The architecture file {source} is not valid: {first_error(error)}.") from error


@cache
def _bundled() -> dict[str, Architecture]:
    folder = resources.files("ditq") / "architectures"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {a.name: a for a in (_parse(parse_yaml(f.read_text("utf-8"), f.name, UsageError), f.name) for f in files)}


def names() -> list[str]:
    """The architectures that come with ditq."""
    return sorted(_bundled())


@cache
def roles() -> frozenset[str]:
    """All roles in the architectures that come with ditq."""
    known: set[str] = set()
    for architecture in _bundled().values():
        groups = [group for stack in architecture.stacks.values() for group in stack]
        known.update(architecture.other.values(), *(group.linears.values() for group in groups))
    return frozenset(known)


def load(architecture: str | Path | Architecture) -> Architecture:
    """An architecture by name, or from your own YAML file.

    Raises:
        UsageError: no such name or file, or the file is not valid.
    """
    if isinstance(architecture, Architecture):
        return architecture
    if str(architecture) in _bundled():
        return _bundled()[str(architecture)]
    path = Path(architecture)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return _parse(read_yaml(path, UsageError), str(path))
    raise UsageError(
        f"Unknown architecture {short(str(architecture))}. Known: {', '.join(names())}. Or pass the path of a "
        ".yaml file (copy one from ditq/architectures, see CONTRIBUTING.md, Add a model)."
    )


def pipeline_class(name: str) -> Any:
    """The pipeline class of ditq with this name, else ``DiffusionPipeline``, which looks up those of diffusers."""
    import diffusers

    outside_diffusers = (a for a in _bundled().values() if a.module != "diffusers" and name in a.pipeline.classes)
    for architecture in outside_diffusers:
        return getattr(import_module(architecture.module), name)
    return diffusers.DiffusionPipeline


def match(model: nn.Module) -> Architecture:
    """The architecture of a transformer, by the name of its class.

    Raises:
        UsageError: no file names this class; the message says how to add one.
    """
    class_name = type(model).__name__
    for architecture in _bundled().values():
        if class_name in architecture.classes:
            return architecture
    raise UsageError(
        f"ditq does not know the architecture of {class_name}. Known: "
        + ", ".join(f"{a.name} ({', '.join(a.classes)})" for a in _bundled().values())
        + ". To add one, copy a file of ditq/architectures, name the role and the producer of every linear "
        "(see CONTRIBUTING.md, Add a model), and pass it with architecture=PATH or --architecture PATH."
    )
