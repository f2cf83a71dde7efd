"""Images in the page: exact where small, bounded where large."""

import base64
import io

import made_up
import numpy as np
import pytest
from PIL import Image

from ditq.metrics import psnr_db
from ditq.report import pictures


def decoded(uri: str) -> Image.Image:
    kind, _, content = uri.partition(",")
    assert kind == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_small_pictures_are_exact() -> None:
    for picture in (made_up.picture(0), noise(128, 96)):
        assert (np.asarray(decoded(pictures.strip([picture]))) == np.asarray(picture)).all()


def test_large_pictures_are_close() -> None:
    picture = made_up.picture(0, 512)
    assert psnr_db(picture, decoded(pictures.strip([picture]))) > 38


def test_frames_stand_one_below_the_other() -> None:
    frames = [noise(40, 24, seed) for seed in range(5)]
    whole = np.asarray(decoded(pictures.strip(frames)))
    assert (whole == np.concatenate([np.asarray(f) for f in frames])).all()


@pytest.mark.parametrize(
    ("size", "frames", "expected"),
    [
        ((64, 64), 1, (64, 64)),
        ((2048, 1024), 1, (768, 384)),
        ((800, 640), 1, (768, 614)),
        ((832, 480), 81, (350, 202)),
    ],
)
def test_embedded_size_keeps_the_limits_of_page_and_format(
    size: tuple[int, int], frames: int, expected: tuple[int, int]
) -> None:
    found = pictures.embedded_size([Image.new("RGB", size)] * frames)
    assert found == expected
    assert found[1] * frames <= 16383


def test_only_the_first_prompts_are_shown() -> None:
    report = made_up.report(prompts=26)
    drawn = made_up.pictures(report)
    names = list(drawn)
    shown = pictures.pairs(drawn, names)
    assert len(shown) == pictures.SHOWN == 24
    assert np.asarray(decoded(shown[3].strips[2])).tobytes() == drawn[names[2]][3].tobytes()
    assert shown[3].psnr_db == pytest.approx([psnr_db(drawn[names[0]][3], drawn[name][3]) for name in names[1:]])


def test_fewer_are_shown_where_they_are_heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {"a": [noise(64, 64, i) for i in range(6)], "b": [noise(64, 64, i + 6) for i in range(6)]}
    one = sum(map(len, pictures.pairs(drawn, ["a", "b"])[0].strips))
    monkeypatch.setattr(pictures, "BUDGET", int(3.5 * one))
    assert len(pictures.pairs(drawn, ["a", "b"])) == 3
    monkeypatch.setattr(pictures, "BUDGET", 1)
    assert len(pictures.pairs(drawn, ["a", "b"])) == 1


def test_models_must_have_drawn_the_same_prompts() -> None:
    with pytest.raises(ValueError, match="zip"):
        pictures.pairs({"a": [noise(8, 8)] * 2, "b": [noise(8, 8)]}, ["a", "b"])
