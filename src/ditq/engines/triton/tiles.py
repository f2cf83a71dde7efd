"""Tile sizes of the matrix products. A fixed table needs no tuning at the first image, and graphs can be captured.

Their speed is not measured yet. ``tests/engines/test_triton_compile.py`` shows that they use the matrix instructions,
spill no registers and fit in the shared memory of the GPU. Tiles are wide if M and N give every multiprocessor at
least one, and smaller otherwise.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

ARCHITECTURES = (80, 89, 90)
"""Compute capabilities with a table; other GPUs use the table of the highest one below theirs."""

SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory available to one program."""

Work = Literal["plain", "more", "most"]
"""The work besides products and rescaling, by its need of registers. ``plain``: none. ``more``: 4 bits to unpack, a
residual, a gate with one row per tile, a low-rank branch. ``most``: zero points of the input, or a gate with several
samples per tile."""

LARGEST: dict[Work, dict[int, int]] = {
    "plain": {80: 2**30, 89: 2**30, 90: 2**30},
    "more": {80: 128 * 128, 89: 128 * 128, 90: 128 * 128},
    "most": {80: 128 * 128, 89: 128 * 128, 90: 64 * 128},
}
"""Outputs of the largest tile that does this work without spilling registers."""


class Tile(NamedTuple):
    """One program computes BM tokens x BN outputs, BK input features at a time."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


# By architecture, then in descending order: (smallest number of 128 x 128 tiles, tile to use).
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

# Float32 sums of groups need additional registers.
_GROUPED: dict[int, tuple[tuple[int, Tile], ...]] = {
    80: ((108, Tile(128, 64, 64, 8, 3)), (0, Tile(32, 64, 64, 4, 3))),
    89: ((128, Tile(128, 64, 64, 8, 3)), (0, Tile(32, 64, 64, 4, 3))),
    90: ((66, Tile(64, 128, 128, 8, 3)), (0, Tile(32, 64, 128, 4, 4))),
}


def tiles(capability: int, grouped: bool) -> tuple[tuple[int, Tile], ...]:
    """The table of a GPU of this compute capability (86 is 8.6).

    Raises:
        ValueError: the GPU is older than every table.
    """
    return (_GROUPED if grouped else _TABLE)[architecture(capability)]


def architecture(capability: int) -> int:
    """The compute capability of the table that a GPU uses.

    Raises:
        ValueError: the GPU is older than every table.
    """
    if capability < ARCHITECTURES[0]:
        raise ValueError(f"compute capability must be at least {ARCHITECTURES[0]}, got {capability}")
    # 8.6 and 8.7 have at most the shared memory of 8.9.
    return 80 if capability < 86 else 89 if capability < 90 else 90


def tile_for(m: int, n: int, capability: int, group: int | None = None, work: Work = "plain") -> Tile:
    """The tile for a product of M x N outputs.

    M is rounded up to a power of two, so that similar resolutions share a program.

    Args:
        group: input features that share scales; None: all.
    """
    m = bucket(m)
    count = -(-m // 128) * -(-n // 128)
    most = LARGEST[work][architecture(capability)]
    table = tiles(capability, group is not None)
    tile = next(tile for least, tile in table if count >= least and most >= tile.BM * tile.BN)
    if group is None:
        return tile
    # An integer product needs at least 32 features.
    return tile._replace(BK=max(32, min(tile.BK, 1 << (group - 1).bit_length())))


def bucket(m: int) -> int:
    """The smallest power of two that is at least ``m``."""
    return 1 << max(0, m - 1).bit_length()
