"""Original checkpoints of classes that diffusers has: every tensor has its place."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from helpers import run, tiny_model
from torch import Tensor

from ditq import architectures
from ditq.errors import CheckpointError, UsageError
from ditq.models.official import load_official, official

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def published_dit(d: int, depth: int, classes: int) -> Shapes:
    """Names and shapes of facebookresearch/DiT's checkpoints, without positions."""
    shapes: Shapes = {
        "x_embedder.proj.weight": (d, 4, 2, 2), "x_embedder.proj.bias": (d,),
        **linear("t_embedder.mlp.0", d, 256), **linear("t_embedder.mlp.2", d, d),
        "y_embedder.embedding_table.weight": (classes + 1, d),
        **linear("final_layer.adaLN_modulation.1", 2 * d, d), **linear("final_layer.linear", 32, d),
    }  # fmt: skip
    for block in (f"blocks.{i}" for i in range(depth)):
        shapes |= linear(f"{block}.attn.qkv", 3 * d, d) | linear(f"{block}.attn.proj", d, d)
        shapes |= linear(f"{block}.mlp.fc1", 4 * d, d) | linear(f"{block}.mlp.fc2", d, 4 * d)
        shapes |= linear(f"{block}.adaLN_modulation.1", 6 * d, d)
    return shapes


def tiny_dit_checkpoint() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {name: 0.1 * torch.randn(shape) for name, shape in published_dit(128, 2, 10).items()}


def test_every_tensor_of_dit_has_its_place_at_real_size() -> None:
    config = architectures.load("dit").sizes["DiT-XL/2"]
    with torch.device("meta"):
        model = diffusers.DiTTransformer2DModel(**config)
    shapes = published_dit(1152, 28, 1000)
    places, state = official(model), model.state_dict()
    assert places.keys() == shapes.keys()
    assert sorted(part for own in places.values() for part in own) == sorted(state)
    for key, own in places.items():
        together = key.endswith(("qkv.weight", "qkv.bias"))
        assert len(own) == (3 if together else 28 if key.startswith(("t_embedder", "y_embedder")) else 1)
        shape = tuple(state[own[0]].shape)
        assert ((3 * shape[0], *shape[1:]) if together else shape) == shapes[key]


def test_dit_takes_rows_and_copies() -> None:
    model, tensors = tiny_model("dit"), tiny_dit_checkpoint()
    load_official(model, {**tensors, "pos_embed": torch.zeros(1, 16, 128)})
    state = model.state_dict()
    rows = torch.cat([state[f"transformer_blocks.1.attn1.to_{part}.weight"] for part in "qkv"])
    assert torch.equal(rows, tensors["blocks.1.attn.qkv.weight"])
    for i in range(2):
        embedder = f"transformer_blocks.{i}.norm1.emb"
        assert torch.equal(state[f"{embedder}.timestep_embedder.linear_2.bias"], tensors["t_embedder.mlp.2.bias"])
        table = tensors["y_embedder.embedding_table.weight"]
        assert torch.equal(state[f"{embedder}.class_embedder.embedding_table.weight"], table)
    assert torch.equal(state["proj_out_2.weight"], tensors["final_layer.linear.weight"])


@pytest.mark.parametrize("name", ["dit", "latte"])
def test_a_model_takes_its_own_names_too(name: str) -> None:
    source, target = tiny_model(name), tiny_model(name, seed=1)
    tensors: dict[str, Any] = dict(source.state_dict())
    if name == "latte":  # Vchitect/Latte's text-to-video checkpoint: diffusers' names, and positions
        tensors |= {"pos_embed.pos_embed": torch.zeros(1, 16, 128), "temp_pos_embed": torch.zeros(1, 3, 128)}
    load_official(target, tensors)
    assert torch.equal(run(target, name), run(source, name))


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("blocks.1.attn.qkv.weight", None, r"lacks tensor 'transformer_blocks.1.attn1.to_q.weight' \(or 'blocks.1"),
        (
            "blocks.1.attn.qkv.weight",
            torch.zeros(128, 128),
            r"'blocks.1.attn.qkv.weight' has shape \(128, 128\).*\(384, 128\)",
        ),
        (
            "y_embedder.embedding_table.weight",
            torch.zeros(10, 128),
            r"has shape \(10, 128\); the model expects \(11, 128\)",
        ),
        ("blocks.2.mlp.fc1.bias", torch.zeros(512), "holds tensor 'blocks.2.mlp.fc1.bias'"),
    ],
    ids=["missing", "not-fused", "classes", "surplus"],
)
def test_dit_checkpoint_that_does_not_fit_is_refused_by_name(key: str, value: Tensor | None, complaint: str) -> None:
    tensors = {k: v for k, v in tiny_dit_checkpoint().items() if k != key}
    with pytest.raises(CheckpointError, match=complaint):
        load_official(tiny_model("dit"), tensors if value is None else {**tensors, key: value})


def test_other_classes_are_refused() -> None:
    with pytest.raises(UsageError, match="WanTransformer3DModel.*Known: DiTTransformer2DModel"):
        load_official(tiny_model("wan"), {})
