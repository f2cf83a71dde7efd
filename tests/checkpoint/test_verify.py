"""Damaged, foreign and newer checkpoints: refused with the file or the tensor, never loaded in silence."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers import tiny_dit, tiny_pixart, tiny_statistics
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import ditq
from ditq.checkpoint.folder import read_plan
from ditq.checkpoint.verify import CONFIG, DIGESTS, FORMAT, PLAN, verify
from ditq.digests import of_tensor
from ditq.errors import CheckpointError, DitqError

FILE = "transformer/diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.1.ff.net.2"
CLEAR = (CheckpointError, SafetensorError, OSError, ValueError)

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PixArt with smoothing, asymmetric weights and static activations: every kind of tensor there is."""
    path = tmp_path_factory.mktemp("original") / "pipe"
    pipe = tiny_pixart()
    statistics = tiny_statistics(pipe.transformer, "pixart")
    overrides = ["activations={bits: 8, granularity: tensor}", "keep_layers=['attn2']"]
    ditq.quantize(pipe, "smoothquant-w4a8", statistics=statistics, overrides=overrides)
    pipe.save_pretrained(path)
    return path


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "pipe"))


def read(folder: Path) -> tuple[Tensors, dict[str, str]]:
    with safe_open(folder / FILE, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118


def rewrite(folder: Path, change: Callable[[Tensors], object], checksums: bool = True) -> None:
    """Changes tensors as somebody would who knows the format, checksums included."""
    tensors, metadata = read(folder)
    change(tensors)
    if checksums:
        metadata[DIGESTS] = json.dumps({name: of_tensor(t) for name, t in tensors.items()})
    save_file(tensors, folder / FILE, metadata)


def edit_plan(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def bind(folder: Path) -> None:
    """Stores the digest of an edited plan, as somebody would who knows the format."""
    tensors, metadata = read(folder)
    plan = read_plan(folder)
    assert plan is not None
    save_file(tensors, folder / FILE, {**metadata, PLAN: plan.binding()})


def by_ditq(folder: Path) -> Any:
    return ditq.load(folder)


def by_diffusers(folder: Path) -> Any:
    return diffusers.PixArtTransformer2DModel.from_pretrained(folder / "transformer")


LOADERS = [by_ditq, by_diffusers]


@pytest.fixture(params=LOADERS, ids=["ditq.load", "diffusers"])
def load(request: pytest.FixtureRequest) -> Callable[[Path], Any]:
    return request.param  # type: ignore[no-any-return]


def test_undamaged_loads(load: Callable[[Path], Any], folder: Path) -> None:
    load(folder)


# ---------------------------------------------------------------------------------------------- bytes


def header_size(data: bytes) -> int:
    return 8 + int(struct.unpack("<Q", data[:8])[0])


def span(data: bytes, name: str) -> tuple[int, int]:
    begin = header_size(data)
    a, b = json.loads(data[8:begin])[name]["data_offsets"]
    return begin + a, begin + b


def places(data: bytes, part: str) -> tuple[int, int]:
    end = header_size(data)
    return {
        "length": (0, 8),
        "header": (8, end),
        "codes": span(data, f"{LAYER}.qweight"),
        "scales": span(data, f"{LAYER}.weight_scale"),
        "zero-points": span(data, f"{LAYER}.weight_zero_point"),
        "16-bit": span(data, "proj_out.weight"),
        "smoothing": span(data, f"{LAYER}.smooth_scale"),
    }[part]


@pytest.mark.parametrize("part", ["codes", "scales", "zero-points", "16-bit", "smoothing"])
@pytest.mark.parametrize("seed", range(4))
def test_flipped_bit_in_a_tensor_is_found(part: str, seed: int, load: Callable[[Path], Any], folder: Path) -> None:
    data = bytearray((folder / FILE).read_bytes())
    generator = torch.Generator().manual_seed(seed)
    begin, end = places(bytes(data), part)
    data[int(torch.randint(begin, end, (), generator=generator))] ^= 1 << int(
        torch.randint(8, (), generator=generator)
    )
    (folder / FILE).write_bytes(data)
    tensor = "proj_out.weight" if part == "16-bit" else LAYER
    with pytest.raises(CheckpointError, match=tensor):
        load(folder)


@pytest.mark.parametrize("seed", range(24))
def test_flipped_bit_in_the_header_is_found_or_harmless(seed: int, original: Path, folder: Path) -> None:
    data = bytearray((folder / FILE).read_bytes())
    generator = torch.Generator().manual_seed(seed)
    begin, end = places(bytes(data), "length" if seed < 4 else "header")
    data[int(torch.randint(begin, end, (), generator=generator))] ^= 1 << int(
        torch.randint(8, (), generator=generator)
    )
    (folder / FILE).write_bytes(data)
    for load in LOADERS:
        try:
            loaded = load(folder)
        except CLEAR as error:
            if load is by_ditq:
                assert isinstance(error, DitqError)
                assert str(error)
            continue
        state = getattr(loaded, "transformer", loaded).state_dict()
        expected = by_diffusers(original).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.999])
def test_truncated_file_is_found(keep: float, load: Callable[[Path], Any], folder: Path) -> None:
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CLEAR, match="diffusion_pytorch_model.safetensors") as error:
        load(folder)
    if load is by_ditq:
        assert isinstance(error.value, CheckpointError)


def test_missing_file_is_found(load: Callable[[Path], Any], folder: Path) -> None:
    (folder / FILE).unlink()
    with pytest.raises(CLEAR, match="no safetensors file|no file named"):
        load(folder)


@pytest.mark.parametrize("sharded", [True, False])
def test_missing_16_bit_tensor_is_found(sharded: bool, folder: Path) -> None:
    transformer = ditq.load(folder).transformer
    shutil.rmtree(folder / "transformer")
    transformer.save_pretrained(folder / "transformer", max_shard_size="50KB" if sharded else "1GB")
    for file in (folder / "transformer").glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        tensors.pop("proj_out.weight", None)
        save_file(tensors, file, metadata)
    for load in LOADERS:
        with pytest.raises(CheckpointError, match="tensor 'proj_out.weight'"):
            load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"quantization_config": 3}'], ids=["empty", "cut", "list", "number"])
def test_damaged_config_is_found(text: str, load: Callable[[Path], Any], folder: Path) -> None:
    (folder / "transformer" / "config.json").write_text(text)
    with pytest.raises(Exception) as error:  # noqa: PT011 - diffusers has its own kinds
        load(folder)
    assert load is by_diffusers or isinstance(error.value, DitqError)


# -------------------------------------------------------------------------------------------- tensors


def rename(tensors: Tensors, old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


CHANGES: dict[str, tuple[str, Callable[[Tensors], object]]] = {
    "codes-removed": (f"{LAYER}.qweight", lambda t: t.pop(f"{LAYER}.qweight")),
    "codes-renamed": (f"{LAYER}.qweight", lambda t: rename(t, f"{LAYER}.qweight", f"{LAYER}.qweights")),
    "codes-reshaped": (
        f"{LAYER}.qweight",
        lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"].T.contiguous()}),
    ),
    "codes-recast": (
        f"{LAYER}.qweight",
        lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"].view(torch.int8)}),
    ),
    "scale-removed": (f"{LAYER}.weight_scale", lambda t: t.pop(f"{LAYER}.weight_scale")),
    "scale-recast": (
        f"{LAYER}.weight_scale",
        lambda t: t.update({f"{LAYER}.weight_scale": t[f"{LAYER}.weight_scale"].half()}),
    ),
    "scale-nan": (f"{LAYER}.weight_scale", lambda t: t[f"{LAYER}.weight_scale"][3].fill_(float("nan"))),
    "scale-inf": (f"{LAYER}.weight_scale", lambda t: t[f"{LAYER}.weight_scale"][3].fill_(float("inf"))),
    "scale-zero": (f"{LAYER}.weight_scale", lambda t: t[f"{LAYER}.weight_scale"][0].zero_()),
    "scale-negative": (f"{LAYER}.weight_scale", lambda t: t[f"{LAYER}.weight_scale"].neg_()),
    "input-scale-nan": (f"{LAYER}.input_scale", lambda t: t[f"{LAYER}.input_scale"].fill_(float("nan"))),
    "smooth-scale-reshaped": (
        f"{LAYER}.smooth_scale",
        lambda t: t.update({f"{LAYER}.smooth_scale": t[f"{LAYER}.smooth_scale"][:-8].contiguous()}),
    ),
    "zero-point-above": (f"{LAYER}.weight_zero_point", lambda t: t[f"{LAYER}.weight_zero_point"][5].fill_(8)),
    "zero-point-below": (f"{LAYER}.weight_zero_point", lambda t: t[f"{LAYER}.weight_zero_point"][5].fill_(-9)),
    "bias-removed": (f"{LAYER}.bias", lambda t: t.pop(f"{LAYER}.bias")),
    "16-bit-removed": ("proj_out.weight", lambda t: t.pop("proj_out.weight")),
    "16-bit-renamed": ("proj_out", lambda t: rename(t, "proj_out.weight", "proj_out.wait")),
    "16-bit-reshaped": ("proj_out", lambda t: t.update({"proj_out.weight": t["proj_out.weight"][:-1].contiguous()})),
    "tensor-added": ("surprise", lambda t: t.update({"surprise": torch.ones(3)})),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_tensor_is_named(change: str, load: Callable[[Path], Any], folder: Path) -> None:
    name, function = CHANGES[change]
    rewrite(folder, function)
    with pytest.raises((CheckpointError, ValueError), match=name.replace(".", r"\.")):
        load(folder)


@pytest.mark.parametrize("checksums", ["absent", "one-absent", "no-json", "list"])
def test_missing_checksums_are_refused(checksums: str, load: Callable[[Path], Any], folder: Path) -> None:
    tensors, metadata = read(folder)
    digests = json.loads(metadata.pop(DIGESTS))
    del digests["proj_out.weight"]
    if checksums != "absent":
        metadata[DIGESTS] = {"one-absent": json.dumps(digests), "no-json": "{", "list": "[]"}[checksums]
    save_file(tensors, folder / FILE, metadata)
    with pytest.raises(CheckpointError, match="checksum"):
        load(folder)


# ----------------------------------------------------------------------------------------------- plan


def first_quantized(fields: dict[str, Any]) -> dict[str, Any]:
    return next(layer for layer in fields["layers"] if layer.get("weight"))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda f: f.update(format_version=2), r"format_version 2.*pip install 'ditq>="),
        (lambda f: first_quantized(f)["weight"].update(bits=11), r"layers\.\d+\.weight\.bits.*11"),
        (lambda f: first_quantized(f)["weight"].update(bits=5), "qweight"),
        (lambda f: first_quantized(f).update(name="blocks.9.to_q"), r"blocks\.9\.to_q"),
        (lambda f: first_quantized(f).update(in_features=64), "attn1.to_q"),
        (lambda f: f.update(layers="all"), "layers"),
        (lambda f: f.pop("method"), "method"),
    ],
    ids=[
        "newer", "bits-impossible", "bits-other", "layer-missing", "layer-size", "layers-no-list",
        "field-missing",
    ],
)  # fmt: skip
def test_wrong_plan_is_refused(
    change: Callable[[dict[str, Any]], object], complaint: str, load: Callable[[Path], Any], folder: Path
) -> None:
    edit_plan(folder, change)
    with suppress(CheckpointError):  # a plan that is not valid has no digest
        bind(folder)
    with pytest.raises(DitqError, match=complaint):
        load(folder)


# ------------------------------------------------------------------------------- folds of ditq 0.1

OLD = Path(__file__).resolve().parent.parent / "data" / "v0.1" / "pixart-folded"
MODULATION = "transformer_blocks.0.ditq_modulation"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    (tmp_path / "pipe").mkdir()
    return Path(shutil.copytree(OLD, tmp_path / "pipe" / "transformer")).parent


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda t: t.pop("transformer_blocks.0.norm1.weight"), "0.norm1.weight"),
        (lambda t: t.pop(MODULATION), "0.ditq_modulation"),
        (lambda t: t.update({MODULATION: torch.ones(1)}), "0.ditq_modulation"),
        (lambda t: t[MODULATION][7].fill_(float("nan")), "0.ditq_modulation"),
    ],
    ids=["norm-removed", "removed", "reshaped", "nan"],
)
def test_changed_fold_is_named(change: Callable[[Tensors], object], name: str, old: Path) -> None:
    rewrite(old, change)
    with pytest.raises((CheckpointError, ValueError), match=name.replace(".", r"\.")):
        by_diffusers(old)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda f: f["folds"][0].update(norm="transformer_blocks.0.norm9"), "norm9"),
        (lambda f: f["folds"][0].update(block="transformer_blocks.7"), r"transformer_blocks\.7|norm1"),
        (lambda f: f["folds"][0].update(argument="nothing"), "nothing"),
        (lambda f: f.update(folds=[]), r"norm1\.weight|ditq_modulation"),
    ],
    ids=["norm", "block", "argument", "removed"],
)
def test_wrong_fold_is_refused(change: Callable[[dict[str, Any]], object], complaint: str, old: Path) -> None:
    edit_plan(old, change)
    with pytest.raises(DitqError, match=complaint):
        by_diffusers(old)


def test_plan_without_layers_or_recipe_is_refused(load: Callable[[Path], Any], folder: Path) -> None:
    edit_plan(folder, lambda f: (f.pop("layers"), f.pop("recipe")))
    with pytest.raises(CheckpointError):
        load(folder)


def test_plan_of_another_architecture_is_refused(folder: Path, tmp_path: Path) -> None:
    pipe = tiny_dit()
    pipe.save_pretrained(tmp_path / "dit")
    config = json.loads((tmp_path / "dit/transformer/config.json").read_text())
    config["quantization_config"] = json.loads((folder / "transformer/config.json").read_text())["quantization_config"]
    (tmp_path / "dit/transformer/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        ditq.load(tmp_path / "dit")


# ------------------------------------------------------------------------------ binding to config.json


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list) and value:
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*path, key))
    else:
        yield path


def other(value: Any) -> Any:
    """A value of the same type, and close, so that validation has little to complain about."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    words = {"group": "channel", "channel": "tensor", "token": "tensor", "max": "spearman", "minmax": "mse"}
    return words.get(value, f"{value}x") if isinstance(value, str) else 1


def test_every_edited_leaf_of_the_config_is_refused(folder: Path) -> None:
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    files = [folder / FILE]
    edited = [p for p in leaves(config) if p[0] not in ("_diffusers_version", "_name_or_path")]
    # Equal layers have equal fields: of the layers, the first and the last of each kind of leaf.
    kinds = {tuple(part for part in p if not isinstance(part, int)): p for p in edited}
    kinds |= {(*kind, "last"): p for kind, p in reversed(list(zip(map(str, edited), edited, strict=True))[:40])}
    assert len(kinds) > 60
    for place in kinds.values():
        changed = json.loads(json.dumps(config))
        target = changed
        for part in place[:-1]:
            target = target[part]
        target[place[-1]] = other(target[place[-1]])
        path.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError):
            plan = read_plan(folder)
            assert plan is not None
            verify(files, plan)
    path.write_text(json.dumps(config))
    by_ditq(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer["rotate"].update(seed=5),
        lambda layer: layer["rotate"].update(block=8),
        lambda layer: layer["activation"].update(bits=4),
        lambda layer: layer["activation"].update(granularity="tensor"),
        lambda layer: layer.update(reason="another"),
    ],
    ids=["seed", "block", "bits", "granularity", "reason"],
)
def test_edit_that_fits_the_tensors_is_refused(change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    pipe = tiny_pixart()
    ditq.quantize(pipe, "quarot-w8a8")
    pipe.save_pretrained(tmp_path / "pipe")
    edit_plan(tmp_path / "pipe", lambda fields: change(first_quantized(fields)))
    for load in LOADERS:
        with pytest.raises(CheckpointError, match="config.json was edited"):
            load(tmp_path / "pipe")


def test_swapped_names_are_refused(load: Callable[[Path], Any], folder: Path) -> None:
    def swap(fields: dict[str, Any]) -> None:
        a, b = [layer for layer in fields["layers"] if layer["name"].endswith(("attn1.to_q", "attn1.to_k"))][:2]
        a["name"], b["name"] = b["name"], a["name"]

    edit_plan(folder, swap)
    with pytest.raises(CheckpointError, match="config.json was edited"):
        load(folder)


@pytest.mark.parametrize("key", [PLAN, CONFIG, FORMAT])
def test_removed_binding_is_refused(key: str, load: Callable[[Path], Any], folder: Path) -> None:
    tensors, metadata = read(folder)
    del metadata[key]
    save_file(tensors, folder / FILE, metadata)
    with pytest.raises(CheckpointError, match=key):
        load(folder)


def test_edited_config_of_the_model_is_refused(load: Callable[[Path], Any], folder: Path) -> None:
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "norm_eps": 0.5}))
    with pytest.raises(CheckpointError, match=r"norm_eps' is 0\.5, but was"):
        load(folder)


@pytest.mark.parametrize("replacement", [None, {}, {"quant_method": "bitsandbytes"}, "removed"], ids=str)
def test_quantized_tensors_without_a_plan_are_refused(replacement: Any, folder: Path) -> None:
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = replacement
    if replacement == "removed":
        del config["quantization_config"]
    path.write_text(json.dumps(config))
    for load in (by_ditq, read_plan):
        with pytest.raises(CheckpointError, match="quantization_config was removed or replaced"):
            load(folder)


def test_plan_replaced_by_an_engine_is_refused(folder: Path) -> None:
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "ditq", "engine": {"name": "openvino"}}
    path.write_text(json.dumps(config))
    for load in LOADERS:
        with pytest.raises(CheckpointError, match="quantization_config was removed or replaced|method is missing"):
            load(folder)


# --------------------------------------------------------------------------------------------- pickle


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["state-dict", "trap"])
def test_pickle_is_refused_and_never_run(kind: str, load: Callable[[Path], Any], folder: Path, tmp_path: Path) -> None:
    tensors, _ = read(folder)
    (folder / FILE).unlink()
    binary = folder / "transformer" / "diffusion_pytorch_model.bin"
    if kind == "trap":
        binary.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    else:
        torch.save(tensors, binary)
    with pytest.raises(CLEAR, match="safetensors" if kind == "state-dict" or load is by_ditq else "weights"):
        load(folder)
    assert not (tmp_path / "sprung").exists()


def test_pickle_is_never_written(folder: Path, tmp_path: Path) -> None:
    model = by_diffusers(folder)
    with pytest.raises((DitqError, ValueError), match="safe"):
        model.save_pretrained(tmp_path / "out", safe_serialization=False)


def test_the_message_for_a_damaged_header_does_not_print_all_of_it(folder: Path) -> None:
    path = folder / FILE
    data = path.read_bytes()
    header = json.loads(data[8 : header_size(data)])
    header["__metadata__"] = "x" * 50_000
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[header_size(data) :])
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        by_ditq(folder)
    assert len(str(caught.value)) < 1000
