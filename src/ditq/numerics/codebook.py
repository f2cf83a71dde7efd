"""The codebook of normal levels: 2^bits integers whose distances follow the density of a normal distribution.

Rotated weights and inputs are close to normal (Hadamard matrices mix all channels). For such numbers evenly spaced
levels waste codes on the tails. Lloyd's and Max's levels (Lloyd 1982, Max 1960) have the smallest squared error: the
level of a cell is the mean of its numbers, and a cell ends halfway between two levels. SQNR of a normal distribution
in dB, with the best scale:

    bits                                 2      3      4      5      6
    uniform, symmetric                7.21  13.29  18.90  24.33  29.71
    uniform, all 2^bits codes         8.26  13.91  19.26  24.53  29.82
    normal levels, as floats          9.30  14.62  20.22  26.01  31.91
    normal levels, integers below     9.30  14.62  20.22  25.98  31.78

The levels here are integers of 8 bits, so a product of codes is a product of int8 numbers like that of any other
grid, on any engine. The outermost level is the integer up to 127 for which rounding the levels costs least.
With 8 bits the integers themselves are the finest grid; 7 bits are left out too, as tables for them would be long.

No level is 0, since the number of levels is even and they are symmetric.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# The positive levels; the others are their negatives. They are part of the checkpoint format and must not change.
_POSITIVE = {
    2: (38, 127),
    3: (13, 40, 71, 114),
    4: (5, 15, 25, 36, 48, 62, 79, 104),
    5: (3, 8, 13, 18, 23, 28, 34, 40, 46, 53, 60, 68, 77, 88, 102, 124),
    6: (1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 30, 32,
        34, 37, 39, 42, 45, 48, 51, 54, 58, 62, 66, 71, 77, 84, 93, 108),
}  # fmt: skip

WIDTHS = tuple(_POSITIVE)
"""The bits for which there are normal levels."""

UNIT_SCALE = {2: 0.0118943, 3: 0.0188883, 4: 0.0262171, 5: 0.0262667, 6: 0.0345793}
"""The scale with the smallest squared error for a normal distribution of variance 1, by bits."""


CREST = 4.0
"""Numbers beyond this multiple of the root mean square widen the scale, see :func:`normal_scale`."""


def normal_levels(bits: int) -> tuple[int, ...]:
    """The 2^bits levels in ascending order.

    Raises:
        ValueError: there are none for ``bits``.

    Example:
        >>> normal_levels(3)
        (-114, -71, -40, -13, 13, 40, 71, 114)
    """
    if bits not in _POSITIVE:
        raise ValueError(f"normal levels have {WIDTHS[0]} to {WIDTHS[-1]} bits, got {bits}")
    positive = _POSITIVE[bits]
    return (*(-level for level in reversed(positive)), *positive)


def normal_scale(groups: Tensor, bits: int) -> Tensor:
    """The scale that is best for normal numbers with the root mean square of each group, but not for less than its
    largest number over :data:`CREST`.

    Inputs of bundled:emoji-t2i (calibration rows, one scale per token), SQNR in dB:

        bits                                          2      3      4      6
        rotated: uniform, asymmetric               5.06  12.35  18.99  31.44
        rotated: root mean square alone            9.26  14.57  20.19  31.76
        rotated: with the limit                    9.26  14.57  20.20  31.84
        as they are: uniform, asymmetric           5.17  11.59  17.70  30.20
        as they are: root mean square alone        7.79  12.30  16.71  24.97
        as they are: with the limit                7.52  12.76  18.14  30.22

    A fixed part of the largest number does as well on rotated inputs (20.4 dB with 0.9 of it at 4 bits), but the best
    part depends on the bits and on the number of channels: 0.5 at 2 bits, 0.7 at 3, 1.0 at 6.

    Args:
        groups: float32 [..., n].

    Returns:
        float32 [...]; 0 for a group of zeros, NaN for a group with NaN or Inf.
    """
    largest = torch.linalg.vector_norm(groups, float("inf"), dim=-1)
    # Squares of numbers relative to the largest one neither overflow nor underflow.
    unit = groups / torch.where(largest > 0, largest, 1.0)[..., None]
    rms = torch.linalg.vector_norm(unit, dim=-1) * groups.shape[-1] ** -0.5
    return UNIT_SCALE[bits] * largest * rms.clamp_min(1 / CREST)


def nearest_level(values: Tensor, bits: int) -> Tensor:
    """The nearest level of each number, int8; of two equally near ones the lower one.

    Args:
        values: in units of the scale, float32, any shape. The level of NaN is arbitrary.
    """
    # A cell ends halfway between two integers, so ceil(2 v), which is exact, decides. The table is faster than a
    # search: on a CPU ten times faster than torch.bucketize.
    cells = torch.mul(values, 2.0).ceil_().clamp_(-2 * _LARGEST, 2 * _LARGEST).nan_to_num_(0.0)
    return _look_up("cells", bits, cells.to(torch.int32).add_(2 * _LARGEST))


def indices(levels: Tensor, bits: int) -> Tensor:
    """The position of each level in the table minus 2^(bits-1), which ``pack`` stores: int8, same shape.

    Raises:
        ValueError: a number is not a level.
    """
    found = _look_up("indices", bits, levels.to(torch.int32).add_(128))
    if bool((found == _NO_LEVEL).any()):
        bad = int(levels[found == _NO_LEVEL][0])
        raise ValueError(f"codes must be among the {2**bits} normal levels of {bits} bits, got {bad}")
    return found


def from_indices(found: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`indices`, int8."""
    return _look_up("levels", bits, found.to(torch.int32).add_(2 ** (bits - 1)))


def from_bytes(packed: Tensor, bits: int) -> Tensor:
    """The levels of packed indices of 2 or 4 bits: int8 [R, W 8 / bits] of uint8 [R, W], by one look-up a byte."""
    return _look_up("bytes", bits, packed.to(torch.int32)).view(torch.int8)


def warm(bits: int, device: torch.device) -> None:
    """Fills the tables of a device, so that a layer can be compiled before its first call.

    The compiler treats them as constants, see ``ditq.numerics.hadamard``.
    """
    for name in ("cells", "levels", *(["bytes"] if bits in (2, 4) else [])):
        _key(name, bits, device)


_LARGEST = 127
_NO_LEVEL = 127  # indices have at most 6 bits

_tensors: dict[str, Tensor] = {}


def _look_up(name: str, bits: int, index: Tensor) -> Tensor:
    """The table at every ``index`` (int32, any shape). index_select is ten times faster than indexing."""
    table = _tensors[_key(name, bits, index.device)]
    return table.index_select(0, index.flatten()).view(index.shape)


def _key(name: str, bits: int, device: torch.device) -> str:
    key = f"{name} {bits} {device}"
    _tensors[key] = _table(name, bits, device)
    return key


_key._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in ditq.numerics.hadamard


@cache
def _table(name: str, bits: int, device: torch.device) -> Tensor:
    """Made outside of inference mode: inference tensors cannot be used in training later (LoRA)."""
    levels = normal_levels(bits)
    with torch.inference_mode(False):
        codes = torch.tensor(levels, dtype=torch.int8, device="cpu")
        if name == "levels":
            out = codes
        elif name == "cells":  # the level of every ceil(2 v)
            ends = (codes[1:].double() + codes[:-1].double()) / 2
            values = torch.arange(-2 * _LARGEST, 2 * _LARGEST + 1, device="cpu").double() / 2
            out = codes[torch.bucketize(values, ends)]
        elif name == "indices":  # of every integer from -128
            out = torch.full((256,), _NO_LEVEL, dtype=torch.int8, device="cpu")
            out[codes.int() + 128] = torch.arange(2**bits, device="cpu").sub(2 ** (bits - 1)).to(torch.int8)
        else:  # "bytes": the levels of a byte's indices, as one number of 16 or 32 bits, the first in the lowest byte
            byte = torch.arange(256, device="cpu")
            parts = [(byte >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
            out = codes[torch.stack(parts, 1)].view(torch.int16 if bits == 4 else torch.int32)[:, 0].contiguous()
        return out.to(device)
