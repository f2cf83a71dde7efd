"""What diffusers promises for a quantized model, for every architecture file and each kind of recipe."""

from __future__ import annotations

import copy
import functools
import io
import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from helpers import example_inputs, run, tiny_model
from offloading import send_away
from torch import Tensor, nn

import ditq
from ditq import architectures
from ditq.errors import UsageError
from ditq.layers import QuantizedLinear

RECIPES = {
    "plain": ("rtn-w8a8", ()),
    "smoothed": ("smoothquant-w8a8", ()),
    "rotated": ("quarot-w4a8", ()),
}
FOLDED = Path(__file__).resolve().parent.parent / "data" / "v0.1" / "pixart-folded"
CPU = torch.device("cpu")


def float_model(architecture: str) -> Any:
    return tiny_model(architecture)


@functools.cache
def made(architecture: str, recipe: str) -> Any:
    if recipe == "folded":
        return diffusers.PixArtTransformer2DModel.from_pretrained(FOLDED).eval()
    name, overrides = RECIPES[recipe]
    model = float_model(architecture)

    def calibration(model: nn.Module) -> None:
        run(model, architecture)

    ditq.quantize(model, name, overrides=overrides, calibrate_with=calibration if recipe == "smoothed" else None)
    return model


@functools.cache
def saved(architecture: str, recipe: str, folder: Path) -> Path:
    path = folder / f"{architecture}-{recipe}"
    made(architecture, recipe).save_pretrained(path)
    return path


@functools.cache
def expected(architecture: str, recipe: str) -> Tensor:
    return run(copy.deepcopy(made(architecture, recipe)), architecture)


def tensors_equal(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)


def quantized_layers(model: nn.Module) -> list[QuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


Offload = Callable[[Any, Path], object]


def disk(model: Any, folder: Path) -> None:
    accelerate.disk_offload(model, folder, execution_device=CPU, offload_buffers=True)


def group(level: str, to_disk: bool) -> Offload:
    def offload(model: Any, folder: Path) -> None:
        more: dict[str, Any] = {"num_blocks_per_group": 1} if level == "block_level" else {}
        model.enable_group_offload(
            CPU, CPU, offload_type=level, offload_to_disk_path=str(folder) if to_disk else None, **more
        )

    return offload


OFFLOADS: dict[str, Offload] = {
    "accelerate": lambda m, _: accelerate.cpu_offload(m, CPU, offload_buffers=True),
    "accelerate without buffers": lambda m, _: accelerate.cpu_offload(m, CPU),
    "disk": disk,
    "with hook": lambda m, _: accelerate.cpu_offload_with_hook(m, CPU),
    "blocks": group("block_level", False),
    "blocks on disk": group("block_level", True),
    "leaves": group("leaf_level", False),
    "leaves on disk": group("leaf_level", True),
    "blocks away": lambda m, _: send_away(m, "block"),
    "leaves away": lambda m, _: send_away(m, "leaf"),
}


RARE = ("accelerate without buffers", "with hook", "leaves on disk", "disk")  # the others go the same ways


def fails(model: nn.Module, offload: Offload, architecture: str, folder: Path) -> Exception | None:
    """The error of the model offloaded this way; None if its output is as without."""
    before = run(model, architecture)
    folder.mkdir()
    try:
        offload(model, folder)
        for _ in range(2):
            assert torch.equal(run(model, architecture), before)
    except Exception as error:
        return error
    return None


class ModelContract:
    """The checks; a subclass gives ``architecture``, ``recipe`` and ``folder``."""

    architecture: str
    recipe: str
    folder: Path

    def model(self) -> Any:
        return copy.deepcopy(made(self.architecture, self.recipe))

    def expected(self) -> Tensor:
        return expected(self.architecture, self.recipe)

    def run(self, model: Any, **changes: Any) -> Tensor:
        return run(model, self.architecture, **changes)

    def float_model(self) -> Any:
        if self.recipe == "folded":
            return type(self.model()).from_config({**self.model().config, "quantization_config": None}).eval()
        return float_model(self.architecture)

    # ------------------------------------------------------------------------------- memory, dtypes

    def test_memory_falls(self) -> None:
        model, plain = self.model(), self.float_model().bfloat16()
        assert model.to("cpu").get_memory_footprint() < plain.get_memory_footprint() * 2
        stored = {t.data_ptr(): t.nbytes for layer in quantized_layers(model) for t in layer.state_dict().values()}
        names = [n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]
        assert sum(stored.values()) < sum(plain.get_submodule(n).weight.nbytes for n in names)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_loads_in_a_dtype_with_scales_in_float32(self, dtype: torch.dtype) -> None:
        model = type(self.model()).from_pretrained(
            saved(self.architecture, self.recipe, self.folder), torch_dtype=dtype
        )
        keep = model._keep_in_fp32_modules or []
        for name, p in model.named_parameters():
            if not any(part in name.split(".") for part in keep):
                assert p.dtype == dtype, name
        before = dict(self.model().named_buffers())
        for layer in quantized_layers(model):
            assert layer.weight.dtype == dtype or keep
        for name, buffer in model.named_buffers():
            if name.endswith(("scale", "zero_point", "qweight", "ditq_modulation")):
                assert buffer.dtype == before[name].dtype
                assert torch.equal(buffer, before[name])
        output = self.run(model)
        assert output.isfinite().all()
        if dtype == torch.float32:
            assert torch.equal(output, self.expected())

    def test_modules_kept_in_float32_stay(self, request: pytest.FixtureRequest) -> None:
        model = self.model()
        keep = model._keep_in_fp32_modules or []
        names = [n for n, _ in model.named_parameters() if any(part in n.split(".") for part in keep)]
        if not names:
            pytest.skip("the class keeps none")
        folder = saved(self.architecture, self.recipe, self.folder)
        loaded = type(model).from_pretrained(folder, torch_dtype=torch.bfloat16)
        assert {loaded.get_parameter(n).dtype for n in names} == {torch.float32}

    def test_casting_is_refused_and_changes_nothing(self) -> None:
        model = self.model()
        for cast in (lambda: model.to(torch.bfloat16), model.half, model.float):
            with pytest.raises(ValueError, match="quantized"):
                cast()
        assert tensors_equal(model, self.model())

    def test_module_cast_keeps_scales(self) -> None:
        model = self.model()
        nn.Module.to(model, torch.bfloat16)  # what accelerate and a parent module do
        before = dict(self.model().named_buffers())
        for layer_name, layer in model.named_modules():
            if isinstance(layer, QuantizedLinear):
                assert layer.weight.dtype == torch.bfloat16
                for name, buffer in layer.named_buffers(layer_name):
                    assert torch.equal(buffer, before[name])
                    assert buffer.dtype == before[name].dtype
        assert self.run(model).dtype == torch.bfloat16

    def test_parameters_count_what_is_quantized(self) -> None:
        assert self.model().num_parameters() == self.float_model().num_parameters()

    # ------------------------------------------------------------------------------- saving, copies

    @pytest.mark.parametrize("sharded", [False, True], ids=["one", "shards"])
    def test_saved_and_loaded_is_identical(self, sharded: bool, tmp_path: Path) -> None:
        model = self.model()
        model.save_pretrained(tmp_path, **({"max_shard_size": "60KB"} if sharded else {}))
        assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == sharded
        loaded = type(model).from_pretrained(tmp_path)
        assert tensors_equal(model, loaded)
        assert torch.equal(self.run(loaded), self.expected())

    def test_kept_layers_stay_float(self) -> None:
        model = self.model()
        kept = [layer.name for layer in model.hf_quantizer.plan.kept]
        assert kept
        assert {type(model.get_submodule(name)) for name in kept} == {nn.Linear}
        loaded = type(model).from_pretrained(saved(self.architecture, self.recipe, self.folder))
        assert {type(loaded.get_submodule(name)) for name in kept} == {nn.Linear}

    @pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "blocks"], ids=str)
    def test_device_map(self, device_map: Any) -> None:
        kind = type(self.model())
        folder = saved(self.architecture, self.recipe, self.folder)
        if device_map == "blocks":
            device_map = {name.partition(".")[0]: "cpu" for name in self.model().state_dict()}
        loaded = kind.from_pretrained(folder, device_map=device_map)
        assert torch.equal(self.run(loaded), self.expected())

    @pytest.mark.parametrize("way", ["deepcopy", "pickle", "state dict"])
    def test_copies_are_identical(self, way: str) -> None:
        model = self.model()
        if way == "deepcopy":
            copied = copy.deepcopy(model)
        elif way == "pickle":
            copied = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model.state_dict(), file)
            file.seek(0)
            copied = self.model()
            with torch.no_grad():
                for tensor in copied.state_dict().values():
                    tensor.zero_()
            copied.load_state_dict(torch.load(file, weights_only=True))
        assert tensors_equal(model, copied)
        assert torch.equal(self.run(copied), self.expected())
        copied.to("meta")
        assert torch.equal(self.run(model), self.expected())

    # ---------------------------------------------------------------------------------- offloading

    @pytest.mark.parametrize("way", [pytest.param(w, marks=[pytest.mark.slow] * (w in RARE)) for w in OFFLOADS])
    def test_offloaded_output_is_identical(self, way: str, tmp_path: Path) -> None:
        error = fails(self.model(), OFFLOADS[way], self.architecture, tmp_path / "quantized")
        if error is not None and fails(self.float_model(), OFFLOADS[way], self.architecture, tmp_path / "float"):
            return  # diffusers cannot do it for the float model either
        if error is not None:
            raise error

    def test_layerwise_casting(self) -> None:
        model = self.model()
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        scales = {b.dtype for m in quantized_layers(model) for n, b in m.named_buffers() if n.endswith("_scale")}
        assert scales == {torch.float32}
        inputs = example_inputs(self.architecture)  # in float32, whatever the parameters are stored in
        with torch.no_grad():
            first, second = (model(**inputs, return_dict=False)[0] for _ in range(2))
        assert torch.equal(first, second)
        assert first.isfinite().all()
        assert (first - self.expected()).norm() < 0.5 * self.expected().norm()

    # -------------------------------------------------------------------------------------- running

    def test_inference_mode_is_identical(self) -> None:
        model = self.model()
        with torch.inference_mode():
            assert torch.equal(self.run(model), self.expected())
        assert torch.equal(self.run(model), self.expected())

    def test_autocast(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            output = self.run(self.model()).float()
        assert output.isfinite().all()
        assert (output - self.expected()).norm() < 0.5 * self.expected().norm()

    def test_threads_do_not_mix_their_inputs(self) -> None:
        model = self.model()
        seeds = range(4)
        alone = [self.run(model, seed=seed) for seed in seeds]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda seed: self.run(model, seed=seed), list(seeds) * 2))
        assert all(torch.equal(x, alone[i % 4]) for i, x in enumerate(together))

    @pytest.mark.slow
    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
    def test_compiles_to_one_graph(self, dynamic: bool) -> None:
        def compiled(model: nn.Module) -> Tensor:
            torch._dynamo.reset()
            return self.run(torch.compile(model, backend="eager", fullgraph=True, dynamic=dynamic))

        try:
            output = compiled(self.model())
        except Exception as error:
            try:
                compiled(self.float_model())
            except Exception:
                return  # nor does the float model
            raise error
        assert (output - self.expected()).norm() < 1e-2 * self.expected().norm()

    @pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
    def test_gradients_pass_through(self, checkpointing: bool) -> None:
        model = self.model().train()
        for p in model.parameters():
            p.requires_grad_(False)
        if checkpointing:
            if not model._supports_gradient_checkpointing:
                pytest.skip("the class does not support it")
            model.enable_gradient_checkpointing()
        layer = quantized_layers(model)[0]
        extra = nn.Parameter(torch.zeros(layer.out_features))
        layer.register_forward_hook(lambda _, __, output: output + extra)
        output = model(**example_inputs(self.architecture), return_dict=False)[0]
        output.square().mean().backward()
        assert extra.grad is not None
        assert extra.grad.isfinite().all()
        assert extra.grad.abs().max() > 0

    # ------------------------------------------------------------------------------------- adapters

    def test_adapter_acts_as_on_the_float_model_and_leaves_no_trace(self) -> None:
        peft = pytest.importorskip("peft")
        model, plain = self.model(), self.float_model()
        names = [n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]
        config = peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False)
        own, floats = self.expected(), self.run(plain)
        outputs = []
        for one in (model, plain):
            torch.manual_seed(0)
            peft.inject_adapter_in_model(config, one)
            outputs.append(self.run(one))
        error = (own - floats).norm() / floats.norm()
        assert (outputs[1] - floats).norm() > 1e-2 * floats.norm()
        if self.recipe != "folded":  # whose layers get other inputs
            assert (outputs[0] - outputs[1]).norm() < (1.5 * error + 0.02) * outputs[1].norm()
        tuned = [(n, m) for n, m in model.named_modules() if hasattr(m, "lora_A")]
        assert len(tuned) == len(names)
        with pytest.raises(UsageError, match="ditq.fuse_lora"):
            tuned[0][1].merge()
        assert torch.equal(self.run(model), outputs[0])
        for name, layer in tuned:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
        assert tensors_equal(model, self.model())
        assert torch.equal(self.run(model), own)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contract")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("architecture", architectures.names())
class TestEveryArchitecture(ModelContract):
    @pytest.fixture(autouse=True)
    def _case(self, architecture: str, recipe: str, folder: Path) -> None:
        self.architecture, self.recipe, self.folder = architecture, recipe, folder


class TestFoldedCheckpoint(ModelContract):
    @pytest.fixture(autouse=True)
    def _case(self, folder: Path) -> None:
        self.architecture, self.recipe, self.folder = "pixart", "folded", folder


def test_smoothing_is_stored_in_the_layers() -> None:
    assert any("smooth_scale" in layer._buffers for layer in quantized_layers(made("pixart", "smoothed")))
    assert "ditq_modulation" in json.dumps(list(made("pixart", "folded").state_dict()))
