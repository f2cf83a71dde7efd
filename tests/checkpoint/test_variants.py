"""Folders whose weights are of a variant: found when it is asked for, named when it is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers import tiny_dit

import ditq
from ditq.checkpoint.variants import check_variant, weight_files
from ditq.cli.app import run
from ditq.errors import CheckpointError, UsageError


@pytest.fixture(scope="module")
def fp16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 16-bit pipeline with files of the variant only."""
    folder = tmp_path_factory.mktemp("models") / "fp16"
    tiny_dit().to(torch.float16).save_pretrained(folder, variant="fp16")
    return folder


@pytest.mark.parametrize(
    ("names", "variant", "chosen"),
    [
        (["a.safetensors", "a.fp16.safetensors"], None, ["a.safetensors"]),
        (["a.safetensors", "a.fp16.safetensors"], "fp16", ["a.fp16.safetensors"]),
        (["a.safetensors", "a.fp16.safetensors"], "bf16", ["a.safetensors"]),
        (["a.fp16-00001-of-00002.safetensors", "a-00001-of-00002.safetensors"], "fp16",
         ["a.fp16-00001-of-00002.safetensors"]),
        (["a.fp16-00001-of-00002.safetensors", "a-00001-of-00002.safetensors"], None,
         ["a-00001-of-00002.safetensors"]),
        (["a-00001-of-00002.fp16.safetensors"], "fp16", ["a-00001-of-00002.fp16.safetensors"]),
        (["a.fp16.safetensors"], None, []),
    ],
)  # fmt: skip
def test_files_of_a_variant(names: list[str], variant: str | None, chosen: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert [file.name for file in weight_files(tmp_path, variant)] == chosen


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_variant_that_is_not_there_is_named_with_those_that_are(suffix: str, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / f"model.bf16.{suffix}").touch()
    for variant in (None, "fp16"):
        with pytest.raises(UsageError, match=r"only those of 'bf16': pass variant='bf16' \(--variant bf16\)"):
            check_variant(tmp_path, {"vae": None}, variant)
    check_variant(tmp_path, {"vae": None}, None, passed=["vae"])
    check_variant(tmp_path, {"vae": None}, "bf16")
    (tmp_path / "vae" / f"model.{suffix}").touch()
    with pytest.raises(UsageError, match="no weights of variant 'fp16': pass one of bf16, or leave it out"):
        check_variant(tmp_path, {"vae": None}, "fp16")


def test_load_with_and_without(fp16: Path) -> None:
    with pytest.raises(UsageError, match=r"only those of 'fp16': pass variant='fp16' \(--variant fp16\)"):
        ditq.load(fp16)
    assert ditq.load(fp16, variant="fp16").transformer.dtype == torch.float32


@pytest.mark.parametrize("verb", ["quantize --recipe rtn-w8a8", "generate --prompt 1", "search", "compare"])
def test_every_verb_has_the_hint(verb: str, fp16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, *options = verb.split()
    second = [str(fp16)] if name == "compare" else []
    assert run([name, str(fp16), *second, *options, "--out", str(tmp_path / "out")]) == 2
    assert "--variant fp16" in capsys.readouterr().err


def test_verbs_with_a_variant(fp16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, variant = tmp_path / "w8a8", ["--variant", "fp16", "--quiet"]
    assert run(["quantize", str(fp16), "--recipe", "rtn-w8a8", "--out", str(out), *variant]) == 0
    ditq.load(out)  # whole without a variant
    quick = ["--steps", "1", "--quiet"]
    assert run(["generate", str(out), "--prompt", "1", "--out", str(tmp_path / "a"), *quick]) == 0
    assert run(["generate", str(fp16), "--prompt", "1", "--out", str(tmp_path / "b"), *quick, *variant]) == 0
    (tmp_path / "prompts").write_text("1\n2\n")
    more = [
        "--prompts",
        str(tmp_path / "prompts"),
        "--explain",
        "0",
        "--no-cache",
        "--metrics",
        "basic",
        "--steps",
        "1",
    ]
    assert run(["compare", str(fp16), str(out), *more, *variant]) == 0, capsys.readouterr().err


def test_saving_with_a_source_of_a_variant_gives_a_folder_that_loads(fp16: Path, tmp_path: Path) -> None:
    pipe = ditq.load(fp16, variant="fp16")
    ditq.quantize(pipe, "rtn-w8a8")
    ditq.load(ditq.save(pipe, tmp_path / "out", source=fp16))


def test_only_the_files_that_are_loaded_are_verified(fp16: Path, tmp_path: Path) -> None:
    """A quantized variant with a float file beside it, and the other way round."""
    pipe = ditq.load(fp16, variant="fp16")
    float_file = tmp_path / "float.safetensors"
    shutil.copy(fp16 / "transformer/diffusion_pytorch_model.fp16.safetensors", float_file)
    ditq.quantize(pipe, "rtn-w8a8")
    pipe.save_pretrained(tmp_path / "q8", variant="q8")
    folder = tmp_path / "q8" / "transformer"
    shutil.copy(float_file, folder / "diffusion_pytorch_model.safetensors")
    ditq.load(tmp_path / "q8", variant="q8")
    assert run(["inspect", str(tmp_path / "q8"), "--variant", "q8"]) == 0
    with pytest.raises((CheckpointError, UsageError)):  # the config describes the variant
        ditq.load(tmp_path / "q8")
    shutil.copy(fp16 / "transformer/config.json", folder)
    for part in ("vae",):
        (tmp_path / "q8" / part / "diffusion_pytorch_model.q8.safetensors").rename(
            tmp_path / "q8" / part / "diffusion_pytorch_model.safetensors"
        )
    assert not getattr(ditq.load(tmp_path / "q8").transformer, "is_quantized", False)
