"""The contract that diffusers tests for its own backends: loading, saving, casting, moving, adapting, dequantizing."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers import PIPELINES, draw, run, tiny_dit, tiny_model, tiny_pixart, tiny_statistics
from safetensors import safe_open
from torch import nn

import ditq
from ditq.errors import CheckpointError, UsageError
from ditq.layers import QuantizedLinear, TimestepLinear
from ditq.numerics import sqnr_db
from ditq.plan import Plan

FILE = "diffusion_pytorch_model.safetensors"
CASES = {
    "pixart-smoothquant-w4a8": ("pixart", "smoothquant-w4a8", ()),
    "pixart-quarot-w4a4": ("pixart", "quarot-w4a4", ()),
    "pixart-online-w3a8": (
        "pixart",
        "viditq-w4a8",
        ("weights.bits=3", "balance.choose=always", "balance.alpha=0.5"),
    ),
    "dit-smoothquant-w8a8": ("dit", "smoothquant-w8a8", ()),
    "dit-rtn-static-w6a6": ("dit", "rtn-static-w6a6", ()),
    "dit-groups-w4a8": (
        "dit",
        "rtn-w4a8",
        ("weights={bits: 4, granularity: group, group_size: 32}", "keep_layers=['blocks.0.ff']"),
    ),
    "dit-qdit-w4a8": ("dit", "qdit-w4a8", ("weights.group_size=32", "activations.group_size=32")),
    "pixart-gptq-static-groups-w4a8": (
        "pixart",
        "smoothquant-w4a8",
        ("rounding=gptq", "activations={bits: 8, granularity: group, group_size: 64}"),
    ),
    "pixart-normal-gptq-w4a4": (
        "pixart",
        "quarot-w4a4",
        ("rounding=gptq", "clip=mse", "weights.symmetric=true", "weights.levels=normal", "activations.levels=normal"),
    ),
    "dit-full-w4a8": ("dit", "rtn-w4a8", ("clip=mse", "weights.symmetric=true", "weights.full=true")),
    "dit-normal-groups-w3a8": (
        "dit",
        "rtn-w3a8",
        ("weights={bits: 3, granularity: group, group_size: 32, levels: normal}",),
    ),
    "dit-timesteps-w4a8": (
        "dit",
        "smoothquant-w4a8",
        ("balance.timesteps=[[0, 499], [500, 999]]", "keep=[embedder, final]"),
    ),
}


def quantized(case: str) -> tuple[Any, Plan, str]:
    architecture, recipe, overrides = CASES[case]
    model = tiny_model(architecture)
    statistics = tiny_statistics(model, architecture)
    plan = ditq.quantize(model, recipe, statistics=statistics, overrides=overrides).plan
    return model, plan, architecture


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    out = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            out |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return out


def identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# ------------------------------------------------------------------------------------- save and load


def test_saved_and_loaded_model_is_bit_identical(case: str, tmp_path: Path) -> None:
    model, _, architecture = quantized(case)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert identical(loaded.state_dict(), model.state_dict())
    for t in (900, 10):
        timestep = torch.tensor([t, t])
        assert torch.equal(run(loaded, architecture, timestep=timestep), run(model, architecture, timestep=timestep))


def test_sharded_checkpoint_is_bit_identical(case: str, tmp_path: Path) -> None:
    model, _, architecture = quantized(case)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = type(model).from_pretrained(tmp_path)
    assert identical(loaded.state_dict(), model.state_dict())
    assert torch.equal(run(loaded, architecture), run(model, architecture))


def test_saving_again_writes_identical_files(case: str, tmp_path: Path) -> None:
    model, _, _ = quantized(case)
    model.save_pretrained(tmp_path / "a")
    type(model).from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert identical(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b"))
    metadata = []
    for x in "ab":
        with safe_open(tmp_path / x / FILE, "pt") as file:
            metadata.append(file.metadata())  # whose order in the file is not fixed
    assert metadata[0] == metadata[1]
    first, second = (json.loads((tmp_path / x / "config.json").read_text()) for x in "ab")
    assert {**first, "_name_or_path": ""} == {**second, "_name_or_path": ""}


def test_config_round_trip_keeps_the_plan(case: str, tmp_path: Path) -> None:
    model, plan, _ = quantized(case)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored.pop("quant_method") == "ditq"
    assert stored["format_version"] == 1
    loaded = type(model).from_pretrained(tmp_path)
    assert Plan.from_dict(stored) == loaded.hf_quantizer.plan == plan
    assert loaded.config.quantization_config.plan.hash() == plan.hash()


def test_only_safetensors_are_written(tmp_path: Path) -> None:
    model, _, _ = quantized("dit-smoothquant-w8a8")
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", FILE]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_16_bit_keeps_scales_in_float32(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, _, architecture = quantized(case)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, torch_dtype=dtype)
    before = dict(model.named_buffers())
    for name, buffer in loaded.named_buffers():
        if name.endswith(("scale", "zero_point", "qweight", "ditq_modulation")):
            assert buffer.dtype == before[name].dtype, name
            assert torch.equal(buffer, before[name]), name
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    out = run(loaded, architecture)
    assert out.dtype == dtype
    assert sqnr_db(run(model, architecture), out) > 12  # 4-bit activations at a rounding boundary turn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_model_quantized_in_16_bit_is_saved_as_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    plain = tiny_model("pixart")
    plain.save_pretrained(tmp_path / "plain")
    # As users get one: from_pretrained leaves tables of sines in float32, `.to` does not.
    model = type(plain).from_pretrained(tmp_path / "plain", torch_dtype=dtype)
    architecture = "pixart"
    plan = ditq.quantize(model, "smoothquant-w4a8", statistics=tiny_statistics(model, architecture)).plan
    assert plan.storage_dtype == str(dtype).removeprefix("torch.")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, torch_dtype=dtype)
    assert identical(loaded.state_dict(), model.state_dict())
    assert torch.equal(run(loaded, architecture), run(model, architecture))


def test_file_is_smaller_by_the_planned_ratio(tmp_path: Path) -> None:
    model, plan, _ = quantized("dit-smoothquant-w8a8")
    tiny_model("dit").to(torch.bfloat16).save_pretrained(tmp_path / "16")
    model.save_pretrained(tmp_path / "8")
    size = {x: sum(t.numel() * t.element_size() for t in tensors_of(tmp_path / x).values()) for x in ("16", "8")}
    quantized_bytes = sum(layer.parameters for layer in plan.quantized)
    assert size["8"] < size["16"] - 0.9 * quantized_bytes
    assert size["8"] / size["16"] == pytest.approx(plan.memory()[0] / plan.memory()[1], rel=0.02)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_memory_footprint_falls_with_the_bits(bits: int) -> None:
    model = tiny_model("dit").to(torch.bfloat16)
    before = model.get_memory_footprint()
    plan = ditq.quantize(model, "rtn-w8a8", overrides=[f"weights.bits={bits}"]).plan
    saved = sum(layer.parameters * (16 - bits) // 8 for layer in plan.quantized)
    assert before - model.get_memory_footprint() == pytest.approx(saved, rel=0.05)


def test_parameters_are_counted() -> None:
    model, _, _ = quantized("dit-smoothquant-w8a8")
    assert model.num_parameters() > 0
    assert "quantization_config" in str(model.config)
    assert repr(model.config["quantization_config"]).startswith("DitqConfig(")


# ---------------------------------------------------------------------------------- kinds of modules


def test_planned_layers_are_quantized_and_others_keep_their_type(case: str, tmp_path: Path) -> None:
    model, plan, _ = quantized(case)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for layer in plan.quantized:
        kind = TimestepLinear if layer.timesteps else QuantizedLinear
        assert type(loaded.get_submodule(layer.name)) is kind
    assert plan.kept
    for layer in plan.kept:
        module = loaded.get_submodule(layer.name)
        assert type(module) is nn.Linear
        assert module.weight.dtype == torch.float32


def test_kept_layers_are_stored_in_16_bit(tmp_path: Path) -> None:
    model, plan, _ = quantized("dit-groups-w4a8")
    model.save_pretrained(tmp_path)
    stored = tensors_of(tmp_path)
    assert "transformer_blocks.0.ff.net.2.weight" in stored
    for layer in plan.kept:
        assert stored[f"{layer.name}.weight"].dtype == getattr(torch, plan.storage_dtype)


# ------------------------------------------------------------------------------------ cast and move


@pytest.mark.parametrize("cast", ["half", "float", "to", "to-keyword"])
def test_casting_is_refused_as_for_other_backends(cast: str, tmp_path: Path) -> None:
    model, _, architecture = quantized("dit-smoothquant-w8a8")
    model.save_pretrained(tmp_path)
    for m in (model, type(model).from_pretrained(tmp_path)):
        before = run(m, architecture)
        with pytest.raises(ValueError, match="quantized"):
            {
                "half": m.half,
                "float": m.float,
                "to": lambda m=m: m.to(torch.bfloat16),
                "to-keyword": lambda m=m: m.to(dtype=torch.bfloat16),
            }[cast]()
        assert torch.equal(run(m, architecture), before)


def test_moving_is_allowed(case: str) -> None:
    model, _, architecture = quantized(case)
    before = run(model, architecture)
    assert torch.equal(run(model.to("cpu"), architecture), before)
    model.to("meta")
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}


@pytest.mark.gpu
def test_moving_to_cuda_and_back(case: str) -> None:
    model, _, architecture = quantized(case)
    before = run(model, architecture)
    model.to("cuda")
    assert {t.device.type for t in model.state_dict().values()} == {"cuda"}
    assert torch.equal(run(model.to("cpu"), architecture), before)


# ------------------------------------------------------------------------------- dequantize, adapters


def test_dequantize_gives_plain_linears_and_close_outputs(case: str) -> None:
    model, plan, architecture = quantized(case)
    before = run(model, architecture)
    model.dequantize()
    for layer in plan.layers:
        assert type(model.get_submodule(layer.name)) is nn.Linear
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    after = run(model, architecture)
    floor = {4: 8, 6: 15, 8: 25}[plan.nominal_activation_bits]
    assert sqnr_db(before, after) > floor
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    "case",
    [
        "dit-groups-w4a8",
        "pixart-smoothquant-w4a8",
        "dit-smoothquant-w8a8",
    ],
)
def test_dequantized_model_can_be_saved_as_a_plain_one(case: str, tmp_path: Path) -> None:
    model, _, architecture = quantized(case)
    model.dequantize()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert sqnr_db(run(model, architecture), run(loaded, architecture)) > 40


def test_dequantized_model_can_be_cast() -> None:
    model, _, architecture = quantized("dit-smoothquant-w8a8")
    model.dequantize()
    model.to(torch.bfloat16)
    assert run(model, architecture).dtype == torch.bfloat16


def test_lora_runs_and_trains(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, _, architecture = quantized("pixart-smoothquant-w4a8")
    before = run(model, architecture)
    config = peft.LoraConfig(r=4, target_modules=["to_out.0", "ff.net.2"], lora_alpha=4)
    model = peft.inject_adapter_in_model(config, model)
    assert torch.equal(run(model, architecture), before)  # B starts at zero
    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    for p in model.parameters():
        p.requires_grad_(False)
    for p in adapters:
        p.requires_grad_(True)
    target = before + 0.1 * torch.randn_like(before)
    optimizer = torch.optim.Adam(adapters, lr=1e-2)
    losses = []
    for _ in range(8):
        out = run_with_gradients(model, architecture)
        loss = (out - target).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None for p in adapters)
    assert losses[-1] < losses[0]


def run_with_gradients(model: nn.Module, architecture: str) -> torch.Tensor:
    from helpers import example_inputs

    with torch.enable_grad():
        return model(**example_inputs(architecture), return_dict=False)[0]


# --------------------------------------------------------------------------------------- on the fly


@pytest.fixture(scope="module")
def plain_dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain")
    pipe = tiny_dit()
    pipe.transformer.to(torch.bfloat16).float()
    pipe.save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantizing_while_loading_equals_quantizing_after(dtype: torch.dtype, plain_dit: Path) -> None:
    config = ditq.DitqConfig(recipe="rtn-w8a8")
    cls = diffusers.DiTTransformer2DModel
    model = cls.from_pretrained(plain_dit / "transformer", quantization_config=config, torch_dtype=dtype)
    other = cls.from_pretrained(plain_dit / "transformer", torch_dtype=dtype)
    plan = ditq.quantize(other, "rtn-w8a8").plan
    assert model.hf_quantizer.plan == plan
    assert identical(model.state_dict(), other.state_dict())


def test_model_quantized_while_loading_can_be_saved(plain_dit: Path, tmp_path: Path) -> None:
    config = ditq.DitqConfig(recipe="rtn-w4a8")
    cls = diffusers.DiTTransformer2DModel
    model = cls.from_pretrained(plain_dit / "transformer", quantization_config=config)
    model.save_pretrained(tmp_path)
    assert identical(cls.from_pretrained(tmp_path).state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="quantized"):
        model.half()


def test_pipeline_quantization_config(plain_dit: Path) -> None:
    from diffusers.quantizers import PipelineQuantizationConfig

    config = PipelineQuantizationConfig(quant_mapping={"transformer": ditq.DitqConfig(recipe="rtn-w8a8")})
    pipe = diffusers.DiffusionPipeline.from_pretrained(plain_dit, quantization_config=config)
    plain = diffusers.DiffusionPipeline.from_pretrained(plain_dit)
    assert isinstance(pipe.transformer.transformer_blocks[0].ff.net[2], QuantizedLinear)
    for p in (pipe, plain):
        p.set_progress_bar_config(disable=True)
    assert sqnr_db(draw(plain), draw(pipe)) > 25


@pytest.mark.parametrize("recipe", ["viditq-w4a8", "smoothquant-w8a8", "rtn-static-w8a8"])
def test_recipe_that_needs_calibration_is_refused_while_loading(recipe: str, plain_dit: Path) -> None:
    with pytest.raises(UsageError, match=f"{recipe}.*needs calibration.*ditq.quantize"):
        diffusers.DiTTransformer2DModel.from_pretrained(
            plain_dit / "transformer", quantization_config=ditq.DitqConfig(recipe=recipe)
        )


def test_unknown_recipe_is_refused_while_loading(plain_dit: Path) -> None:
    with pytest.raises(UsageError, match="Unknown recipe 'rtn-x8a8'"):
        diffusers.DiTTransformer2DModel.from_pretrained(
            plain_dit / "transformer", quantization_config=ditq.DitqConfig(recipe="rtn-x8a8")
        )


# ------------------------------------------------------------------------------------------ pipelines


@pytest.mark.parametrize("name", PIPELINES)
def test_whole_pipeline_loads_with_plain_diffusers(name: str, tmp_path: Path) -> None:
    pipe = {"pixart": tiny_pixart, "dit": tiny_dit}[name]()
    ditq.quantize(pipe, "quarot-w4a8")
    before = draw(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipe)
    assert torch.equal(draw(loaded), before)


# --------------------------------------------------------------------------------------- registration

CHECK = """
import sys
{imports}
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from ditq.checkpoint.backend import DitqConfig, DitqQuantizer
assert AUTO_QUANTIZER_MAPPING["ditq"] is DitqQuantizer
assert AUTO_QUANTIZATION_CONFIG_MAPPING["ditq"] is DitqConfig
from transformers.quantizers import auto
from ditq.checkpoint import text_encoder
assert auto.AUTO_QUANTIZER_MAPPING["ditq"] is text_encoder.DitqQuantizer
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["ditq"] is text_encoder.DitqConfig
assert not [f for f in sys.meta_path if type(f).__name__ == "_ImportHook"]
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import ditq",
        "import diffusers.quantizers.auto\nimport ditq",
        "import diffusers\nimport ditq\nimport ditq.api",
        "import transformers.quantizers.auto\nimport ditq",
        "import ditq\nimport transformers.quantizers.auto\nassert 'diffusers' not in sys.modules",
    ],
    ids=["ditq-first", "diffusers-first", "lazy-diffusers-first", "transformers-first", "transformers-alone"],
)
def test_backend_is_registered_in_any_order_of_imports(imports: str) -> None:
    code = CHECK.format(imports=imports)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------- modules that diffusers keeps in float32


@pytest.fixture(scope="module")
def plain_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wan")
    tiny_model("wan").save_pretrained(path)
    return path


WAN = diffusers.WanTransformer3DModel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["memory", "cast", "loading"])
@pytest.mark.parametrize("keep", [True, False], ids=["float-embedder", "quantized-embedder"])
def test_float32_modules_stay_so(how: str, dtype: torch.dtype, keep: bool, plain_wan: Path, tmp_path: Path) -> None:
    overrides = [] if keep else ["keep=[]"]
    if how == "loading":
        config = ditq.DitqConfig(recipe="rtn-w8a8", overrides=overrides)
        model = WAN.from_pretrained(plain_wan, torch_dtype=dtype, quantization_config=config)
    else:
        model = (
            WAN.from_pretrained(plain_wan, torch_dtype=dtype)
            if how == "memory"
            else tiny_model("wan").to(dtype).eval()
        )
        ditq.quantize(model, "rtn-w8a8", overrides=overrides)
    assert model.hf_quantizer.plan.storage_dtype == str(dtype).removeprefix("torch.")
    for name, p in model.named_parameters():
        kept = set(name.split(".")) & set(WAN._keep_in_fp32_modules)
        assert p.dtype == (torch.float32 if kept else dtype), name
    model.save_pretrained(tmp_path)
    loaded = WAN.from_pretrained(tmp_path, torch_dtype=dtype)
    assert identical(loaded.state_dict(), model.state_dict())
    assert torch.equal(run(loaded, "wan"), run(model, "wan"))


def test_float32_modules_of_a_float32_model_are_not_rounded(plain_wan: Path, tmp_path: Path) -> None:
    model = WAN.from_pretrained(plain_wan)
    before = model.scale_shift_table.detach().clone()
    ditq.quantize(model, "rtn-w8a8")
    model.save_pretrained(tmp_path)
    loaded = WAN.from_pretrained(tmp_path)
    assert torch.equal(loaded.scale_shift_table, before)
    assert tensors_of(tmp_path)["scale_shift_table"].dtype == torch.float32
    assert torch.equal(run(loaded, "wan"), run(model, "wan"))


# ---------------------------------------------------------------------------- casts inside of wrappers

OLD = Path(__file__).resolve().parent.parent / "data" / "v0.1" / "pixart-folded"


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
@pytest.mark.parametrize("kind", ["new", "folded", "timesteps"])
def test_cast_inside_of_a_wrapper(kind: str, cast: str, tmp_path: Path) -> None:
    if kind == "folded":
        model: Any = diffusers.PixArtTransformer2DModel.from_pretrained(OLD)
    else:
        model = quantized("dit-timesteps-w4a8" if kind == "timesteps" else "pixart-smoothquant-w4a8")[0]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    getattr(nn.ModuleDict({"t": model}), cast)()
    model.save_pretrained(tmp_path)
    dtype = getattr(torch, {"half": "float16"}.get(cast, cast))
    loaded = type(model).from_pretrained(tmp_path, torch_dtype=dtype)
    assert identical(loaded.state_dict(), model.state_dict())
    for name, buffer in loaded.named_buffers():
        if name.endswith(("scale", "zero_point", "ditq_modulation")):
            assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name])


# ------------------------------------------------------------------------------------ copies and counts


@pytest.mark.parametrize("kind", ["folded", *CASES])
def test_pickled_and_copied_models_compute_the_same(kind: str) -> None:
    if kind == "folded":
        model, architecture = diffusers.PixArtTransformer2DModel.from_pretrained(OLD), "pixart"
    else:
        model, _, architecture = quantized(kind)
    expected = run(model, architecture)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(run(other, architecture), expected)
        assert other.config.quantization_config.plan == model.hf_quantizer.plan
        assert identical(other.state_dict(), model.state_dict())


def test_num_parameters_are_those_of_the_float_model(case: str) -> None:
    architecture = CASES[case][0]
    plain, (model, _, _) = tiny_model(architecture), quantized(case)
    assert model.num_parameters() == plain.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == plain.num_parameters(exclude_embeddings=True)
    tensors = [*model.parameters(), *model.buffers()]
    assert model.get_memory_footprint() == sum(t.numel() * t.element_size() for t in tensors)
    model.dequantize()
    assert model.num_parameters() == plain.num_parameters()


# -------------------------------------------------------------------------------- ways to save and load


@pytest.mark.parametrize("more", [{"device_map": "cpu"}, {"disable_mmap": True}, {"torch_dtype": torch.float32}])
def test_ways_to_load(more: dict[str, Any], tmp_path: Path) -> None:
    model, _, architecture = quantized("dit-smoothquant-w8a8")
    model.save_pretrained(tmp_path, variant="fp16")
    loaded = type(model).from_pretrained(tmp_path, variant="fp16", **more)
    assert torch.equal(run(loaded, architecture), run(model, architecture))


def test_state_dict_of_one_model_loads_into_another() -> None:
    first, second = (ditq.quantize(tiny_model("dit", seed), "rtn-w8a8").model for seed in (0, 1))
    second.load_state_dict(first.state_dict())
    assert torch.equal(run(second, "dit"), run(first, "dit"))


def test_low_cpu_mem_usage_is_refused_by_diffusers(tmp_path: Path) -> None:
    model, _, _ = quantized("dit-smoothquant-w8a8")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        type(model).from_pretrained(tmp_path, low_cpu_mem_usage=False)


def test_dtypes_by_component(tmp_path: Path) -> None:
    pipe = tiny_pixart()
    ditq.quantize(pipe, "rtn-w8a8")
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, torch_dtype={"transformer": torch.bfloat16})
    assert loaded.transformer.dtype == torch.bfloat16
    assert loaded.vae.dtype == torch.float32


def test_a_model_from_a_quantized_config_is_not_quantized_and_says_so(tmp_path: Path) -> None:
    model, _, _ = quantized("dit-smoothquant-w8a8")
    plain = type(model).from_config(model.config)
    assert not getattr(plain, "is_quantized", False)
    plain.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="remove quantization_config"):
        type(model).from_pretrained(tmp_path)
