"""The page as text: what it holds, what it escapes, what it leaves out, and that it needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import made_up
import pytest

from ditq.errors import DitqError, UsageError
from ditq.report import html
from ditq.report.document import Report, read

NASTY = "</script><script>window.hacked = 1</script> 'single' \"double\" &amp; {{ 7 * 7 }} <img src=x onerror=hack()>"


class Page(HTMLParser):
    """Elements in order as (tag, attributes), and pieces of text with the tag that came before, "" after an end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.within = ""
        self.texts: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.within = tag

    def handle_endtag(self, tag: str) -> None:
        self.within = ""

    def handle_data(self, data: str) -> None:
        self.texts.append((self.within, data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text_of(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]

    @property
    def words(self) -> str:
        shown = (text for tag, text in self.texts if tag not in ("script", "style"))
        return " ".join(" ".join(shown).split())


@pytest.fixture(scope="module")
def report() -> Report:
    return made_up.report()


@pytest.fixture(scope="module")
def text(report: Report) -> str:
    return html.render(report, made_up.pictures(report))


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def small(report: Report, **update: Any) -> Page:
    """The page of a changed report, of two prompts."""
    short = report.model_copy(update={"prompts": report.prompts[:2], "seeds": report.seeds[:2], **update})
    drawn = made_up.pictures(made_up.report(prompts=2))
    old = (made_up.report().reference, *made_up.report().models)
    names = {model.name: new.name for model, new in zip(old, (short.reference, *short.models), strict=False)}
    return Page(html.render(short, {names[name]: column for name, column in drawn.items() if name in names}))


def test_everything_that_was_measured_is_there(report: Report, page: Page) -> None:
    for sentence in report.summary:
        assert sentence in page.words
    for info in report.metrics:
        assert info.title in page.words
        assert info.about in page.words
    for expected in (
        report.title, report.date, report.command, "CLIPScore", "are not here", "DPMSolverMultistepScheduler",
        "2.13.0+cpu", "0 to 29", "emoji artwork, 885", "29.4", "28.8 to 30.1",
        "n = 30; feature network: emoji-classifier", "18.21 MB", "0.32 of 16 bit", "0.93 ×", "slower than 16 bit",
        "24 of 30 prompts: the first ones, not selected",
        "no measurable difference in 2, worse in 2 of 4 metrics", "viditq-w8a8 minus viditq-w4a8: +19.4",
        *(model.fingerprint for model in report.models), *report.prompts,
    ):  # fmt: skip
        assert expected in page.words, expected


def test_too_few_pairs_have_neither_intervals_nor_verdicts(report: Report) -> None:
    page = small(made_up.without_intervals(report), summary=[])
    assert "interval not available" in page.words
    assert "no verdict from fewer than 3 pairs" in page.words
    for word in ("measurably best", "measurably worse", "no measurable difference in", "28.8 to 30.1", "nan", "None"):
        assert word not in page.words, word


def test_a_quantized_reference_is_called_by_its_bits_everywhere(report: Report) -> None:
    reference = report.reference.model_copy(update={"nominal_bits": {"weights": 8, "activations": 8}})
    infos = [info.model_copy(update={"about": ""}) for info in report.metrics]
    models = [model.model_copy(update={"layers": []}) for model in report.models]
    page = small(report, reference=reference, metrics=infos, models=models, summary=[])
    assert "0.32 of W8A8" in page.words
    assert "slower than W8A8" in page.words
    assert page.words.count("16 bit") == 1  # layers kept in 16 bit
    assert not [a for _, a in page.elements if "16 bit" in " ".join(filter(None, a.values()))]


def test_best_is_marked_once_and_only_where_it_is_measurable(page: Page) -> None:
    assert page.words.count("measurably best") == 1


def test_every_layer_of_every_plan_is_in_its_table(report: Report, page: Page) -> None:
    rows = [a for tag, a in page.elements if tag == "th" and a.get("scope") == "row"]
    assert len(rows) == len(report.metrics) + sum(len(model.layers) for model in report.models)


def test_page_needs_nothing_else(text: str, page: Page) -> None:
    assert not page.all("base") and not page.all("iframe")
    for attributes in (a for _, a in page.elements):
        for name in ("src", "href", "action", "srcset", "data", "poster"):
            value = attributes.get(name) or ""
            assert value.startswith(("data:", "#")) or not value, value
        assert "style" not in attributes and not any(name.startswith("on") for name in attributes)
    style, script = page.text_of("style")[0], page.text_of("script")[-1]
    assert "url(" not in style and "@import" not in style
    assert not re.search(r"\b(fetch|XMLHttpRequest|import|localStorage|eval|innerHTML)\b", script)


def test_policy_allows_exactly_this_style_and_script(page: Page) -> None:
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    for kind in ("style", "script"):
        inline = page.text_of(kind)[-1]
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_page_is_small(text: str) -> None:
    assert len(text.encode()) < 2_500_000


def test_headings_are_an_outline(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert page.all("html")[0]["lang"] == "en"


def test_ids_are_unique_and_references_lead_somewhere(page: Page) -> None:
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for name in ("for", "aria-labelledby"):
            assert attributes.get(name, ids[0]) in ids
        if (attributes.get("href") or "").startswith("#"):
            assert attributes["href"][1:] in ids


def test_foreign_text_stays_text(report: Report) -> None:
    a, b = report.models
    errors = a.layer_errors.model_copy(update={"layers": [NASTY, *a.layer_errors.layers[1:]]})
    layers = [{**a.layers[0], "name": NASTY, "role": NASTY, "reason": NASTY, "balance": NASTY}, *a.layers[1:]]
    nasty = a.model_copy(
        update={
            "name": NASTY, "path": NASTY, "recipe": NASTY, "pipeline": NASTY, "fingerprint": NASTY,
            "layer_errors": errors, "layers": layers,
        }
    )  # fmt: skip
    page = small(
        report, title=NASTY, summary=[NASTY, NASTY], prompts=[NASTY, NASTY], command=NASTY, models=[nasty, b],
        reference=report.reference.model_copy(update={"name": NASTY + "2"}), sampler={NASTY: NASTY},
        skipped=[report.skipped[0].model_copy(update={"metric": NASTY, "reason": NASTY})], differences=[],
        metrics=[info.model_copy(update={"title": NASTY, "about": NASTY, "unit": NASTY}) for info in report.metrics],
        environment={"cpu": NASTY, NASTY: NASTY}, real={"name": NASTY, "n": 3}, date=NASTY,
    )  # fmt: skip
    assert len(page.all("script")) == 2
    assert not any(a.get("onerror") or a.get("src") == "x" for a in page.all("img"))
    assert "49" not in page.text_of("h1")[0]
    assert page.text_of("h1") == [NASTY]
    assert json.loads(page.text_of("script")[0])["errors"][1]["layers"][0] == NASTY


def test_what_was_not_measured_leaves_no_empty_section(report: Report) -> None:
    bare = [
        model.model_copy(
            update={"layer_errors": None, "latent_sqnr_by_step": None, "step_time": None, "transformer_bytes": 0,
                    "nominal_bits": None, "average_bits": None, "layers": [], "seconds_per_picture": None}
        )
        for model in report.models[:1]
    ]  # fmt: skip
    reference = report.reference.model_copy(update={"transformer_bytes": 0, "step_time": None})
    page = small(
        report, models=bare, reference=reference, skipped=[], real=None, differences=[], environment={}, sampler={}
    )
    headings = " ".join(text for tag, text in page.texts if tag in ("h2", "h3"))
    for absent in ("Not measured", "Where the error arises", "Quality against memory", "Memory of", "Speed of"):
        assert absent not in headings
    assert not [a for a in page.all("input") if a.get("data-switch")]  # one model needs no choice
    assert "#layers" not in [a.get("href") for a in page.all("a")]


def test_a_model_without_layer_errors_says_so_beside_one_that_has_them(report: Report) -> None:
    a, b = report.models
    page = small(report, models=[a, b.model_copy(update={"layer_errors": None})])
    assert "Not measured for viditq-w4a8." in page.words
    assert [bool(e) for e in json.loads(page.text_of("script")[0])["errors"]] == [False, True, False]


def test_many_models_are_named_in_legends(report: Report, page: Page) -> None:
    many = [report.models[0].model_copy(update={"name": f"model-{i}"}) for i in range(7)]
    drawn = made_up.pictures(made_up.report(prompts=2))
    columns = {"emoji-t2i": drawn["emoji-t2i"], **{model.name: drawn["viditq-w8a8"] for model in many}}
    short = {"prompts": report.prompts[:2], "seeds": report.seeds[:2], "differences": [], "models": many}
    crowded = Page(html.render(report.model_copy(update=short), columns))
    assert [a["class"] for a in crowded.all("ul") if "class" in a].count("signs") == 2
    assert "signs" not in [a.get("class") for a in page.all("ul")]


def test_only_videos_have_playback_controls(page: Page) -> None:
    report = made_up.report("video", prompts=2)
    videos = Page(html.render(report, made_up.pictures(report)))
    ids = [{a.get("id") for _, a in p.elements} for p in (page, videos)]
    assert {"play", "frame"} <= ids[1] and not {"play", "frame"} & ids[0]
    assert "Warping error" in videos.words and "Warping error" not in page.words
    assert {a["data-frames"] for a in videos.all("img") if "data-frames" in a} == {"8"}


def test_written_files_are_read_back(report: Report, tmp_path: Path, text: str) -> None:
    html.write(report, made_up.pictures(report), tmp_path)
    assert read(tmp_path) == read(tmp_path / "report.json") == report
    assert (tmp_path / "report.html").read_text("utf-8") == text


def test_reading_something_else_says_what_is_wrong(report: Report, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no report at .*report.json"):
        read(tmp_path)
    file = tmp_path / "report.json"
    file.write_text("{")
    with pytest.raises(DitqError, match="not a report of this version"):
        read(file)
    file.write_text(json.dumps({**report.model_dump(mode="json"), "format_version": 2}))
    with pytest.raises(DitqError, match="format_version"):
        read(file)


def test_missing_jinja_names_the_extra(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jinja2" else found(name))
    with pytest.raises(DitqError, match=re.escape("pip install 'ditq[report]'")):
        html.write(report, {}, tmp_path)
    assert not list(tmp_path.iterdir())
