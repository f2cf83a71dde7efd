"""The engine on a real model: every layer of the bundled text-to-image model multiplies integers, images agree."""

from __future__ import annotations

import ditq_bundled
import pytest

import ditq
from ditq import api, architectures
from ditq.comparison import compare
from ditq.openvino import runtime
from ditq.sampling import Sampling, sample

if (reason := runtime.why_unavailable()) is not None:
    pytest.skip(reason, allow_module_level=True)

from ditq.openvino import attention_ranges
from ditq.openvino.export import compile_in_place
from ditq.sampling import first_call

# Every layer smoothed and rotated: nothing to search, and the most that this engine has to do.
SHORT = ("calibration.prompts=4", "calibration.steps=4", "balance.choose=always", "balance.alpha=0.5", "clip=minmax")


@pytest.mark.parametrize(("recipe", "storage", "width"), [("viditq-w8a8", "u8", 0), ("viditq-w4a8", "u4", 128)])
def test_emoji_pictures_are_those_of_the_torch_engine(recipe: str, storage: str, width: int) -> None:
    pipe = api.load("bundled:emoji-t2i")
    arch = architectures.match(pipe.transformer)
    prompts = ditq_bundled.prompts("emoji-t2i", "evaluation")[:4]
    ditq.quantize(pipe, recipe, prompts=ditq_bundled.prompts("emoji-t2i", "calibration"), overrides=SHORT)
    drawn = sample(pipe, arch, prompts, Sampling(steps=8))
    report = compile_in_place(pipe.transformer, arch, first_call(pipe, arch, prompts[:1]))
    assert len(report.layers) == 80
    assert {(layer.storage, report.executions[layer.name]) for layer in report.layers} == {(storage, "int8")}
    assert report.group_size == width
    again = sample(pipe, arch, prompts, Sampling(steps=8))
    assert compare(drawn, again).metrics["psnr_db"].mean > 40


def test_emoji_pictures_with_queries_and_keys_in_8_bits() -> None:
    pipe = api.load("bundled:emoji-t2i")
    arch = architectures.match(pipe.transformer)
    prompts, calibration = (ditq_bundled.prompts("emoji-t2i", part)[:4] for part in ("evaluation", "calibration"))
    ditq.quantize(pipe, "smoothquant-static-w8a8", prompts=calibration, overrides=SHORT[:2])
    drawn = sample(pipe, arch, prompts, Sampling(steps=8))
    largest = attention_ranges.sampled_ranges(pipe, arch, calibration)
    report = compile_in_place(pipe.transformer, arch, first_call(pipe, arch, prompts[:1]), largest=largest)
    assert report.attentions == 2 * len(largest) == 16
    assert {*report.executions.values()} == {"int8"}
    again = sample(pipe, arch, prompts, Sampling(steps=8))
    assert 30 < compare(drawn, again).metrics["psnr_db"].mean < 60  # close, and not the same: they were rounded
