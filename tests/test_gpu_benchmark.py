"""What of the GPU benchmark runs without one: shapes, statistics, the table, and the refusal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_card_it_says_why_it_cannot_run() -> None:
    done = subprocess.run([sys.executable, FOLDER / "run.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("This benchmark measures the Triton engine, which cannot run here: ")
    assert not done.stdout


def test_products_are_those_of_the_models_and_stand_once() -> None:
    from _shapes import MODELS, products, widths

    found = products()
    assert len({p[:3] for p in found}) == len(found)
    assert sum(len(p.where) for p in found) == 3 * len(MODELS)
    assert all(p.k % 16 == p.n % 16 == 0 for p in found)
    up = next(p for p in found if "FLUX 1024 up" in p.where)
    assert up.operations == 2 * 4608 * 3072 * 12288
    assert (32768, 1152, 4608) in widths()
    assert len(set(widths())) == len(widths())


def test_summary_of_times() -> None:
    from _time import summary

    assert summary([3.0, 1.0, 2.0, 5.0, 4.0]) == (3.0, 1.0, 2.0, 5)
    assert summary([7.0]) == (7.0, 7.0, 0.0, 1)
    with pytest.raises(ValueError, match="nothing to summarize"):
        summary([])


def test_arguments_fill_the_cache_twice() -> None:
    from _time import copies

    assert copies(10, 50) == 10
    assert copies(40, 50) == 3
    assert copies(1000, 50) == 1
    assert copies(1, 50, most=4) == 4


def test_the_clock_runs_out() -> None:
    from _time import Clock

    now = 100.0
    clock = Clock(2, now=lambda: now)
    assert clock.left() == 120
    now = 221.0
    assert clock.left() == -1


def test_shares_of_the_ceiling_are_in_the_table() -> None:
    import run
    from _measure import table
    from _time import Times

    row = run.with_share(run.row("64 x 64 x 64 ditq W8A8", Times(2.0, 1.5, 0.1, 30)), 0.715)
    text = table([row, run.Row("64 x 64 x 64 bf16", run.NO_TIME)], run.CEILING)
    assert "0.71" in text
    assert "no time left" in text


def test_rivals_are_close_to_the_linear_that_they_replace() -> None:
    from _rivals import Int8Linear, replaced

    model = torch.nn.ModuleDict({"blocks": torch.nn.Linear(64, 32), "head": torch.nn.Linear(64, 32)})
    x = torch.randn(20, 64)
    expected = model["blocks"](x)
    replaced(model, Int8Linear, "blocks")
    assert type(model["head"]) is torch.nn.Linear
    y = model["blocks"](x)
    assert 1e-4 < (y - expected).norm() / expected.norm() < 0.02
