"""Tiles measured on this GPU, in a file; without a measurement the table of ``tiles.py`` applies.

Tuning is explicit, by :func:`tune` (``benchmarks/gpu/run.py --tune 3`` calls it), so that it neither delays a first
image nor disturbs a recorded graph. Products only read its results.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditq.engines.triton.tiles import LARGEST, Tile, Work, architecture, bucket, tile_for, tiles
from ditq.files import write_text
from ditq.folders import cache_root

GAIN = 1.03
"""A tile must be faster than the one of the table by this factor."""

_MORE: dict[int, tuple[Tile, ...]] = {
    80: (Tile(128, 64, 128, 4, 3), Tile(64, 128, 64, 4, 4)),
    89: (Tile(128, 64, 64, 4, 3), Tile(64, 128, 64, 4, 3)),
    90: (Tile(128, 256, 128, 8, 3), Tile(128, 128, 128, 8, 4), Tile(256, 128, 64, 8, 4)),
}
"""Further candidates besides the tiles of the table; the tests compile them too."""


def candidates(capability: int, work: Work) -> tuple[Tile, ...]:
    """The tiles that may be chosen for a product without groups."""
    own = architecture(capability)
    every = (*(tile for _, tile in tiles(capability, False)), *_MORE[own])
    return tuple(tile for tile in every if LARGEST[work][own] >= tile.BM * tile.BN)


def key(m: int, n: int, k: int, bits: int, work: Work) -> str:
    """The key of a product in the file; 0 bits are int8 codes that are not packed."""
    return f"{bucket(m)} x {n} x {k}, {bits} bits, {work}"


def path(capability: int) -> Path:
    """The file for GPUs of this compute capability."""
    return cache_root() / "triton" / f"tiles-sm{capability}.json"


@cache
def known(capability: int) -> dict[str, Tile]:
    """The tiles in the file. A file that cannot be read is ignored with a warning; invalid entries are skipped."""
    file = path(capability)
    if not file.exists():
        return {}
    try:
        entries = json.loads(file.read_text())["tiles"]
        found = {name: Tile(*values) for name, values in entries.items()}
        allowed = {work: set(candidates(capability, work)) for work in LARGEST}
        return {name: tile for name, tile in found.items() if tile in allowed[_work(name)]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"Measured tiles in {file} are not used: {error}. Delete the file to remove this warning.", stacklevel=2
        )
        return {}


def _work(name: str) -> Any:
    return name.rpartition(", ")[2]


def best_tile(m: int, n: int, k: int, bits: int, capability: int, work: Work) -> Tile:
    """The tile of a product without groups: the measured one, or the one of the table."""
    return known(capability).get(key(m, n, k, bits, work)) or tile_for(m, n, capability, None, work)


def tune(
    products: Iterable[tuple[int, int, int, int, Work]],
    capability: int,
    run: Callable[[tuple[int, int, int, int, Work], Tile], tuple[Tensor, float]],
    enough: Callable[[], bool] = lambda: False,
) -> dict[str, Tile]:
    """Measures products (M, N, K, bits, work), and adds tiles that are faster than the table's to the file.

    Args:
        run: returns the output and the milliseconds of a product with a tile.
        enough: called before each product; True ends the tuning.

    Returns:
        The tiles that were added.

    Raises:
        RuntimeError: a graph is being recorded.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tiles cannot be measured while a CUDA graph is recorded; tune before recording")
    found: dict[str, Tile] = {}
    for product in products:
        if enough():
            break
        m, n, k, bits, work = product
        first = tile_for(m, n, capability, None, work)
        expected, least = run(product, first)
        least /= GAIN
        for tile in candidates(capability, work):
            if tile == first:
                continue
            # A GPU with less memory or fewer registers than the largest of its architecture may refuse a tile.
            with suppress(RuntimeError):
                y, ms = run(product, tile)
                if ms < least and torch.equal(y, expected):
                    least, found[key(m, n, k, bits, work)] = ms, tile
    if found:
        write(path(capability), {"format": 1, "tiles": {**known(capability), **found}})
        known.cache_clear()
    return found


def write(file: Path, content: dict[str, Any]) -> None:
    """Writes atomically: a reader gets the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(content, indent=1))
