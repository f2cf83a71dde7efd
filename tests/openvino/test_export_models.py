"""Exported transformers: they compute what the torch engine computes, in integers, in any size, from a folder too."""

from __future__ import annotations

import copy
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    CONDITIONS,
    PIPELINES,
    draw,
    example_inputs,
    layer_plan,
    run,
    tiny_model,
    tiny_statistics,
    token_format,
    weight_format,
)
from torch import Tensor, nn

from ditq import architectures
from ditq.architectures import Architecture
from ditq.conversion import quantize_model
from ditq.errors import CheckpointError, DitqError, UsageError
from ditq.layers import QuantizedLinear
from ditq.numerics import relative_error
from ditq.openvino import runtime
from ditq.recipe import load as load_recipe

if (reason := runtime.why_unavailable()) is not None:
    pytest.skip(reason, allow_module_level=True)

import numpy as np
import openvino.opset13 as op

from ditq.openvino import convert
from ditq.openvino.compiled import CompiledStack
from ditq.openvino.export import compile_in_place, export, load
from ditq.openvino.graph import Builder
from ditq.openvino.manifest import FILE, Manifest
from ditq.sampling import first_call

# Mostly the engines agree to 1e-6. Where one code falls on the other side of a rounding boundary, all that follows
# is rounded differently; rounding itself costs these models 1e-2. The export compares without it, to 1e-4.
CLOSE = 6e-3
# Both engines then share the scales of every layer: K is 128 and 512 in the tiny models, so G is 128.
SAME_GROUPS = ("activations.granularity=group", "activations.group_size=128")

GROUPS = ("weights.granularity=group", "weights.group_size=64")


def quantized(
    name: str,
    recipe: str = "viditq-w4a8",
    overrides: tuple[str, ...] = SAME_GROUPS,
    dtype: torch.dtype = torch.float32,
    blocks: int = 2,
) -> nn.Module:
    model = tiny_model(name, num_layers=blocks)
    arch = architectures.load(name)
    wanted = load_recipe(recipe).override(list(overrides))
    if dtype != torch.float32:
        model = model.to(dtype)
    statistics = tiny_statistics(model, name) if wanted.needs_calibration else None
    quantize_model(model, arch, wanted, statistics)
    return model


def load_into(model: nn.Module, folder: Path) -> nn.Module:
    load(folder, model)
    return model


def exported(model: nn.Module, name: str, folder: Path, **options: Any) -> nn.Module:
    """A copy of ``model`` that OpenVINO executes."""
    call = example_inputs(name, dtype=next(model.parameters()).dtype)
    export(model, architectures.load(name), call, folder, **options)
    loaded = copy.deepcopy(model)
    load(folder, loaded, **options)
    return loaded


def sizes(name: str) -> list[dict[str, Any]]:
    """Inputs of sizes that no example had."""
    torch.manual_seed(1)
    out: list[dict[str, Any]] = []
    for batch, height, width, text in ((1, 8, 8, 1), (3, 16, 16, 9), (2, 4, 20, 31)):
        call: dict[str, Any] = {"timestep": torch.full((batch,), 400)}
        if name == "pixart":
            mask = torch.ones(batch, text)
            mask[0, text // 2 + 1 :] = 0
            call |= {"encoder_hidden_states": torch.randn(batch, text, 64), "encoder_attention_mask": mask}
        else:
            call["class_labels"] = torch.arange(batch)
            width = height  # the class itself knows square images only
        out.append({**call, "hidden_states": torch.randn(batch, 4, height, width)})
    return out


@pytest.fixture(scope="module")
def torch_model(name: str) -> nn.Module:
    return quantized(name)


@pytest.fixture(scope="module")
def folder(name: str, torch_model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(name)
    export(torch_model, architectures.load(name), example_inputs(name), path)
    return path


@pytest.fixture
def model(torch_model: nn.Module, folder: Path) -> nn.Module:
    model = copy.deepcopy(torch_model)
    load(folder, model)
    return model


# -------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("name", "recipe", "overrides"),
    [
        ("pixart", "rtn-w8a8", ()),
        ("pixart", "viditq-w8a8", ()),
        ("pixart", "viditq-w8a8", SAME_GROUPS),
        ("pixart", "rtn-static-w8a8", ()),
        ("dit", "smoothquant-w8a8", ()),
        ("dit", "quarot-w4a8", SAME_GROUPS),
        ("dit", "rtn-w6a6", ()),
        ("dit", "viditq-w4a4", ()),
        ("dit", "rtn-w8a8", ("activations.symmetric=false", "weights.symmetric=true")),
    ],
    ids=str,
)
def test_computes_what_the_torch_engine_computes(
    name: str, recipe: str, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    model = quantized(name, recipe, overrides)
    # With fewer bits one code on the other side is a larger step.
    limit = CLOSE * {"a6": 4, "a4": 16}.get(recipe[-2:], 1)
    assert relative_error(run(model, name), run(exported(model, name, tmp_path), name)) < limit


def test_any_batch_resolution_and_text_length(name: str, torch_model: nn.Module, model: nn.Module) -> None:
    for call in sizes(name):
        expected, y = run(torch_model, name, **call), run(model, name, **call)
        assert y.shape == expected.shape
        assert relative_error(expected, y) < CLOSE


@pytest.mark.parametrize(
    "overrides",
    [
        ("balance.choose=always",),
        ("balance.choose=always", "balance.block=32"),
        ("weights.symmetric=true", "weights.bits=3"),
        ("weights.granularity=group", "weights.group_size=64", "activations.group_size=64"),
        ("weights.bits=2", "weights.granularity=group", "weights.group_size=16", "activations.group_size=16"),
    ],
    ids=" ".join,
)
def test_balances_and_weight_formats(overrides: tuple[str, ...], tmp_path: Path) -> None:
    model = quantized("pixart", overrides=(*SAME_GROUPS, *overrides), blocks=1)
    assert relative_error(run(model, "pixart"), run(exported(model, "pixart", tmp_path), "pixart")) < CLOSE


def test_mixed_plan(tmp_path: Path) -> None:
    eight = "{bits: 8, granularity: channel}"
    tokens = "{bits: 8, granularity: group, group_size: 128, dynamic: true}"
    model = quantized(
        "dit", "rtn-w4a8",
        (*SAME_GROUPS, "keep_layers=['0.attn1.to_k']", "keep=[embedder, final]",
         f"roles.ffn.down={{weights: {eight}, activations: {tokens}}}",
         f"roles.modulation={{weights: {eight}}}", f"roles.self_attn.out={{weights: {eight}}}"),
    )  # fmt: skip
    report = export(model, architectures.load("dit"), example_inputs("dit"), tmp_path)
    found = {layer.name.removeprefix("transformer_blocks."): layer for layer in report.layers}
    how = {name: (layer.storage, report.executions[layer.name]) for name, layer in found.items()}
    assert how["0.attn1.to_q"] == ("u4", "int8")
    assert how["0.ff.net.2"] == ("i8", "int8")
    assert how["0.attn1.to_k"] == (None, "float")
    assert how["1.attn1.to_k"] == ("u4", "int8")
    assert how["1.attn1.to_out.0"] == how["1.norm1.linear"] == ("u8", "float")
    assert found["1.norm1.linear"].reason == "16-bit activations by the plan"
    text = report.summary()
    assert "9 of 18 linear layers of the blocks multiply 8-bit integers (2 with i8 weights, 7 with u4 weights)" in text
    assert "In floats (16-bit activations by the plan): transformer_blocks.0.norm1.linear" in text
    loaded = load_into(copy.deepcopy(model), tmp_path)
    assert relative_error(run(model, "dit"), run(loaded, "dit")) < CLOSE


def test_every_layer_of_a_plan_is_executed_in_integers(name: str, torch_model: nn.Module, folder: Path) -> None:
    report = load(folder, copy.deepcopy(torch_model))
    planned = {n for n, m in torch_model.named_modules() if isinstance(m, QuantizedLinear)}
    assert planned == {n for n, how in report.executions.items() if how == "int8"}
    assert len(planned) == {"pixart": 20, "dit": 12}[name]
    assert report.group_size == 128


def test_16_bit_model_keeps_its_dtype(tmp_path: Path) -> None:
    model = quantized("pixart", dtype=torch.bfloat16, blocks=1)
    before = {n: p.dtype for n, p in model.named_parameters()}
    loaded = exported(model, "pixart", tmp_path)
    assert {n: p.dtype for n, p in model.named_parameters()} == before
    assert loaded.dtype == torch.bfloat16
    y = run(loaded, "pixart")
    assert y.dtype == torch.bfloat16
    # The blocks compute in float32 inside, the torch model rounds after every operation.
    assert relative_error(run(model.float(), "pixart"), y) < 0.02


def test_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = quantized("pixart")
    expected, modules = run(model, "pixart"), {n: type(m) for n, m in model.named_modules()}
    state = {n: t.clone() for n, t in model.state_dict().items()}
    model.train()
    export(model, architectures.load("pixart"), example_inputs("pixart"), tmp_path)
    assert model.training
    model.eval()
    assert {n: type(m) for n, m in model.named_modules()} == modules
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in state.items())
    assert torch.equal(run(model, "pixart"), expected)


# ----------------------------------------------------------------------------------- saved and loaded


def test_loads_into_a_model_without_block_weights(name: str, torch_model: nn.Module, folder: Path) -> None:
    expected = run(load_into(copy.deepcopy(torch_model), folder), name)
    bare = copy.deepcopy(torch_model)
    kept = Manifest.read(folder).segments[0].kept
    for path, module in list(bare.transformer_blocks.named_modules()):
        if path.partition(".")[2] not in kept and not any(path.partition(".")[2].startswith(f"{k}.") for k in kept):
            for key in list(module._parameters):
                if module._parameters[key] is not None:
                    module._parameters[key] = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
    assert torch.equal(run(load_into(bare, folder), name), expected)


def test_without_a_folder_it_is_bit_equal(name: str, torch_model: nn.Module, model: nn.Module) -> None:
    here = copy.deepcopy(torch_model)
    report = compile_in_place(here, architectures.load(name), example_inputs(name))
    assert torch.equal(run(here, name), run(model, name))
    assert "int8" in report.executions.values()


def test_weights_of_the_blocks_are_gone_and_the_rest_keeps_its_names(
    name: str, torch_model: nn.Module, model: nn.Module
) -> None:
    left = set(model.state_dict())
    assert left <= set(torch_model.state_dict())
    blocks = {n for n in left if n.startswith("transformer_blocks.")}
    assert all(n.startswith("transformer_blocks.0.norm1.emb.") for n in blocks)
    assert bool(blocks) == (name == "dit")
    assert len(model.transformer_blocks) == 1
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())


def test_properties_reach_openvino(torch_model: nn.Module, folder: Path, tmp_path: Path) -> None:
    model = copy.deepcopy(torch_model)
    load(folder, model, properties={"INFERENCE_NUM_THREADS": 1, "CACHE_DIR": str(tmp_path)})
    compiled = model.transformer_blocks[0].program.compiled
    assert int(compiled.get_property("INFERENCE_NUM_THREADS")) == 1
    assert int(compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")) == 128
    assert list(tmp_path.iterdir())
    again = copy.deepcopy(torch_model)
    load(folder, again, properties={"INFERENCE_NUM_THREADS": 1, "CACHE_DIR": str(tmp_path)})
    for_name = "pixart" if hasattr(model, "caption_projection") else "dit"
    assert torch.equal(run(model, for_name), run(again, for_name))
    with pytest.raises(UsageError, match="cannot compile"):
        load(folder, copy.deepcopy(torch_model), properties={"INFERENCE_NUM_THREADS": "many"})


def damaged(folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of an exported folder with another manifest."""
    copied = Path(shutil.copytree(folder, tmp_path / "damaged"))
    data = json.loads((copied / FILE).read_text())
    change(data)
    (copied / FILE).write_text(json.dumps(data))
    return copied


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format_version=3), "format_version"),
        (lambda d: d.update(surprise=1), "surprise"),
        (lambda d: d.pop("group_size"), "group_size"),
        (lambda d: d.update(group_size=100), "group_size"),
        (lambda d: d.update(segments=[]), "segments"),
        (lambda d: d["segments"].append(d["segments"][0]), "the same place or file"),
        (lambda d: d["segments"][0].update(file="../other.xml"), "file"),
        (lambda d: d["segments"][0].update(digests={}), "digests"),
        (lambda d: d["segments"][0]["digests"].popitem(), "digests"),
        (lambda d: d["segments"][0].pop("digests"), "digests"),
        (lambda d: d["segments"][0].update(outputs=2), "inputs and outputs"),
        (lambda d: d["segments"][0]["inputs"].pop(), "inputs and outputs"),
        (lambda d: d["segments"][0]["inputs"][0].update(shape=[None, -1]), "shape"),
        (lambda d: d["segments"][0]["inputs"][0].update(dtype="float16"), "dtype"),
        (lambda d: d["segments"][0].update(parameters=["x"]), "another version of diffusers"),
        (lambda d: d["segments"][0].update(place="blocks"), "does not have"),
        (lambda d: d["segments"][0].update(kept=["norm1.nothing"]), "does not have"),
        (lambda d: d["segments"][0]["layers"][0].update(storage="i5"), "storage"),
        (lambda d: d["segments"][0]["layers"][0].update(columns=0), "columns"),
    ],
)
def test_wrong_manifests_are_refused(
    change: Callable[[dict[str, Any]], Any], message: str, torch_model: nn.Module, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(damaged(folder, tmp_path, change), copy.deepcopy(torch_model))


@pytest.mark.parametrize("file", ["transformer_blocks.xml", "transformer_blocks.bin"])
def test_changed_and_missing_files_are_refused(
    file: str, torch_model: nn.Module, folder: Path, tmp_path: Path
) -> None:
    copied = damaged(folder, tmp_path, lambda d: None)
    data = bytearray((copied / file).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / file).write_bytes(data)
    model = copy.deepcopy(torch_model)
    with pytest.raises(CheckpointError, match=f"{file} was changed"):
        load(copied, model)
    (copied / file).unlink()
    with pytest.raises(CheckpointError, match=f"does not contain {file}"):
        load(copied, model)
    (copied / FILE).unlink()
    with pytest.raises(CheckpointError, match="holds no exported model"):
        load(copied, model)
    assert not any(isinstance(m, CompiledStack) for m in model.modules())


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("rtn-static-w8a8", GROUPS, r"transformer_blocks.0.attn1.to_q, .* and 18 more with weights int8 .*static"),
        ("rtn-w4a4", GROUPS, "activations int4 sym/token, dynamic: .* to 8 bits, not to 4"),
        ("rtn-w8a8", (*GROUPS, "activations.symmetric=false"), "without zero points"),
        ("smoothquant-w8a8", ("balance.timesteps=[[0, 500], [501, 1000]]",), "integers per timestep range"),
    ],
)
def test_plans_that_cannot_be_executed_exactly(
    recipe: str, overrides: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    model = quantized("pixart", recipe, overrides)
    with pytest.raises(UsageError, match=message):
        export(model, architectures.load("pixart"), example_inputs("pixart"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_unquantized_models_need_to_be_allowed(tmp_path: Path) -> None:
    model = tiny_model("dit")
    with pytest.raises(UsageError, match="no quantized layers"):
        export(model, architectures.load("dit"), example_inputs("dit"), tmp_path)
    loaded = exported(model, "dit", tmp_path, allow_float=True)
    assert relative_error(run(model, "dit"), run(loaded, "dit")) < 1e-5


def test_shapes_that_openvino_multiplies_in_floats(tmp_path: Path) -> None:
    weights = "weights={bits: 4, granularity: group, group_size: 8}"
    model = quantized("pixart", "rtn-w4a8", (weights, "roles.ffn.down={weights: {bits: 4, granularity: channel}}"))
    arch, call = architectures.load("pixart"), example_inputs("pixart")
    with pytest.raises(
        DitqError, match=r"18 layers in floats.*128 -> 128, i4 weights.*groups of 8 are not a multiple"
    ):
        export(model, arch, call, tmp_path)
    report = export(model, arch, call, tmp_path, allow_float=True)
    assert set(report.executions.values()) == {"float"}
    assert "In floats (its weight groups of 8 are not a multiple of 16)" in report.summary()


def test_kernels_that_this_cpu_does_not_have(
    name: str, torch_model: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditq.openvino.summary.execution", lambda kernel, width, precision: "float")
    with pytest.raises(DitqError, match=r"layers in floats that should multiply integers: transformer_blocks.0.attn1"):
        load(folder, copy.deepcopy(torch_model))
    report = load(folder, copy.deepcopy(torch_model), allow_float=True)
    assert set(report.executions.values()) == {"float"}
    assert "In floats (this CPU)" in report.summary()


def test_weights_that_were_expanded_to_floats_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel multiplies integers by itself; the guard is that the graph still has the integer weights."""

    class Expanding(Builder):
        def weight(self, linear: Any) -> Any:
            if linear.name != "transformer_blocks.1.ff.net.2":
                return super().weight(linear)
            return op.constant(convert_weight(linear))

    from ditq.openvino.linear import dequantized

    convert_weight = lambda linear: dequantized(linear).numpy()  # noqa: E731
    monkeypatch.setattr(convert, "Builder", Expanding)
    with pytest.raises(
        DitqError, match=r"1 layers in floats that should .*: transformer_blocks.1.ff.net.2 \(512 -> 128"
    ):
        export(quantized("dit"), architectures.load("dit"), example_inputs("dit"), tmp_path)


def test_graphs_that_compute_something_else_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Builder):
        def balance(self, x: Any, linear: Any) -> Any:
            return op.multiply(super().balance(x, linear), np.float32(1.2))

    monkeypatch.setattr(convert, "Builder", Wrong)
    with pytest.raises(DitqError, match="does not compute what the model computes"):
        export(quantized("dit"), architectures.load("dit"), example_inputs("dit"), tmp_path)
    assert not (tmp_path / FILE).exists()


def test_openvino_not_installed(
    torch_model: nn.Module, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "why_unavailable", lambda: "it is not installed: do this")
    for work in (
        lambda: export(torch_model, architectures.load(name), example_inputs(name), folder),
        lambda: load(folder, copy.deepcopy(torch_model)),
    ):
        with pytest.raises(DitqError, match="'openvino' is not available: it is not installed: do this"):
            work()


# ----------------------------------------------------------------------------------------------- calls


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> CompiledStack:
    model = quantized("pixart")
    return exported(model, "pixart", tmp_path_factory.mktemp("stack")).transformer_blocks[0]


def block_call(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(2)
    call = {
        "hidden_states": torch.randn(2, 16, 128), "encoder_hidden_states": torch.randn(2, 6, 128),
        "encoder_attention_mask": torch.zeros(2, 1, 6), "timestep": torch.randn(2, 768),
    }  # fmt: skip
    return {**call, **changes}


def test_arguments_may_be_positional(stack: CompiledStack) -> None:
    call = block_call()
    expected = stack(**call)
    positional = (call["hidden_states"], None, call["encoder_hidden_states"], call["encoder_attention_mask"])
    assert torch.equal(stack(*positional, call["timestep"], class_labels=None), expected)


def test_outputs_are_copies(stack: CompiledStack) -> None:
    first = stack(**block_call())
    kept = first.clone()
    stack(**block_call(hidden_states=torch.randn(2, 16, 128)))
    assert torch.equal(first, kept)


def test_inputs_need_not_be_contiguous(stack: CompiledStack) -> None:
    call = block_call()
    wide = torch.stack([call["hidden_states"]] * 2, -1)[..., 0]
    assert not wide.is_contiguous()
    assert torch.equal(stack(**{**call, "hidden_states": wide}), stack(**call))


@pytest.mark.parametrize("argument", ["hidden_states", "encoder_hidden_states", "timestep"])
def test_nan_stays_nan_in_its_sample_only(stack: CompiledStack, argument: str) -> None:
    call = block_call()
    expected = stack(**call)
    call[argument] = call[argument].clone()
    call[argument].view(-1)[-3] = torch.nan
    y = stack(**call)
    assert bool(y[1].isnan().all())
    assert torch.equal(y[0], expected[0])


def test_infinite_masks_are_no_nan(stack: CompiledStack) -> None:
    mask = torch.zeros(2, 1, 6)
    mask[0, 0, 3:] = -torch.inf
    assert bool(stack(**block_call(encoder_attention_mask=mask)).isfinite().all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_attention_mask": None}, "exported with encoder_attention_mask=a tensor .* called with None"),
        ({"attention_mask": torch.zeros(2, 1, 16)}, r"with attention_mask=None .* a tensor \(2, 1, 16\)"),
        ({"cross_attention_kwargs": {"scale": 0.5}}, "cross_attention_kwargs.scale=None .* 0.5"),
        ({"hidden_states": torch.randn(2, 16, 64)}, r"shape \[any, any, 128\] and dtype float32, got \[2, 16, 64\]"),
        ({"hidden_states": torch.randn(16, 128)}, r"got \[16, 128\]"),
        ({"hidden_states": torch.randn(2, 16, 128, device="meta")}, "runs on the CPU; 'hidden_states' is on meta"),
        ({"hidden_states": torch.randn(2, 16, 128, requires_grad=True)}, "has no gradients"),
    ],
)
def test_calls_that_the_graph_does_not_know(stack: CompiledStack, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        stack(**block_call(**changes))


def test_missing_tensors_are_named(stack: CompiledStack) -> None:
    call = block_call()
    del call["timestep"]
    with pytest.raises(UsageError, match="the tensor 'timestep', which is missing in this call"):
        stack(**call)


def test_fractions_of_timesteps_are_not_cut_off(tmp_path: Path) -> None:
    model = exported(quantized("dit"), "dit", tmp_path)
    with pytest.raises(UsageError, match=r"timestep of shape \[any\] and dtype int64, got \[2\] and float32"):
        run(model, "dit", timestep=torch.tensor([10.5, 10.5]))


def test_static_shapes_change_nothing_but_time(
    torch_model: nn.Module, name: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flexible, fixed = copy.deepcopy(torch_model), copy.deepcopy(torch_model)
    load(folder, flexible)
    load(folder, fixed, shapes="static")
    program = fixed.transformer_blocks[0].program
    first = program.compiled
    assert relative_error(run(flexible, name), run(fixed, name)) < CLOSE
    second = program.compiled
    assert second is not first
    assert all(port.get_partial_shape().is_static for port in second.inputs)
    run(fixed, name)
    assert program.compiled is second  # the same sizes again
    for batch in range(3, 8):
        y = run(fixed, name, **{k: repeated(v, batch) for k, v in example_inputs(name).items()})
        assert y.shape[0] == batch
    assert program.shapes == "dynamic"
    assert "called in more than 4 sizes" in caplog.text
    assert all(port.get_partial_shape().is_dynamic for port in program.compiled.inputs)
    last = program.compiled
    run(fixed, name)
    assert program.compiled is last


@pytest.mark.parametrize("shapes", ["dynamic", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_the_bf16_hint_outputs_are_bf16_inside_and_as_before_outside(
    torch_model: nn.Module, name: str, folder: Path, shapes: Any, dtype: torch.dtype
) -> None:
    model = copy.deepcopy(torch_model).to(dtype)
    load(folder, model, properties={"INFERENCE_PRECISION_HINT": "bf16"}, shapes=shapes)
    call = example_inputs(name, dtype=dtype)
    y = run(model, name, **call)
    program = model.transformer_blocks[0].program
    assert {port.get_element_type().get_type_name() for port in program.compiled.outputs} == {"bf16"}
    assert y.dtype == dtype
    assert 1e-4 < relative_error(run(torch_model, name), y) < 0.05
    assert torch.equal(run(model, name, **call), y)  # a copy, which the next call does not overwrite


@pytest.mark.parametrize("small", [True, False])
def test_graphs_of_several_sizes_are_kept_while_they_are_small(
    torch_model: nn.Module, name: str, folder: Path, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not small:
        monkeypatch.setattr("ditq.openvino.program.SMALL", 1)
    model = copy.deepcopy(torch_model)
    load(folder, model, shapes="static")
    program = model.transformer_blocks[0].program
    call = example_inputs(name)
    larger = {k: repeated(v, 3) for k, v in call.items()}
    first = run(model, name, **call)
    compiled = program.compiled
    run(model, name, **larger)
    assert program.compiled is not compiled
    again = run(model, name, **call)
    assert torch.equal(first, again)
    assert (program.compiled is compiled) == small


def repeated(value: Any, batch: int) -> Any:
    return value[:1].repeat(batch, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) and value.ndim else value


def test_threads_and_copies_share_a_model(stack: CompiledStack) -> None:
    calls = [block_call(hidden_states=torch.randn(2, 8 + 8 * i, 128)) for i in range(4)]
    expected = [stack(**call) for call in calls]
    results: dict[int, Tensor] = {}
    twin = copy.deepcopy(stack)

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                results[i] = (twin if i % 2 else stack)(**calls[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[i], expected[i]) for i in range(4))


# ----------------------------------------------------------------------------------- other structures


class TwoStreams(nn.Module):
    """A block with two outputs, nested tensors and an argument that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(
        self, x: Tensor, text: Tensor, rotary: tuple[Tensor, Tensor], unused: Tensor, scale: float = 0.5
    ) -> Any:
        x = x + scale * self.a(x) * rotary[0] + rotary[1]
        return text + self.b(text) + x.mean(1, keepdim=True), x


class Toy(nn.Module):
    """``between`` is what all tokens are multiplied by between two blocks."""

    def __init__(self, between: float = 0.0, kind: type[nn.Module] = TwoStreams) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(kind() for _ in range(3))
        self.between = between
        for i, block in enumerate(self.blocks):
            for path in "ab":
                plan = layer_plan(f"blocks.{i}.{path}", 32, 32, weight=weight_format(8), activation=token_format())
                setattr(block, path, QuantizedLinear.from_linear(getattr(block, path), plan))

    def forward(self, sample: Tensor, text: Tensor, return_dict: bool = False) -> tuple[Tensor, Tensor]:
        rotary = (sample[:1].cos(), sample[:1].sin())
        for block in self.blocks:
            if self.between:
                sample = sample * self.between
            text, sample = block(sample, text=text, rotary=rotary, unused=text)
        return sample, text


TOY = Architecture.model_validate({
    "name": "toy", "classes": ["Toy"], "forward": {"sample": "sample", "time": "t", "text": "text"},
    "stacks": {"blocks": [{"input": {"online": "residual"}, "linears": {"a": "self_attn.q"}}]},
    "guidance": {"style": "batch"}, "pipeline": {"condition": "prompt"},
})  # fmt: skip


# "Images" of one row: tokens and channels.
TOY_CALLS = tuple({"sample": torch.randn(n, t, 32), "text": torch.randn(n, 4 + n, 32)} for n, t in ((2, 5), (3, 7)))


@pytest.fixture
def _toy_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditq.openvino.export.variations", lambda *a: TOY_CALLS)


@pytest.mark.usefixtures("_toy_calls")
@pytest.mark.parametrize("between", [0.0, 0.9], ids=["chain", "work between blocks"])
def test_blocks_of_any_signature(between: float, tmp_path: Path) -> None:
    model = Toy(between)
    export(model, TOY, TOY_CALLS[0], tmp_path)
    loaded = load_into(copy.deepcopy(model), tmp_path)
    assert len(loaded.blocks) == (3 if between else 1)
    other = {"sample": torch.randn(1, 11, 32), "text": torch.randn(1, 3, 32)}
    with torch.no_grad():
        for expected, y in zip(model(**other), loaded(**other), strict=True):
            assert relative_error(expected, y) < CLOSE


class Frozen(TwoStreams):
    """Leaves the trace with a Python number: the tokens are counted once and for all."""

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        return super().forward(x / int(x.shape[1]), **kwargs)


class FrozenShape(TwoStreams):
    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        return super().forward(x + torch.ones(int(x.shape[1]), 32), **kwargs)


@pytest.mark.usefixtures("_toy_calls")
@pytest.mark.parametrize("kind", [Frozen, FrozenShape])
def test_sizes_that_the_trace_has_frozen_are_noticed(kind: type[nn.Module], tmp_path: Path) -> None:
    with pytest.raises(
        DitqError, match=r"graph of blocks does not compute what the model computes: (its|it takes inputs)"
    ):
        export(Toy(kind=kind), TOY, TOY_CALLS[0], tmp_path)


class Counting(Toy):
    """Tells its blocks a number that depends on the size of the input."""

    def forward(self, sample: Tensor, text: Tensor, return_dict: bool = False) -> tuple[Tensor, Tensor]:
        rotary = (sample[:1].cos(), sample[:1].sin())
        for block in self.blocks:
            text, sample = block(sample, text, rotary, text, scale=1.0 / sample.shape[1])
        return sample, text


@pytest.mark.usefixtures("_toy_calls")
def test_numbers_that_depend_on_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DitqError, match=r"Argument 'scale' of blocks is neither a tensor nor a constant \(0\.2, 0\.14"
    ):
        export(Counting(), TOY, TOY_CALLS[0], tmp_path)


class Peeking(Toy):
    """Calls a module of its last block, where no compiled stack could give it."""

    def forward(self, sample: Tensor, text: Tensor, return_dict: bool = False) -> Any:
        sample, text = super().forward(sample, text)
        return self.blocks[2].a(sample), text


@pytest.mark.usefixtures("_toy_calls")
def test_modules_of_later_blocks_cannot_be_kept(tmp_path: Path) -> None:
    with pytest.raises(DitqError, match=r"The model calls blocks\.2\.a itself; only modules of the first block"):
        export(Peeking(), TOY, TOY_CALLS[0], tmp_path)


# ------------------------------------------------------------------------------------------- pipelines


@pytest.mark.parametrize("kind", ["pixart", "dit"])
def test_stands_in_a_stock_pipeline(kind: str) -> None:
    pipe = PIPELINES[kind]()
    arch = architectures.load(kind)
    quantize_model(pipe.transformer, arch, load_recipe("rtn-w8a8").override(list(SAME_GROUPS)), None)
    expected = draw(pipe)
    compile_in_place(pipe.transformer, arch, first_call(pipe, arch, CONDITIONS[kind][:1]))
    assert type(pipe.transformer).__module__.startswith("diffusers.")
    assert pipe.device.type == "cpu"
    assert float((draw(pipe) - expected).square().mean()) < 1e-5  # 50 dB


def test_copies_of_a_layer_are_executed_once_and_in_integers(tmp_path: Path) -> None:
    eight = "{weights: {bits: 8, granularity: channel}, activations: {bits: 8, granularity: token, dynamic: true}}"
    model = tiny_model("dit")
    first, *others = model.transformer_blocks
    for block in others:
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    recipe = load_recipe("rtn-w8a8").override([f"roles.embedder={eight}", "keep=[modulation, final]"])
    quantize_model(model, architectures.load("dit"), recipe, None)
    report = export(model, architectures.load("dit"), example_inputs("dit"), tmp_path)
    copies = [layer for layer in report.layers if layer.twin]
    assert {layer.name.rpartition("linear_")[0] for layer in copies} == {
        f"transformer_blocks.{i}.norm1.emb.timestep_embedder." for i in range(1, len(others) + 1)
    }
    assert all(report.executions[layer.name] == "int8" for layer in copies)
