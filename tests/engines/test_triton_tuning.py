"""Tiles that were measured: chosen only where right and faster, kept, read back, and never trusted blindly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_helpers import why_not

if (reason := why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)

from ditq.engines.triton import tuning
from ditq.engines.triton.tiles import ARCHITECTURES, LARGEST, SHARED_MEMORY, Tile, Work, tile_for

PRODUCT = (4000, 1152, 4608, 8, "plain")
FAST = Tile(128, 128, 128, 8, 4)


@pytest.fixture(autouse=True)
def _own_file(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DITQ_CACHE", str(tmp_path))
    tuning.known.cache_clear()
    yield
    tuning.known.cache_clear()


def card(wrong: tuple[Tile, ...] = (), refused: tuple[Tile, ...] = (), gain: float = 2) -> Any:
    """A card on which FAST takes a part of the time of the others; some tiles give wrong numbers, or do not run."""

    def run(product: tuple[int, int, int, int, Work], tile: Tile) -> tuple[Tensor, float]:
        if tile in refused:
            raise RuntimeError("out of resources: shared memory")
        return torch.tensor([float(tile in wrong)]), 1 / gain if tile == FAST else 1.0

    return run


def test_a_faster_tile_is_found_kept_and_used() -> None:
    first = tile_for(4000, 1152, 90)
    assert tuning.best_tile(*PRODUCT[:4], 90, "plain") == first
    assert tuning.tune([PRODUCT], 90, card()) == {"4096 x 1152 x 4608, 8 bits, plain": FAST}
    assert tuning.best_tile(*PRODUCT[:4], 90, "plain") == FAST
    assert tuning.best_tile(3000, 1152, 4608, 8, 90, "plain") == FAST  # the same bucket
    assert tuning.best_tile(5000, 1152, 4608, 8, 90, "plain") != FAST
    assert tuning.best_tile(*PRODUCT[:4], 89, "plain") == tile_for(4000, 1152, 89)


@pytest.mark.parametrize("machine", [card(wrong=(FAST,)), card(refused=(FAST,)), card(gain=1.01)])
def test_wrong_refused_and_hardly_faster_tiles_are_not(machine: Any) -> None:
    assert tuning.tune([PRODUCT], 90, machine) == {}
    assert not tuning.path(90).exists()


def test_what_was_found_before_stays() -> None:
    tuning.tune([PRODUCT], 90, card())
    tuning.tune([(64, 1152, 1152, 8, "plain")], 90, card())
    assert len(json.loads(tuning.path(90).read_text())["tiles"]) == 2


def test_it_ends_when_there_is_no_time() -> None:
    assert tuning.tune([PRODUCT], 90, card(), lambda: True) == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"tiles": {"a, plain": [1, 2]}}', '{"tiles": {"a, plain": 3}}', "{}"])
def test_a_damaged_file_counts_as_absent(text: str) -> None:
    tuning.path(90).parent.mkdir(parents=True)
    tuning.path(90).write_text(text)
    with pytest.warns(UserWarning, match="not used"):
        assert tuning.best_tile(*PRODUCT[:4], 90, "plain") == tile_for(4000, 1152, 90)


def test_tiles_that_nobody_has_compiled_are_not_taken_from_a_file() -> None:
    tuning.path(90).parent.mkdir(parents=True)
    entries = {tuning.key(*PRODUCT): (512, 512, 512, 8, 9), "x, more": (256, 128, 128, 8, 3)}
    tuning.path(90).write_text(json.dumps({"tiles": entries}))
    assert tuning.known(90) == {}


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("work", LARGEST)
def test_candidates_fit(capability: int, work: Work) -> None:
    found = tuning.candidates(capability, work)
    assert tile_for(4096, 4608, capability, None, work) in found
    for tile in found:
        # int8 codes of both sides, as often as there are stages.
        assert (tile.BM + tile.BN) * tile.BK * tile.stages <= SHARED_MEMORY[capability] * 1.15
        assert LARGEST[work][capability] >= tile.BM * tile.BN
