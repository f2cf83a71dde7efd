"""What a user passes as ``quantization_config``: honoured or refused, never swallowed, never changed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.quantizers import PipelineQuantizationConfig
from helpers import run, tiny_dit, tiny_model, tiny_pixart
from safetensors.torch import save_file

import ditq
from ditq.checkpoint.backend import DitqQuantizer
from ditq.errors import CheckpointError, DitqError, UsageError
from ditq.layers import QuantizedLinear
from ditq.recipe import load as load_recipe

DIT = diffusers.DiTTransformer2DModel


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("sources")
    tiny_model("dit").save_pretrained(path / "dit")
    tiny_model("pixart").save_pretrained(path / "pixart")
    tiny_pixart().save_pretrained(path / "pixart-pipe")
    tiny_dit().save_pretrained(path / "dit-pipe")
    return {p.name: p for p in path.iterdir()}


def load(sources: dict[str, Path], config: Any, **more: Any) -> Any:
    return DIT.from_pretrained(sources["dit"], quantization_config=config, **more)


# --------------------------------------------------------------------------- one config, several models


def test_one_config_loads_independent_models(sources: dict[str, Path], tmp_path: Path) -> None:
    config = ditq.DitqConfig(recipe="rtn-w8a8")
    before = copy.deepcopy(config.__dict__)
    kinds: dict[str, Any] = {"dit": DIT, "pixart": diffusers.PixArtTransformer2DModel}

    def make(name: str) -> Any:
        return kinds[name].from_pretrained(sources[name], quantization_config=config)

    names = ["dit", "pixart"]
    models = [make(name) for name in names]
    assert config.__dict__ == before
    for name, model in zip(names, models, strict=True):
        assert model.config.quantization_config.plan.architecture == name
        model.save_pretrained(tmp_path / name)
        assert torch.equal(run(kinds[name].from_pretrained(tmp_path / name), name), run(model, name))


def test_quantizers_of_one_config_are_independent() -> None:
    config = ditq.DitqConfig(recipe="rtn-w8a8")
    quantizers = [DitqQuantizer(config, pre_quantized=False) for _ in range(2)]  # two loads at the same time
    for quantizer, name in zip(quantizers, ["dit", "pixart"], strict=True):
        quantizer.postprocess_model(tiny_model(name))
    assert [q.plan.architecture for q in quantizers] == ["dit", "pixart"]
    assert config.plan is None


# ------------------------------------------------------------------------------------------- keywords


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"bits": 4}, "Unknown keyword of DitqConfig 'bits'.*rtn-w8a8"),
        ({"override": ["clip=mse"]}, "Did you mean 'overrides'"),
        ({"load_in_8bit": True}, "load_in_8bit"),
        ({"seed": 3}, "'seed', a field of a plan"),
        ({"overrides": ["clip"]}, "key=value"),
        ({"overrides": ["clips=mse"]}, "clips"),
    ],
)
def test_keywords_without_meaning_are_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DitqError, match=complaint):
        ditq.DitqConfig(recipe="rtn-w8a8", **fields)


def test_overrides_and_kept_modules_are_honoured(sources: dict[str, Path]) -> None:
    config = ditq.DitqConfig(
        recipe="rtn-w8a8", overrides="weights.bits=4", modules_to_not_convert=["transformer_blocks.0", "to_k"]
    )
    plan = load(sources, config).hf_quantizer.plan
    assert {layer.weight.bits for layer in plan.quantized} == {4}
    kept = {layer.name for layer in plan.kept}
    assert {x.name for x in plan if x.name.startswith("transformer_blocks.0.") or ".to_k" in x.name} <= kept
    assert any(layer.name.startswith("transformer_blocks.1.") for layer in plan.quantized)
    again = ditq.DitqConfig.from_dict(config.to_dict())
    assert again.job() == config.job()


def test_a_module_that_does_not_exist_is_refused(sources: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="'transformer_block.0'.*Did you mean 'transformer_blocks.0'"):
        load(sources, ditq.DitqConfig(recipe="rtn-w8a8", modules_to_not_convert=["transformer_block.0"]))


@pytest.mark.parametrize("kind", ["object", "path", "text"])
def test_recipe_object_or_file(kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    weights, activations = "{bits: 4, granularity: channel}", "{bits: 8, granularity: token, dynamic: true}"
    path.write_text(f"name: mine\nweights: {weights}\nactivations: {activations}\n")
    config = ditq.DitqConfig(recipe={"object": load_recipe(path), "path": path, "text": str(path)}[kind])
    assert load(sources, config).hf_quantizer.plan.recipe == "mine"
    assert ditq.DitqConfig.from_dict(config.to_dict()).job() == config.job()


def test_a_plan_takes_no_overrides(sources: dict[str, Path]) -> None:
    plan = load(sources, ditq.DitqConfig(recipe="rtn-w8a8")).hf_quantizer.plan
    fields = ditq.DitqConfig(plan=plan).to_dict()
    assert ditq.DitqConfig(**fields).plan == plan
    for more in ({"overrides": ["clip=mse"]}, {"modules_to_not_convert": ["ff"]}):
        with pytest.raises(UsageError, match="plan"):
            ditq.DitqConfig(plan=plan, **more)
    with pytest.raises(CheckpointError):
        ditq.DitqConfig(**fields, bits=4)


# ----------------------------------------------------------------------------------------- components


@pytest.mark.parametrize("component", ["text_encoder", "vae"])
def test_other_components_are_refused(component: str, sources: dict[str, Path]) -> None:
    config = ditq.DitqConfig(recipe="rtn-w8a8")
    both = PipelineQuantizationConfig(quant_mapping={"transformer": config, component: config})
    with pytest.raises(UsageError, match="quant_mapping={'transformer'"):
        diffusers.DiffusionPipeline.from_pretrained(sources["pixart-pipe"], quantization_config=both)


def test_by_name_of_the_backend(sources: dict[str, Path]) -> None:
    fields: dict[str, Any] = {"quant_backend": "ditq", "quant_kwargs": {"recipe": "rtn-w8a8"}}
    config = PipelineQuantizationConfig(**fields, components_to_quantize=["transformer"])
    pipe = diffusers.DiffusionPipeline.from_pretrained(sources["pixart-pipe"], quantization_config=config)
    assert isinstance(pipe.transformer.transformer_blocks[0].attn1.to_q, QuantizedLinear)
    everything = PipelineQuantizationConfig(**fields)
    with pytest.raises(UsageError, match="components_to_quantize="):
        diffusers.DiffusionPipeline.from_pretrained(sources["pixart-pipe"], quantization_config=everything)


# ---------------------------------------------------------------------------------------- single files


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_single_file(dtype: torch.dtype | None, sources: dict[str, Path], tmp_path: Path) -> None:
    model = tiny_wan_from_single_file(sources, tmp_path, dtype)
    assert any(isinstance(m, QuantizedLinear) for m in model.modules())
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved", torch_dtype=dtype)
    assert torch.equal(run(loaded, "wan"), run(model, "wan"))


def tiny_wan_from_single_file(sources: dict[str, Path], tmp_path: Path, dtype: Any, **config: Any) -> Any:
    plain = tiny_model("wan")
    plain.save_pretrained(tmp_path / "wan")
    file = tmp_path / "wan/diffusion_pytorch_model.safetensors"
    config = config or {"recipe": "rtn-w8a8"}
    more = {} if dtype is None else {"torch_dtype": dtype}
    return type(plain).from_single_file(
        str(file), config=str(tmp_path / "wan"), quantization_config=ditq.DitqConfig(**config), **more
    )


def test_single_file_with_a_plan_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    plan = ditq.quantize(tiny_model("wan"), "rtn-w8a8").plan
    with pytest.raises(UsageError, match="from_pretrained"):
        tiny_wan_from_single_file(sources, tmp_path, None, plan=plan)


# --------------------------------------------------------------------------------------------- float8


def test_float8_weights_are_upcast_with_a_word(sources: dict[str, Path], tmp_path: Path) -> None:
    model = tiny_model("dit").to(torch.bfloat16)
    model.save_config(tmp_path)
    state = {k: v.to(torch.float8_e4m3fn) if v.ndim == 2 else v for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    config = ditq.DitqConfig(recipe="rtn-w8a8")
    with pytest.warns(UserWarning, match="float8_e4m3fn"):
        loaded = DIT.from_pretrained(tmp_path, quantization_config=config, torch_dtype=torch.bfloat16)
    assert loaded.hf_quantizer.plan.storage_dtype == "bfloat16"
    plain = DIT.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    ditq.quantize(plain, "rtn-w8a8")
    assert torch.equal(run(loaded, "dit"), run(plain, "dit"))
    save_file({**state, "a.scale_weight": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UsageError, match="a.scale_weight"):
        DIT.from_pretrained(tmp_path, quantization_config=config, torch_dtype=torch.bfloat16)
    with pytest.raises(UsageError, match="torch_dtype=torch.bfloat16"):
        load(sources, config, torch_dtype=torch.float8_e5m2)


@pytest.mark.parametrize("how", ["cast", "layerwise"])
def test_float8_weights_in_memory_are_refused(how: str) -> None:
    model = tiny_model("dit")
    if how == "cast":
        model.to(torch.float8_e4m3fn)
    else:
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    with pytest.raises(UsageError, match="float8_e4m3fn.*enable_layerwise_casting"):
        ditq.quantize(model, "rtn-w8a8")
