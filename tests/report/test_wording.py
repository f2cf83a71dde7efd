"""Numbers and units as people read them."""

import pytest

from ditq.metrics.score import Interval
from ditq.plan import TensorFormat
from ditq.report import wording


def around(mean: float, half: float) -> Interval:
    return Interval(mean=mean, ci95=(mean - half, mean + half), n=9)


@pytest.mark.parametrize(
    ("mean", "half", "text"),
    [
        (29.4213, 0.66, "29.4 in 28.8 to 30.1"),
        (0.99897, 0.0002, "0.9990 in 0.9988 to 0.9992"),
        (34.91, 2.4, "34.9 in 32.5 to 37.3"),
        (0.0151, 0.0043, "0.0151 in 0.0108 to 0.0194"),
        (1834.2, 150.0, "1834 in 1684 to 1984"),
        (-0.019, 0.021, "−0.019 in −0.040 to 0.002"),
        (100.0, 0.0, "100.00 in 100.00 to 100.00"),
        (1e-9, 3e-9, "0.00000 in 0.00000 to 0.00000"),
    ],
)
def test_places_follow_the_interval(mean: float, half: float, text: str) -> None:
    value = around(mean, half)
    places = wording.digits([value])
    assert f"{wording.number(mean, places)} in {wording.interval(value, places)}" == text


def test_one_place_for_a_row_is_that_of_its_narrowest_interval() -> None:
    assert wording.digits([around(0.968, 0.031), around(0.999, 0.0004)]) == 4
    assert wording.digits([]) == 2


def test_signs() -> None:
    assert wording.number(0.25, 1, sign=True) == "+0.2"
    assert wording.number(-0.04, 1, sign=True) == "0.0"
    assert wording.number(-0.04, 1) == "0.0"


def test_memory_is_in_decimal_units() -> None:
    assert wording.megabytes(18_214_912) == "18.21 MB"
    assert wording.megabytes(23_800_000_000) == "23.80 GB"


def test_seeds() -> None:
    assert wording.seeds([5, 6, 7, 8]) == "5 to 8"
    assert wording.seeds([5, 7, 8]) == "5, 7, 8"
    assert wording.seeds([3]) == "3"


def test_settings_leave_out_what_is_not_set() -> None:
    values = {"guidance_scale": 0.0, "steps": None, "recipe": "", "versions": {"torch": "2.13", "ditq": "0.1"}}
    assert wording.settings(values) == [("guidance scale", "0.0"), ("versions", "torch 2.13, ditq 0.1")]


def test_counted() -> None:
    assert [wording.counted(n, "prompt") for n in (0, 1, 2)] == ["0 prompts", "1 prompt", "2 prompts"]


@pytest.mark.parametrize(
    ("mean", "text"), [(29.4213, "29.4"), (0.00199, "0.00199"), (0.0, "0.00"), (1834.2, "1834.2")]
)
def test_without_intervals_about_three_digits_are_shown(mean: float, text: str) -> None:
    alone = Interval(mean=mean, ci95=None, n=1)
    assert wording.number(mean, wording.digits([alone])) == text
    assert wording.interval(alone, 1) == "interval not available"


def test_formats_in_short_words() -> None:
    weights = TensorFormat(bits=4, symmetric=False, granularity="group", group_size=128)
    assert wording.weights(weights) == "W4 group 128 asym"
    assert wording.weights(TensorFormat(bits=8, granularity="channel")) == "W8 channel"
    assert wording.inputs(TensorFormat(bits=8, granularity="token", dynamic=True)) == "A8 token dyn"
    assert wording.inputs(TensorFormat(bits=6, granularity="tensor")) == "A6 tensor static"
    assert wording.inputs(None) == "16 bit"


def test_formats_name_what_is_not_uniform() -> None:
    normal = TensorFormat(bits=4, granularity="group", group_size=64, levels="normal")
    assert wording.weights(normal) == "W4 normal group 64"
    assert wording.weights(TensorFormat(bits=4, granularity="group", group_size=64)) == "W4 group 64"
    assert wording.weights(TensorFormat(bits=4, granularity="channel", full=True)) == "W4 full channel"
    inputs = TensorFormat(bits=4, granularity="token", dynamic=True, levels="normal")
    assert wording.inputs(inputs) == "A4 normal token dyn"
