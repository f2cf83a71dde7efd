"""The verbs on tiny pipelines, through the function behind the ``ditq`` command; messages, statuses, what is left."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from console import ditq
from diffusers import DiffusionPipeline
from helpers import PROMPTS, QUICK, tiny_pixart
from PIL import Image

from ditq.cli import common
from ditq.cli.app import run
from ditq.cli.doctor import missing_packages
from ditq.cli.recipes import in_words
from ditq.engines import registry
from ditq.engines.torch import TorchEngine
from ditq.openvino.runtime import why_unavailable
from ditq.recipe import families, load

SETTINGS = [item for setting in QUICK for item in ("--set", setting)]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny 16-bit PixArt pipeline folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pixart().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture(scope="module")
def quantized(pipeline: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "w4a8"
    assert run(["quantize", str(pipeline), "--prompts", str(prompts), "--out", str(out), "--quiet", *SETTINGS]) == 0
    return out


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITQ_CACHE", str(tmp_path / "cache"))


# ------------------------------------------------------------------------------------------ the work


def test_quantize_writes_a_pipeline_that_plain_diffusers_loads(quantized: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(quantized)
    assert type(pipe.transformer.transformer_blocks[0].attn1.to_q).__name__ == "QuantizedLinear"


def test_quantize_leaves_other_components_as_they_were(pipeline: Path, quantized: Path) -> None:
    for file in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (pipeline / file).read_bytes() == (quantized / file).read_bytes()


def test_inspect_json_agrees_with_the_files(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = ditq(capsys, "inspect", quantized, "--json")
    data = json.loads(out)
    assert status == 0
    assert data["nominal_bits"] == {"weights": 4, "activations": 8}
    assert data["transformer_bytes"] == sum(
        f.stat().st_size for f in (quantized / "transformer").glob("*.safetensors")
    )
    assert data["transformer_bytes"] < data["transformer_bytes_16bit"]
    row = next(layer for layer in data["layers"] if layer["role"] == "ffn.up")
    assert set(row) >= {
        "name",
        "role",
        "weight_bits",
        "activation_bits",
        "granularity",
        "balance",
        "rounding",
        "reason",
    }
    assert all(layer["reason"] for layer in data["layers"] if layer["weight_bits"] == 16)


def test_inspect_shows_equal_blocks_once_and_every_layer_when_asked(
    quantized: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common.out, "_width", 80)
    status, out, _ = ditq(capsys, "inspect", quantized)
    assert status == 0
    assert "linear layers quantized" in out
    assert "transformer_blocks.0-1" in out
    assert len(re.findall(r"ff\.net\.2\b", out)) == 1
    layers = len(json.loads(ditq(capsys, "inspect", quantized, "--json")[1])["layers"])
    _, full, _ = ditq(capsys, "inspect", quantized, "--layers")
    assert len(re.findall(r"(?m)^\S*\w", full.partition("---\n")[2])) >= layers
    assert max(map(len, (out + full).splitlines())) <= 80


def test_names_with_markup_reach_the_terminal_as_they_are(
    pipeline: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "w[red]"
    arguments = ["--recipe", "rtn-w8a8", "--set", "keep_layers=['blocks.[/0]']", "--out", out]
    status, said, _ = ditq(capsys, "quantize", pipeline, *arguments)
    assert status == 0
    assert "w[red]" in said.replace("\n", "")
    status, said, _ = ditq(capsys, "inspect", out)
    assert status == 0
    assert "blocks.[/0]" in said
    _, _, err = ditq(capsys, "inspect", tmp_path / "\x1b[31mno\nsuch")
    assert one_paragraph(err)
    assert "\x1b" not in err


def test_inspect_prints_on_an_ascii_terminal(quantized: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ditq", "inspect", str(quantized), "--layers"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert "linear layers quantized" in done.stdout.decode("ascii")


@pytest.mark.parametrize("name", ["viditq-w4a8", "qdit-w3a8", "rtn-w8a16", "ptq4dm-w8a8", "gptq-w4a4"])
def test_a_printed_recipe_is_a_file_that_loads_as_the_same_recipe(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common.out, "_width", 40)
    status, out, _ = ditq(capsys, "recipes", name)
    assert status == 0
    file = tmp_path / "recipe.yaml"
    file.write_text(out)
    assert load(file) == load(name)


def test_recipes_lists_every_family_once_within_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common.out, "_width", 80)
    _, out, _ = ditq(capsys, "recipes")
    listed = re.findall(r"(?m)^(\S+)-wXaY\s.*(yes|no)\s+(?:[\d.]+ s)?\s*$", out)
    assert [name for name, _ in listed] == list(families())
    assert dict(listed)["rtn"] == "no"
    assert dict(listed)["viditq"] == "yes"
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out


def test_recipes_are_told_in_words() -> None:
    svdquant = load("svdquant-w4a4")
    assert in_words(svdquant) == "smooth by error, branch of rank 32, groups of 64, dynamic"
    regular = load("quarot-w4a4").override("balance.rotation=regular")
    assert in_words(regular) == "rotate by regular blocks, dynamic"


def test_a_family_is_shown_with_its_widths(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = ditq(capsys, "recipes", "viditq")
    assert yaml.safe_load(out)["widths"] == list(families()["viditq"].widths)
    _, out, _ = ditq(capsys, "recipes", "viditq", "--json")
    assert json.loads(out)["for_whom"] == families()["viditq"].for_whom


def test_architectures_are_whole_names_within_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common.out, "_width", 80)
    _, data, _ = ditq(capsys, "architectures", "--json")
    _, out, _ = ditq(capsys, "architectures")
    for row in json.loads(data):
        assert {row["architecture"], *row["class"]} <= set(out.replace(",", " ").split())
    _, one, _ = ditq(capsys, "architectures", "pixart")
    assert "self_attn.q/k/v/out" in one
    assert max(map(len, (out + one).splitlines())) <= 80


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert ditq(capsys, "--version") == (0, f"ditq {metadata.version('ditq')}\n", "")


def test_generate_repeats_itself(quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        arguments = ["--prompt", PROMPTS[0], "--steps", 2, "--seed", 3, "--quiet", "--out", tmp_path / name]
        assert ditq(capsys, "generate", quantized, *arguments)[0] == 0
    first, second = (Image.open(tmp_path / name / "0000.png").tobytes() for name in ("a", "b"))
    assert first == second
    assert (tmp_path / "a" / "prompts.txt").read_text().strip() == PROMPTS[0]


def test_compare_json_has_the_promised_fields(
    pipeline: Path, quantized: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out_dir = tmp_path / "comparison"
    arguments = ["--prompts", prompts, "--steps", 2, "--json", "--out", out_dir]
    status, out, _ = ditq(capsys, "compare", pipeline, quantized, *arguments)
    data = json.loads(out)
    assert status == 0
    assert data["pairs"] == len(PROMPTS)
    assert data["prompts"] == PROMPTS
    for metric in ("psnr_db", "ssim", "latent_sqnr_db"):
        assert set(data[metric]) == {"mean", "ci95", "n", "higher_is_better"}
        assert data[metric]["ci95"][0] <= data[metric]["mean"] <= data[metric]["ci95"][1]
    assert Image.open(out_dir / "sheet.png").width > 100
    command = json.loads((out_dir / "report.json").read_text())["command"]
    assert f"--prompts {prompts} --steps 2 " in command


def test_two_prompts_give_no_intervals_and_a_quantized_reference_its_bits(
    pipeline: Path, quantized: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--prompts", prompts, "--count", 2, "--steps", 2, "--metrics", "basic", "--explain", 0]
    status, out, err = ditq(capsys, "compare", quantized, pipeline, *arguments)
    assert status == 0, err
    assert out.startswith("2 prompts, seed 0")
    assert re.search(r"(?m)^metric +W4A8 ", out)
    assert "± n/a" in out
    assert "no intervals and no verdicts from fewer than 3 pairs" in " ".join(out.split())
    _, out, _ = ditq(capsys, "compare", pipeline, quantized, *arguments, "--json")
    assert json.loads(out)["psnr_db"]["ci95"] is None


def test_comparing_a_pipeline_with_itself_finds_no_difference(
    pipeline: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = ditq(capsys, "compare", pipeline, pipeline, "--prompts", prompts, "--steps", 2, "--json")
    assert json.loads(out)["psnr_db"]["mean"] == 100


@pytest.mark.parametrize("verb", ["recipes", "architectures", "doctor"])
def test_listings_print_a_table_and_json(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ditq(capsys, verb)[0] == 0
    status, out, _ = ditq(capsys, verb, "--json")
    assert status == 0
    assert json.loads(out)


def test_doctor_names_engines_with_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = ditq(capsys, "doctor", "--json")
    rows = {row["name"]: row for row in json.loads(out)["engines"]}
    assert rows["torch"]["available"] is True
    assert all(row["reason"] for row in rows.values())


def test_doctor_says_what_was_proved(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchEngine, "prove", lambda self, device: "1 code of 64 differs")
    registry.forget()
    try:
        data = json.loads(ditq(capsys, "doctor", "--json")[1])
        [row] = [row for row in data["engines"] if row["name"] == "torch"]
        assert (row["available"], row["proved"], row["device"]) == (False, False, "cpu")
        assert "1 code of 64 differs" in row["reason"]
    finally:
        registry.forget()


def test_doctor_names_runtimes_and_the_extras_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(ditq(capsys, "doctor", "--json")[1])
    [runtime] = data["runtimes"]
    assert runtime["name"] == "openvino"
    assert runtime["available"] is (why_unavailable() is None)
    assert runtime["reason"]
    assert set(data["extras"]) == set(metadata.metadata("ditq").get_all("Provides-Extra") or [])
    assert data["extras"]["dev"] is True
    _, out, _ = ditq(capsys, "doctor")
    assert "runtime openvino" in out


def test_an_extra_misses_the_packages_that_are_not_installed() -> None:
    requirements = [
        "torch>=2", "no-such-package>=1; extra == 'a'", "pytest; extra == 'a'", "pytest>=8.2; extra == 'b'",
        "another-one; sys_platform == 'nowhere' and extra == 'b'",
    ]  # fmt: skip
    assert missing_packages(requirements) == {"a": ["no-such-package"], "b": []}


@pytest.mark.parametrize(
    "verb",
    [
        "demo",
        "quantize",
        "search",
        "sensitivity",
        "generate",
        "inspect",
        "compare",
        "export",
        "recipes",
        "architectures",
        "doctor",
    ],
)
def test_help_of_every_verb_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = ditq(capsys, verb, "--help")
    assert status == 0
    assert f"Example: ditq {verb}" in " ".join(out.split())
    assert ditq(capsys, verb, "-h") == (status, out, "")


# ---------------------------------------------------------------------------------------- the errors


def one_paragraph(err: str) -> bool:
    return err.strip().startswith("error: ") and "\n" not in err.strip() and "Traceback" not in err


def check_failure(result: tuple[int, str, str], status: int, *words: str, left: Path | None = None) -> None:
    """Checks the exit status, for one paragraph with these words, and that no output is left."""
    code, _, err = result
    assert code == status, err
    assert one_paragraph(err), err
    for word in words:
        assert word in err
    if left is not None:
        assert not left.exists()
        assert not list(left.parent.glob(f".{left.name}*"))


def test_unknown_recipe_names_the_known(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    result = ditq(capsys, "quantize", pipeline, "--recipe", "viditk-w4a8", "--out", out)
    check_failure(result, 2, "viditk-w4a8", "Did you mean 'viditq-w4a8'", "rtn-wXaY", left=out)
    result = ditq(capsys, "quantize", pipeline, "--recipe", "viditq-w4a9", "--out", out)
    check_failure(result, 2, "w4a9", "2 to 8 or 16", left=out)


def test_folder_that_is_no_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    (tmp_path / "nothing").mkdir()
    result = ditq(capsys, "quantize", tmp_path / "nothing", "--recipe", "rtn-w8a8", "--out", out)
    check_failure(result, 2, "not a diffusers pipeline", "model_index.json", left=out)
    missing = ditq(capsys, "quantize", tmp_path / "absent", "--recipe", "rtn-w8a8", "--out", out)
    check_failure(missing, 2, "There is no pipeline", left=out)


def test_unknown_bundled_model_names_the_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = ditq(capsys, "quantize", "bundled:nope", "--recipe", "rtn-w8a8", "--out", tmp_path / "out")
    check_failure(result, 2, "nope", "known", left=tmp_path / "out")


def test_unknown_architecture_says_how_to_add_one(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import SD3Transformer2DModel

    folder, out = tmp_path / "sd3", tmp_path / "out"
    shutil.copytree(pipeline, folder)
    shutil.rmtree(folder / "transformer")
    SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "SD3Transformer2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    result = ditq(capsys, "quantize", folder, "--recipe", "rtn-w8a8", "--out", out)
    check_failure(result, 2, "SD3Transformer2DModel", "--architecture", "CONTRIBUTING.md", left=out)


def test_nan_in_weights_names_the_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe, folder, out = tiny_pixart(), tmp_path / "nan", tmp_path / "out"
    with torch.no_grad():
        pipe.transformer.transformer_blocks[1].attn1.to_k.weight[0, 0] = float("nan")
    pipe.save_pretrained(folder)
    result = ditq(capsys, "quantize", folder, "--recipe", "rtn-w8a8", "--out", out)
    check_failure(result, 1, "transformer_blocks.1.attn1.to_k.weight", "NaN", left=out)


def test_empty_prompts_file(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, out = tmp_path / "empty.txt", tmp_path / "out"
    empty.write_text("\n \n")
    result = ditq(capsys, "quantize", pipeline, "--prompts", empty, "--out", out)
    check_failure(result, 2, "empty", "one prompt per line", left=out)


def test_no_prompts_for_a_recipe_that_needs_them(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_failure(ditq(capsys, "quantize", pipeline, "--out", tmp_path / "out"), 2, "--prompts", left=tmp_path / "out")


def test_existing_output_is_refused_and_untouched(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    check_failure(ditq(capsys, "quantize", pipeline, "--recipe", "rtn-w8a8", "--out", out), 2, "exists already")
    assert [p.name for p in out.iterdir()] == ["precious.txt"]


def test_output_that_cannot_be_written(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("no folder")
    result = ditq(capsys, "quantize", pipeline, "--recipe", "rtn-w8a8", "--out", tmp_path / "file" / "out")
    check_failure(result, 1, "Cannot write")


def test_quantizing_twice_is_refused(quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = ditq(capsys, "quantize", quantized, "--recipe", "rtn-w8a8", "--out", tmp_path / "out")
    check_failure(result, 2, "quantized already", left=tmp_path / "out")


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_weights_name_file_or_tensor(
    damage: str, quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(quantized, folder)
    file = next((folder / "transformer").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    else:
        data[len(data) * 3 // 4] ^= 0x10
    file.write_bytes(data)
    for verb in ("inspect", "generate"):
        arguments = [] if verb == "inspect" else ["--prompt", "a red cat", "--steps", 1, "--out", tmp_path / "out"]
        result = ditq(capsys, verb, folder, *arguments)
        check_failure(result, 1, ".safetensors" if damage == "truncated" else "checksum", left=tmp_path / "out")


def test_plan_that_names_a_missing_layer(quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "wrong"
    shutil.copytree(quantized, folder)
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text().replace("transformer_blocks.1.attn1.to_q", "transformer_blocks.9.attn1.to_q"))
    result = ditq(capsys, "generate", folder, "--prompt", "a red cat", "--out", tmp_path / "out")
    check_failure(result, 1, "transformer_blocks.9.attn1.to_q", left=tmp_path / "out")


@pytest.mark.parametrize(
    ("setting", "word"), [("weights.bits=9", "weights.bits"), ("nonsense=1", "nonsense"), ("justtext", "key=value")]
)
def test_wrong_set_is_a_usage_error(
    setting: str, word: str, pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = ditq(capsys, "quantize", pipeline, "--set", setting, "--out", tmp_path / "out")
    check_failure(result, 2, word, left=tmp_path / "out")


def test_unknown_option_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert ditq(capsys, "quantize", "--no-such-option")[0] == 2


# ---------------------------------------------------------------------------- options without an effect


def test_options_that_a_recipe_has_no_use_for_are_named(
    pipeline: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["quantize", pipeline, "--recipe", "rtn-w8a8", "--out", tmp_path / "out", "--json"]
    status, out, err = ditq(capsys, *arguments, "--prompts", prompts, "--resume")
    assert status == 0
    assert err == "--prompts and --resume: not used, as this needs no calibration.\n"
    assert json.loads(out)["out"] == str(tmp_path / "out")


def test_plan_beside_a_recipe_is_refused(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    result = ditq(capsys, "quantize", pipeline, "--plan", "p.json", "--recipe", "viditq-w4a8", "--out", out)
    check_failure(result, 2, "--plan", "--recipe", left=out)


def test_seed_beside_a_plan_is_refused(
    pipeline: Path, quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = json.loads((quantized / "transformer" / "config.json").read_text())["quantization_config"]
    (tmp_path / "plan.json").write_text(json.dumps({k: v for k, v in fields.items() if k != "quant_method"}))
    out = tmp_path / "out"
    result = ditq(capsys, "quantize", pipeline, "--plan", tmp_path / "plan.json", "--seed", 1, "--prompts",
                  pipeline / "model_index.json", "--out", out, "--quiet")  # fmt: skip
    check_failure(result, 2, "carries its own seed (0)", left=out)
