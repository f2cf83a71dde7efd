"""Folders with damaged, huge or contradicting configs: one clear error, before anything large happens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_pixart

import ditq
from ditq.checkpoint.folder import read_plan, read_plans
from ditq.cli.app import run
from ditq.errors import CheckpointError


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe = tiny_pixart()
    ditq.quantize(pipe, "rtn-w8a8")
    return ditq.save(pipe, tmp_path_factory.mktemp("original") / "pipe")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "pipe"))


TEXTS = {
    "empty": "",
    "deep": "[" * 100_000,
    "deep-object": '{"a":' * 2000 + "1" + "}" * 2000,
    "digits": '{"a": ' + "9" * 5000 + "}",
    "integer": '{"a": ' + "9" * 30 + "}",
    "latin": b'{"a": "\xe9"}',
    "large": b" " * (17 << 20) + b"{}",
}


@pytest.mark.parametrize(
    "file", ["model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
)
@pytest.mark.parametrize("text", TEXTS)
def test_config_that_is_not_small_json_is_refused(text: str, file: str, folder: Path) -> None:
    content = TEXTS[text]
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=Path(file).name) as error:
        ditq.load(folder)
    assert len(str(error.value)) < 700


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("entry", [True, 7, "x", None, {}, ["diffusers"]], ids=str)
def test_component_of_the_index_is_a_library_and_a_class(entry: Any, folder: Path) -> None:
    """Otherwise diffusers looks for a model with the name ``7`` on the hub, for half a minute."""
    edit(folder / "model_index.json", lambda index: index.update(scheduler=entry))
    with pytest.raises(CheckpointError, match="scheduler is .* not a library and a class"):
        ditq.load(folder)


@pytest.mark.parametrize(
    ("component", "field", "value"),
    [
        ("vae", "block_out_channels", 3), ("vae", "norm_num_groups", 0), ("vae", "latent_channels", "four"),
        ("text_encoder", "num_layers", None), ("text_encoder", "d_model", -1),
        ("transformer", "num_layers", 10**9), ("transformer", "num_layers", "two"), ("transformer", "sample_size", []),
    ],
)  # fmt: skip
def test_fields_of_the_wrong_kind_are_one_error(component: str, field: str, value: Any, folder: Path) -> None:
    edit(folder / component / "config.json", lambda config: config.update({field: value}))
    with pytest.raises(CheckpointError):
        ditq.load(folder)


@pytest.mark.parametrize("replacement", [None, {}, {"quant_method": "bitsandbytes"}], ids=str)
def test_every_reader_refuses_quantized_tensors_without_a_plan(replacement: Any, folder: Path) -> None:
    edit(folder / "transformer/config.json", lambda config: config.update(quantization_config=replacement))
    for read in (read_plan, read_plans, ditq.load):
        with pytest.raises(CheckpointError, match="quantization_config was removed or replaced"):
            read(folder)


def test_16_bit_folders_have_no_plan(tmp_path: Path) -> None:
    tiny_pixart().save_pretrained(tmp_path / "pipe")
    assert read_plan(tmp_path / "pipe") is None
    assert read_plans(tmp_path / "pipe") == {}


@pytest.mark.parametrize("verb", ["inspect", "generate --prompt cat", "export", "quantize --recipe rtn-w8a8"])
def test_every_verb_refuses_quantized_tensors_without_a_plan(verb: str, folder: Path, capsys: Any) -> None:
    edit(folder / "transformer/config.json", lambda config: config.pop("quantization_config"))
    name, *options = verb.split()
    out = [] if name == "inspect" else ["--out", str(folder.parent / "out")]
    assert run([name, str(folder), *options, *out]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "quantization_config was removed or replaced" in error
    assert "unexpected" not in error


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", "[]", "{", "\xff"])
def test_plan_file_that_is_not_a_small_plan_is_refused(text: str, folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "plan.json").write_bytes(text.encode("latin-1"))
    command = ["quantize", str(folder), "--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "out")]
    assert run(command) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "is not a plan file" in error
    assert len(error) < 900


@pytest.mark.parametrize("verb", ["inspect", "export"])
def test_a_missing_folder_that_looks_like_a_hub_id(verb: str, tmp_path: Path, capsys: Any) -> None:
    assert run([verb, "my/checkpoint", *(["--out", str(tmp_path / "out")] if verb == "export" else [])]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"{verb} reads folders only, and 'my/checkpoint' is none here; if it is a hub id" in error


def test_a_text_encoder_in_pickles_only_is_one_error(folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").unlink()
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match=r"a pickle \(\.bin\).* Get the weights as safetensors"):
        ditq.load(folder)
