"""Latte without text against the published mathematics, names and shapes, and its pipeline."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import example_inputs, tiny_model
from torch import Tensor
from torch.nn import functional as F
from videos import latte_class

from ditq.errors import CheckpointError, UsageError
from ditq.models.latte_class import Latte
from ditq.models.official import load_official, official

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def published(d: int, depth: int, classes: int | None) -> Shapes:
    """Names and shapes of Vchitect/Latte's models/latte.py (extras 2, or 1 without classes), without positions."""
    shapes: Shapes = {
        "x_embedder.proj.weight": (d, 4, 2, 2), "x_embedder.proj.bias": (d,),
        **linear("t_embedder.mlp.0", d, 256), **linear("t_embedder.mlp.2", d, d),
        **linear("final_layer.adaLN_modulation.1", 2 * d, d), **linear("final_layer.linear", 32, d),
    }  # fmt: skip
    if classes is not None:
        shapes["y_embedder.embedding_table.weight"] = (classes + 1, d)
    for block in (f"blocks.{i}" for i in range(depth)):
        shapes |= linear(f"{block}.attn.qkv", 3 * d, d) | linear(f"{block}.attn.proj", d, d)
        shapes |= linear(f"{block}.mlp.fc1", 4 * d, d) | linear(f"{block}.mlp.fc2", d, 4 * d)
        shapes |= linear(f"{block}.adaLN_modulation.1", 6 * d, d)
    return shapes


def tiny_checkpoint() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {name: torch.randn(shape) / math.sqrt(shape[-1]) for name, shape in published(128, 4, 10).items()}


@pytest.mark.parametrize(("classes", "parameters"), [(101, 673.80e6), (None, 673.68e6)], ids=["ucf101", "sky"])
def test_every_published_tensor_has_its_place_at_real_size(classes: int | None, parameters: float) -> None:
    with torch.device("meta"):
        model = Latte(num_classes=classes)
    shapes, places, state = published(1152, 28, classes), official(model), model.state_dict()
    assert places.keys() == shapes.keys()
    for key, own in places.items():
        assert (sum(len(state[part]) for part in own), *state[own[0]].shape[1:]) == shapes[key], key
    assert sorted(part for own in places.values() for part in own) == sorted(state)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-4)  # the paper: 673.68 M


def test_blocks_are_spatial_and_temporal_in_turn() -> None:
    model, tensors = tiny_model("latte-class"), tiny_checkpoint()
    positions = {"pos_embed": torch.zeros(1, 16, 128), "temp_embed": torch.zeros(1, 3, 128)}
    load_official(model, {**tensors, **positions})
    for i, block in enumerate(
        (model.spatial_blocks[0], model.temporal_blocks[0], model.spatial_blocks[1], model.temporal_blocks[1])
    ):
        assert torch.equal(block.mlp.fc2.weight, tensors[f"blocks.{i}.mlp.fc2.weight"])
        for part, rows in zip("qkv", tensors[f"blocks.{i}.attn.qkv.bias"].chunk(3), strict=True):
            assert torch.equal(block.attn.get_submodule(part).bias, rows)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("blocks.3.attn.qkv.weight", None, r"lacks tensor 'temporal_blocks.1.attn.q.weight' \(or 'blocks.3.attn.qkv"),
        (
            "blocks.0.mlp.fc1.bias",
            torch.zeros(128),
            r"'blocks.0.mlp.fc1.bias' has shape \(128,\); the model expects \(512,\)",
        ),
        ("blocks.4.mlp.fc1.bias", torch.zeros(512), "holds tensor 'blocks.4.mlp.fc1.bias'"),
    ],
    ids=["missing", "misshaped", "deeper"],
)
def test_checkpoint_that_does_not_fit_is_refused_by_name(key: str, value: Tensor | None, complaint: str) -> None:
    tensors = {name: t for name, t in tiny_checkpoint().items() if name != key}
    with pytest.raises(CheckpointError, match=complaint):
        load_official(tiny_model("latte-class"), tensors if value is None else {**tensors, key: value})


def reference(w: dict[str, Tensor], x: dict[str, Tensor]) -> Tensor:
    """The published forward pass written down again, in float64, one sample after the other."""
    d, heads, frames, side = 128, 4, 3, 4
    w = {key: value.double() for key, value in w.items()}

    def lin(name: str, y: Tensor) -> Tensor:
        return y @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def sines(width: int, place: float) -> list[float]:
        angles = [place / 10000 ** (2 * i / width) for i in range(width // 2)]
        return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]

    def norm(y: Tensor) -> Tensor:
        return (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def attention(name: str, y: Tensor) -> Tensor:  # [tokens, d]
        parts = zip(*(part.chunk(heads, -1) for part in lin(f"{name}.qkv", y).chunk(3, -1)), strict=True)
        out = [((q @ k.T) / math.sqrt(d // heads)).softmax(-1) @ v for q, k, v in parts]
        return lin(f"{name}.proj", torch.cat(out, -1))

    def block(name: str, y: Tensor, vector: Tensor) -> Tensor:  # [sequences, tokens, d]
        table = lin(f"{name}.adaLN_modulation.1", F.silu(vector)).reshape(6, d)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = table
        m = norm(y) * (1 + scale) + shift
        y = y + gate * torch.stack([attention(f"{name}.attn", one) for one in m])
        m = norm(y) * (1 + scale_mlp) + shift_mlp
        return y + gate_mlp * lin(f"{name}.mlp.fc2", F.gelu(lin(f"{name}.mlp.fc1", m), approximate="tanh"))

    places = torch.tensor([sines(d // 2, c) + sines(d // 2, r) for r in range(side) for c in range(side)]).double()
    times = torch.tensor([sines(d, f) for f in range(frames)]).double()
    samples = []
    for b in range(2):
        patches = x["hidden_states"][b].double().reshape(4, frames, side, 2, side, 2)
        y = patches.permute(1, 2, 4, 0, 3, 5).reshape(frames, side * side, 16)
        y = y @ w["x_embedder.proj.weight"].reshape(d, 16).T + w["x_embedder.proj.bias"] + places
        angles = float(x["timestep"][b]) * torch.exp(-math.log(10000) * torch.arange(128).double() / 128)
        vector = lin("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()]))
        vector = lin("t_embedder.mlp.2", F.silu(vector)) + w["y_embedder.embedding_table.weight"][x["class_labels"][b]]
        for i in (0, 2):
            y = block(f"blocks.{i}", y, vector).transpose(0, 1)
            y = block(f"blocks.{i + 1}", y + times if i == 0 else y, vector).transpose(0, 1)
        shift, scale = lin("final_layer.adaLN_modulation.1", F.silu(vector)).chunk(2)
        out = lin("final_layer.linear", norm(y) * (1 + scale) + shift).reshape(frames, side, side, 2, 2, 8)
        samples.append(out.permute(5, 0, 1, 3, 2, 4).reshape(8, frames, 2 * side, 2 * side))
    return torch.stack(samples)


def test_forward_pass_is_the_published_one() -> None:
    tensors = tiny_checkpoint()
    model = tiny_model("latte-class").double()
    load_official(model, tensors)
    inputs = {
        **example_inputs("latte-class"),
        "timestep": torch.tensor([10, 730]),
        "class_labels": torch.tensor([3, 10]),
    }
    expected = reference(tensors, inputs)
    with torch.no_grad():
        got = model(**{**inputs, "hidden_states": inputs["hidden_states"].double()}).sample
    # Times and positions are made in float32.
    assert float((got - expected).norm() / expected.norm()) < 1e-4


# --------------------------------------------------------------------------------------------- pipeline


def test_guidance_acts_on_the_noise_and_not_on_the_variance() -> None:
    pipe = latte_class()
    seen: list[Tensor] = []
    steps: list[Tensor] = []
    calls: list[dict[str, Any]] = []
    pipe.transformer.register_forward_hook(lambda _, args, output: seen.append(output[0]))
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    step = pipe.scheduler.step

    def noted(noise: Tensor, *args: Any, **kwargs: Any) -> Any:
        steps.append(noise)
        return step(noise, *args, **kwargs)

    pipe.scheduler.step = noted
    pipe([3, 7], num_inference_steps=2, guidance_scale=4.0, output_type="latent")
    assert calls[0]["class_labels"].tolist() == [3, 7, 10, 10]
    conditional, unconditional = seen[0].chunk(2)
    guided = unconditional + 4 * (conditional - unconditional)
    torch.testing.assert_close(steps[0][:, :4], guided[:, :4])
    assert torch.equal(steps[0][:, 4:], conditional[:, 4:])


def test_labels_that_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(UsageError, match="class_labels must be 0 to 9, got 10"):
        latte_class()([3, 10])


def test_a_model_without_classes_draws_as_many_as_it_is_asked_for() -> None:
    pipe = latte_class()
    pipe.register_modules(transformer=tiny_model("latte-class", num_classes=None))
    calls: list[dict[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    frames = pipe([0, 0], num_inference_steps=1).frames
    assert [len(video) for video in frames] == [3, 3]
    assert len(calls[0]["hidden_states"]) == 2
    with pytest.raises(ValueError, match="class_labels must be given: this model has 10 classes"):
        tiny_model("latte-class")(torch.randn(1, 4, 3, 8, 8), torch.tensor([1]))


def test_an_odd_number_of_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="depth must be even.*got 3"):
        tiny_model("latte-class", depth=3)
