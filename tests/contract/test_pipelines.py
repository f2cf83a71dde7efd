"""What diffusers promises for a pipeline with a quantized transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from helpers import CONDITIONS, PIPELINES, draw

import ditq

RECIPES = {"plain": "rtn-w8a8", "smoothed": "smoothquant-w8a8", "rotated": "quarot-w4a8"}
FOLDED = Path(__file__).resolve().parent.parent / "data" / "v0.1" / "pixart-folded"
CPU = torch.device("cpu")


@pytest.fixture(
    params=[(name, recipe) for name in PIPELINES for recipe in RECIPES] + [("pixart", "folded")], ids="-".join
)
def pipe(request: pytest.FixtureRequest) -> Any:
    name, recipe = request.param
    pipe = PIPELINES[name]()
    if recipe == "folded":
        pipe.transformer = diffusers.PixArtTransformer2DModel.from_pretrained(FOLDED).eval()
        return pipe
    quick = ["calibration.steps=2", "calibration.prompts=2"] if recipe == "smoothed" else []
    prompts = CONDITIONS[name][:2] if recipe == "smoothed" else None
    ditq.quantize(pipe, RECIPES[recipe], prompts=prompts, overrides=quick)
    return pipe


def scales(pipe: Any) -> dict[str, torch.Tensor]:
    return {n: b.clone() for n, b in pipe.transformer.named_buffers() if n.endswith(("scale", "qweight"))}


def labels(pipe: Any) -> dict[str, Any]:
    return {"id2label": {i: name for name, i in pipe.labels.items()}} if hasattr(pipe, "labels") else {}


def test_parts_take_turns_on_the_device(pipe: Any) -> None:
    """``enable_model_cpu_offload`` needs an accelerator; these are the hooks that it sets."""
    before, hook = draw(pipe), None
    for name in pipe.model_cpu_offload_seq.split("->"):
        part = getattr(pipe, name, None)
        if isinstance(part, torch.nn.Module):
            _, hook = accelerate.cpu_offload_with_hook(part, CPU, prev_module_hook=hook)
    for _ in range(2):
        assert torch.equal(draw(pipe), before)


def test_layers_take_turns_on_the_device(pipe: Any) -> None:
    """``enable_sequential_cpu_offload`` needs an accelerator; these are the hooks that it sets."""
    before = draw(pipe)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            accelerate.cpu_offload(part, CPU, offload_buffers=len(part._parameters) > 0)
    for _ in range(2):
        assert torch.equal(draw(pipe), before)


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_groups_take_turns_on_the_device(level: str, pipe: Any) -> None:
    before = draw(pipe)
    blocks: dict[str, Any] = {"num_blocks_per_group": 1} if level == "block_level" else {}
    if not pipe.transformer._supports_group_offloading:
        pytest.skip("diffusers does not support it for this class")
    pipe.transformer.enable_group_offload(CPU, CPU, offload_type=level, **blocks)
    assert torch.equal(draw(pipe), before)


def test_cast_is_refused_and_changes_no_scale(pipe: Any) -> None:
    before, image = scales(pipe), draw(pipe)
    with pytest.raises(ValueError, match="quantized"):
        pipe.to(torch.bfloat16)
    after = scales(pipe)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert pipe.transformer.dtype == torch.float32
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and name != "transformer":
            part.float()
    assert (draw(pipe) - image).abs().max() < 0.1


def test_moving_changes_nothing(pipe: Any) -> None:
    before = draw(pipe)
    assert torch.equal(draw(pipe.to("cpu")), before)


def test_another_pipeline_takes_the_parts(pipe: Any) -> None:
    before = draw(pipe)
    kind = diffusers.PixArtSigmaPipeline if isinstance(pipe, diffusers.PixArtAlphaPipeline) else type(pipe)
    with pytest.raises(ValueError, match="quantized"):  # it always casts, which diffusers refuses if quantized
        kind.from_pipe(pipe)
    other = kind(**{name: part for name, part in pipe.components.items() if part is not None}, **labels(pipe))
    other.set_progress_bar_config(disable=True)
    assert other.transformer is pipe.transformer
    assert torch.equal(draw(other), before)


def test_saved_and_loaded_is_identical(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    assert torch.equal(draw(ditq.load(tmp_path)), draw(pipe))
