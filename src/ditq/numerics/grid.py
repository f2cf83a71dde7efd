"""The grid: the values that a quantized tensor can take, and the elements that share a scale."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Granularity = Literal["tensor", "channel", "token", "group"]

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
    """How a matrix is quantized: ``x ~ scale * (code - zero_point)``, with evenly spaced codes of ``bits`` bits.

    A grid with uneven levels (a codebook) would be a field here, ``levels``, and a branch in ``quantize`` and
    ``dequantize``. Plans, recipes, quantized tensors and engines pass the grid on, so they would support it too.

    Attributes:
        bits: 2 to 8.
        symmetric: codes +-(2^(bits-1) - 1) without zero point, or all 2^bits codes with one.
        granularity: what shares a scale: the whole ``tensor``; one row, called ``channel`` for a weight [N, K] (output
            channel) and ``token`` for an input [M, K]; or a ``group`` of ``group_size`` neighbouring columns of a row.
        group_size: columns per group; for granularity "group" only.
        dynamic: scales are computed from the tensor itself at run time; static ones come from calibration.

    Example:
        >>> str(Grid(bits=4, symmetric=False, granularity="group", group_size=128))
        'int4 asym/group 128, static'
        >>> Grid(bits=4, granularity="channel").code_range
        (-7, 7)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Annotated[int, Field(ge=2, le=8)]
    symmetric: bool = True
    granularity: Granularity
    group_size: Annotated[int, Field(ge=1)] | None = None
    dynamic: bool = False

    @model_validator(mode="after")
    def _group_size_goes_with_groups(self) -> Self:
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError(
                f"group_size is for granularity 'group' only, got {self.granularity!r} with {self.group_size}"
            )
        return self

    def __str__(self) -> str:
        per = f"group {self.group_size}" if self.group_size else self.granularity
        kind = "" if self.granularity == "channel" else ", dynamic" if self.dynamic else ", static"
        return f"int{self.bits} {'sym' if self.symmetric else 'asym'}/{per}{kind}"

    @property
    def code_range(self) -> tuple[int, int]:
        """The smallest and the largest code, see :func:`code_range`."""
        return code_range(self.bits, self.symmetric)

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
