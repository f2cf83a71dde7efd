"""The grid: the values that a quantized tensor can take, and the elements that share a scale."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from ditq.numerics.codebook import WIDTHS, normal_levels

Granularity = Literal["tensor", "channel", "token", "group"]
Levels = Literal["uniform", "normal"]

_USUAL_GROUP_SIZES = (16, 32, 48, 64, 96, 128, 192, 256, 288, 384, 512)


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """The smallest and the largest code.

    Symmetric: +-(2^(b-1) - 1), so that -x has the code of x negated. Asymmetric: all 2^b codes,
    -2^(b-1) ... 2^(b-1) - 1.

    Raises:
        ValueError: ``bits`` is not 2 to 8.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    top = 2 ** (bits - 1) - 1
    return (-top if symmetric else -top - 1), top


class Grid(BaseModel):
    """How a matrix is quantized: ``x ~ scale * (code - zero_point)``, with 2^bits codes or one fewer.

    Attributes:
        bits: 2 to 8.
        symmetric: codes +-(2^(bits-1) - 1) without zero point, or all 2^bits codes with one.
        granularity: what shares a scale: the whole ``tensor``; one row, called ``channel`` for a weight [N, K] (output
            channel) and ``token`` for an input [M, K]; or a ``group`` of ``group_size`` neighbouring columns of a row.
        group_size: columns per group; for granularity "group" only.
        dynamic: scales are computed from the tensor itself at run time; static ones come from calibration.
        levels: ``uniform`` codes are consecutive integers. ``normal`` ones are the 2^bits integers up to 127 of
            :mod:`ditq.numerics.codebook`, denser around zero, for 2 to 6 bits; symmetric, without zero point.
        full: symmetric weights with uniform levels use the code -2^(bits-1) too. A scale may be negative, so that the
            extra code is on the side of the largest magnitude. Without zero points this is nearly as accurate as
            asymmetric codes: rotated 4-bit weights gain 0.7 dB per channel and 0.9 dB in groups of 64.

    Example:
        >>> str(Grid(bits=4, symmetric=False, granularity="group", group_size=128))
        'int4 asym/group 128, static'
        >>> Grid(bits=4, granularity="channel").code_range
        (-7, 7)
        >>> Grid(bits=4, granularity="channel", levels="normal").code_range
        (-104, 104)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Annotated[int, Field(ge=2, le=8)]
    symmetric: bool = True
    granularity: Granularity
    group_size: Annotated[int, Field(ge=1)] | None = None
    dynamic: bool = False
    levels: Levels = "uniform"
    full: bool = False

    @model_validator(mode="after")
    def _group_size_goes_with_groups(self) -> Self:
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError(
                f"group_size is for granularity 'group' only, got {self.granularity!r} with {self.group_size}"
            )
        return self

    @model_validator(mode="after")
    def _levels_exist(self) -> Self:
        if self.levels == "normal" and self.bits not in WIDTHS:
            raise ValueError(
                f"levels 'normal' have {WIDTHS[0]} to {WIDTHS[-1]} bits, got bits={self.bits}; set levels to 'uniform'"
            )
        if self.levels == "normal" and not self.symmetric:
            raise ValueError("levels 'normal' are symmetric and have no zero point: symmetric must be true, got false")
        if self.full and (not self.symmetric or self.levels != "uniform"):
            raise ValueError(
                "full is for symmetric grids with uniform levels (others use all codes anyway): full must be false, "
                "got true"
            )
        return self

    @model_serializer(mode="wrap")
    def _serialized(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Grids without these fields are written, and plans hashed, as before the fields existed."""
        fields: dict[str, Any] = handler(self)
        if self.levels == "uniform":
            fields.pop("levels", None)
        if not self.full:
            fields.pop("full", None)
        return fields

    def __str__(self) -> str:
        per = f"group {self.group_size}" if self.group_size else self.granularity
        kind = "" if self.granularity == "channel" else ", dynamic" if self.dynamic else ", static"
        codes = "normal" if self.levels == "normal" else "full" if self.full else "sym" if self.symmetric else "asym"
        return f"int{self.bits} {codes}/{per}{kind}"

    @property
    def code_range(self) -> tuple[int, int]:
        """The smallest and the largest code, see :func:`code_range`; of normal levels the outermost ones."""
        if self.levels == "normal":
            levels = normal_levels(self.bits)
            return levels[0], levels[-1]
        return code_range(self.bits, self.symmetric and not self.full)

    def with_bits(self, bits: int) -> Grid:
        """The same grid with other bits; with uniform levels where there are no normal ones.

        Raises:
            ValueError: ``bits`` is not 2 to 8.
        """
        return Grid(**{**dict(self), "bits": bits, "levels": self.levels if bits in WIDTHS else "uniform"})

    def groups(self, columns: int) -> int:
        """Number of scales in one row of ``columns`` numbers.

        Raises:
            ValueError: the group size does not divide the columns; the usual ones that do are listed.
        """
        if self.group_size is None:
            return 1
        if columns % self.group_size:
            possible = [g for g in _USUAL_GROUP_SIZES if columns % g == 0]
            possible = possible or [g for g in range(1, columns + 1) if columns % g == 0]
            raise ValueError(
                f"group_size must divide the {columns} columns, got {self.group_size}; "
                f"possible: {', '.join(map(str, possible))}"
            )
        return columns // self.group_size

    def scales(self, rows: int, columns: int) -> tuple[int, int]:
        """The shape [R, G] of the scales of a matrix; [1, 1] for granularity "tensor"."""
        return (1, 1) if self.granularity == "tensor" else (rows, self.groups(columns))
