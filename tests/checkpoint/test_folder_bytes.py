"""The bytes of saved files are those that the plan says: exactly for the tensors; files also have headers.

``Plan.memory()`` counts tensors. A header (names, shapes, checksums) takes about 160 bytes per tensor, which is 1.0 to
1.3 % of the two smaller bundled models (6 and 7 MB) and 0.3 % of the third (16 MB) in 4 bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ditq_bundled
import pytest
import torch
from helpers import tiny_model, tiny_statistics
from torch import nn

import ditq
from ditq import architectures
from ditq.conversion import estimate
from ditq.plan import LayerPlan, Plan
from ditq.recipe import load

BITS = (3, 4, 8, 16)
SHORT = ["calibration.prompts=1", "calibration.steps=2", "calibration.rows=64"]


def saved(model: nn.Module, folder: Path, **options: Any) -> tuple[int, int, int, int]:
    """Bytes of the files, bytes of their tensors, number of tensors and of files, read from the files alone."""
    model.save_pretrained(folder, **options)
    files = list(folder.glob("*.safetensors"))
    size = tensors = count = 0
    for file in files:
        data = file.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little")
        size, tensors = size + len(data), tensors + len(data) - header
        count += data[:header].count(b'"data_offsets"')
    return size, tensors, count, len(files)


def check(model: nn.Module, plan: Plan, folder: Path, **options: Any) -> float:
    """The size of the files relative to the plan; that of their tensors must be equal to it."""
    size, tensors, count, files = saved(model, folder, **options)
    assert tensors == plan.memory()[0]
    assert size - tensors < 110 * count + 90 * count * files  # every file has all checksums
    loaded = type(model).from_pretrained(folder)
    assert loaded.hf_quantizer.plan.memory() == plan.memory()
    return size / plan.memory()[0]


def by_hand(model: nn.Module, recipe: str = "rtn-w4a8") -> Plan:
    """A plan with layers of 3, 4 and 8 bits, and some that are kept, in turn."""

    def changed(layer: LayerPlan, bits: int) -> LayerPlan:
        if layer.weight is None:
            return layer
        if bits == 16:
            return layer.model_copy(update={"weight": None, "activation": None, "reason": "by hand"})
        return layer.model_copy(update={"weight": layer.weight.model_copy(update={"bits": bits})})

    plan = estimate(model, architectures.match(model), load(recipe))
    layers = tuple(changed(layer, BITS[i % len(BITS)]) for i, layer in enumerate(plan))
    assert {layer.weight_bits for layer in layers} == set(BITS)
    return Plan.from_dict(plan.model_copy(update={"layers": layers}).model_dump(mode="json"))


# ------------------------------------------------------------------------------------- bundled models


def calibration(name: str, pipe: Any) -> list[str]:
    return list(pipe.labels)[:1] if name == "emoji-class" else ditq_bundled.prompts(name, "calibration")[:1]


@pytest.mark.parametrize(
    ("name", "recipe", "header"),
    [
        ("emoji-t2i", "rtn-w4a8", 0.011),
        ("emoji-t2i", "viditq-w4a8", 0.013),
        ("emoji-t2i", "qdit-w4a4", 0.011),
        ("emoji-class", "rtn-w4a8", 0.004),
        ("emoji-class", "viditq-w4a8", 0.004),
        ("emoji-video", "rtn-w4a8", 0.011),
        ("emoji-video", "viditq-w4a8", 0.013),
    ],
)
def test_files_of_a_recipe(name: str, recipe: str, header: float, tmp_path: Path) -> None:
    pipe = ditq.load(f"bundled:{name}")
    overrides = [*SHORT, *(["balance.alpha=[0.5]"] if load(recipe).balance.smooth else [])]
    options: dict[str, Any] = {"prompts": calibration(name, pipe), "overrides": overrides}
    plan = ditq.quantize(pipe, recipe, **(options if load(recipe).needs_calibration else {})).plan
    assert 1 < check(pipe.transformer, plan, tmp_path) < 1 + header


@pytest.mark.parametrize(("name", "header"), [("emoji-t2i", 0.01), ("emoji-class", 0.004), ("emoji-video", 0.01)])
def test_files_of_mixed_bits(name: str, header: float, tmp_path: Path) -> None:
    pipe = ditq.load(f"bundled:{name}")
    planned = by_hand(pipe.transformer)
    plan = ditq.quantize(pipe, planned).plan
    assert plan.memory() == planned.memory()  # known before anything is quantized
    assert 1 < check(pipe.transformer, plan, tmp_path) < 1 + header


def test_files_of_a_model_in_shards(tmp_path: Path) -> None:
    pipe = ditq.load("bundled:emoji-t2i")
    plan = ditq.quantize(pipe, "rtn-w8a8").plan
    check(pipe.transformer, plan, tmp_path, max_shard_size="3MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1


# ------------------------------------------------------------------------------------- other models

EMBEDDER = ("roles.embedder={weights: {bits: 8, granularity: channel}}", "keep=[modulation, final]")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overrides", [(), EMBEDDER])
def test_parameters_that_the_class_keeps_in_float32(
    overrides: tuple[str, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_model("wan").to(dtype)
    plan = ditq.quantize(model, "rtn-w4a8", overrides=overrides).plan
    assert plan.float32_parameters > 0
    assert (plan["condition_embedder.time_embedder.linear_1"].weight_bits == 8) == bool(overrides)
    check(model, plan, tmp_path)


def test_a_plan_that_does_not_say_what_stays_in_float32_is_completed(tmp_path: Path) -> None:
    model = tiny_model("wan")
    old = by_hand(model).model_copy(update={"float32_parameters": 0})
    check(model, ditq.quantize(model, old).plan, tmp_path)


@pytest.mark.parametrize("architecture", ["dit", "pixart", "wan"])
def test_mixed_bits_of_tiny_models(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    plan = ditq.quantize(model, by_hand(model)).plan
    check(model, plan, tmp_path)


def test_copies_for_ranges_of_timesteps_with_their_own_bits(tmp_path: Path) -> None:
    model = tiny_model("dit")
    plan = by_hand(model)
    grids = [layer.weight for layer in plan.quantized if layer.weight.bits in (3, 8)][:2]  # type: ignore[union-attr]
    ranges = {"timesteps": ((0, 499), (500, 999)), "range_weights": tuple(grids)}
    layers = tuple(
        layer.model_copy(update=ranges if layer.weight_bits == 8 and layer.weight else {}) for layer in plan
    )
    assert {grid.bits for grid in grids} == {3, 8}  # type: ignore[union-attr]
    statistics = tiny_statistics(model, "dit")
    plan = ditq.quantize(model, plan.model_copy(update={"layers": layers}), statistics=statistics).plan
    assert any(layer.timesteps for layer in plan)
    check(model, plan, tmp_path)
