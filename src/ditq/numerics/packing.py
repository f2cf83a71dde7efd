"""Packing: codes of ``bits`` bits as a little-endian bit stream per row, without gaps between codes.

Codes are stored unsigned, u = code + 2^(bits-1). Bit j of code i is bit (i bits + j) mod 8 of byte
(i bits + j) // 8: the first code is in the lowest bits. Rows are padded with zero bits to whole bytes.
4-bit codes are therefore two to a byte, the first in the low nibble. Of normal levels u is the position among the
2^bits levels, in ascending order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ditq.numerics import codebook
from ditq.numerics.grid import Grid, code_range


def packed_bytes(columns: int, bits: int) -> int:
    """The number of bytes of a row of ``columns`` codes, ceil(columns bits / 8).

    Raises:
        ValueError: ``bits`` is not 2 to 8.
    """
    code_range(bits, symmetric=False)
    return (columns * bits + 7) // 8


def pack(codes: Tensor, grid: Grid | int) -> Tensor:
    """Packs int8 [R, K] into uint8 [R, ceil(K bits / 8)].

    Args:
        grid: of the codes; the number of bits stands for uniform levels.

    Raises:
        ValueError: ``codes`` is not an int8 matrix, or contains a code that does not fit in ``bits`` bits, or that is
            not a level of the grid.
    """
    bits, normal = (grid, False) if isinstance(grid, int) else (grid.bits, grid.levels == "normal")
    bottom, top = code_range(bits, symmetric=False)
    if codes.ndim != 2 or codes.dtype != torch.int8:
        raise ValueError(f"codes must be int8 [R, K], got {codes.dtype} {tuple(codes.shape)}")
    rows, columns = codes.shape
    width = packed_bytes(columns, bits)
    if codes.numel() == 0:
        return torch.zeros(rows, width, dtype=torch.uint8, device=codes.device)
    if normal:
        codes = codebook.indices(codes, bits)
    low, high = (int(end) for end in codes.aminmax())
    if low < bottom or high > top:
        raise ValueError(f"codes must be in [{bottom}, {top}] for {bits} bits, got [{low}, {high}]")
    if bits == 8:
        return codes.view(torch.uint8) ^ 0x80
    count, size = _period(bits)
    unsigned = F.pad((codes - bottom).view(torch.uint8), (0, -columns % count)).view(rows, -1, count)
    packed = torch.zeros(rows, unsigned.shape[1], size, dtype=torch.uint8, device=codes.device)
    for i in range(count):
        byte, shift = divmod(i * bits, 8)
        packed[..., byte] |= unsigned[..., i] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= unsigned[..., i] >> (8 - shift)
    return packed.view(rows, -1)[:, :width].contiguous()


def unpack(packed: Tensor, grid: Grid | int, columns: int) -> Tensor:
    """The inverse of :func:`pack`: int8 [R, columns], contiguous.

    It runs in the forward pass of layers, so 8, 4 and 2 bits have fast paths of a few passes over contiguous memory.

    Args:
        grid: of the codes; the number of bits stands for uniform levels.

    Raises:
        ValueError: ``packed`` is not uint8 [R, ceil(columns bits / 8)].
    """
    bits, normal = (grid, False) if isinstance(grid, int) else (grid.bits, grid.levels == "normal")
    width = packed_bytes(columns, bits)
    if packed.ndim != 2 or packed.dtype != torch.uint8 or packed.shape[1] != width:
        raise ValueError(
            f"packed must be uint8 [R, {width}] for {columns} columns of {bits} bits, "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )
    if normal:
        if bits in (4, 2):
            return codebook.from_bytes(packed, bits)[:, :columns].contiguous()
        return codebook.from_indices(_unpack_any(packed, bits)[:, :columns].contiguous(), bits)
    if bits == 8:
        return (packed ^ 0x80).view(torch.int8)
    if bits in (4, 2):
        codes = (_spread4(packed) if bits == 4 else _spread2(packed)).view(torch.int8)
        return codes.sub_(2 ** (bits - 1))[:, :columns].contiguous()
    return _unpack_any(packed, bits)[:, :columns].contiguous()


def _period(bits: int) -> tuple[int, int]:
    """The number of codes, and of bytes, after which a code starts at the lowest bit of a byte again."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def _spread4(packed: Tensor) -> Tensor:
    """Spreads the nibbles of a byte to the bytes of an int16, which are in order on little-endian hosts."""
    wide = packed.to(torch.int16)
    return wide.bitwise_or_(wide << 4).bitwise_and_(0x0F0F)


def _spread2(packed: Tensor) -> Tensor:
    """Spreads the bit pairs of a byte to the bytes of an int32, by halving twice."""
    wide = packed.to(torch.int32)
    wide.bitwise_or_(wide << 12).bitwise_and_(0x000F000F)
    return wide.bitwise_or_(wide << 6).bitwise_and_(0x03030303)


def _unpack_any(packed: Tensor, bits: int) -> Tensor:
    """int8 [R, >= columns] for any width, by the position of a code in its period; stays in 8-bit integers."""
    rows, width = packed.shape
    count, size = _period(bits)
    stream = F.pad(packed, (0, -width % size)).view(rows, -(-width // size), size)
    codes = torch.empty(rows, stream.shape[1], count, dtype=torch.uint8, device=packed.device)
    for i in range(count):
        byte, shift = divmod(i * bits, 8)
        value = stream[..., byte] >> shift
        if shift + bits > 8:
            value |= stream[..., byte + 1] << (8 - shift)  # bits beyond the eighth are dropped, as intended
        codes[..., i] = value & (2**bits - 1)
    return codes.flatten(1).view(torch.int8).sub_(2 ** (bits - 1))
