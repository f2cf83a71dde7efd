"""Tile sizes of the matrix products: a table, so that no first image waits for tuning and graphs can be captured.

Not measured yet: starting points of which ``tests/engines/test_triton_compile.py`` has shown that they reach the
matrix instructions, spill no registers and fit in the shared memory of the card. Wide tiles where M and N give every
multiprocessor one, small ones below.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

ARCHITECTURES = (80, 89, 90)
"""Compute capabilities that have an own table; a card takes that of the highest one below it."""

SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one program may use."""

Work = Literal["plain", "more", "most"]
"""What there is to do beside products and rescaling, which takes registers: nothing; 4 bits to unpack, a residual, a
gate that is one row in a tile, a branch of low rank; or zero points of the input, a gate of several samples a tile."""

LARGEST: dict[Work, dict[int, int]] = {
    "plain": {80: 2**30, 89: 2**30, 90: 2**30},
    "more": {80: 128 * 128, 89: 128 * 128, 90: 128 * 128},
    "most": {80: 128 * 128, 89: 128 * 128, 90: 64 * 128},
}
"""Outputs of the largest tile that does it without spilling registers."""


class Tile(NamedTuple):
    """One program computes BM tokens x BN outputs, BK input features at a time."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


# By architecture, then from the largest number of 128 x 128 tiles down: (at least as many tiles, tile).
_TABLE: dict[int, tuple[tuple[int, Tile], ...]] = {
    80: (
        (108, Tile(128, 128, 64, 8, 3)),
        (27, Tile(64, 64, 128, 4, 3)),
        (0, Tile(32, 64, 128, 4, 4)),
    ),
    89: (
        (128, Tile(128, 128, 64, 8, 3)),
        (32, Tile(64, 64, 128, 4, 3)),
        (0, Tile(32, 64, 128, 4, 3)),
    ),
    90: (
        (264, Tile(256, 128, 128, 8, 3)),
        (66, Tile(128, 128, 128, 8, 3)),
        (17, Tile(64, 128, 128, 8, 3)),
        (0, Tile(32, 64, 128, 4, 4)),
    ),
}

# Sums of groups in float32 need registers of their own.
_GROUPED: dict[int, tuple[tuple[int, Tile], ...]] = {
    80: ((108, Tile(128, 64, 64, 8, 3)), (0, Tile(32, 64, 64, 4, 3))),
    89: ((128, Tile(128, 64, 64, 8, 3)), (0, Tile(32, 64, 64, 4, 3))),
    90: ((66, Tile(64, 128, 128, 8, 3)), (0, Tile(32, 64, 128, 4, 4))),
}


def tiles(capability: int, grouped: bool) -> tuple[tuple[int, Tile], ...]:
    """The table of a card of this compute capability (86 is 8.6).

    Raises:
        ValueError: it is older than any that has a table.
    """
    return (_GROUPED if grouped else _TABLE)[architecture(capability)]


def architecture(capability: int) -> int:
    """That of the table for a card.

    Raises:
        ValueError: the card is older than any that has one.
    """
    if capability < ARCHITECTURES[0]:
        raise ValueError(f"compute capability must be at least {ARCHITECTURES[0]}, got {capability}")
    # 8.6 and 8.7 have no more shared memory than 8.9.
    return 80 if capability < 86 else 89 if capability < 90 else 90


def tile_for(m: int, n: int, capability: int, group: int | None = None, work: Work = "plain") -> Tile:
    """The tile for a product of M x N outputs.

    M counts as the next power of two, so that resolutions that differ little share a program.

    Args:
        group: input features that share scales, None for all.
    """
    m = bucket(m)
    count = -(-m // 128) * -(-n // 128)
    most = LARGEST[work][architecture(capability)]
    table = tiles(capability, group is not None)
    tile = next(tile for least, tile in table if count >= least and most >= tile.BM * tile.BN)
    if group is None:
        return tile
    # An integer product takes at least 32 features.
    return tile._replace(BK=max(32, min(tile.BK, 1 << (group - 1).bit_length())))


def bucket(m: int) -> int:
    """The power of two from ``m`` on."""
    return 1 << max(0, m - 1).bit_length()
