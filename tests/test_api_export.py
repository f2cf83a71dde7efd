"""``ditq export``: an exported folder is a pipeline that plain diffusers loads and OpenVINO runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import videos
from diffusers import DiffusionPipeline
from helpers import CONDITIONS, PIPELINES, PROMPTS, QUICK, tiny_pixart

import ditq
from ditq import api, architectures
from ditq.checkpoint.folder import read_plan, read_plans
from ditq.cli.app import run
from ditq.components import transformer_names
from ditq.errors import CheckpointError, UsageError
from ditq.metrics import psnr_db
from ditq.numerics import sqnr_db
from ditq.openvino import attention_ranges, runtime
from ditq.openvino.manifest import Manifest
from ditq.sampling import Sampling, fingerprint, sample

pytest.importorskip("openvino")
if (reason := runtime.why_unavailable()) is not None:
    pytest.skip(reason, allow_module_level=True)

OPTIONS: dict[str, Any] = {"steps": 3, "guidance_scale": 3.0, "batch_size": 2}


@pytest.fixture(scope="module", params=["pixart", "dit"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """The name of an architecture, a quantized tiny pipeline of it, and its export."""
    root = tmp_path_factory.mktemp(request.param)
    pipe = PIPELINES[request.param]()
    ditq.quantize(pipe, "viditq-w8a8", prompts=CONDITIONS[request.param], overrides=QUICK)
    source = ditq.save(pipe, root / "w8a8")
    text = api.export(source, root / "exported")
    assert "linear layers of the blocks multiply 8-bit integers" in text
    return request.param, source, root / "exported"


def test_plain_diffusers_loads_it_and_draws_the_same(folders: tuple[str, Path, Path]) -> None:
    name, source, exported = folders
    arch = architectures.load(name)
    pipes = [DiffusionPipeline.from_pretrained(folder) for folder in (source, exported)]
    assert type(pipes[1].transformer) is type(pipes[0].transformer)
    assert not any(type(m).__name__ == "QuantizedLinear" for m in pipes[1].transformer.modules())
    a, b = (sample(pipe, arch, CONDITIONS[name], Sampling(**OPTIONS)) for pipe in pipes)
    # The tiny random models amplify a flipped rounding; the bundled ones are tested at 40 dB.
    assert min(psnr_db(x, y) for x, y in zip(a.images, b.images, strict=True)) > 30
    assert fingerprint(pipes[0]) != fingerprint(pipes[1])


def test_the_checkpoint_stays_whole(folders: tuple[str, Path, Path]) -> None:
    name, source, exported = folders
    with ditq.use_engine("torch"):
        pipes = [DiffusionPipeline.from_pretrained(folder) for folder in (source, exported)]
    a, b = (sample(pipe, architectures.load(name), CONDITIONS[name], Sampling(**OPTIONS)) for pipe in pipes)
    assert torch.equal(a.trajectory, b.trajectory)
    assert read_plan(source) == read_plan(exported)


def test_compiled_blocks_cannot_be_saved_or_dequantized(folders: tuple[str, Path, Path], tmp_path: Path) -> None:
    pipe = ditq.load(folders[2])
    with pytest.raises(UsageError, match=r"cannot be saved again. Copy its folder"):
        pipe.transformer.save_pretrained(tmp_path / "again")
    with pytest.raises(UsageError, match="cannot be dequantized"):
        pipe.transformer.dequantize()


@pytest.fixture(scope="module")
def whole(folders: tuple[str, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path, Path]:
    """As ``folders``, with what was printed, and the rest of the pipeline exported too."""
    name, source, _ = folders
    out = tmp_path_factory.mktemp(name) / "whole"
    return name, api.export(source, out, whole_pipeline=True), source, out


def test_the_rest_of_the_pipeline_is_graphs_too(whole: tuple[str, str, Path, Path]) -> None:
    name, text, source, exported = whole
    parts = ("vae.decoder", "text_encoder.encoder") if name == "pixart" else ("vae.decoder",)
    assert text.endswith("\n".join(f"{part.partition('.')[0]}: in floats." for part in parts))
    plain, pipe = (DiffusionPipeline.from_pretrained(folder) for folder in (source, exported))
    for part in parts:
        component, _, inner = part.partition(".")
        assert type(getattr(getattr(pipe, component), inner)).__name__ == "CompiledStack"
    latents = torch.randn(3, plain.vae.config.latent_channels, 6, 4)
    with torch.no_grad():
        torch.testing.assert_close(
            pipe.vae.decode(latents).sample, plain.vae.decode(latents).sample, rtol=0, atol=1e-4
        )
        if name == "pixart":
            ids, mask = (
                torch.randint(1, plain.text_encoder.config.vocab_size, (2, 9)),
                torch.ones(2, 9, dtype=torch.long),
            )
            mask[1, 4:] = 0
            a, b = (p.text_encoder(ids, attention_mask=mask)[0] for p in (plain, pipe))
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert fingerprint(plain) != fingerprint(pipe)
    arch = architectures.load(name)
    a, b = (sample(p, arch, CONDITIONS[name], Sampling(**OPTIONS)) for p in (plain, pipe))
    assert min(psnr_db(x, y) for x, y in zip(a.images, b.images, strict=True)) > 30


def test_the_rest_of_the_pipeline_stays_whole(whole: tuple[str, str, Path, Path], tmp_path: Path) -> None:
    name, _, source, exported = whole
    compiled = DiffusionPipeline.from_pretrained(exported)
    with pytest.raises(UsageError, match="cannot be saved again"):
        compiled.vae.save_pretrained(tmp_path / "vae")
    if name == "pixart":
        with pytest.raises(ValueError, match="not serializable"):
            compiled.text_encoder.save_pretrained(tmp_path / "text_encoder")
    with ditq.use_engine("torch"):
        plain, back = (DiffusionPipeline.from_pretrained(folder) for folder in (source, exported))
    back.save_pretrained(tmp_path / "back")
    again = DiffusionPipeline.from_pretrained(tmp_path / "back")
    a, b, c = (
        sample(p, architectures.load(name), CONDITIONS[name], Sampling(**OPTIONS)) for p in (plain, back, again)
    )
    assert torch.equal(a.trajectory, b.trajectory)
    assert torch.equal(a.trajectory, c.trajectory)


def test_components_that_stay_in_torch_are_named(folders: tuple[str, Path, Path], tmp_path: Path) -> None:
    from ditq.openvino import components

    class Odd(torch.nn.Module):
        pass

    class AutoencoderKL(torch.nn.Module):  # one that is called in a way that no graph can be
        config = type("Config", (), {"latent_channels": 4})
        dtype = torch.float32

        def __init__(self) -> None:
            super().__init__()
            self.decoder = torch.nn.Identity()

        def decode(self, z: torch.Tensor) -> None:
            return None

    pipe = type("Pipe", (), {"vae": AutoencoderKL(), "text_encoder": Odd(), "text_encoder_2": None})
    (tmp_path / "vae").mkdir()
    found = components.export_components(pipe, tmp_path, {"name": "openvino"})
    assert found == {
        "vae": "decoder was not called on the example inputs.",
        "text_encoder": "a Odd (supported: AutoencoderKL, T5EncoderModel, UMT5EncoderModel)",
    }
    assert not list((tmp_path / "vae").iterdir())


def test_comparison_times_graphs_but_does_not_look_into_them(folders: tuple[str, Path, Path]) -> None:
    name, source, exported = folders
    found = ditq.compare(
        PIPELINES[name](), {"torch": str(source), "openvino": str(exported)}, CONDITIONS[name], explain=2, **OPTIONS
    )
    assert found.models["torch"].errors is not None
    assert found.models["openvino"].errors is None
    assert found.models["openvino"].step_time is not None


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda f: (f / "openvino" / "ditq_openvino.json").unlink(), "ditq_openvino.json"),
        (lambda f: (f / "openvino" / "ditq_openvino.sha256").unlink(), "does not contain ditq_openvino.sha256"),
        (lambda f: edit_manifest(f, lambda m: m.update(group_size=16)), "was edited since it was exported"),
        (
            lambda f: edit_manifest(f, lambda m: m["segments"][0].update(digests={})),
            "was edited since it was exported",
        ),
        (lambda f: edit_manifest(f, lambda m: m["segments"][0]["layers"].pop()), "was edited since it was exported"),
        (lambda f: edit_plan(f, lambda c: c["layers"][0].update(reason="x")), "config.json was edited"),
        (lambda f: edit_plan(f, lambda c: c.update(seed=7)), "config.json was edited"),
        (lambda f: next((f / "openvino").glob("*.bin")).write_bytes(b"x"), "changed since it was exported"),
        (lambda f: edit(f, {"name": "tensorrt"}), "names the engine"),
        (lambda f: edit(f, {"name": "openvino", "options": {"A": [1]}}), "names the engine"),
        (lambda f: edit(f, {"name": "openvino", "attention": "f16"}), "names the engine"),
        (lambda f: edit(f, {"name": "openvino", "options": {"NO_SUCH_PROPERTY": "1"}}), "OpenVINO"),
    ],
    ids=[
        "no manifest",
        "no binding",
        "group size",
        "no digests",
        "layers",
        "reason",
        "seed",
        "damaged graph",
        "unknown engine",
        "odd option",
        "odd attention",
        "unknown option",
    ],
)
def test_damaged_exports_are_refused(
    folders: tuple[str, Path, Path], damage: Any, complaint: str, tmp_path: Path
) -> None:
    copy = shutil.copytree(folders[2], tmp_path / "copy")
    damage(copy / "transformer")
    with pytest.raises((CheckpointError, UsageError), match=complaint):
        ditq.load(copy)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "openvino" / "ditq_openvino.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_plan(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content["quantization_config"])
    path.write_text(json.dumps(content))


def test_graphs_of_another_plan_are_refused(folders: tuple[str, Path, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(folders[2], tmp_path / "copy")
    graphs = copy / "transformer" / "openvino"
    plan = read_plans(copy)["transformer"]
    Manifest.read(graphs).write(graphs, plan.model_copy(update={"seed": plan.seed + 1}))
    with pytest.raises(CheckpointError, match="belongs to another checkpoint"):
        ditq.load(copy)


def edit(folder: Path, engine: dict[str, Any]) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"]["engine"] = engine
    path.write_text(json.dumps(content))


def test_options_are_kept_and_used(folders: tuple[str, Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["export", str(folders[1]), "--out", str(out), "--option", "INFERENCE_NUM_THREADS=1", "--quiet"]
    command += ["--shapes", "static", "--attention", "bf16"]
    assert run(command) == 0
    config = json.loads((out / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["engine"] == {
        "name": "openvino", "shapes": "static", "attention": "bf16", "options": {"INFERENCE_NUM_THREADS": "1"}
    }  # fmt: skip
    blocks = ditq.load(out).transformer.transformer_blocks
    assert blocks[0].program.shapes == "static"
    assert blocks[0].program.compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_queries_and_keys_in_8_bits(folders: tuple[str, Path, Path], tmp_path: Path, capsys: Any) -> None:
    name, source, exported = folders
    (tmp_path / "prompts.txt").write_text("\n".join(CONDITIONS[name]) + "\n")
    command = ["export", str(source), "--out", str(tmp_path / "out"), "--attention", "int8"]
    assert run([*command, "--prompts", str(tmp_path / "prompts.txt")]) == 0
    assert "attentions multiply 8-bit queries and keys" in capsys.readouterr().out.replace("\n", " ")
    arch = architectures.load(name)
    pipes = [DiffusionPipeline.from_pretrained(folder) for folder in (exported, tmp_path / "out")]
    a, b = (sample(pipe, arch, CONDITIONS[name], Sampling(**OPTIONS)) for pipe in pipes)
    assert not torch.equal(a.trajectory, b.trajectory)
    assert min(psnr_db(x, y) for x, y in zip(a.images, b.images, strict=True)) > 20
    if name == "pixart":
        assert run([*command[:3], str(tmp_path / "again"), *command[4:]]) == 2
        assert "--prompts FILE" in capsys.readouterr().err.replace("\n", " ")
        assert not (tmp_path / "again").exists()


def test_options_are_checked_before_the_work(
    folders: tuple[str, Path, Path], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    _, source, _ = folders
    monkeypatch.setattr(api, "load", lambda *_: pytest.fail("loaded first"))
    out = tmp_path / "out"
    for option, complaint in {
        "NO_SUCH=4": "Unknown property of OpenVINO 'NO_SUCH'",
        "INFERENCE_NUM_THREAD=4": "Did you mean 'INFERENCE_NUM_THREADS'",
        "INFERENCE_NUM_THREADS=many": "OpenVINO refuses the options INFERENCE_NUM_THREADS=many",
    }.items():
        assert run(["export", str(source), "--out", str(out), "--option", option]) == 2
        assert complaint in capsys.readouterr().err.replace("\n", " ")
    for arguments in (["--prompts", __file__], ["--seed", "0"], ["--prompts", __file__, "--attention", "f32"]):
        assert run(["export", str(source), "--out", str(out), *arguments]) == 2
        assert "has no effect with attention=" in capsys.readouterr().err.replace("\n", " ")
    with pytest.raises(UsageError, match="must be a list of strings"):
        api.export(source, out, attention="int8", prompts="a red cat")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan 2.2 with both transformers quantized."""
    pipe = videos.wan_of_two_experts()
    for component in transformer_names(pipe):
        ditq.quantize(pipe, "rtn-w8a8", component=component)
    return ditq.save(pipe, tmp_path_factory.mktemp("wan") / "w8a8")


def draw(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    arguments = videos.PIPELINES["wan"][1]
    sampling = Sampling(seed=5, steps=4, guidance_scale=3.0, arguments=arguments)
    return sample(pipe, architectures.load("wan"), PROMPTS[:1], sampling).latents


def test_both_experts_become_graphs(experts: Path, tmp_path: Path) -> None:
    text = api.export(experts, tmp_path / "out")
    assert [line.partition(":")[0] for line in text.splitlines() if "multiply 8-bit" in line] == [
        "transformer", "transformer_2"
    ]  # fmt: skip
    pipe, plain = DiffusionPipeline.from_pretrained(tmp_path / "out"), ditq.load(experts)
    for component in transformer_names(pipe):
        model = getattr(pipe, component)
        assert [type(block).__name__ for block in model.blocks] == ["CompiledStack"]
        config = json.loads((tmp_path / "out" / component / "config.json").read_text())["quantization_config"]
        assert config["engine"]["name"] == "openvino"
    assert pipe.transformer.blocks[0].digests != pipe.transformer_2.blocks[0].digests
    assert read_plans(tmp_path / "out") == read_plans(experts)
    assert sqnr_db(draw(plain), draw(pipe)) > 20
    with ditq.use_engine("torch"):
        assert torch.equal(draw(plain), draw(ditq.load(tmp_path / "out")))


def test_attention_of_both_experts_has_its_own_scales(experts: Path, tmp_path: Path, monkeypatch: Any) -> None:
    watched = []

    def few(pipe: Any, architecture: Any, conditions: Any, *, component: str, **_: Any) -> Any:
        watched.append((component, list(conditions)))
        model = getattr(pipe, component)
        with attention_ranges.observed(model, architecture) as found:
            draw(pipe)
        return found

    monkeypatch.setattr(attention_ranges, "sampled_ranges", few)
    text = api.export(experts, tmp_path / "out", attention="int8", prompts=PROMPTS[:1])
    assert watched == [("transformer", PROMPTS[:1]), ("transformer_2", PROMPTS[:1])]
    assert text.count("attentions multiply 8-bit queries and keys") == 2


def test_expert_that_is_not_quantized_stays_in_torch(tmp_path: Path) -> None:
    pipe = videos.wan_of_two_experts()
    ditq.quantize(pipe, "rtn-w8a8", component="transformer_2")
    source = ditq.save(pipe, tmp_path / "w8a8")
    text = api.export(source, tmp_path / "out")
    assert "transformer: stays in torch: it is not quantized by ditq." in text.splitlines()
    loaded = ditq.load(tmp_path / "out")
    assert type(loaded.transformer.blocks[0]).__name__ == "WanTransformerBlock"
    assert type(loaded.transformer_2.blocks[0]).__name__ == "CompiledStack"


def test_what_cannot_be_exported(
    folders: tuple[str, Path, Path], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    _, source, _ = folders
    tiny_pixart().save_pretrained(tmp_path / "plain")
    with pytest.raises(UsageError, match="quantized by ditq; run ditq quantize"):
        api.export(tmp_path / "plain", tmp_path / "out")
    with pytest.raises(UsageError, match="Unknown kind of shapes 'fixed'"):
        api.export(source, tmp_path / "out", shapes="fixed")
    with pytest.raises(UsageError, match="Unknown precision of attention 'f16'"):
        api.export(source, tmp_path / "out", attention="f16")
    with pytest.raises(UsageError, match="needs shapes='static'"):
        api.export(source, tmp_path / "out", attention="bf16")
    with pytest.raises(UsageError, match="Unknown engine to export to 'onnx'"):
        api.export(source, tmp_path / "out", engine="onnx")
    with pytest.raises(UsageError, match="exists already"):
        api.export(source, tmp_path / "plain")
    assert run(["export", str(source), "--out", str(tmp_path / "out"), "--option", "THREADS"]) == 2
    assert "NAME=VALUE" in capsys.readouterr().err
    monkeypatch.setattr(runtime, "why_unavailable", lambda: "not installed: pip install 'ditq[openvino]'")
    assert run(["export", str(source), "--out", str(tmp_path / "out")]) == 1
    assert "ditq[openvino]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_plan_that_openvino_cannot_execute_is_refused(tmp_path: Path) -> None:
    pipe = tiny_pixart()
    ditq.quantize(pipe, "rtn-w4a4", overrides=["weights.granularity=group", "weights.group_size=16"])
    source = ditq.save(pipe, tmp_path / "w4a4")
    with pytest.raises(UsageError, match="cannot execute this plan exactly"):
        api.export(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w4a4"]
