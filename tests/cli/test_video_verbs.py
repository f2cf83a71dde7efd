"""The verbs on a tiny video pipeline: the output files, and options that fit only images or only videos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ditq_bundled
import pytest
import videos
from console import ditq
from helpers import PROMPTS, tiny_pixart
from PIL import Image

from ditq.cli import demo
from ditq.cli.app import run


@pytest.fixture(scope="module")
def latte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny 16-bit pipeline that generates 3 frames of 16 x 16 pixels."""
    folder = tmp_path_factory.mktemp("models") / "latte"
    videos.latte().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "pixart"
    tiny_pixart().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(latte: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "w8a8"
    assert run(["quantize", str(latte), "--recipe", "rtn-w8a8", "--out", str(out), "--quiet"]) == 0
    return out


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS[:2]) + "\n")
    return path


def generate(capsys: pytest.CaptureFixture[str], pipeline: Path, out: Path, *more: Any) -> tuple[int, str, str]:
    return ditq(capsys, "generate", pipeline, "--prompt", PROMPTS[0], "--steps", 2, "--out", out, *more)


def test_generate_writes_gif_mp4_and_a_sheet_of_frames(
    quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = generate(capsys, quantized, tmp_path / "v", "--prompt", PROMPTS[1], "--frames", 3, "--fps", 4)
    assert status == 0, err
    assert "2 videos of 3 frames" in out
    names = {path.name for path in (tmp_path / "v").iterdir()}
    assert names == {"0000.gif", "0000.mp4", "0001.gif", "0001.mp4", "sheet.png", "prompts.txt"}
    with Image.open(tmp_path / "v" / "0000.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"]) == (3, (16, 16), 250)
        gif.seek(2)
        last = gif.convert("RGB")
    assert len(set(last.get_flattened_data() if hasattr(last, "get_flattened_data") else last.getdata())) > 1


def test_one_format_is_enough(latte: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(capsys, latte, tmp_path / "v", "--format", "gif", "--quiet")[0] == 0
    assert {path.suffix for path in (tmp_path / "v").iterdir()} == {".gif", ".png", ".txt"}


def test_images_in_other_formats_and_sizes(pixart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--format", "webp", "--height", 32, "--width", 16)
    status, _, err = generate(capsys, pixart, tmp_path / "p", *options)
    assert status == 0, err
    assert {path.name for path in (tmp_path / "p").iterdir()} == {"0000.webp", "prompts.txt"}
    assert Image.open(tmp_path / "p" / "0000.webp").size == (16, 32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--frames", 8), ("LattePipeline", "3 frames", "--frames 8")),
        (("--format", "png"), ("LattePipeline generates videos", "gif, mp4", "'png'", "sheet.png")),
        (("--format", "gif,avi"), ("'avi'",)),
    ],
    ids=["frames", "image-format", "unknown-format"],
)
def test_options_that_do_not_fit_a_video_pipeline(
    options: tuple[Any, ...], words: tuple[str, ...], latte: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = generate(capsys, latte, tmp_path / "v", *options)
    check(status, err, words, tmp_path / "v")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--frames", 8), ("PixArtAlphaPipeline generates images", "--frames")),
        (("--fps", 8), ("PixArtAlphaPipeline generates images", "--fps")),
        (("--format", "mp4"), ("PixArtAlphaPipeline generates images", "png, jpg, webp", "'mp4'")),
    ],
    ids=["frames", "fps", "video-format"],
)
def test_options_that_do_not_fit_an_image_pipeline(
    options: tuple[Any, ...], words: tuple[str, ...], pixart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = generate(capsys, pixart, tmp_path / "p", *options)
    check(status, err, words, tmp_path / "p")
    if options[0] != "--format":
        status, _, err = ditq(capsys, "compare", pixart, pixart, "--out", tmp_path / "c", *options)
        check(status, err, words, tmp_path / "c")


def check(status: int, err: str, words: tuple[str, ...], left: Path) -> None:
    """Checks for wrong usage, one paragraph with these words, and that no output is left."""
    assert status == 2, err
    assert err.strip().startswith("error: ")
    assert "\n" not in err.strip()
    for word in words:
        assert word in err
    assert not left.exists()


def test_compare_measures_motion_and_shows_models_side_by_side(
    latte: Path, quantized: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--prompts", prompts, "--steps", 2, "--fps", 4, "--explain", 1, "--json", "--out", tmp_path / "c")
    status, out, err = ditq(capsys, "compare", latte, quantized, *arguments)
    assert status == 0, err
    data = json.loads(out)
    assert {"psnr_db", "ssim", "latent_sqnr_db", "delta_flow", "flow_score", "warping_error"} <= data.keys()
    assert data["psnr_db"]["mean"] > 25
    assert data["warping_error"]["n"] == 2
    report = json.loads((tmp_path / "c" / "report.json").read_text())
    assert report["kind"] == "video"
    assert (report["sampler"]["frames"], report["sampler"]["fps"]) == (3, 4)
    assert "--fps 4" in report["command"]
    with Image.open(tmp_path / "c" / "side-by-side.gif") as gif:
        assert gif.n_frames == 3
        assert gif.info["duration"] == 250
    assert (tmp_path / "c" / "side-by-side.mp4").stat().st_size > 500
    assert Image.open(tmp_path / "c" / "sheet.png").height > 4 * 96  # two models, two prompts
    values = json.loads((tmp_path / "c" / "values.json").read_text())
    assert len(next(v for k, v in values.items() if k)["delta_flow"]) == 2


def test_models_of_other_lengths_cannot_be_compared(
    latte: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = videos.latte()
    longer.transformer = type(longer.transformer)(**{**longer.transformer.config, "video_length": 4})
    longer.save_pretrained(tmp_path / "longer")
    arguments = ("--prompts", prompts, "--steps", 2, "--no-cache", "--explain", 0, "--out", tmp_path / "c")
    status, _, err = ditq(capsys, "compare", latte, tmp_path / "longer", *arguments, "--quiet")
    check(status, err, ("longer generates videos of 4 frames", "the reference videos of 3 frames"), tmp_path / "c")


def test_video_demo_refuses_an_image_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--video", "--model", "bundled:emoji-t2i", "--out", tmp_path / "d")
    status, _, err = ditq(capsys, "demo", *arguments)
    check(status, err, ("bundled:emoji-t2i generates images", "--video", "bundled:emoji-video"), tmp_path / "d")


def test_demo_of_videos_ends_in_one_animation(
    latte: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a tiny model in place of the bundled one."""
    monkeypatch.setattr(ditq_bundled, "path", lambda name: latte)
    monkeypatch.setattr(demo, "VIDEO_SAMPLER", {"steps": 2, "guidance_scale": 3.0})
    status, out, err = ditq(capsys, "demo", "--video", "--count", 2, "--out", tmp_path / "d")
    assert status == 0, err
    for line in ("PSNR dB", "Warping error", "ΔFlow", "side by side:", "report:"):
        assert line in out
    found = json.loads((tmp_path / "d" / "demo.json").read_text())
    assert list(found["models"]) == ["viditq-w8a8", "viditq-w4a8", "rtn-w4a8"]
    assert found["models"]["viditq-w8a8"]["psnr_db"]["mean"] > found["models"]["rtn-w4a8"]["psnr_db"]["mean"]
    with Image.open(tmp_path / "d" / "side-by-side.gif") as gif:
        assert gif.n_frames == 3
        assert gif.height > 4 * 96  # 16 bit and three recipes
    names = {path.name for path in (tmp_path / "d").iterdir()}
    assert {"side-by-side.mp4", "report.html", "sheet.png", demo.KEPT} <= names
