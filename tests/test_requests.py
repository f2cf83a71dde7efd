"""Wrong arguments of the verbs: one message before the work."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

import ditq
from ditq.errors import UsageError
from ditq.recipe import load
from ditq.requests import check_prompts, seed_of
from ditq.sampling import Sampling


@pytest.mark.parametrize("seed", [-1, 2**70])
def test_a_seed_out_of_range_is_one_message(seed: int) -> None:
    for use in (lambda: seed_of(load("rtn-w8a8"), seed), lambda: Sampling(seed)):
        with pytest.raises(UsageError, match=f"seed must be 0 to .*got {seed}"):
            use()


def test_an_open_file_is_no_list_of_prompts() -> None:
    with pytest.raises(UsageError, match="got an open file: pass prompts="):
        check_prompts(io.StringIO("a tree\n"))  # type: ignore[arg-type]


def test_export_of_a_hub_id_says_how_to_get_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="export reads folders only.*hf download owner/name"):
        ditq.export("owner/name", tmp_path / "out")
