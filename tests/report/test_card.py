"""The model card: front matter that the Hub accepts, and text that stays text."""

import re

import made_up
import pytest
import yaml
from huggingface_hub import ModelCard

from ditq.report.card import MARK, card
from ditq.report.document import Report

NASTY = "a | b ]( `c` <script>alert(1)</script>\n# d: 'e' \"f\" --- *g*"


@pytest.fixture
def report() -> Report:
    return made_up.report()


def parts(text: str) -> tuple[dict, str]:
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_front_matter_is_what_the_hub_reads(report: Report) -> None:
    data = ModelCard(card(report, report.models[1])).data
    assert data.library_name == "diffusers"
    assert data.base_model == "emoji-t2i"
    assert data.base_model_relation == "quantized"
    assert data.tags == ["ditq", "quantized", "w4a8"]
    assert data.license is None
    results = {r.metric_type: (r.metric_value, r.metric_name) for r in data.eval_results}
    assert results["psnr_db"] == (29.42, "PSNR (dB)")
    assert results["kid"] == (0.0151, "KID (emoji-classifier)")
    assert set(results) == set(report.models[1].metrics)
    assert data.eval_results[0].dataset_name == "30 prompts, seeds 0 to 29, real images: emoji artwork"


def test_table_stands_beside_the_reference(report: Report) -> None:
    _, body = parts(card(report, report.models[1]))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in body.splitlines() if line.startswith("|")]
    table = {row[0]: row[1:] for row in rows}
    assert table["PSNR (dB)"] == ["higher", "is the reference", "29.4 (28.8 to 30.1)", "", "30"]
    assert table["KID (emoji-classifier)"] == [
        "lower", "0.0131 (0.0090 to 0.0172)", "0.0151 (0.0108 to 0.0194)", "worse", "30"
    ]  # fmt: skip
    assert table["Recall (emoji-classifier)"][3] == "no measurable difference"


def test_body_says_what_stayed_how_to_use_and_how_to_reproduce(report: Report) -> None:
    _, body = parts(card(report, report.models[1]))
    assert body.startswith(MARK)
    assert "5.87 MB instead of 18.21 MB (0.32)" in body
    assert "80 linear layers are quantized, 3 are not: 1 embedder, 1 final, 1 modulation." in body
    assert "import ditq" in body
    assert report.command in body
    assert report.models[1].fingerprint in body
    assert "CLIPScore" in body


def test_summary_is_about_this_model(report: Report) -> None:
    _, body = parts(card(report, report.models[1]))
    assert "viditq-w4a8 takes 0.32" in body
    assert "viditq-w8a8 takes" not in body


@pytest.mark.parametrize("field", ["name", "recipe"])
def test_names_of_models_are_text(report: Report, field: str) -> None:
    model = report.models[1].model_copy(update={field: NASTY})
    front, body = parts(card(report, model))
    assert_harmless(body)
    if field == "name":
        assert front["model-index"][0]["name"] == NASTY


def test_names_of_everything_else_are_text(report: Report) -> None:
    model = report.models[1]
    model.layers[0]["role"] = NASTY
    hostile = report.model_copy(
        update={
            "summary": [NASTY],
            "command": f"ditq compare '{NASTY}' ``` ````",
            "skipped": [report.skipped[0].model_copy(update={"reason": NASTY})],
            "metrics": [info.model_copy(update={"title": NASTY}) for info in report.metrics],
            "reference": report.reference.model_copy(update={"name": NASTY}),
            "sampler": {NASTY: NASTY},
        }
    )
    front, body = parts(card(hostile, model))
    assert front["base_model"] == NASTY
    assert_harmless(body)
    fence, command = re.search(r"^(`{4,})console\n(.*?)\n\1$", body, re.DOTALL | re.MULTILINE).groups()
    assert fence == "`````"
    assert command == hostile.command


def assert_harmless(body: str) -> None:
    """Outside of code no HTML, no heading and no cell border came from a name."""
    prose = re.sub(r"^(`{3,})\w+\n.*?\n\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"(?<![\\`])(`+)(?!`).*?(?<!`)\1(?!`)", "", prose)
    assert not re.search(r"(?<!\\)<script", prose)
    assert not re.search(r"^# d", prose, re.MULTILINE)
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 7 for line in prose.splitlines() if line.startswith("|"))


def test_too_few_pairs_and_a_quantized_reference_are_named() -> None:
    report = made_up.without_intervals(made_up.report(prompts=1))
    report.reference.nominal_bits = {"weights": 8, "activations": 8}
    text = card(report, report.models[1])
    assert "1 prompt, seeds 0, same noise" in text
    assert "paired difference to W8A8" in text
    assert "| metric | better | W8A8 |" in text
    assert "(interval not available)" in text
    assert "no verdict from fewer than 3 pairs" in text
    assert "no measurable difference |" not in text
