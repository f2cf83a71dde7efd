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


@pytest.mark.parametrize("name", ["pixart", "stdit", "dit", "latte", "cogvideox"])
def test_whole_transformers_take_their_calls(name: str) -> None:
    """The published sizes, with one block, without numbers."""
    from _transformers import wholes

    whole, device = wholes()[name], torch.device("meta")
    model = whole.build(device, torch.bfloat16, dry=False, blocks=1)
    call = whole.call(device, torch.bfloat16, dry=False)
    with torch.no_grad():
        y = model(**call, return_dict=False)[0]
    assert y.shape[0] == call["hidden_states"].shape[0]
    assert y.shape[-2:] == call["hidden_states"].shape[-2:]
    assert y.dtype == torch.bfloat16
    assert whole.depth[2] <= whole.depth[1]
    assert all(len(model.get_submodule(stack)) == 1 for stack in whole.blocks)


def test_rows_of_tiny_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a dry run does for each model: every variant that needs no compiler and no card."""
    from triton_helpers import why_not

    if (reason := why_not()) is not None:
        pytest.skip(reason)
    import run
    from _time import Clock
    from _transformers import wholes

    from ditq import engines
    from ditq.engines.triton.engine import TritonEngine

    monkeypatch.setattr(TritonEngine, "why_unavailable", lambda self: None)
    monkeypatch.setattr(TritonEngine, "why_unsupported", lambda *_: None)
    monkeypatch.setattr(TritonEngine, "prove", lambda self, device: None)
    engines.registry.forget()
    eager = {name: variant for name, variant in run.VARIANTS.items() if variant.how != "compiled"}
    monkeypatch.setattr(run, "VARIANTS", eager)
    this = run.Run(torch.device("cpu"), True, Clock(60), tmp_path)
    try:
        with engines.use_engine("triton"):
            rows = run.kept(this, "dit", run.transformer_rows(this, wholes()["dit"], brief=False))
    finally:
        engines.registry.forget()
    assert [r.name for r in rows] == list(eager)
    assert {r.status for r in rows} == {"ok"}
    errors = {r.name: r.relative_error for r in rows}
    assert errors["bf16"] == 0
    assert 0 < errors["ditq W8A8"] < errors["ditq W4A8"] < 0.5
    assert len((tmp_path / "gpu_rows.jsonl").read_text().splitlines()) == len(rows)


def test_no_time_left_is_said(tmp_path: Path) -> None:
    import run
    from _time import Clock
    from _transformers import wholes

    this = run.Run(torch.device("cpu"), True, Clock(-1), tmp_path)
    rows = list(run.transformer_rows(this, wholes()["dit"], brief=True))
    assert {r.status for r in rows} == {run.NO_TIME}


def test_what_was_to_be_reached() -> None:
    import run
    from _time import Times

    def timed(name: str, ms: float) -> object:
        return run.row(name, Times(ms, ms, 0.0, 3))

    steps = {"PixArt": [
        timed("bf16", 34), timed("bf16 compiled", 26), timed("ditq W8A8", 20), timed("ditq W8A8 compiled", 22),
        timed("ditq W8A8 rotated by H128", 30), timed("ditq W4A8", 25), run.Row("torchao int8 compiled", "missing"),
    ]}  # fmt: skip
    shares = [run.with_share(timed(f"{m} x 8 x 8 ditq W8A8", 1), share) for m, share in ((4096, 0.8), (100, 0.1))]
    found = {text: (value, enough) for text, value, enough in run.verdicts(steps, shares, [])}
    assert found["PixArt: W8A8 against bf16"] == (1.7, 1.7)
    assert found["PixArt: W8A8 against bf16 compiled"] == (1.3, 1.3)
    assert found["PixArt: W8A8 against torchao int8 compiled"][0] is None
    assert found["PixArt: W4A8 against bf16"] == (34 / 25, 1.4)
    assert found["PixArt: W8A8 over W8A8 rotated"][0] == pytest.approx(2 / 3)
    assert found["PixArt: compiled over eager fused (1.05: keep the fused one)"] == (1.1, 1.05)
    (share,) = (value for text, (value, _) in found.items() if text.startswith("W8A8 products"))
    assert share == 0.8
