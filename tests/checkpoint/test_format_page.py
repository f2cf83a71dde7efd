"""A reader written from docs/checkpoint-format.md alone, in numpy: it decodes layers as ditq does."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from helpers import tiny_model, tiny_statistics
from numpy.typing import NDArray

import ditq
from ditq.numerics import hadamard_matrix
from ditq.numerics.hadamard import is_supported

V0_1 = Path(__file__).resolve().parent.parent / "data" / "v0.1"
PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "checkpoint-format.md"
DTYPES = {"U8": np.uint8, "I8": np.int8, "F32": np.float32, "BF16": np.uint16, "F16": np.float16, "I64": np.int64}
TORCH = {"U8": "uint8", "I8": "int8", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64"}

Array = NDArray[Any]


# ------------------------------------------------------------------------------------------- the reader


def read_file(path: Path) -> tuple[dict[str, Array], dict[str, str], dict[str, str]]:
    """Tensors as stored, their dtypes, and the metadata of a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__", {})
    tensors, kinds = {}, {}
    for name, entry in header.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(data[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        kinds[name] = entry["dtype"]
    return tensors, kinds, metadata


def floats(x: Array, kind: str) -> Array:
    """bfloat16 is the upper half of a float32."""
    return (x.astype(np.uint32) << 16).view(np.float32) if kind == "BF16" else x.astype(np.float32)


def codes(packed: Array, bits: int, columns: int) -> Array:
    out = np.zeros((len(packed), columns), np.int64)
    for i in range(columns):
        for j in range(bits):
            byte, bit = divmod(i * bits + j, 8)
            out[:, i] |= ((packed[:, byte].astype(np.int64) >> bit) & 1) << j
    return out - 2 ** (bits - 1)


def normal_levels(bits: int) -> tuple[Array, float]:
    """The codes in ascending order, and u, from the page's table."""
    row = re.search(rf"^\| {bits} \| ([\d, ]+) \| (0\.\d+) \|$", PAGE.read_text(), re.M)
    assert row
    positive = np.array([int(code) for code in row[1].split(",")])
    return np.concatenate([-positive[::-1], positive]), float(row[2])


def paley(p: int) -> Array | None:
    def prime(n: int) -> bool:
        return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))

    for q, rest in ((p - 1, 3), (p // 2 - 1, 1)):
        if prime(q) and q % 4 == rest:
            squares = {t * t % q for t in range(1, q)}
            C = np.zeros((q + 1, q + 1))
            C[0, 1:], C[1:, 0] = 1, -1 if rest == 3 else 1
            for i in range(q):
                for j in range(q):
                    d = (j - i) % q
                    C[1 + i, 1 + j] = 0 if d == 0 else 1 if d in squares else -1
            if rest == 3:
                return np.eye(q + 1) + C
            return np.kron(C, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1), [[1, -1], [-1, -1]])
    return None


def hadamard(n: int) -> Array | None:
    odd = n
    while odd % 2 == 0:
        odd //= 2
    H: Array | None = np.ones((1, 1))
    if odd > 1:
        p = 4 * odd
        while n % p == 0 and paley(p) is None:
            p *= 2
        H = paley(p) if n % p == 0 else None
    while H is not None and len(H) < n:
        H = np.kron(H, [[1, 1], [1, -1]])
    return H


def rotation(rotate: dict[str, Any], columns: int) -> Array:
    if rotate.get("kind") == "regular":
        H = np.ones((1, 1))
        while len(H) < rotate["block"]:
            H = np.kron(H, [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
        return np.kron(np.eye(columns // len(H)), H) / np.sqrt(len(H))
    twister = np.random.MT19937()
    twister._legacy_seeding(rotate.get("seed", 0) & 0xFFFFFFFF)  # init_genrand
    signs = 2.0 * (twister.random_raw(columns) & 1) - 1
    block = rotate["block"]
    S = hadamard(block)
    assert S is not None
    return signs[:, None] * np.kron(np.eye(columns // block), S) / np.sqrt(block)


def weight(tensors: dict[str, Array], prefix: str, layer: dict[str, Any]) -> Array:
    """The balanced weight W [N, K]."""
    grid, columns = layer["weight"], layer["in_features"]
    width = grid.get("group_size") or columns
    c = codes(tensors[prefix + "qweight"], grid["bits"], columns)
    if grid.get("levels") == "normal":
        c = normal_levels(grid["bits"])[0][c + 2 ** (grid["bits"] - 1)]
    c = c.astype(np.float64)
    scale = tensors[prefix + "weight_scale"].astype(np.float64)
    if not grid.get("symmetric", True):
        c = c - np.repeat(tensors[prefix + "weight_zero_point"], width, axis=1)
    return c * np.repeat(scale, width, axis=1)


def rounded(x: Array, grid: dict[str, Any], scale: Array | None) -> Array:
    """Q_a of the balanced input [M, K]."""
    bits, symmetric = grid["bits"], grid.get("symmetric", True)
    width = grid.get("group_size") or x.shape[1]
    groups = x.astype(np.float32).reshape(len(x), -1, width)
    if grid.get("levels") == "normal":
        flat = groups.reshape(1, 1, -1) if grid["granularity"] == "tensor" else groups
        levels, unit = normal_levels(bits)
        a = unit * np.maximum(np.sqrt(np.square(flat).mean(-1)), np.abs(flat).max(-1) / 4)
        distances = np.abs(groups[..., None] / a[..., None, None] - levels)
        return (levels[distances.argmin(-1)] * a[..., None]).reshape(x.shape)
    top = 2 ** (bits - 1) - 1
    bottom = -top if symmetric else -top - 1
    zero: Array = np.zeros((1, 1), np.float32)
    if grid.get("dynamic", False):
        flat = groups.reshape(1, 1, -1) if grid["granularity"] == "tensor" else groups
        if symmetric:
            a = np.abs(flat).max(-1) / np.float32(top)
        else:
            h, low = flat.max(-1).clip(min=0), flat.min(-1).clip(max=0)
            a = (h - low) / np.float32(2**bits - 1)
            zero = (np.round(-low / a) - 2 ** (bits - 1)).clip(bottom, top)
    else:
        assert scale is not None
        a = scale
    found = (np.round(groups / a[..., None]) + zero[..., None]).clip(bottom, top)
    return ((found - zero[..., None]) * a[..., None]).reshape(x.shape)


def factors(tensors: dict[str, Array], kinds: dict[str, str], prefix: str) -> tuple[Array, Array]:
    """D [rank, K] and U [N, rank] of the branch."""
    names = [prefix + "branch_down", prefix + "branch_up"]
    D, U = (floats(tensors[name], kinds[name]).astype(np.float64) for name in names)
    return D, U


def outcome(tensors: dict[str, Array], kinds: dict[str, str], prefix: str, layer: dict[str, Any], x: Array) -> Array:
    low = 0.0
    if layer.get("branch"):
        D, U = factors(tensors, kinds, prefix)
        low = (x @ D.T) @ U.T
    if layer.get("smooth") and not layer["smooth"].get("folded"):
        x = x / tensors[prefix + "smooth_scale"]
    if layer.get("rotate"):
        x = x @ rotation(layer["rotate"], layer["in_features"])
    if layer.get("activation"):
        x = rounded(x, layer["activation"], tensors.get(prefix + "input_scale"))
    y = x.astype(np.float64) @ weight(tensors, prefix, layer).T + low
    return y + floats(tensors[prefix + "bias"], kinds[prefix + "bias"]) if layer.get("bias", True) else y


# -------------------------------------------------------------------------------------------- the tests

CASES = {
    "asymmetric-w4a8": ("pixart", "smoothquant-w4a8", ["balance.alpha=0.5"]),
    "w3a8-rotated": (
        "pixart", "viditq-w4a8",
        ["weights.bits=3", "balance.choose=always", "balance.alpha=0.5"],
    ),
    "regular-rotation": ("pixart", "quarot-w8a8", ["balance.rotation=regular"]),
    "branch": ("pixart", "svdquant-w4a8", ["balance.alpha=[0.3, 0.6]", "branch.rank=8"]),
    "branch-of-ranges": (
        "dit", "smoothquant-w4a8",
        ["branch={rank: 4, dtype: float32}", "balance.timesteps=[[0, 499], [500, 999]]"],
    ),
    "groups-asymmetric-inputs": (
        "dit", "qdit-w4a8", ["weights.group_size=32", "activations={bits: 8, granularity: group, group_size: 32, "
                             "symmetric: false, dynamic: true}"],
    ),
    "static-groups-w5": (
        "dit", "rtn-static-w8a8", ["weights.bits=5", "activations={bits: 8, granularity: group, group_size: 32}"],
    ),
    "symmetric-tensor": ("dit", "rtn-w8a8", ["weights={bits: 6, symmetric: true, granularity: tensor}"]),
    "normal-w4a4": (
        "pixart", "quarot-w4a4", ["weights={bits: 4, granularity: group, group_size: 32, levels: normal}",
                                  "activations.levels=normal"],
    ),
    "full-w4a8": ("pixart", "rtn-w4a8", ["weights={bits: 4, granularity: group, group_size: 32, full: true}"]),
    "normal-w3a6-groups": (
        "dit", "gptq-w3a6", ["rounding=nearest", "weights.symmetric=true", "weights.levels=normal",
                             "activations={bits: 6, granularity: group, group_size: 32, dynamic: true, "
                             "levels: normal}"],
    ),
    "timesteps": ("dit", "smoothquant-w4a8", ["balance.timesteps=[[0, 499], [500, 999]]", "weights.bits=2"]),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    architecture, recipe, overrides = CASES[request.param]
    model = tiny_model(architecture)
    statistics = tiny_statistics(model, architecture)
    ditq.quantize(model, recipe, statistics=statistics, overrides=overrides, seed=11)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def test_page_decodes_every_layer(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    tensors, kinds, _ = read_file(folder / "diffusion_pytorch_model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format_version"]) == ("ditq", 1)
    layers = [layer for layer in config["layers"] if layer.get("weight")]
    assert len(layers) > 4
    for layer in layers:
        module = model.get_submodule(layer["name"])
        parts = {f"{layer['name']}.": module}
        if layer.get("timesteps"):
            parts = {f"{layer['name']}.ranges.{i}.": part for i, part in enumerate(module.ranges)}
        for prefix, part in parts.items():
            W = weight(tensors, prefix, layer)
            if layer.get("rotate"):
                W = W @ rotation(layer["rotate"], layer["in_features"]).T
            if layer.get("smooth") and not layer["smooth"].get("folded"):
                W = W / tensors[prefix + "smooth_scale"]
            if layer.get("branch"):
                D, U = factors(tensors, kinds, prefix)
                W = W + U @ D
            np.testing.assert_allclose(W, part.weight.detach().numpy(), rtol=1e-5, atol=1e-5 * abs(W).max())
            x = torch.randn(5, layer["in_features"], generator=torch.Generator().manual_seed(1))
            y = outcome(tensors, kinds, prefix, layer, x.numpy())
            found = part(x).detach().numpy()
            # A number at a rounding boundary of the rotated input may turn: one code of one product.
            assert np.mean(np.isclose(found, y, rtol=1e-4, atol=1e-4)) > (0.9 if layer.get("rotate") else 0.999)
            assert np.square(y - found).sum() < 1e-3 * np.square(y).sum()


def test_page_knows_every_tensor(saved: tuple[Any, Path]) -> None:
    """Names and shapes follow from the config; what is left are parameters of the model in 16 bit."""
    model, folder = saved
    tensors, kinds, _ = read_file(folder / "diffusion_pytorch_model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in config["layers"]:
        if not (grid := layer.get("weight")):
            continue
        k, n = layer["in_features"], layer["out_features"]
        shape = (1, 1) if grid["granularity"] == "tensor" else (n, k // (grid.get("group_size") or k))
        ranges = range(len(layer.get("timesteps") or ()))
        for prefix in [f"{layer['name']}.ranges.{i}." for i in ranges] or [f"{layer['name']}."]:
            expected[prefix + "qweight"] = ("U8", (n, -(-k * grid["bits"] // 8)))
            expected[prefix + "weight_scale"] = ("F32", shape)
            if not grid.get("symmetric", True):
                expected[prefix + "weight_zero_point"] = ("I8", shape)
            if layer.get("smooth") and not layer["smooth"].get("folded"):
                expected[prefix + "smooth_scale"] = ("F32", (k,))
            if (inputs := layer.get("activation")) and not inputs.get("dynamic", False):
                expected[prefix + "input_scale"] = ("F32", (1, k // (inputs.get("group_size") or k)))
            if branch := layer.get("branch"):
                kind = {"bfloat16": "BF16", "float32": "F32"}[branch.get("dtype", "bfloat16")]
                expected[prefix + "branch_down"] = (kind, (branch["rank"], k))
                expected[prefix + "branch_up"] = (kind, (n, branch["rank"]))
    for fold in config.get("folds", ()):
        if fold.get("block"):
            shape = (fold.get("chunks", 6) * fold["width"],)
            expected[f"{fold['block']}.ditq_modulation"] = ("F32", shape)
        if fold.get("created", True):
            assert tensors[f"{fold['norm']}.weight"].shape == (fold["width"],)
    assert {name: (kinds[name], tensors[name].shape) for name in expected} == expected
    storage = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[config["storage_dtype"]]
    parameters = {name for name, _ in model.named_parameters()}
    assert tensors.keys() - expected.keys() <= parameters | {n for n, _ in model.named_buffers()}
    assert {kinds[name] for name in parameters} == {storage}


def test_page_explains_the_checksums(saved: tuple[Any, Path]) -> None:
    tensors, kinds, metadata = read_file(saved[1] / "diffusion_pytorch_model.safetensors")
    found = {}
    for name, tensor in tensors.items():
        kind = f"torch.{TORCH[kinds[name]]}{tuple(map(int, tensor.shape))}"
        found[name] = hashlib.sha256(tensor.tobytes() + kind.encode()).hexdigest()[:16]
    assert json.loads(metadata["ditq_sha256"]) == found


def test_folded_modulation_divides_shifts_only() -> None:
    """PixArt: shift, scale, gate of the attention, then of the MLP; the norms' weights are 1 / s of the same s."""
    model = diffusers.PixArtTransformer2DModel.from_pretrained(V0_1 / "pixart-folded")
    folds = {fold.norm: fold for fold in model.hf_quantizer.plan.folds}
    block = model.transformer_blocks[0]
    factor = block.ditq_modulation.view(6, -1)
    assert factor.shape[1] == folds["transformer_blocks.0.norm1"].width
    for chunk in (1, 2, 4, 5):
        assert bool((factor[chunk] == 1).all())
    for chunk, norm in ((0, block.norm1), (3, block.norm2)):
        assert not bool((factor[chunk] == 1).all())
        torch.testing.assert_close(factor[chunk], norm.weight, rtol=2**-8, atol=0)  # which is stored in 16 bit


def test_worked_example_of_the_page() -> None:
    text = PAGE.read_text()
    written = re.search(r"c = +(.*)\n", text)
    stored = re.findall(r"byte \d = 0b([01]{8}) = 0x([0-9A-F]{2})", text)
    assert written and len(stored) == 2
    packed = np.array([[int(number, 16) for _, number in stored]], np.uint8)
    assert [int(bits, 2) for bits, _ in stored] == packed[0].tolist()
    assert codes(packed, 3, 5)[0].tolist() == [int(c) for c in written[1].split()]


def test_page_names_every_field_of_a_plan() -> None:
    from ditq.numerics import Grid
    from ditq.plan import Branch, Fold, LayerPlan, Plan, Rotate, Smooth

    text = PAGE.read_text()
    for kind in (Plan, LayerPlan, Fold, Grid, Smooth, Rotate, Branch):
        missing = [name for name in kind.model_fields if f"`{name}`" not in text]
        assert not missing, kind.__name__


def test_hadamard_matrices_of_the_page() -> None:
    written = re.search(r"Up to 256 the orders p are (.*?)\(first kind\) and (.*?)\(second", PAGE.read_text(), re.S)
    assert written
    orders = sorted(int(p) for kind in written.groups() for p in re.findall(r"\d+", kind))
    supported = {p << k for p in (1, *orders) for k in range(9) if p << k <= 256}
    for n in range(1, 257):
        H = hadamard(n)
        assert (H is not None) == is_supported(n) == (n in supported), n
        if H is not None:
            assert np.array_equal(H, hadamard_matrix(n).numpy()), n
