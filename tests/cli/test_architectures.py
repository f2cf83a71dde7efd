"""``ditq architectures``: the tables, and the page generated from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ditq import architectures
from ditq.cli.app import run
from ditq.cli.architectures import as_markdown, checkpoints, families, page
from ditq.conversion import estimate
from ditq.recipe import load

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
KNOWN = [architectures.load(name) for name in architectures.names()]


def test_page_has_the_table_of_the_files_as_they_are() -> None:
    assert as_markdown(families(KNOWN)) in PAGE.read_text(), (
        "run: ditq architectures --sizes --markdown > docs/architectures.md"
    )


@pytest.mark.slow
def test_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["architectures", "--sizes", "--markdown"]) == 0
    assert capsys.readouterr().out == PAGE.read_text()


def test_row_of_a_family() -> None:
    rows = {row["architecture"]: row for row in families(KNOWN)}
    assert rows["latte"]["quantized roles"] == [
        "spatial_attn.q/k/v/out", "cross_attn.q/k/v/out", "ffn.up/down", "temporal_attn.q/k/v/out",
    ]  # fmt: skip
    assert rows["latte"]["class"] == ["LatteTransformer3DModel"]
    assert rows["latte"]["pipeline"] == ["LattePipeline"]
    assert rows["latte"]["folds"] == "7 of 11 inputs"
    assert rows["pixart"]["tested"][:2] == ["tiny", "bundled:emoji-t2i"]
    assert rows["wan"]["guidance"] == "two calls, conditional first"
    assert "fused_out_mlp" in rows["hunyuanvideo"]["quantized roles"]


@pytest.mark.parametrize("family", KNOWN, ids=lambda a: a.name)
def test_pipeline_classes_exist(family: architectures.Architecture) -> None:
    import diffusers

    assert family.pipeline.classes or family.name == "stdit3"
    for name in family.pipeline.classes:
        own = architectures.pipeline_class(name)
        assert own.__name__ == name or hasattr(diffusers, name)


# What the papers and model cards say, in billions; 5 % for what they leave out (embedders, copies of them).
PUBLISHED = {
    "Allegro": 2.8, "CogVideoX-2b": 1.69, "CogVideoX-5b": 5.57, "HunyuanVideo": 13, "Latte-1": 1.06,
    "LTX-Video-2B": 1.92, "LTX-Video-13B": 13, "Mochi-1": 10, "PixArt-Sigma-XL/2": 0.61, "Wan2.1-T2V-1.3B": 1.42,
    "Wan2.1-T2V-14B": 14.3, "Wan2.1-I2V-14B": 16.4, "Wan2.2-TI2V-5B": 5,
    "STDiT-XL/2 (Open-Sora v1.0)": 0.76, "STDiT3-XL/2 (Open-Sora v1.2)": 1.2,
}  # fmt: skip


@pytest.mark.slow
def test_every_linear_at_real_size_has_a_role_and_memory_shrinks() -> None:
    rows = checkpoints(KNOWN)
    assert {row["architecture"] for row in rows} == set(architectures.names())
    for row in rows:
        whole, w8, w4 = (float(row[kind].split()[0]) for kind in ("16 bit", "W8A8", "W4A8"))
        assert w4 < w8 < whole
        parameters = float(row["parameters"].split()[0])
        assert whole == pytest.approx(2 * parameters, rel=0.02)
        if row["checkpoint"] in PUBLISHED:
            assert parameters == pytest.approx(PUBLISHED[row["checkpoint"]], rel=0.05)


QUANTIZED_EMBEDDER = ("roles.embedder={weights: {bits: 8, granularity: channel}}", "keep=[modulation, final]")


@pytest.mark.parametrize("name", ["latte", "wan"])  # wan keeps some parameters in float32
@pytest.mark.parametrize("overrides", [(), QUANTIZED_EMBEDDER])
def test_estimate_is_what_quantization_makes(name: str, overrides: tuple[str, ...]) -> None:
    from helpers import tiny_model

    import ditq

    arch = architectures.load(name)
    with torch.device("meta"):
        empty = arch.model_class()(**arch.example.config)  # type: ignore[union-attr]
    planned = estimate(empty, arch, load("rtn-w4a8").override(overrides))
    done = ditq.quantize(tiny_model(name), "rtn-w4a8", overrides=overrides).plan
    assert (planned.float32_parameters > 0) == (name == "wan")
    assert planned.float32_parameters == done.float32_parameters
    assert planned.memory() == done.memory()
    assert [(x.name, x.weight, x.activation) for x in planned] == [(x.name, x.weight, x.activation) for x in done]


def test_verb_prints_rows_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["architectures", "--json"]) == 0
    assert [row["architecture"] for row in json.loads(capsys.readouterr().out)] == architectures.names()


def test_notes_are_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditq.cli.architectures.checkpoints", lambda known: [{"checkpoint": "x"}])
    text = page(KNOWN)
    for family in KNOWN:
        assert not family.note or f"- **{family.name}**: {family.note}\n" in text
