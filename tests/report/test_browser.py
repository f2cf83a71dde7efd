"""The rendered report in a real browser, from disk, as a reader would use it.

Chromium is taken from DITQ_CHROMIUM, else from Playwright, else from the system. Without one the tests are
skipped, but not in continuous integration (CI is set): there they fail.
"""

from __future__ import annotations

import base64
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import made_up
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Playwright, expect, sync_playwright
from scores import renamed, scores

from ditq.report import html, sensitivity
from ditq.report.document import Report
from ditq.report.sensitivity import Decoupling

WORD = "supercalifragilisticexpialidocious" * 3
NASTY = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\"'"

Open = Callable[..., Page]


def chromium(playwright: Playwright) -> str:
    """Path of a browser; skips (fails in CI) where there is none."""
    named = os.environ.get("DITQ_CHROMIUM")
    if named:
        return named
    own = playwright.chromium.executable_path
    if Path(own).exists():
        return own
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        reason = "no Chromium: apt-get install chromium, or playwright install chromium, or set DITQ_CHROMIUM"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Containers give Chromium too little shared memory and no GPU. (Playwright runs it without a sandbox.)
        options = ["--disable-dev-shm-usage", "--disable-gpu"]
        launched = playwright.chromium.launch(executable_path=chromium(playwright), args=options)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    pictures, videos = made_up.report("image", prompts=6), made_up.report("video", prompts=3)
    a, b = pictures.models
    hostile = pictures.model_copy(
        update={
            "title": NASTY, "summary": [WORD, NASTY], "prompts": [WORD, *[NASTY] * 5], "command": WORD,
            "models": [a.model_copy(update={"name": f"{WORD}-w8a8", "path": WORD}),
                       b.model_copy(update={"name": f"{NASTY}-w4a8"})],
            "differences": [],
            "skipped": [pictures.skipped[0].model_copy(update={"metric": WORD, "reason": NASTY})],
        }
    )  # fmt: skip
    return {"image": pictures, "video": videos, "hostile": hostile}


@pytest.fixture(scope="module")
def files(reports: dict[str, Report], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    for name, report in reports.items():
        (folder / name).mkdir()
        html.write(report, made_up.pictures(report), folder / name)
    pages = {name: folder / name / "report.html" for name in reports}
    measured = [scores(60), renamed(scores(4), [WORD, NASTY, "ffn.up", "ffn.down"], "role")]
    groups: Decoupling = {
        "name": f"{WORD} at w3", "groups": [WORD, NASTY], "metrics": [WORD, "PSNR"], "drops": [[0.1, 0.2], [0.3, 0.1]],
        "errors": [[0.01, 0.02], [0.01, 0.01]], "loads": [[0.3, 0.7], [0.9, 0.1]],
    }  # fmt: skip
    file = sensitivity.write_report(folder / "sensitivity.html", measured, [WORD, NASTY], [groups], title=NASTY)
    return {**pages, "sensitivity": file}


@pytest.fixture
def open_report(browser: Browser, files: dict[str, Path]) -> Iterator[Open]:
    """Opens a report; afterwards nothing may have been requested, logged as an error, thrown or injected."""
    contexts, pages, problems = [], [], []

    def open_one(kind: str = "image", width: int = 1280, **options: Any) -> Page:
        context = browser.new_context(
            **{"viewport": {"width": width, "height": 800}, "reduced_motion": "reduce", **options}
        )
        context.set_default_timeout(5000)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(f"thrown: {error}"))
        page.on("console", lambda m: problems.append(f"console: {m.text}") if m.type in ("error", "warning") else None)
        page.on("request", lambda r: problems.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
        page.goto(files[kind].as_uri())
        contexts.append(context)
        pages.append(page)
        return page

    yield open_one
    for page in pages:
        if page.evaluate("window.hacked"):
            problems.append("a name became script")
    for context in contexts:
        context.close()
    assert not problems


def shown(page: Page, canvas: str) -> np.ndarray:
    """The pixels of a canvas."""
    uri = page.eval_on_selector(canvas, "canvas => canvas.toDataURL('image/png')")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))


def style(page: Page, selector: str, name: str) -> str:
    return page.eval_on_selector(selector, "(e, name) => getComputedStyle(e)[name]", name)


# ------------------------------------------------------------------------------------------- images


def test_slider_moves_the_boundary_by_keyboard_mouse_and_touch(open_report: Open) -> None:
    page = open_report(has_touch=True)
    assert style(page, "#after", "clipPath") == "inset(0px 0px 0px 50%)"
    page.focus("#split")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert style(page, "#after", "clipPath") == "inset(0px 0px 0px 53%)"
    assert page.get_attribute("#split", "aria-valuetext") == "16 bit on the left 53 %"
    box = page.locator("#split").bounding_box()
    page.mouse.click(box["x"] + 0.2 * box["width"], box["y"] + 30)
    assert style(page, "#after", "clipPath") == "inset(0px 0px 0px 20%)"
    page.touchscreen.tap(box["x"] + 0.9 * box["width"], box["y"] + 30)
    assert style(page, "#after", "clipPath") == "inset(0px 0px 0px 90%)"
    knob = page.locator(".knob").bounding_box()
    assert knob["x"] + 1 == pytest.approx(box["x"] + 0.9 * box["width"], abs=1.5)


def test_large_pair_shows_the_pixels_of_the_choice(open_report: Open, reports: dict[str, Report]) -> None:
    drawn = made_up.pictures(reports["image"])
    page = open_report()
    page.locator(".thumb input").nth(4).check()
    page.locator("#pictures input[value='2'][data-switch]").check()
    expect(page.locator("#after")).to_have_attribute("aria-label", f"viditq-w4a8: {reports['image'].prompts[4]}")
    expect(page.locator("#shown-prompt")).to_contain_text("seed 4, PSNR 30")
    assert (shown(page, "#before") == np.asarray(drawn["emoji-t2i"][4])).all()
    assert (shown(page, "#after") == np.asarray(drawn["viditq-w4a8"][4])).all()


def test_views(open_report: Open) -> None:
    page = open_report()

    def boxes() -> list[dict[str, float]]:
        return [page.locator(canvas).bounding_box() for canvas in ("#before", "#after")]

    before, after = boxes()
    assert before == after
    page.get_by_label("Side by side").check()
    before, after = boxes()
    assert before["x"] + before["width"] <= after["x"] and before["y"] == after["y"]
    assert not page.locator("#split").is_visible()
    assert style(page, "#after", "clipPath") == "none"
    page.get_by_label("Difference").check()
    before, after = boxes()
    assert before == after
    pixels = np.asarray(Image.open(io.BytesIO(page.locator("#after").screenshot())).convert("RGB"))
    blocks = pixels[: len(pixels) // 64 * 64 : len(pixels) // 64].mean()
    assert 0 < blocks < 60  # 8 times noise of a standard deviation of 1, on black


def test_one_choice_of_model_holds_for_the_page(open_report: Open) -> None:
    page = open_report()
    page.locator("#plan input[data-switch][value='2']").check()
    for section in ("#pictures", "#layers", "#plan"):
        assert page.locator(f"{section} input[data-switch][value='2']").is_checked()
    expect(page.locator("#after-name")).to_have_text("viditq-w4a8")
    assert page.locator(".per-model[data-model='1']:visible").count() == 0
    assert page.locator(".per-model[data-model='2']:visible").count() == 2
    assert page.locator(".thumb").first.locator("img:visible").evaluate_all("all => all.map(i => i.alt)") == [
        "16 bit", "viditq-w4a8"
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------- videos


def test_videos_play_in_step_and_pause(open_report: Open, reports: dict[str, Report]) -> None:
    page = open_report("video", reduced_motion="no-preference")
    expect(page.locator("#play")).to_have_text("Pause")
    seen = page.evaluate("""() => new Promise((done) => {
        const seen = [];
        const look = () => {
            seen.push([...document.querySelectorAll(".stage canvas")].map((c) => c.dataset.frame).join());
            if (new Set(seen).size < 4) requestAnimationFrame(look); else done(seen);
        };
        look();
    })""")
    assert all(before == after for before, after in (pair.split(",") for pair in seen))
    page.click("#play")
    expect(page.locator("#play")).to_have_text("Play")
    stopped = page.get_attribute("#before", "data-frame")
    page.wait_for_timeout(400)
    assert page.get_attribute("#before", "data-frame") == stopped
    drawn = made_up.pictures(reports["video"])
    for canvas, name in (("#before", "emoji-t2i"), ("#after", "viditq-w8a8")):
        assert (shown(page, canvas) == np.asarray(drawn[name][0][int(stopped)])).all()


def test_videos_stand_still_where_motion_is_not_wanted(open_report: Open) -> None:
    page = open_report("video")
    expect(page.locator("#play")).to_have_text("Play")
    page.wait_for_timeout(300)
    assert page.get_attribute("#after", "data-frame") == "0"


def test_frame_slider_shows_exactly_that_frame(open_report: Open, reports: dict[str, Report]) -> None:
    drawn = made_up.pictures(reports["video"])
    page = open_report("video", reduced_motion="no-preference")
    expect(page.locator("#play")).to_have_text("Pause")
    page.focus("#frame")
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#play")).to_have_text("Play")
    assert page.text_content("#frame-number") == "7 / 8"
    assert (shown(page, "#before") == np.asarray(drawn["emoji-t2i"][0][6])).all()
    assert (shown(page, "#after") == np.asarray(drawn["viditq-w8a8"][0][6])).all()


def test_thumbnails_of_videos_show_one_frame(open_report: Open) -> None:
    page = open_report("video")
    box = page.locator(".strips img:visible").first.bounding_box()
    assert box["width"] == pytest.approx(box["height"], abs=1)


# --------------------------------------------------------------------------------------- layers, plan


def test_heat_map_reads_out_by_keyboard(open_report: Open, reports: dict[str, Report]) -> None:
    errors = reports["image"].models[0].layer_errors
    page = open_report()
    readout = page.locator(".readout:visible")
    page.locator(".map:visible").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "PageDown"):
        page.keyboard.press(key)
    expect(readout).to_have_text(
        f"{errors.sqnr_db[12][1]:.1f} dB at t = 949, {errors.layers[12]} ({errors.roles[12]})"
    )
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    for _ in range(20):
        page.keyboard.press("PageUp")
    expect(readout).to_have_text(f"{errors.sqnr_db[0][-1]:.1f} dB at t = 49, {errors.layers[0]} ({errors.roles[0]})")


def test_heat_map_reads_out_by_pointer(open_report: Open, reports: dict[str, Report]) -> None:
    errors = reports["image"].models[1].layer_errors
    page = open_report(has_touch=True)
    page.locator("#layers input[data-switch][value='2']").check()
    cells = page.locator(".cells:visible")
    cells.scroll_into_view_if_needed()
    box = cells.bounding_box()
    rows, columns = len(errors.layers), len(errors.timesteps)
    for row, column, go in ((40, 7, page.mouse.move), (3, 19, page.touchscreen.tap)):
        go(box["x"] + (column + 0.5) / columns * box["width"], box["y"] + (row + 0.5) / rows * box["height"])
        expect(page.locator(".readout:visible")).to_contain_text(f"{errors.sqnr_db[row][column]:.1f} dB")
        expect(page.locator(".readout:visible")).to_contain_text(errors.layers[row])


def test_worst_layers_lead_into_the_map(open_report: Open, reports: dict[str, Report]) -> None:
    errors = reports["image"].models[0].layer_errors
    means = np.mean(errors.sqnr_db, axis=1)
    page = open_report()
    buttons = page.locator(".worst:visible button")
    assert buttons.locator(".name").all_text_contents() == [errors.layers[i] for i in np.argsort(means)[:10]]
    buttons.nth(2).click()
    row = int(np.argsort(means)[2])
    expect(page.locator(".readout:visible")).to_contain_text(f"{min(errors.sqnr_db[row]):.1f} dB")
    expect(page.locator(".readout:visible")).to_contain_text(errors.layers[row])


def test_plan_is_filtered_by_words(open_report: Open) -> None:
    page = open_report()
    rows, count = page.locator("#plan tbody tr:visible"), page.locator("#count")
    assert (rows.count(), count.text_content()) == (83, "83 of 83 layers")
    page.fill("#filter", "ROTATE blocks.3")
    assert (rows.count(), count.text_content()) == (2, "2 of 83 layers")
    page.fill("#filter", "stay in 16 bit")
    assert rows.locator("th").all_text_contents() == list(made_up.KEPT)
    page.fill("#filter", "int4")
    assert (rows.count(), count.text_content()) == (0, "0 of 83 layers")
    page.locator("#plan input[data-switch][value='2']").check()
    assert (rows.count(), count.text_content()) == (80, "80 of 83 layers")


# -------------------------------------------------------------------------------------- reproduction


def test_copy_puts_the_command_on_the_clipboard(open_report: Open, reports: dict[str, Report]) -> None:
    page = open_report(permissions=["clipboard-read", "clipboard-write"])
    page.click("#copy")
    expect(page.locator("#copy")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == reports["image"].command


def test_copy_selects_the_command_where_the_clipboard_is_closed(open_report: Open, reports: dict[str, Report]) -> None:
    page = open_report()
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('closed')); }")
    page.click("#copy")
    expect(page.locator("#copy")).to_have_text("Selected")
    assert page.evaluate("getSelection().toString().trim()") == reports["image"].command


# ------------------------------------------------------------------------------- themes, sizes, access

CONTRAST = """() => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgba = (colour) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const luminance = (c) => c.slice(0, 3).map((v) => v / 255)
        .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (element) => {
        for (let e = element; e; e = e.parentElement) {
            const colour = rgba(getComputedStyle(e).backgroundColor);
            if (colour[3] > 200) return colour;
        }
        return [255, 255, 255, 255];
    };
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
        const element = node.parentElement;
        if (!node.textContent.trim() || !element.checkVisibility() || element.closest("script, title, desc")) continue;
        const style = getComputedStyle(element);
        const own = rgba(element.closest("svg") ? style.fill : style.color);
        const [a, b] = [luminance(own), luminance(behind(element))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        found.push([ratio, node.textContent.trim().slice(0, 40)]);
    }
    return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_themes(open_report: Open, scheme: str) -> None:
    page = open_report("video", color_scheme=scheme)
    page.eval_on_selector_all("details", "all => all.forEach(d => { d.open = true; })")
    ratios = page.evaluate(CONTRAST)
    assert len(ratios) > 300
    assert not [entry for entry in ratios if entry[0] < 4.5]


def test_theme_follows_the_system_until_it_is_chosen(open_report: Open) -> None:
    page = open_report(color_scheme="dark")
    button = page.locator("#theme")
    dark = style(page, "body", "backgroundColor")
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    light = style(page, "body", "backgroundColor")
    assert light != dark
    assert button.get_attribute("aria-pressed") == "false"
    page.emulate_media(color_scheme="light")
    assert style(page, "body", "backgroundColor") == light
    button.click()
    assert style(page, "body", "backgroundColor") == dark


@pytest.mark.parametrize("kind", ["image", "video", "hostile"])
@pytest.mark.parametrize("width", [390, 320])
def test_no_sideways_scrolling_on_a_phone(open_report: Open, kind: str, width: int) -> None:
    page = open_report(kind, width=width, has_touch=True)
    page.eval_on_selector_all("details", "all => all.forEach(d => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("scrollTo(99, 0)")
    assert page.evaluate("scrollX") == 0
    scrolled = page.locator("#metrics .scroll")
    assert scrolled.evaluate("e => e.scrollWidth > e.clientWidth")  # it scrolls in its own box


def test_names_of_files_and_prompts_stay_text(open_report: Open, reports: dict[str, Report]) -> None:
    page = open_report("hostile")
    page.locator("#pictures input[data-switch][value='2']").check()
    page.locator(".thumb input").nth(1).check()
    expect(page.locator("#shown-prompt")).to_contain_text(f"{NASTY} seed 1")
    assert page.text_content("#after-name") == reports["hostile"].models[1].name
    assert page.text_content("h1") == NASTY


@pytest.mark.parametrize("kind", ["image", "video"])
def test_every_control_has_a_name(open_report: Open, kind: str) -> None:
    page = open_report(kind)
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    roles = {
        "button",
        "slider",
        "radio",
        "searchbox",
        "application",
        "link",
        "image",
        "canvas",
        "region",
        "navigation",
    }
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", "").strip())
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in roles
    ]
    assert {"button", "slider", "radio", "searchbox", "application", "link", "image"} <= {role for role, _ in named}
    assert not [entry for entry in named if not entry[1]]
    switches = [name for role, name in named if role == "radio"]
    assert switches.count("viditq-w8a8") == 3 and "Slider" in switches


@pytest.mark.parametrize(("kind", "own"), [("image", ["split"]), ("video", ["play", "frame"])])
def test_everything_is_reached_and_seen_by_keyboard(open_report: Open, kind: str, own: list[str]) -> None:
    page = open_report(kind)
    reached = []
    for _ in range(120):
        page.keyboard.press("Tab")
        identity = page.evaluate("""() => {
            const e = document.activeElement;
            const marks = [e, e.nextElementSibling, e.closest(".thumb")].filter(Boolean)
                .map((x) => getComputedStyle(x)).filter((x) => x.opacity > 0);
            if (e.id === "split") marks.push(getComputedStyle(document.querySelector(".knob"), "::after"));
            return [e.id || e.name || e.className || e.tagName, marks.some((x) => x.outlineStyle !== "none")];
        }""")
        if identity[0] == "BODY":
            break
        reached.append(identity)
    names = [name for name, _ in reached]
    for expected in (*own, "theme", "view", "prompt", "map", "filter", "copy", "model-pictures"):
        assert expected in names
    assert not [name for name, seen in reached if not seen]


# ------------------------------------------------------------------------------------ print, no script


def test_print_shows_everything_side_by_side(open_report: Open) -> None:
    page = open_report(color_scheme="dark")
    page.fill("#filter", "ffn")
    page.emulate_media(media="print", color_scheme="dark")
    before, after = (page.locator(canvas).bounding_box() for canvas in ("#before", "#after"))
    assert before["x"] + before["width"] <= after["x"]
    assert style(page, "#after", "clipPath") == "none"
    assert page.locator(".strips img:visible").count() == 6 * 3
    assert page.locator(".per-model:visible").count() == 4
    assert page.locator("#plan tbody tr:visible").count() == 2 * 83
    assert page.locator(".about:visible").count() == 8
    assert page.locator("nav:visible, button#copy:visible, #filter:visible, #split:visible").count() == 0
    assert sum(map(int, style(page, "body", "backgroundColor").strip("rgb()").split(","))) > 3 * 240


def test_numbers_need_no_script(open_report: Open) -> None:
    page = open_report(java_script_enabled=False)
    for visible in (".metrics", ".panels svg >> nth=0", ".strips img >> nth=0", ".cells >> nth=0", ".plan >> nth=0"):
        assert page.locator(visible).is_visible()


# --------------------------------------------------------------------------------- sensitivity scores

OVERLAPS = """() => [...document.querySelectorAll(".map svg")].flatMap((svg) => {
    const labels = [...svg.querySelectorAll("text")].map((e) => [e.textContent, e.getBoundingClientRect()]);
    const outer = svg.getBoundingClientRect();
    return labels.flatMap(([a, x], i) => [
        ...(x.left < outer.left - 1 || x.right > outer.right + 1 ? [[a, "is cut off"]] : []),
        ...labels.slice(i + 1).filter(([, y]) => x.left < y.right - 1 && y.left < x.right - 1
            && x.top < y.bottom - 1 && y.top < x.bottom - 1).map(([b]) => [a, b]),
    ]);
})"""


@pytest.mark.parametrize("width", [1280, 390])
def test_sensitivity_fits_and_its_labels_do_not_overlap(open_report: Open, width: int) -> None:
    page = open_report("sensitivity", width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OVERLAPS) == []
    assert page.text_content("h1") == NASTY


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_sensitivity_stands_out_in_both_themes(open_report: Open, scheme: str) -> None:
    ratios = open_report("sensitivity", color_scheme=scheme).evaluate(CONTRAST)
    assert len(ratios) > 200
    assert not [entry for entry in ratios if entry[0] < 4.5]
