"""The VAE of Open-Sora v1.2 against its own mathematics, names and shapes; what it does with the length of a video."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from ditq.errors import CheckpointError
from ditq.models.official import from_official, load_official, official
from ditq.models.opensora import OpenSoraVAE

TINY = {
    "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "temporal_channels": (8, 8, 16, 24),
    "temporal_layers": 2, "temporal_groups": 4,
}  # fmt: skip


def tiny() -> OpenSoraVAE:
    torch.manual_seed(0)
    vae = OpenSoraVAE(**TINY).eval()
    with torch.no_grad():
        for name, p in vae.named_parameters():
            if "norm" in name or name.endswith("bias"):
                p.add_(0.3 * torch.randn_like(p))
    return vae


# ------------------------------------------------------------------------------------ names and shapes


def published(widths: tuple[int, ...], count: int, latents: int = 4) -> dict[str, tuple[int, ...]]:
    """Names and shapes below ``temporal_vae.``, from the constructors of hpcaitech/Open-Sora at v1.2.0."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, rows: int, columns: int, kernel: int = 3, bias: bool = True) -> None:
        shapes[f"{name}.conv.weight"] = (rows, columns, kernel, kernel, kernel)
        if bias:
            shapes[f"{name}.conv.bias"] = (rows,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def block(name: str, before: int, width: int) -> None:
        norm(f"{name}.norm1", before)
        conv(f"{name}.conv1", width, before, bias=False)
        norm(f"{name}.norm2", width)
        conv(f"{name}.conv2", width, width, bias=False)
        if before != width:
            conv(f"{name}.conv3", width, before, 1, bias=False)

    stages = len(widths)
    conv("encoder.conv_in", widths[0], latents, bias=False)
    before = widths[0]
    for i in range(stages):
        for j in range(count):
            block(f"encoder.block_res_blocks.{i}.{j}", before, widths[i])
            before = widths[i]
        if i in (1, 2):  # temporal_downsample = (False, True, True)
            conv(f"encoder.conv_blocks.{i}", before, before)
    for j in range(count):
        block(f"encoder.res_blocks.{j}", before, before)
    norm("encoder.norm1", before)
    conv("encoder.conv2", 2 * latents, before, 1)
    conv("quant_conv", 2 * latents, 2 * latents, 1)
    conv("post_quant_conv", latents, latents, 1)
    conv("decoder.conv1", before, latents)
    for j in range(count):
        block(f"decoder.res_blocks.{j}", before, before)
    for i in reversed(range(stages)):
        for j in range(count):
            block(f"decoder.block_res_blocks.{i}.{j}", before, widths[i])
            before = widths[i]
        if i in (2, 3):
            conv(f"decoder.conv_blocks.{i - 1}", 2 * before, before)
    norm("decoder.norm1", before)
    conv("decoder.conv_out", latents, before)
    return shapes


def test_every_published_tensor_has_its_place_at_real_size() -> None:
    with torch.device("meta"):
        vae = OpenSoraVAE()
    state = {name: tuple(t.shape) for name, t in vae.state_dict().items()}
    assert all(own == (name,) for name, own in official(vae).items())
    temporal = {f"temporal_vae.{name}": shape for name, shape in published((128, 256, 256, 512), 4).items()}
    assert {name: shape for name, shape in state.items() if name.startswith("temporal_vae.")} == temporal
    # The spatial one is diffusers' own class: 248 tensors, as in the file of SDXL's VAE.
    spatial = {name: shape for name, shape in state.items() if name.startswith("spatial_vae.module.")}
    assert len(spatial) == 248
    assert spatial["spatial_vae.module.encoder.conv_out.weight"] == (8, 512, 3, 3)
    assert spatial["spatial_vae.module.decoder.mid_block.attentions.0.to_out.0.weight"] == (512, 512)
    assert state.keys() - temporal.keys() - spatial.keys() == {"shift", "scale"}
    assert state["shift"] == state["scale"] == (1, 4, 1, 1, 1)
    # The report: 300 M of the temporal one, 83 M of the spatial one.
    assert sum(p.numel() for p in vae.temporal_vae.parameters()) == pytest.approx(300e6, rel=0.04)
    assert sum(p.numel() for p in vae.spatial.parameters()) == pytest.approx(83e6, rel=0.01)


def test_a_file_of_published_names_is_the_same_model(tmp_path: Path) -> None:
    vae = tiny()
    tensors = {name: t.clone() for name, t in vae.state_dict().items() if name not in ("shift", "scale")}
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = from_official(OpenSoraVAE, tmp_path / "model.safetensors", **TINY)
    z = torch.randn(1, 4, 2, 3, 3)
    with torch.no_grad():
        assert torch.equal(loaded.decode(z, 8), vae.decode(z, 8))


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("temporal_vae.decoder.conv_blocks.1.conv.bias", None, "lacks tensor 'temporal_vae.decoder.conv_blocks.1"),
        (
            "temporal_vae.encoder.conv_in.conv.weight",
            torch.zeros(8, 4, 1, 3, 3),
            r"has shape \(8, 4, 1, 3, 3\); the model",
        ),
        ("spatial_vae.module.quant_conv.weight", None, "lacks tensor 'spatial_vae.module.quant_conv.weight'"),
        (
            "temporal_vae.decoder.conv_blocks.0.conv.bias",
            torch.zeros(8),
            "holds tensor .*which OpenSoraVAE does not have",
        ),
    ],
    ids=["missing", "misshaped", "missing-spatial", "surplus"],
)
def test_checkpoint_that_does_not_fit_is_refused_by_name(key: str, value: Tensor | None, complaint: str) -> None:
    vae = tiny()
    tensors = {name: t for name, t in vae.state_dict().items() if name != key}
    with pytest.raises(CheckpointError, match=complaint):
        load_official(vae, tensors if value is None else {**tensors, key: value})


# ------------------------------------------------------------------------------------------ mathematics


def reference(w: dict[str, Tensor], x: Tensor, half: str, stages: int = 4, count: int = 2) -> Tensor:
    """The published encoder or decoder written down again, in float64, frame by frame."""
    w = {name.removeprefix("temporal_vae."): value.double() for name, value in w.items()}

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight, bias = w[f"{name}.conv.weight"], w.get(f"{name}.conv.bias")
        kernel = weight.shape[2]
        out = []
        for last in range(stride - 1, x.shape[2], stride):
            frame = 0
            for k in range(kernel):  # tap k sees the frame kernel - 1 - k earlier
                t = last - (kernel - 1 - k)
                if t >= 0:
                    frame = frame + F.conv2d(x[:, :, t], weight[:, :, k], padding=kernel // 2)
            out.append(frame if bias is None else frame + bias[:, None, None])
        return torch.stack(out, 2)

    def norm(name: str, x: Tensor) -> Tensor:
        parts = x.unflatten(1, (4, -1)).flatten(2)
        parts = (parts - parts.mean(2, keepdim=True)) / (parts.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return (
            parts.reshape(x.shape) * w[f"{name}.weight"][:, None, None, None] + w[f"{name}.bias"][:, None, None, None]
        )

    def block(name: str, x: Tensor) -> Tensor:
        y = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)))
        y = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", y)))
        return y + (conv(f"{name}.conv3", x) if f"{name}.conv3.conv.weight" in w else x)

    if half == "encoder":
        x = conv("encoder.conv_in", x.double())
        for i in range(stages):
            for j in range(count):
                x = block(f"encoder.block_res_blocks.{i}.{j}", x)
            if i in (1, 2):
                x = conv(f"encoder.conv_blocks.{i}", x, stride=2)
        for j in range(count):
            x = block(f"encoder.res_blocks.{j}", x)
        return conv("quant_conv", conv("encoder.conv2", F.silu(norm("encoder.norm1", x))))
    x = conv("decoder.conv1", conv("post_quant_conv", x.double()))
    for j in range(count):
        x = block(f"decoder.res_blocks.{j}", x)
    for i in reversed(range(stages)):
        for j in range(count):
            x = block(f"decoder.block_res_blocks.{i}.{j}", x)
        if i in (2, 3):
            y = conv(f"decoder.conv_blocks.{i - 1}", x)
            x = torch.stack([y[:, n % 2 :: 2, n // 2] for n in range(2 * y.shape[2])], 2)
    return conv("decoder.conv_out", F.silu(norm("decoder.norm1", x)))


@torch.no_grad()
def test_temporal_halves_are_the_published_ones() -> None:
    vae = tiny().double()
    weights = vae.temporal_vae.state_dict()
    x, z = torch.randn(2, 4, 8, 5, 6).double(), torch.randn(2, 4, 3, 5, 6).double()
    torch.testing.assert_close(vae.temporal_vae.encode(x), reference(weights, x, "encoder"))
    torch.testing.assert_close(vae.temporal_vae.decode(z, 12), reference(weights, z, "decoder"))
    torch.testing.assert_close(vae.temporal_vae.decode(z, 10), reference(weights, z, "decoder")[:, :, 2:])
    padded = torch.cat([torch.zeros_like(x[:, :, :2]), x[:, :, :6]], 2)
    torch.testing.assert_close(vae.temporal_vae.encode(x[:, :, :6]), reference(weights, padded, "encoder"))


# ---------------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize(
    ("frames", "latent"), [(1, 1), (4, 1), (5, 2), (16, 4), (17, 5), (18, 6), (34, 10), (51, 15), (102, 30), (24, 7)]
)
def test_latent_frames(frames: int, latent: int) -> None:
    assert tiny().latent_frames(frames) == latent


@torch.no_grad()
def test_a_video_is_cut_every_17_frames() -> None:
    vae = tiny()
    z = torch.randn(2, 4, 12, 2, 3)
    whole = vae.decode(z, 41)
    assert whole.shape == (2, 3, 41, 4, 6)  # two stages of the tiny spatial VAE: sides twice as long
    parts = [vae.decode(z[:, :, a:b], n) for a, b, n in ((0, 5, 17), (5, 10, 17), (10, 12, 7))]
    torch.testing.assert_close(whole, torch.cat(parts, 2))
    with pytest.raises(ValueError, match="41 frames have 12 latent frames, got 11"):
        vae.decode(z[:, :, :11], 41)


@torch.no_grad()
def test_latents_of_a_video_are_normalized_and_drawn_by_the_generator() -> None:
    vae = tiny()
    video = torch.randn(1, 3, 21, 8, 8)
    first = vae.encode(video, torch.Generator().manual_seed(1))
    assert first.shape == (1, 4, 6, 4, 4)
    assert torch.equal(first, vae.encode(video, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, vae.encode(video, torch.Generator().manual_seed(2)))
    vae.shift.add_(vae.scale)
    torch.testing.assert_close(vae.encode(video, torch.Generator().manual_seed(1)), first - 1)


@torch.no_grad()
def test_frames_are_decoded_a_few_at_a_time() -> None:
    vae = tiny()
    sizes: list[int] = []
    decode = vae.spatial.decode
    vae.spatial.decode = lambda x, **options: sizes.append(len(x)) or decode(x, **options)
    vae.decode(torch.randn(2, 4, 5, 2, 2), 17)
    assert sizes == [4] * 8 + [2]
