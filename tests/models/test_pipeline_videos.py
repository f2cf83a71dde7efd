"""Every video architecture in its own pipeline of diffusers: quantize, save, load, generate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import videos
from helpers import PROMPTS
from torch import Tensor

import ditq
from ditq import architectures
from ditq.calibration import calibrate
from ditq.components import transformer_names
from ditq.errors import UsageError
from ditq.layers import QuantizedLinear
from ditq.numerics import sqnr_db
from ditq.recipe import Calibration
from ditq.sampling import Sampling, sample

FEW = {"steps": 2, "prompts": 2, "batch_size": 2, "rows": 64}


def conditions(name: str) -> list[str]:
    return ["3", "7"] if architectures.load(name).pipeline.condition == "class_labels" else PROMPTS


def draw(pipe: Any, name: str, decode: bool = True) -> tuple[list[Any], Tensor]:
    """Frames of one video and its latents, from fixed noise."""
    _, arguments = videos.PIPELINES[name]
    drawn = sample(
        pipe,
        architectures.load(name),
        conditions(name)[:1],
        Sampling(steps=2, guidance_scale=3.0, seed=5, arguments=arguments),
        decode=decode,
    )
    return drawn.images[0], drawn.latents


@pytest.fixture(params=videos.PIPELINES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_video_architecture_has_a_pipeline_here() -> None:
    files = {name: Path(architectures.__file__).parent / f"{name}.yaml" for name in architectures.names()}
    assert {name for name, file in files.items() if "frames" in file.read_text()} == {*videos.PIPELINES}


def test_quantized_pipeline_saved_and_reloaded_draws_the_same_video(name: str, tmp_path: Path) -> None:
    make, arguments = videos.PIPELINES[name]
    pipe = make()
    assert type(pipe).__name__ in architectures.load(name).pipeline.classes
    decodes = name != "allegro"  # whose VAE decodes tiles of 320 x 320 only
    _, exact = draw(pipe, name, decodes)
    calibration = {**FEW, "arguments": arguments}
    overrides = [f"calibration={calibration}", "balance.alpha=0.5"]
    plan = ditq.quantize(pipe, "viditq-w4a8", prompts=conditions(name), overrides=overrides).plan
    assert {layer.role for layer in plan.kept} <= {"embedder", "final", "modulation"}
    frames, before = draw(pipe, name, decodes)
    assert not torch.equal(before, exact)
    assert sqnr_db(exact, before) > 6  # 4 bits of random weights; the same video of other weights is below 0
    loaded = ditq.load(ditq.save(pipe, tmp_path / "out"))
    loaded.set_progress_bar_config(disable=True)
    assert sum(isinstance(m, QuantizedLinear) for m in loaded.transformer.modules()) == len(plan.quantized)
    again, after = draw(loaded, name, decodes)
    assert torch.equal(after, before)
    if decodes:
        assert [f.tobytes() for f in again] == [f.tobytes() for f in frames]
        assert len(frames) > 1


@pytest.mark.parametrize(("make", "calls"), [(videos.latte, 1), (videos.wan, 2)])
def test_calls_with_guidance(make: Callable[[], Any], calls: int, tmp_path: Path) -> None:
    """Both conditions of a moment are kept together, whether they come as one batch or as two calls."""
    name = make.__name__
    settings = Calibration(**FEW, guidance_scale=3.0, calls=1, arguments=videos.PIPELINES[name][1])
    arch = architectures.load(name)
    kept = calibrate(make(), arch, PROMPTS, settings, cache=tmp_path).calls
    assert kept
    assert len(kept) % calls == 0
    assert [len(call[arch.forward.sample]) for call in kept] == [2 // calls] * len(kept)
    for a, b in zip(kept[::calls], kept[calls - 1 :: calls], strict=True):
        assert torch.equal(a["timestep"], b["timestep"])
        texts = torch.cat([a["encoder_hidden_states"], b["encoder_hidden_states"]])[:2]
        assert not torch.equal(texts[0], texts[-1])


@pytest.mark.parametrize("guidance", [3.0, 1.0], ids=["guided", "unguided"])
def test_frames_folded_into_the_batch_are_not_taken_for_conditions(guidance: float, tmp_path: Path) -> None:
    """One video without guidance has 3 frames and 16 positions: an even first axis, but one condition."""
    pipe, arch = videos.latte(), architectures.load("latte")
    seen: dict[str, list[Tensor]] = {}
    names = {"spatial": "transformer_blocks.0.attn1.to_q", "temporal": "temporal_transformer_blocks.1.attn1.to_q"}
    handles = [
        pipe.transformer.get_submodule(layer).register_forward_pre_hook(
            lambda _, args, key=key: seen.setdefault(key, []).append(args[0].detach())
        )
        for key, layer in names.items()
    ]
    settings = Calibration(**{**FEW, "prompts": 1, "batch_size": 1}, guidance_scale=guidance)
    statistics = calibrate(pipe, arch, PROMPTS, settings, cache=tmp_path)
    for handle in handles:
        handle.remove()
    for key, layer in names.items():
        absmax = statistics.groups[layer].absmax
        assert absmax.shape[1] == (2 if guidance > 1 else 1)
        first = seen[key][0]
        if guidance > 1:
            unconditional, conditional = first.chunk(2)  # Latte's order
            assert torch.equal(absmax[0, 0], conditional.abs().amax((0, 1)))
            assert torch.equal(absmax[0, 1], unconditional.abs().amax((0, 1)))
        else:
            assert len(first) % 2 == (key == "spatial")
            assert torch.equal(absmax[0, 0], first.abs().amax((0, 1)))


@pytest.mark.parametrize("guidance", [3.0, 1.0], ids=["guided", "unguided"])
def test_two_calls_of_one_moment_are_two_conditions(guidance: float, tmp_path: Path) -> None:
    """Wan calls its transformer once with the prompt, once without, at every timestep."""
    pipe, arch = videos.wan(), architectures.load("wan")
    seen: dict[str, list[Tensor]] = {"blocks.1.attn2.to_k": [], "blocks.0.ffn.net.0.proj": []}
    for layer, inputs in seen.items():
        pipe.transformer.get_submodule(layer).register_forward_pre_hook(
            lambda _, args, inputs=inputs: inputs.append(args[0].detach())
        )
    settings = Calibration(
        **{**FEW, "prompts": 1, "batch_size": 1}, guidance_scale=guidance, arguments=videos.PIPELINES["wan"][1]
    )
    statistics = calibrate(pipe, arch, PROMPTS, settings, cache=tmp_path)
    conditions = 2 if guidance > 1 else 1
    for layer, inputs in seen.items():
        assert len(inputs) == 2 * conditions
        expected = torch.stack([x.abs().amax((0, 1)) for x in inputs]).unflatten(0, (2, conditions))
        assert torch.equal(statistics.groups[layer].absmax, expected)


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (videos.mochi, ["transformer_blocks.0.attn1.add_q_proj", "transformer_blocks.0.ff_context.net.2"]),
        (
            videos.hunyuanvideo,
            [
                "context_embedder.token_refiner.refiner_blocks.0.attn.to_q",
                "transformer_blocks.0.attn.add_q_proj",
                "single_transformer_blocks.1.attn.to_q",
                "single_transformer_blocks.1.proj_out",
            ],
        ),
    ],
    ids=["mochi", "hunyuanvideo"],
)
def test_padded_text_does_not_count(make: Callable[[], Any], layers: list[str], tmp_path: Path) -> None:
    name, pipe = make.__name__, make()
    arch = architectures.load(name)
    rows: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    masks: list[Tensor] = []

    def call(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        masks.append(kwargs["encoder_attention_mask"] > 0)

    def read(layer: str) -> Any:
        def observe(_: Any, args: Any) -> None:
            x, mask = args[0].detach(), masks[-1]
            kept = torch.cat([torch.ones(len(x), x.shape[1] - mask.shape[1], dtype=torch.bool), mask], 1)
            rows[layer].append(x[kept])

        return observe

    pipe.transformer.register_forward_pre_hook(call, with_kwargs=True)
    for layer in layers:
        pipe.transformer.get_submodule(layer).register_forward_pre_hook(read(layer))
    settings = Calibration(**FEW, guidance_scale=1.0, arguments=videos.PIPELINES[name][1])
    statistics = calibrate(pipe, arch, PROMPTS, settings, cache=tmp_path)
    assert not all(bool(mask.all()) for mask in masks)
    for layer in layers:
        expected = torch.stack([x.abs().amax(0) for x in rows[layer]])
        assert torch.equal(statistics.groups[layer].absmax.amax(1), expected)


def test_a_condition_without_any_text_has_no_maxima(tmp_path: Path) -> None:
    """Mochi's published pipeline masks all of the empty prompt."""
    pipe = videos.mochi()
    pipe.register_to_config(force_zeros_for_empty_prompt=True)
    settings = Calibration(**FEW, guidance_scale=3.0, arguments=videos.PIPELINES["mochi"][1])
    statistics = calibrate(pipe, architectures.load("mochi"), PROMPTS, settings, cache=tmp_path)
    absmax = statistics.groups["transformer_blocks.0.attn1.add_q_proj"].absmax
    assert bool((absmax[:, 0] > 0).all())
    assert bool((absmax[:, 1] == 0).all())
    assert bool((statistics.groups["transformer_blocks.0.attn1.to_q"].absmax > 0).all())


def test_video_keeps_the_size_that_latte_was_trained_for() -> None:
    frames, _ = draw(videos.latte(), "latte")
    assert [frame.size for frame in frames] == [(16, 16)] * 3


def test_both_experts_are_quantized_each_on_its_own_timesteps(tmp_path: Path) -> None:
    arguments = videos.PIPELINES["wan"][1]
    pipe = videos.wan_of_two_experts()
    assert transformer_names(pipe) == ["transformer", "transformer_2"]
    settings = Calibration(**{**FEW, "steps": 4}, arguments=arguments)
    times = {
        component: calibrate(
            pipe, architectures.load("wan"), PROMPTS, settings, component=component, cache=tmp_path
        ).timesteps
        for component in transformer_names(pipe)
    }
    assert [len(t) for t in times.values()] == [2, 2]
    assert times["transformer"].min() >= 600 > times["transformer_2"].max()
    plain = ditq.save(pipe, tmp_path / "16-bit")
    for component in transformer_names(pipe):
        model = getattr(pipe, component)
        overrides = [f"calibration.{key}={value}" for key, value in {**FEW, "steps": 4}.items()]
        overrides += [f"calibration.arguments={arguments}", "balance.alpha=0.5"]
        result = ditq.quantize(pipe, "smoothquant-w8a8", prompts=PROMPTS, component=component, overrides=overrides)
        assert result.model is model
    assert pipe.transformer.blocks[0].attn1.to_q.qweight.dtype == torch.uint8
    _, before = draw(pipe, "wan")
    loaded = ditq.load(ditq.save(pipe, tmp_path / "out", source=plain))
    loaded.set_progress_bar_config(disable=True)
    for component in transformer_names(loaded):
        assert any(isinstance(m, QuantizedLinear) for m in getattr(loaded, component).modules())
    assert torch.equal(draw(loaded, "wan")[1], before)
    with pytest.raises(UsageError, match="with a transformer_2"):
        ditq.quantize(videos.wan(), "rtn-w8a8", component="transformer_2")
