"""Folders that ditq 0.1 wrote (``tests/data/v0.1``, by ``make_v0_1.py``): today's code reads them, bit for bit."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from torch import nn

import ditq
from ditq.checkpoint.folder import read_plan
from ditq.errors import UsageError
from ditq.layers import QuantizedLinear, TimestepLinear
from ditq.numerics import sqnr_db

DATA = Path(__file__).resolve().parent.parent / "data" / "v0.1"
PIXART = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "pixart-folded": (diffusers.PixArtTransformer2DModel, PIXART),
    "pixart-static": (diffusers.PixArtTransformer2DModel, PIXART),
    "dit-groups": (diffusers.DiTTransformer2DModel, {}),
    "dit-timesteps": (diffusers.DiTTransformer2DModel, {}),
}
PIPELINES = {
    "opensora-16-bit": ("OpenSoraPipeline", {"prompt": "a red cat"}),
    "latte-quantized": ("LatteClassPipeline", {"class_labels": 3}),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As they were computed: products of floats add up in another order with more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stored(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def inputs(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("input."): x for name, x in tensors.items() if name.startswith("input.")}


def check_output(name: str, output: torch.Tensor) -> None:
    """Equal bits where torch and the instruction set are those of then; elsewhere products of floats may differ."""
    tensors, where = stored(DATA / name / "expected.safetensors")
    same = where["torch"] == torch.__version__ and where["cpu"] == torch.backends.cpu.get_cpu_capability()
    if same:
        assert torch.equal(output, tensors["output"])
    assert sqnr_db(tensors["output"].float(), output.float()) > 25


def check_tensors(folder: Path, model: nn.Module) -> None:
    """What the model holds is what the file holds: integers and scales as they are, 16-bit parameters exactly."""
    tensors, _ = stored(folder / "diffusion_pytorch_model.safetensors")
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(state[key].to(tensor.dtype), tensor), key
        if tensor.dtype in (torch.uint8, torch.int8):
            assert state[key].dtype == tensor.dtype


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_model_of_0_1_computes_what_it_computed(name: str) -> None:
    kind, more = MODELS[name]
    model = kind.from_pretrained(DATA / name)
    check_tensors(DATA / name, model)
    assert any(isinstance(m, TimestepLinear if name == "dit-timesteps" else QuantizedLinear) for m in model.modules())
    tensors, _ = stored(DATA / name / "expected.safetensors")
    check_output(name, model(**inputs(tensors), **more, return_dict=False)[0])


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("load", [ditq.load, diffusers.DiffusionPipeline.from_pretrained], ids=["ditq", "diffusers"])
@torch.no_grad()
def test_pipeline_of_our_own_classes_names_modules_of_0_1(load: Any, name: str) -> None:
    class_name, condition = PIPELINES[name]
    index = json.loads((DATA / name / "model_index.json").read_text())
    assert index["transformer"][0].startswith("ditq.architectures.")  # which is no module any more
    if load is not ditq.load:  # plain diffusers knows the transformer's module only, so the class has to be said
        from ditq.models import latte_class, opensora

        load = (opensora.OpenSoraPipeline if "opensora" in name else latte_class.LatteClassPipeline).from_pretrained
    pipe = load(DATA / name)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == class_name
    assert (read_plan(DATA / name) is None) == (name == "opensora-16-bit")
    check_tensors(DATA / name / "transformer", pipe.transformer)
    generator = torch.Generator().manual_seed(5)
    found = pipe(**condition, num_inference_steps=2, generator=generator, output_type="latent").frames
    check_output(name, found)


@torch.no_grad()
def test_exported_folder_of_0_1_runs() -> None:
    pytest.importorskip("openvino")
    from ditq.openvino import runtime

    if (reason := runtime.why_unavailable()) is not None:
        pytest.skip(reason)
    model = diffusers.DiTTransformer2DModel.from_pretrained(DATA / "dit-exported")
    assert type(model.transformer_blocks[0]).__name__ == "CompiledStack"
    tensors, _ = stored(DATA / "dit-exported" / "expected.safetensors")
    output = model(**inputs(tensors), return_dict=False)[0]
    # OpenVINO compiles the graph anew for this CPU: float32 sums in another order, and a code at a rounding boundary
    # that turns. One code of 8 bits in a hundred is 40 dB away.
    assert sqnr_db(tensors["output"], output) > 40
    with ditq.use_engine("torch"):
        plain = diffusers.DiTTransformer2DModel.from_pretrained(DATA / "dit-exported")
    check_tensors(DATA / "dit-exported", plain)
    assert sqnr_db(tensors["output"], plain(**inputs(tensors), return_dict=False)[0]) > 30
    assert model.num_parameters() == type(model).from_config(model.config).num_parameters()
    assert torch.equal(copy.deepcopy(model)(**inputs(tensors), return_dict=False)[0], output)
    with pytest.raises(UsageError, match="cannot be pickled.*use_engine"):
        pickle.dumps(model)
