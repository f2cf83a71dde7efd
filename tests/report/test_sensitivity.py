"""Sensitivity scores for readers: numbers, tables of 80 columns, heat maps without overlaps, and the page."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.table import Table
from scores import KINDS, STEPS, renamed, scores

from ditq.allocation.scores import PREDICTION, Scores, mean_and_error
from ditq.errors import UsageError
from ditq.report import heatmap, sensitivity
from ditq.report.sensitivity import Decoupling
from ditq.report.terminal import Terminal

NASTY = "</style><script>window.hacked = 1</script> & {{ 7 * 7 }} \"'"
ROLES = [
    *(f"{kind}.{part}" for kind in ("self_attn", "cross_attn", "temporal_attn") for part in ("q", "k", "v", "out")),
    "ffn.up", "ffn.down",
]  # fmt: skip
GROUPS: Decoupling = {
    "name": "weights at w3",
    "groups": ["content (cross-attention)", "quality (self-attention, FFN)", "temporal"],
    "metrics": ["CLIPScore", "flow score"],
    "drops": [[0.12, 0.01], [0.02, 0.05], [-0.001, 0.2]],
    "errors": [[0.01, 0.01], [0.01, float("nan")], [0.01, 0.03]],
    "loads": [[0.95, 0.05], [0.4, 0.6], [0.0, 1.0]],
}


def printed(*tables: Table, width: int = 80) -> list[str]:
    out = io.StringIO()
    terminal = Terminal(file=out, width=width, force_terminal=False)
    for one in tables:
        terminal.print(one)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def chosen_calls(of: Scores, keep: list[int]) -> Scores:
    """The scores with some of their rows of ``prediction`` only."""
    values = np.asarray(of.values[PREDICTION])[:, :, keep].tolist()
    rows = {"prompts": tuple(of.prompts[i] for i in keep), "timesteps": tuple(of.timesteps[i] for i in keep)}
    return Scores.model_validate({**of.model_dump(), **rows, "values": {PREDICTION: values}})


# -------------------------------------------------------------------------------------------- tables


def test_numbers_are_those_of_the_scores_in_readable_units() -> None:
    of = scores(metrics=tuple(KINDS))
    mean, error = mean_and_error(of.harms())
    values = sensitivity.shown(of)
    assert np.allclose(values.mean, 100 * mean) and np.allclose(values.error, 100 * error)
    psnr = sensitivity.shown(of, "psnr_db")
    assert np.allclose(psnr.mean, -10 * np.log10(mean_and_error(of.harms("psnr_db"))[0]))
    up, down = (-10 * np.log10(mean[0, 2] + sign * 1e-6 * error[0, 2]) for sign in (-1, 1))
    assert psnr.error[0, 2] == pytest.approx((up - down) / 2e-6, rel=1e-3)  # the slope of the logarithm
    assert np.allclose(sensitivity.shown(of, "ssim").mean, np.mean(of.values["ssim"], 2))
    assert np.allclose(sensitivity.shown(of, "clip_score").mean, 100 * mean)
    assert [sensitivity.shown(of, m).higher_is_better for m in KINDS] == [False, True, True, False]
    assert {sensitivity.shown(of, m).worst for m in KINDS} == {(10, 10, 10)}
    with pytest.raises(UsageError, match="beauty"):
        sensitivity.shown(of, "beauty")


def test_a_table_has_every_gene_in_order_and_marks_the_worst() -> None:
    lines = printed(*sensitivity.tables(scores()))
    rows = [line for line in lines if line.startswith("transformer_blocks")]
    assert [row.split()[0] for row in rows] == [f"transformer_blocks.{i}" for i in range(12)]
    assert [i for i, row in enumerate(rows) if "*" in row] == [10]
    assert rows[10].count("*") == 3
    assert lines[0] == "weights: prediction error, % ↓"
    number = r"(\d+\.\d+) ± \d+\.\d+"
    for row, mean in zip(rows, mean_and_error(scores().harms())[0], strict=True):
        assert [float(x) for x in re.findall(number, row)] == pytest.approx(100 * mean, rel=0.02)


def test_the_error_keeps_a_digit_and_is_left_out_for_one_prompt() -> None:
    values = sensitivity.shown(scores())
    assert all(float(values.text(i, c).split(" ± ")[1]) > 0 for i in range(12) for c in range(3))
    one = scores(prompts=1)
    assert "±" not in sensitivity.shown(one).text(0, 0)
    assert "one prompt: no standard error" in " ".join(printed(*sensitivity.tables(one)))


@pytest.mark.parametrize("metric", list(KINDS))
@pytest.mark.parametrize("genes", [12, 60])
def test_tables_fit_80_columns_with_whole_names_and_numbers(metric: str, genes: int) -> None:
    of = scores(genes, metrics=tuple(KINDS))
    lines = printed(*sensitivity.tables(of, metric))
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    texts = [sensitivity.shown(of, metric).text(i, c) for i in range(genes) for c in range(3)]
    assert all(any(text in line for line in lines) for text in texts)


def test_many_choices_continue_in_another_table() -> None:
    base = scores()
    values = [[row for row in rows for _ in range(2)] for rows in base.values[PREDICTION]]
    many = scores(choices=tuple(f"w{b}" for b in range(8, 2, -1)), values={PREDICTION: values})
    tables = sensitivity.tables(many)
    assert len(tables) > 1
    shown = [str(c.header).strip() for one in tables for c in one.columns]
    assert [c for c in shown if c != "block"] == list(many.choices)
    assert max(map(len, printed(*tables))) <= 80


def test_of_many_layers_the_worst_are_listed_in_order() -> None:
    of = renamed(scores(280), [f"transformer_blocks.{i // 10}.linear{i % 10}" for i in range(280)], "layer")
    lines = printed(sensitivity.tables(of)[0])
    names = [line.split()[0] for line in lines if line.startswith("transformer_blocks.")]
    harm = mean_and_error(of.harms())[0][:, -1]
    assert names == [of.genes[i] for i in sorted(np.argsort(-harm)[: sensitivity.MOST])]
    assert "the 60 worst of 280 at w3" in " ".join(lines)


def test_lines_around_a_narrow_table_are_whole() -> None:
    of = renamed(scores(2), ["ffn.up", "ffn.down"], "role")
    one = of.model_copy(
        update={"choices": ("w3",), "values": {PREDICTION: tuple((x[2],) for x in of.values[PREDICTION])}}
    )
    lines = printed(*sensitivity.tables(one))
    assert lines[0] == "weights: prediction error, % ↓"
    assert lines[-1] == "mean ± standard error over 4 prompts; * worst of its column"


def test_long_names_are_folded() -> None:
    of = renamed(scores(2), [f"down_blocks.{i}.attentions.1.transformer_blocks.0.attn1" for i in range(2)], "layer")
    lines = printed(*sensitivity.tables(of))
    assert max(map(len, lines)) <= 80
    assert "down_blocks.1.attentions.1.transformer_blocks.0.attn1" in "".join(
        line.split("  ")[0].strip() if not line.startswith("  ") else line.strip().split("  ")[0] for line in lines
    )


def test_sentence_names_the_worst_gene() -> None:
    assert sensitivity.sentence(scores()).startswith(
        "Weights at w3: transformer_blocks.10 is the most sensitive block, with a prediction error of "
    )
    mean = mean_and_error(scores().harms())[0][:, -1]
    assert f"{mean[10] / np.median(mean):.1f} × the median block." in sensitivity.sentence(scores())


def test_the_table_of_groups_marks_the_metric_that_each_moves() -> None:
    lines = printed(sensitivity.decoupling_table(**GROUPS))
    assert max(map(len, lines)) <= 80
    rows = {line.split()[0]: line for line in lines if line.startswith(("content", "quality", "temporal"))}
    assert re.search(r"12\.0 ± 1\.0 \* +1\.0 ± 1\.0$", rows["content"])
    assert re.search(r" 5\.0 \*$", rows["quality"])  # no standard error
    assert re.search(r"−0\.1 ± 1\.0 +20\.0 ± 3\.0 \*$", rows["temporal"])
    loads = [re.findall(r"load (\d\.\d\d)", line) for line in lines]
    assert [row for row in loads if row] == [["0.95", "0.05"], ["0.40", "0.60"], ["0.00", "1.00"]]
    single: Decoupling = {**GROUPS, "metrics": ["CLIPScore"], "drops": [[0.1]] * 3, "errors": [[0.01]] * 3,
                          "loads": [[1.0]] * 3}  # fmt: skip
    assert not re.search(r"\d \*", " ".join(printed(sensitivity.decoupling_table(**single))))


def test_groups_of_scores_are_those_of_the_cheapest_choice() -> None:
    of = scores(2, metrics=(PREDICTION, "psnr_db", "clip_score"))
    assert sensitivity.decoupling_of(of) is None  # blocks
    assert sensitivity.decoupling_of(renamed(scores(2), ["cross_attn.q", "ffn.up"], "role")) is None  # no metric
    of = renamed(of, ["cross_attn.q", "ffn.up"], "role").model_copy(update={"roles": (("cross_attn.q",), ("ffn.up",))})
    groups = sensitivity.decoupling_of(of, "transformer_2, weights")
    assert groups is not None
    assert (list(groups["groups"]), groups["metrics"]) == (["content", "quality"], ["PSNR", "CLIPScore"])
    harm = mean_and_error(of.harms("clip_score"))[0][:, -1]
    assert np.asarray(groups["drops"])[:, 1] == pytest.approx(harm)
    assert (np.asarray(groups["errors"]) > 0).all()
    lines = printed(sensitivity.decoupling_table(**groups))
    assert lines[0] == "transformer_2, weights at w3: drop of each metric with one group quantized, %"
    assert max(map(len, lines)) <= 80
    page = sensitivity.render([of], decouplings=[groups, {**groups, "name": "activations at a4"}])
    assert page.count("<h3>Transformer_2, weights at w3</h3>") == page.count("<h3>Activations at a4</h3>") == 1
    alone = renamed(scores(2, 1, (PREDICTION, "psnr_db")), list(of.genes), "role").model_copy(
        update={"roles": of.roles}
    )
    single = sensitivity.decoupling_of(alone)
    assert single is not None and np.isnan(np.asarray(single["errors"])).all()  # one prompt has no spread


def test_of_several_transformers_each_is_named() -> None:
    both = [scores(), scores(info={"component": "transformer_2"})]
    assert [sensitivity.label(one, sensitivity.has_several(both)) for one in both] == [
        "transformer, weights", "transformer_2, weights"
    ]  # fmt: skip
    assert sensitivity.label(both[0], sensitivity.has_several([both[0], both[0]])) == "weights"


# ----------------------------------------------------------------------------------------- heat maps


def test_the_map_holds_the_mean_error_of_each_quarter() -> None:
    of = scores(metrics=(PREDICTION,))
    cells = np.array(sensitivity.by_timestep(of).sqnr_db).reshape(12, 3, 4)
    values = np.asarray(of.values[PREDICTION]).reshape(12, 3, 4, len(STEPS))
    quarters = np.split(np.arange(len(STEPS)), [2, 5, 8])
    expected = np.stack([values[..., q].mean((2, 3)) for q in quarters], -1)
    assert np.allclose(cells, -10 * np.log10(expected))
    assert (np.diff(cells, axis=2) > 0).all()  # the error falls along the run


def test_parts_without_a_measured_timestep_are_grey() -> None:
    of = scores()
    early = chosen_calls(of, [i for i, t in enumerate(of.timesteps) if t > 800])
    cells = np.array(sensitivity.by_timestep(early).sqnr_db, dtype=float).reshape(12, 3, 4)
    assert np.isfinite(cells[..., 0]).all() and np.isnan(cells[..., 1:]).all()
    root = ET.fromstring(sensitivity.heat_map(early, 0, 40))
    grey = [rect for rect in root.iter("rect") if rect.get("class") == "gap"]
    assert len(grey) == 12 * 3 * 3
    assert all("no timestep was measured" in rect.find("title").text for rect in grey)


def test_a_prompt_without_a_call_in_a_part_is_left_out_of_it() -> None:
    of = scores()
    fewer = chosen_calls(of, [i for i, (p, t) in enumerate(zip(of.prompts, of.timesteps, strict=True))
                              if p < 2 or t < 800])  # fmt: skip
    cells = np.array(sensitivity.by_timestep(fewer).sqnr_db).reshape(12, 3, 4)
    first = np.asarray(of.values[PREDICTION]).reshape(12, 3, 4, len(STEPS))[:, :, :2, :2].mean((2, 3))
    assert np.allclose(cells[:, :, 0], -10 * np.log10(first))


def test_a_short_run_has_fewer_parts() -> None:
    of = scores()
    short = of.model_copy(update={"steps": (999.0, 499.0)})
    assert len(sensitivity.parts_of(short)) == 2
    assert "half of the sampling run" in sensitivity.heat_map(short, 0, 40)


def test_colours_and_titles_of_cells() -> None:
    of = scores()
    root = ET.fromstring(sensitivity.heat_map(of, 10, 50))
    rects = list(root.iter("rect"))
    assert len(rects) == 12 * 3 * 4
    cells = sensitivity.by_timestep(of).sqnr_db
    byte = {r.find("title").text: r.get("fill") for r in rects}
    title = next(t for t in byte if t.startswith("transformer_blocks.10, w4, t > "))
    assert byte[title] == "#" + bytes(heatmap.colours(np.array(cells[10][4]), 10, 50)).hex()
    assert title.endswith(f"{cells[10][4]:.1f} dB")


def boxes(svg: str, size: float) -> list[tuple[str, float, float, float, float]]:
    """Text and left, right, top, bottom of every label, with wide letters of this size."""
    found = []
    for text in ET.fromstring(svg).iter("text"):
        width, x, y = 0.58 * size * len(text.text), float(text.get("x")), float(text.get("y"))
        left = x - {"end": width, "middle": width / 2}.get(text.get("text-anchor"), 0)
        found.append((text.text, left, left + width, y - 0.8 * size, y + 0.2 * size))
    return found


@pytest.mark.parametrize(
    "of",
    [
        scores(12),
        scores(60),
        scores(1),
        renamed(scores(len(ROLES)), ROLES, "role"),
        renamed(scores(280), [f"transformer_blocks.{i // 10}.linear{i % 10}" for i in range(280)], "layer"),
    ],
    ids=["12 blocks", "60 blocks", "1 block", "roles", "280 layers"],
)
@pytest.mark.parametrize("size", [10, 12])
def test_labels_do_not_overlap(of: Scores, size: float) -> None:
    svg = sensitivity.heat_map(of, 0, 40)
    width, height = map(float, ET.fromstring(svg).get("viewBox").split()[2:])
    labels = boxes(svg, size)
    assert {choice for choice, *_ in labels} >= {*of.choices, "1", "2", "3", "4"}
    for a, b in itertools.combinations(labels, 2):
        apart = a[2] <= b[1] or b[2] <= a[1] or a[4] <= b[3] or b[4] <= a[3]
        assert apart, (a, b)
    assert all(
        left >= 0 and right <= width and top >= 0 and bottom <= height for _, left, right, top, bottom in labels
    )


def test_every_role_is_named_beside_its_row() -> None:
    labels = [text for text, *_ in boxes(sensitivity.heat_map(renamed(scores(14), ROLES, "role"), 0, 40), 10)]
    assert set(labels) >= set(ROLES)


# ---------------------------------------------------------------------------------------------- page


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.within = ""
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.within = tag

    def handle_data(self, data: str) -> None:
        if self.within != "style":
            self.words += data


def test_the_page_shows_everything_and_needs_nothing_else(tmp_path: Path) -> None:
    weights = scores(metrics=tuple(KINDS))
    activations = scores(part="activations", choices=("a8", "a6", "a4"))
    file = sensitivity.write_report(tmp_path, [weights, activations], ["rank agreement 0.93"], [GROUPS], title="Mine")
    assert file == tmp_path / "report.html"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    text = file.read_text("utf-8")
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("svg") == 2 + 6  # two maps, and a bar for each group and metric
    assert tags.count("table") == len(KINDS) + 1 + 1
    assert "script" not in tags
    words = " ".join(page.words.split())
    for expected in ("Mine", "rank agreement 0.93", "rtn-w4a8", "Activations, one block at a time", "ViDiT-Q",
                     sensitivity.sentence(weights), sensitivity.sentence(activations)):  # fmt: skip
        assert expected in words
    for one in (weights, activations):
        for metric in one.metrics:
            values = sensitivity.shown(one, metric)
            assert all(values.text(i, c) in words for i in range(12) for c in range(3))
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert all(link.startswith(("data:", "#")) for link in links)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)


def test_the_policy_allows_the_style_and_no_script() -> None:
    text = sensitivity.render([scores()])
    policy = next(a["content"] for tag, a in Page(text).tags if a.get("http-equiv") == "Content-Security-Policy")
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    assert f"sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}" in policy
    assert "default-src 'none'" in policy and "script-src" not in policy
    assert not [a for _, a in Page(text).tags if "style" in a]


def test_names_stay_text_and_sections_without_content_are_left_out() -> None:
    hostile = renamed(scores(3), [NASTY, "b", "c"], "role")
    text = sensitivity.render([hostile], [NASTY], title=NASTY)
    page = Page(text)
    assert "script" not in [tag for tag, _ in page.tags]
    assert page.words.count("{{ 7 * 7 }}") >= 4
    assert 'id="decoupling"' not in text
    assert 'id="agreement"' not in sensitivity.render([hostile])


def test_a_report_replaces_an_earlier_one_only_when_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = sensitivity.write_report(tmp_path / "page.html", scores(), title="first")
    assert file == tmp_path / "page.html"
    monkeypatch.setattr(sensitivity, "sentence", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sensitivity.write_report(file, scores(), title="second")
    assert "<title>first</title>" in file.read_text("utf-8")
    monkeypatch.undo()
    sensitivity.write_report(file, scores(), title="third")
    assert "<title>third</title>" in file.read_text("utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
