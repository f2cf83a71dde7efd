"""The small JSON file of an exported model: its arguments, and the kernel of each linear layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ditq import digests
from ditq.errors import CheckpointError
from ditq.openvino.linear import Activations, Kernel, Storage
from ditq.plan import Plan, first_error
from ditq.reading import JSON_BYTES, read_text
from ditq.trace.stacks import Returns

FORMAT_VERSION = 2
FILE = "ditq_openvino.json"
BINDING = "ditq_openvino.sha256"
"""A file with one digest, of the manifest and of the plan; folders of ditq 0.1 do not have it."""

Plain = bool | int | float | str | None
DType = Literal["float32", "int64", "bool"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Input(_Strict):
    """A tensor argument, or a tensor inside an argument (``"rotary.0"``). ``shape`` has None for variable sizes."""

    name: Annotated[str, Field(min_length=1)]
    dtype: DType
    shape: tuple[Annotated[int, Field(ge=0)] | None, ...] = Field(strict=False)


class Layer(_Strict):
    """A linear layer: its kernel, or None with floating-point weights; ``reason`` says why it is not int8.

    ``twin`` names the first layer with bitwise equal weights (DiT has a copy of its embedders in every block).
    OpenVINO computes both at once if they read the same tensor.
    """

    name: Annotated[str, Field(min_length=1)]
    columns: Annotated[int, Field(ge=1)]
    rows: Annotated[int, Field(ge=1)]
    storage: Storage | None = None
    weight_group: Annotated[int, Field(ge=1)] | None = None
    activations: Activations = "float"
    reason: str = ""
    twin: str = ""

    @property
    def kernel(self) -> Kernel | None:
        if self.storage is None:
            return None
        return Kernel(self.columns, self.rows, self.storage, self.weight_group, self.activations)


class Segment(_Strict):
    """One compiled graph: a whole stack of blocks, or one block of a stack that is not a plain chain.

    Attributes:
        place: the module it replaces, ``"transformer_blocks"`` or ``"transformer_blocks.3"``.
        file: of the graph, in the same folder.
        parameters: names of the arguments of the block's forward, in order.
        constants: arguments that are not tensors; a call must pass the same values.
        returns: the type in which a call returns the ``outputs`` tensors.
        digests: of the graph's files, by name.
        kept: modules of the first block that the model itself calls too; they stay torch modules.
        attentions: number of attentions with 8-bit queries and keys.
    """

    place: Annotated[str, Field(pattern=r"^\w+(\.\w+)*$")]
    file: Annotated[str, Field(pattern=r"^[\w.]+\.xml$")]
    parameters: tuple[str, ...] = Field(strict=False)
    inputs: tuple[Input, ...] = Field(strict=False, min_length=1)
    constants: dict[str, Plain]
    outputs: Annotated[int, Field(ge=1)]
    returns: Returns
    kept: tuple[str, ...] = Field(strict=False)
    digests: dict[Annotated[str, Field(pattern=r"^[\w.]+$")], str]
    layers: tuple[Layer, ...] = Field(strict=False)
    attentions: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _every_file_has_a_digest(self) -> Self:
        files = {self.file, f"{self.file.removesuffix('.xml')}.bin"}
        if self.digests.keys() != files:
            raise ValueError(f"digests must be those of {' and '.join(sorted(files))}")
        return self


class Manifest(_Strict):
    """The facts about an exported transformer that its graphs do not contain.

    Attributes:
        openvino: version that wrote the graphs.
        group_size: channels of a token that share an activation scale if OpenVINO rounds the input; 0: it rounds none.
    """

    format_version: Literal[2] = 2
    openvino: str
    architecture: str
    group_size: Annotated[int, Field(ge=0, multiple_of=16)]
    segments: tuple[Segment, ...] = Field(strict=False, min_length=1)

    @model_validator(mode="after")
    def _places_are_unique(self) -> Self:
        places = [segment.place for segment in self.segments]
        if len(set(places)) < len(places) or len({segment.file for segment in self.segments}) < len(places):
            raise ValueError("two segments have the same place or file")
        return self

    def write(self, folder: Path, plan: Plan | None) -> None:
        """Writes the file, and binds it to the plan of the graphs; None if they compute in floating point."""
        (folder / FILE).write_text(self.model_dump_json(indent=1) + "\n", "utf-8")
        (folder / BINDING).write_text(_binding(folder, plan) + "\n", "utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads and validates.

        Raises:
            CheckpointError: the file is missing, a field is invalid (which is named), or it is newer than this ditq.
        """
        path = folder / FILE
        try:
            text = read_text(path, JSON_BYTES, CheckpointError)
        except CheckpointError as error:
            raise CheckpointError(f"{folder} holds no exported model: {error}") from error
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise CheckpointError(
                f"{path} is not valid (this ditq reads format_version {FORMAT_VERSION}): {first_error(error)}."
            ) from error


def check_binding(folder: Path, plan: Plan | None, required: bool) -> None:
    """Checks that the manifest in ``folder`` is the one that was written for graphs of this plan.

    Args:
        required: False accepts a folder without :data:`BINDING`, which ditq 0.1 wrote.

    Raises:
        CheckpointError: the manifest was edited, belongs to another plan, or a file is missing.
    """
    again = "Copy the folder again, or run ditq export again."
    if not (folder / FILE).is_file():
        raise CheckpointError(f"{folder} holds no exported model: it does not contain {FILE}. {again}")
    if not (folder / BINDING).is_file():
        if required:
            raise CheckpointError(f"{folder} does not contain {BINDING}, which ties {FILE} to the plan. {again}")
        return
    if read_text(folder / BINDING, JSON_BYTES, CheckpointError).strip() != _binding(folder, plan):
        raise CheckpointError(
            f"{folder / FILE} was edited since it was exported, or belongs to another checkpoint. {again}"
        )


def _binding(folder: Path, plan: Plan | None) -> str:
    return digests.of_text(digests.of_file(folder / FILE) + (plan.binding() if plan else ""))
