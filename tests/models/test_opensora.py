"""Open-Sora's transformers against its own mathematics, names and shapes, and what is refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PROMPTS, example_inputs, run, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from videos import stdit, stdit3

import ditq
from ditq import architectures
from ditq.errors import CheckpointError
from ditq.models.official import from_official, load_official, official
from ditq.models.opensora import STDiT, STDiT3
from ditq.models.opensora.pipeline import flow_shift

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def published(d: int, depth: int, text: int, length: int, generation: int, head: int = 72) -> Shapes:
    """Names and shapes of the published checkpoints, hpcaitech/Open-Sora at v1.0.0 and v1.2.0."""
    shapes: Shapes = {
        "x_embedder.proj.weight": (d, 4, 1, 2, 2), "x_embedder.proj.bias": (d,),
        **linear("t_embedder.mlp.0", d, 256), **linear("t_embedder.mlp.2", d, d), **linear("t_block.1", 6 * d, d),
        **linear("y_embedder.y_proj.fc1", d, text), **linear("y_embedder.y_proj.fc2", d, d),
        "y_embedder.y_embedding": (length, text),
        **linear("final_layer.linear", 32, d), "final_layer.scale_shift_table": (2, d),
    }  # fmt: skip
    stacks, attentions = ["blocks"], ["attn", "attn_temp"]
    if generation == 3:
        shapes |= {**linear("fps_embedder.mlp.0", d, 256), **linear("fps_embedder.mlp.2", d, d)}
        shapes["rope.freqs"] = (head // 2,)
        stacks, attentions = ["spatial_blocks", "temporal_blocks"], ["attn"]
    for block in (f"{stack}.{i}" for stack in stacks for i in range(depth)):
        for attention in attentions:
            shapes |= linear(f"{block}.{attention}.qkv", 3 * d, d) | linear(f"{block}.{attention}.proj", d, d)
            if generation == 3:
                shapes |= {f"{block}.attn.q_norm.weight": (head,), f"{block}.attn.k_norm.weight": (head,)}
        shapes |= linear(f"{block}.cross_attn.q_linear", d, d) | linear(f"{block}.cross_attn.kv_linear", 2 * d, d)
        shapes |= linear(f"{block}.cross_attn.proj", d, d)
        shapes |= linear(f"{block}.mlp.fc1", 4 * d, d) | linear(f"{block}.mlp.fc2", d, 4 * d)
        shapes[f"{block}.scale_shift_table"] = (6, d)
    return shapes


def tiny_checkpoint(generation: int) -> dict[str, Tensor]:
    torch.manual_seed(3)
    shapes = published(128, 2, 64, 16, generation, head=32)
    made = {name: torch.randn(shape) / math.sqrt(max(shape[1:] or (25,))) for name, shape in shapes.items()}
    if generation == 3:
        made["rope.freqs"] = 10000.0 ** (-torch.arange(0, 32, 2).float() / 32)
    return made


@pytest.fixture(params=["stdit", "stdit3"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def generation(name: str) -> int:
    return 3 if name == "stdit3" else 1


# ------------------------------------------------------------------------------------ names and shapes


@pytest.mark.parametrize(
    ("kind", "shapes", "linears", "parameters"),
    [
        (STDiT, published(1152, 28, 4096, 120, 1), 252, 0.760e9),
        (STDiT3, published(1152, 28, 4096, 300, 3), 392, 1.208e9),
    ],
    ids=["v1.0", "v1.2"],
)
def test_every_published_tensor_has_its_place_at_real_size(
    kind: Any, shapes: Shapes, linears: int, parameters: float
) -> None:
    assert sum(n.endswith(".weight") and "blocks" in n and "norm" not in n for n in shapes) == linears
    with torch.device("meta"):
        model = kind()
    state = model.state_dict()
    places = official(model)
    assert places.keys() == shapes.keys()
    for key, own in places.items():
        rows = sum(len(state[part]) for part in own)
        assert (rows, *state[own[0]].shape[1:]) == shapes[key], key
    assert sorted(part for own in places.values() for part in own) == sorted(state)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.002)


def test_fused_rows_are_queries_keys_and_values_in_this_order(name: str) -> None:
    model, tensors = tiny_model(name), tiny_checkpoint(generation(name))
    load_official(model, tensors)
    block = "blocks.1" if name == "stdit" else "temporal_blocks.1"
    for part, rows in zip("qkv", tensors[f"{block}.attn.qkv.weight"].chunk(3), strict=True):
        assert torch.equal(model.get_submodule(f"{block}.attn.{part}").weight, rows)
    for part, rows in zip(
        ("k_linear", "v_linear"), tensors[f"{block}.cross_attn.kv_linear.bias"].chunk(2), strict=True
    ):
        assert torch.equal(model.get_submodule(f"{block}.cross_attn.{part}").bias, rows)


def test_split_names_and_a_file_give_the_same_model(name: str, tmp_path: Path) -> None:
    arch = architectures.load(name)
    tensors = tiny_checkpoint(generation(name))
    fused = tiny_model(name)
    load_official(fused, tensors)
    split = {k: v for k, v in tensors.items() if ".qkv." not in k}
    for key in tensors.keys() - split.keys():
        for part, rows in zip("qkv", tensors[key].chunk(3), strict=True):
            split[key.replace("qkv", part)] = rows.clone()
    if name == "stdit":  # as published: positions of the size that it was trained on, which are made anew
        split |= {"pos_embed": torch.zeros(1, 16, 128), "pos_embed_temporal": torch.zeros(1, 3, 128)}
    else:  # a library version that does not save them
        del split["rope.freqs"]
    save_file(split, tmp_path / "model.safetensors")
    assert arch.example is not None
    loaded = from_official(arch.model_class(), tmp_path / "model.safetensors", **arch.example.config)
    assert torch.equal(run(loaded, name), run(fused, name))


# ------------------------------------------------------------------------------------------ mathematics


def reference(w: dict[str, Tensor], x: dict[str, Any], third: bool) -> Tensor:
    """The published forward pass written down again, on fused tensors in float64, one sample after the other."""
    d, heads, (frames, side) = 128, 4, (3, 4)
    w = {key: value.double() for key, value in w.items()}

    def lin(name: str, y: Tensor) -> Tensor:
        return y @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def scalar(name: str, value: float) -> Tensor:
        angles = value * torch.exp(-math.log(10000) * torch.arange(128).double() / 128)
        return lin(f"{name}.mlp.2", F.silu(lin(f"{name}.mlp.0", torch.cat([angles.cos(), angles.sin()]))))

    def sines(width: int, place: float) -> list[float]:
        angles = [place / 10000 ** (2 * i / width) for i in range(width // 2)]
        return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]

    def norm(y: Tensor) -> Tensor:
        return (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def rms(name: str, y: Tensor) -> Tensor:
        return w[name] * y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turned(y: Tensor) -> Tensor:  # as complex numbers
        angles = torch.arange(len(y)).double()[:, None] * w["rope.freqs"]
        pairs = torch.view_as_complex(y.reshape(len(y), -1, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.T) / math.sqrt(d // heads)).softmax(-1) @ v

    def self_attention(name: str, y: Tensor, rope: bool) -> Tensor:  # [tokens, d]
        out = []
        for q, k, v in zip(*(part.chunk(heads, -1) for part in lin(f"{name}.qkv", y).chunk(3, -1)), strict=True):
            if third:
                q, k = rms(f"{name}.q_norm.weight", q), rms(f"{name}.k_norm.weight", k)
            out.append(attend(turned(q) if rope else q, turned(k) if rope else k, v))
        return lin(f"{name}.proj", torch.cat(out, -1))

    def cross_attention(name: str, y: Tensor, text: Tensor) -> Tensor:
        k, v = lin(f"{name}.kv_linear", text).chunk(2, -1)
        q = lin(f"{name}.q_linear", y)
        parts = zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True)
        return lin(f"{name}.proj", torch.cat([attend(*part) for part in parts], -1))

    unit = 64 / 512 if third else 0.5  # 8 x 8 latents are 64 x 64 pixels; v1.0 at 256 x 256 counts in halves
    places = torch.tensor(
        [sines(d // 2, c / unit) + sines(d // 2, r / unit) for r in range(side) for c in range(side)]
    )
    samples = []
    for b in range(2):
        latents = x["hidden_states"][b].double()
        text = lin("y_embedder.y_proj.fc1", x["encoder_hidden_states"][b].double())
        text = lin("y_embedder.y_proj.fc2", F.gelu(text, approximate="tanh"))
        text = text[x["encoder_attention_mask"][b] > 0]
        patches = (
            latents.reshape(4, frames, side, 2, side, 2).permute(1, 2, 4, 0, 3, 5).reshape(frames, side * side, 16)
        )
        y = patches @ w["x_embedder.proj.weight"].reshape(d, 16).T + w["x_embedder.proj.bias"] + places.double()
        vector = scalar("t_embedder", float(x["timestep"][b]))
        if third:
            vector = vector + scalar("fps_embedder", float(x["fps"][b]))
        time = lin("t_block.1", F.silu(vector)).reshape(6, d)

        def block(name: str, y: Tensor, temporal: bool, time: Tensor = time, text: Tensor = text) -> Tensor:
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = w[f"{name}.scale_shift_table"] + time
            m = norm(y) * (1 + scale) + shift
            if temporal:
                a = torch.stack([self_attention(f"{name}.attn", m[:, s], True) for s in range(side * side)], 1)
            else:
                a = torch.stack([self_attention(f"{name}.attn", m[f], False) for f in range(frames)])
            y = y + gate * a
            if not third:
                z = y
                if name == "blocks.0":
                    z = y + torch.tensor([sines(d, f) for f in range(frames)]).double()[:, None]
                a = [self_attention(f"{name}.attn_temp", z[:, s], False) for s in range(side * side)]
                y = y + gate * torch.stack(a, 1)
            y = y + cross_attention(f"{name}.cross_attn", y.reshape(-1, d), text).reshape(y.shape)
            m = norm(y) * (1 + scale_mlp) + shift_mlp
            return y + gate_mlp * lin(f"{name}.mlp.fc2", F.gelu(lin(f"{name}.mlp.fc1", m), approximate="tanh"))

        for i in range(2):
            if third:
                y = block(f"temporal_blocks.{i}", block(f"spatial_blocks.{i}", y, False), True)
            else:
                y = block(f"blocks.{i}", y, False)
        shift, scale = w["final_layer.scale_shift_table"] + vector
        out = lin("final_layer.linear", norm(y) * (1 + scale) + shift)  # [frames, positions, 2 x 2 x 8]
        out = out.reshape(frames, side, side, 2, 2, 8).permute(5, 0, 1, 3, 2, 4)
        samples.append(out.reshape(8, frames, 2 * side, 2 * side))
    return torch.stack(samples)


def test_forward_pass_is_the_published_one(name: str) -> None:
    tensors = tiny_checkpoint(generation(name))
    model = tiny_model(name).double()
    load_official(model, tensors)
    inputs = example_inputs(name)
    inputs["encoder_attention_mask"] = torch.tensor([[1.0] * 6, [1.0] * 4 + [0.0] * 2])
    inputs["timestep"] = torch.tensor([10, 730])
    if name == "stdit3":
        inputs["fps"] = torch.tensor([24, 8])
    expected = reference(tensors, inputs, name == "stdit3")
    doubled = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        got = model(**doubled).sample
    # Times and positions are made in float32.
    assert float((got - expected).norm() / expected.norm()) < 1e-4


def test_sizes_that_patches_do_not_divide_are_padded_and_cut(name: str) -> None:
    model, inputs = tiny_model(name), example_inputs(name)
    with torch.no_grad():
        assert model(**{**inputs, "hidden_states": torch.randn(2, 4, 2, 7, 5)}).sample.shape == (2, 8, 2, 7, 5)


# -------------------------------------------------------------------------------------------- refusals


def damaged(name: str, how: str) -> tuple[dict[str, Tensor], str]:
    tensors = tiny_checkpoint(generation(name))
    block = "blocks.1" if name == "stdit" else "spatial_blocks.1"
    if how == "missing":
        del tensors[f"{block}.attn.qkv.weight"]
        return tensors, rf"lacks tensor '{block}.attn.q.weight' \(or '{block}.attn.qkv.weight'\)"
    if how == "one-of-three":
        rows = tensors.pop(f"{block}.attn.qkv.bias").chunk(3)
        return {**tensors, f"{block}.attn.q.bias": rows[0], f"{block}.attn.v.bias": rows[2]}, rf"'{block}.attn.k.bias'"
    if how == "misshaped":
        tensors[f"{block}.mlp.fc1.weight"] = torch.zeros(512, 64)
        return tensors, rf"'{block}.mlp.fc1.weight' has shape \(512, 64\); the model expects \(512, 128\)"
    if how == "fused-misshaped":
        tensors[f"{block}.cross_attn.kv_linear.weight"] = torch.zeros(128, 128)
        return (
            tensors,
            rf"'{block}.cross_attn.kv_linear.weight' has shape \(128, 128\); the model expects \(256, 128\)",
        )
    tensors["extra.weight"] = torch.zeros(1)
    return tensors, "holds tensor 'extra.weight', which STDiT.? does not have|holds tensor 'extra.weight'"


@pytest.mark.parametrize("how", ["missing", "one-of-three", "misshaped", "fused-misshaped", "surplus"])
def test_checkpoint_that_does_not_fit_is_refused_by_name_and_changes_nothing(name: str, how: str) -> None:
    model = tiny_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tensors, complaint = damaged(name, how)
    with pytest.raises(CheckpointError, match=complaint):
        load_official(model, tensors)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_files_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        from_official(STDiT, tmp_path / "model.safetensors")
    for name in ("model.pth", "model.bin", "pytorch_model.bin.index.json"):
        with pytest.raises(CheckpointError, match=rf"{name} is not a safetensors file.*weights_only"):
            from_official(STDiT, tmp_path / name)


def test_several_files_are_read_by_their_index(name: str, tmp_path: Path) -> None:
    arch = architectures.load(name)
    assert arch.example is not None
    tensors = tiny_checkpoint(generation(name))
    names = sorted(tensors)
    index = {key: f"model-{i % 2 + 1:05d}-of-00002.safetensors" for i, key in enumerate(names)}
    for file in set(index.values()):
        save_file({key: tensors[key] for key in names if index[key] == file}, tmp_path / file)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    expected = tiny_model(name)
    load_official(expected, tensors)
    loaded = from_official(arch.model_class(), path, **arch.example.config)
    assert torch.equal(run(loaded, name), run(expected, name))
    (tmp_path / index[names[0]]).unlink()
    with pytest.raises(CheckpointError, match="model-00001-of-00002.safetensors cannot be read.*missing"):
        from_official(arch.model_class(), path, **arch.example.config)
    path.write_text("{}")
    with pytest.raises(CheckpointError, match="is not an index of safetensors files"):
        from_official(arch.model_class(), path, **arch.example.config)


# --------------------------------------------------------------------------------------------- pipeline


def test_guidance_acts_on_the_first_three_channels() -> None:
    pipe = stdit()
    seen: list[Tensor] = []
    steps: list[Tensor] = []
    pipe.transformer.register_forward_hook(lambda _, args, output: seen.append(output[0]))
    step = pipe.scheduler.step

    def noted(noise: Tensor, *args: Any, **kwargs: Any) -> Any:
        steps.append(noise)
        return step(noise, *args, **kwargs)

    pipe.scheduler.step = noted
    pipe(PROMPTS[:1], num_inference_steps=2, guidance_scale=4.0, output_type="latent")
    conditional, unconditional = seen[0].chunk(2)
    guided = unconditional + 4 * (conditional - unconditional)
    torch.testing.assert_close(steps[0][:, :3], guided[:, :3])
    assert torch.equal(steps[0][:, 3:], conditional[:, 3:])
    assert not torch.equal(conditional, unconditional)


def test_no_prompt_is_as_long_as_the_prompt() -> None:
    pipe = stdit()
    calls: list[dict[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    pipe(["a red cat", "blue tree"], num_inference_steps=1, guidance_scale=4.0, output_type="latent")
    mask, text = calls[0]["encoder_attention_mask"], calls[0]["encoder_hidden_states"]
    assert mask.sum(1).tolist() == [4, 3, 4, 3]  # words, and the end of the text
    assert torch.equal(text[2], pipe.transformer.y_embedder.y_embedding)


def test_scheduler_without_learned_variance_takes_the_noise() -> None:
    import diffusers

    pipe = stdit()
    pipe.scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    video = pipe(PROMPTS[0], num_inference_steps=2, num_frames=2, height=24, width=16).frames
    assert [frame.size for frame in video[0]] == [(16, 24)] * 2


# ------------------------------------------------------------------------------------- pipelines on disk


@pytest.mark.parametrize("shards", ["10GB", "300KB"], ids=["one-file", "sharded"])
@pytest.mark.parametrize(
    ("part", "key"),
    [("transformer", "temporal_blocks.1.attn.q.weight"), ("vae", "temporal_vae.decoder.conv_out.conv.bias")],
)
@pytest.mark.parametrize("how", ["missing", "misshaped", "surplus"])
def test_a_pipeline_that_is_not_complete_is_refused_by_name(
    how: str, part: str, key: str, shards: str, tmp_path: Path
) -> None:
    stdit3().save_pretrained(tmp_path, max_shard_size=shards)
    files = sorted((tmp_path / part).glob("*.safetensors"))
    assert (len(files) > 1) == (shards == "300KB")
    if how == "surplus" and len(files) > 1:
        pytest.skip("diffusers reads of several files what their index names")
    for file in files:
        tensors = load_file(file)
        if key in tensors:
            value = tensors.pop(key)
            if how == "misshaped":
                tensors[key] = torch.cat([value, value])
            elif how == "surplus":
                tensors |= {key: value, f"{key}.extra": value.clone()}
            save_file(tensors, file, metadata={"format": "pt"})
    complaint = {
        "missing": "lacks tensor '",
        "misshaped": "because ",
        "surplus": "has the unexpected tensor '",
    }
    with pytest.raises(CheckpointError, match=complaint[how] + re.escape(key)):
        ditq.load(tmp_path)


def test_a_pipeline_of_pickles_is_refused(tmp_path: Path) -> None:
    stdit().save_pretrained(tmp_path)
    (file,) = (tmp_path / "transformer").glob("*.safetensors")
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model.safetensors.*no pickles.*weights_only"):
        ditq.load(tmp_path)


def test_a_model_is_quantized_while_it_is_loaded(tmp_path: Path) -> None:
    model = tiny_model("stdit3")
    model.save_pretrained(tmp_path)
    loaded = STDiT3.from_pretrained(tmp_path, quantization_config=ditq.DitqConfig(recipe="rtn-w8a8"))
    ditq.quantize(model, "rtn-w8a8")
    assert torch.equal(run(loaded, "stdit3"), run(model, "stdit3"))


# -------------------------------------------------------------------------------------- pipeline of v1.2


def test_v12_walks_the_published_way_from_noise_to_data() -> None:
    """The sampler of v1.2.0 written down again: its times, and z + v dt with guidance on the velocity."""
    pipe, steps = stdit3(), 3
    seen: list[tuple[dict[str, Any], Tensor]] = []
    pipe.transformer.register_forward_hook(
        lambda _, args, kwargs, output: seen.append((kwargs, output[0])), with_kwargs=True
    )
    z = torch.randn(1, 4, 10, 2, 3)
    size = {"height": 4, "width": 6, "num_frames": 34, "fps": 8.0}
    out = pipe(
        PROMPTS[0], **size, num_inference_steps=steps, guidance_scale=4.0, latents=z, output_type="latent"
    ).frames
    ratio = math.sqrt(4 * 6 / 512**2) * math.sqrt(34 // 17 * 5)
    times = [ratio * t / (1 + (ratio - 1) * t) for t in (1 - i / steps for i in range(steps))]
    for i, (kwargs, output) in enumerate(seen):
        assert kwargs["timestep"].tolist() == pytest.approx([1000 * times[i]] * 2, rel=1e-6)
        conditional, unconditional = output[:, :4].chunk(2)
        velocity = unconditional + 4 * (conditional - unconditional)
        z = z + velocity * (times[i] - (times[i + 1] if i + 1 < steps else 0))
    torch.testing.assert_close(out, z)
    assert {key: seen[0][0][key].tolist() for key in ("fps", "height", "width")} == {
        "fps": [8.0] * 2, "height": [4.0] * 2, "width": [6.0] * 2,
    }  # fmt: skip


@pytest.mark.parametrize(("frames", "latent"), [(1, 1), (9, 3), (16, 4), (17, 5), (33, 5), (51, 15)])
def test_v12_stays_longer_at_the_noisy_end_of_long_videos(frames: int, latent: int) -> None:
    assert flow_shift(240, 426, frames) == pytest.approx(math.sqrt(240 * 426 * latent) / 512)


def test_v12_draws_frames_of_any_length_and_names_a_score() -> None:
    pipe = stdit3()
    told: list[list[str]] = []
    encode = pipe.encode_prompt
    pipe.encode_prompt = lambda prompt: told.append(prompt) or encode(prompt)
    calls: list[dict[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    prompts = ["a cat", "a cat aesthetic score: 4.0."]
    size = {"height": 4, "width": 8, "num_inference_steps": 1}
    video = pipe(prompts, num_frames=19, **size).frames
    assert [[frame.size for frame in frames] for frames in video] == [[(8, 4)] * 19] * 2
    assert told == [["a cat aesthetic score: 6.5.", "a cat aesthetic score: 4.0."]]
    pipe(prompts, num_frames=1, aesthetic_score=None, guidance_scale=1.0, output_type="latent", **size)
    assert told[1] == prompts
    assert calls[1]["fps"].tolist() == [120.0] * 2  # of an image
    assert len(calls[1]["hidden_states"]) == 2
