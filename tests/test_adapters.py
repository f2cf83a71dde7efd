"""LoRA adapters on quantized models: the same effect as on the float model, fused, saved, and refused where needed."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers import example_inputs, layer_plan, run, tiny_model, tiny_statistics
from torch import Tensor, nn

import ditq
from ditq import architectures
from ditq.checkpoint.backend import attach
from ditq.conversion import quantize_model
from ditq.errors import UsageError
from ditq.layers import QuantizedLinear
from ditq.plan import Branch, Plan
from ditq.recipe import load as load_recipe

peft = pytest.importorskip("peft")

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def quantized(architecture: str, recipe: str, *overrides: str) -> tuple[Any, Any]:
    """The float model and its quantized copy."""
    model = tiny_model(architecture)
    twin = copy.deepcopy(model)
    loaded = load_recipe(recipe).override(overrides)
    statistics = tiny_statistics(model, architecture)
    plan = quantize_model(twin, architectures.load(architecture), loaded, statistics)
    attach(twin, plan)
    return model, twin


def add(model: Any, name: str = "default", seed: int = 0, targets: list[str] | None = None, **config: Any) -> None:
    """Injects an adapter of fixed random numbers, large enough to see."""
    rank, size = config.pop("r", 4), config.pop("size", 0.3)
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=rank, lora_alpha=8, target_modules=targets or TARGETS, **config), model, name
    )
    generator = torch.Generator().manual_seed(seed)
    for full, p in model.named_parameters():
        if f".{name}." in full and "lora_" in full and p.dim() == 2:
            p.data = size * torch.randn(p.shape, generator=generator).to(p)


def relative(x: Tensor, reference: Tensor) -> float:
    return float((x - reference).norm() / reference.norm())


@pytest.mark.parametrize(
    "architecture", ["pixart", "dit", "wan", "ltx", "cogvideox", "latte", "mochi", "hunyuanvideo"]
)
@pytest.mark.parametrize("recipe", ["smoothquant-w8a8", "viditq-w8a8"])
def test_adapter_of_the_float_model_acts_alike(architecture: str, recipe: str) -> None:
    model, twin = quantized(architecture, recipe)
    floats = run(model, architecture)
    own_error = relative(run(twin, architecture), floats)
    seen: list[dict[str, Tensor]] = []
    for one in (model, twin):
        add(one, size=0.1)
        seen.append({})
        for name, module in one.named_modules():
            if name.endswith("lora_A.default"):
                module.register_forward_hook(
                    lambda _, args, __, name=name, into=seen[-1]: into.update({name: args[0]})
                )
    wanted, got = run(model, architecture), run(twin, architecture)
    assert relative(wanted, floats) > 0.02
    assert relative(got, wanted) < own_error + 0.02
    assert seen[0].keys() == seen[1].keys() != set()
    assert max(relative(seen[1][name], x) for name, x in seen[0].items()) < 0.25


@pytest.mark.parametrize("recipe", ["rtn-w4a16", "quarot-w8a8", "viditq-w8a8", "smoothquant-static-w8a8"])
def test_fusing_computes_saves_and_loads_the_same(recipe: str, tmp_path: Path) -> None:
    _, twin = quantized("pixart", recipe)
    bits = twin.hf_quantizer.plan.average_bits
    add(twin, "one")
    add(twin, "two", seed=1, use_rslora=True, r=2)
    for layer in twin.modules():
        if hasattr(layer, "set_adapter") and hasattr(layer, "lora_A"):
            layer.set_adapter(["one", "two"])
    wanted = run(twin, "pixart")
    ditq.fuse_lora(twin)
    fused = run(twin, "pixart")
    assert relative(fused, wanted) < 0.02
    assert not hasattr(twin, "peft_config")
    plan = twin.hf_quantizer.plan
    assert {x.branch.rank for x in plan.quantized if x.branch} == {6}
    assert plan.average_bits > bits
    assert any("branch of rank 6" in x.balance for x in plan)
    twin.save_pretrained(tmp_path)
    again = type(twin).from_pretrained(tmp_path)
    assert torch.equal(run(again, "pixart"), fused)
    tensors = {name: t for name, t in twin.state_dict().items() if "branch_" in name}
    assert tensors
    assert all(torch.equal(again.state_dict()[name], t) for name, t in tensors.items())
    again.dequantize()
    if "static" not in recipe:  # whose scales, calibrated without the adapter, clip its inputs
        assert relative(run(again, "pixart"), fused) < 0.1


def test_fusing_again_and_with_a_scale() -> None:
    _, twin = quantized("pixart", "rtn-w8a8")
    add(twin, "one")
    ditq.fuse_lora(twin)
    once = run(twin, "pixart")
    add(twin, "one")
    ditq.fuse_lora(twin, "one", scale=-1.0)  # takes it away again
    _, plain = quantized("pixart", "rtn-w8a8")
    expected = run(plain, "pixart")
    assert relative(once, expected) > 0.1
    assert relative(run(twin, "pixart"), expected) < 0.01
    assert {x.branch.rank for x in twin.hf_quantizer.plan.quantized if x.branch} == {8}


def test_fusing_what_cannot_be_fused_is_refused() -> None:
    model, twin = quantized("pixart", "rtn-w8a8")
    with pytest.raises(UsageError, match="not quantized by ditq"):
        ditq.fuse_lora(model)
    with pytest.raises(UsageError, match="No adapter is active"):
        ditq.fuse_lora(twin)
    add(twin, "dora", use_dora=True)
    before = run(twin, "pixart")
    with pytest.raises(UsageError, match="'style' is loaded; loaded are: dora"):
        ditq.fuse_lora(twin, "style")
    with pytest.raises(UsageError, match="not a plain low-rank product"):
        ditq.fuse_lora(twin)
    assert torch.equal(run(twin, "pixart"), before)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_in_place_is_refused(safe: bool) -> None:
    _, twin = quantized("wan", "viditq-w8a8")
    with pytest.raises(UsageError, match="ditq.fuse_lora"):
        twin.fuse_lora()
    wrapped = peft.get_peft_model(twin, peft.LoraConfig(r=2, target_modules=TARGETS))
    with pytest.raises(UsageError, match="ditq.fuse_lora"):
        wrapped.merge_adapter(safe_merge=safe)
    with pytest.raises(UsageError, match="ditq.fuse_lora"):
        wrapped.merge_and_unload(safe_merge=safe)


def test_saving_with_adapters_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    _, twin = quantized("pixart", "rtn-w8a8")
    add(twin)
    with pytest.raises(UsageError, match="ditq.fuse_lora"):
        twin.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fusing_projections_is_refused() -> None:
    _, twin = quantized("pixart", "rtn-w8a8")
    before = run(twin, "pixart")
    attention = next(m for m in twin.modules() if type(m).__name__ == "Attention")
    for fuse in (twin.fuse_qkv_projections, attention.fuse_projections):
        with pytest.raises(UsageError, match="share the integers"):
            fuse()
    assert torch.equal(run(twin, "pixart"), before)


def test_changes_of_a_weight_are_refused_and_reads_give_plain_tensors() -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(32, 24), layer_plan())
    assert type(layer.weight * 2) is Tensor
    with pytest.raises(UsageError, match="ditq.fuse_lora"):
        layer.weight.data += 1
    with pytest.raises(UsageError, match="ditq.fuse_lora"):
        layer.weight.data = torch.zeros(24, 32)
    with pytest.raises(UsageError, match="ditq.fuse_lora"):
        layer.weight.mul_(2)
    with pytest.raises(UsageError, match="ditq.fuse_lora"):
        layer.weight[0] = 0


def test_plans_without_a_branch_are_written_as_before() -> None:
    plain = layer_plan()
    assert "branch" not in plain.model_dump(mode="json")
    fields = plain.model_dump(mode="json") | {"branch": {"rank": 2}}
    assert type(plain).model_validate(fields).branch == Branch(rank=2)
    adapters = layer_plan(branch=Branch(rank=2)).model_dump(mode="json")
    assert adapters["branch"] == {"rank": 2, "dtype": "bfloat16"}  # as before branches could be of singular values


def test_an_adapter_on_an_old_folded_checkpoint_warns() -> None:
    folder = Path(__file__).parent / "data" / "v0.1" / "pixart-folded"
    model: Any = diffusers.PixArtTransformer2DModel.from_pretrained(folder)
    assert isinstance(model.hf_quantizer.plan, Plan)
    with pytest.warns(UserWarning, match="folded smoothing scales"):
        add(model)


def test_a_model_that_was_fused_and_unfused_is_quantized(tmp_path: Path) -> None:
    model: Any = tiny_model("pixart")
    arch = architectures.load("pixart")
    recipe = load_recipe("rtn-w8a8")
    expected = copy.deepcopy(model)
    quantize_model(expected, arch, recipe, None)
    model.fuse_qkv_projections()
    with pytest.raises(UsageError, match="unfuse_qkv_projections"):
        quantize_model(model, arch, recipe, None)
    model.unfuse_qkv_projections()
    attach(model, quantize_model(model, arch, recipe, None))
    assert torch.equal(run(model, "pixart"), run(expected, "pixart"))
    model.save_pretrained(tmp_path)
    assert torch.equal(run(type(model).from_pretrained(tmp_path), "pixart"), run(model, "pixart"))


@pytest.mark.parametrize("family", ["wan", "ltx", "cogvideox", "mochi", "hunyuanvideo"])
def test_a_file_loads_through_the_pipeline_and_fuses(family: str, tmp_path: Path) -> None:
    import videos

    pipe = videos.PIPELINES[family][0]()
    pipe.register_modules(transformer=tiny_model(family))  # of the sizes of the example inputs
    model = pipe.transformer
    add(model, size=0.1)
    weights = peft.get_peft_model_state_dict(model)
    wanted = run(model, family)
    model.unload_lora()
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=weights)
    attach(model, quantize_model(model, architectures.load(family), load_recipe("rtn-w8a8"), None))
    own = run(model, family)
    pipe.load_lora_weights(tmp_path)
    got = run(model, family)
    assert relative(got, own) > 0.01
    assert wanted.shape == got.shape
    with pytest.raises(UsageError, match="ditq.fuse_lora"):
        pipe.fuse_lora()
    ditq.fuse_lora(pipe)
    assert relative(run(model, family), got) < 0.02
    assert not pipe.get_list_adapters().get("transformer")
    copy.deepcopy(model).save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("activation", [True, False])
def test_a_branch_adds_its_product_and_has_gradients(activation: bool) -> None:
    plan = layer_plan() if activation else layer_plan(activation=None)
    layer = QuantizedLinear.from_linear(nn.Linear(32, 24), plan)
    x = torch.randn(5, 32, requires_grad=True)
    before = layer(x)
    rounded = layer.float_weight()
    down, up = torch.randn(3, 32), torch.randn(24, 3)
    layer.add_branch(down, up, "float32")
    assert torch.allclose(layer(x) - before, x @ down.T @ up.T, atol=1e-4)
    assert torch.allclose(layer.float_weight() - rounded, up @ down, atol=1e-4)
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, torch.ones(5, 24) @ layer.float_weight(), atol=1e-3)
    layer.to(torch.bfloat16)
    assert layer.branch_down.dtype == torch.float32


def test_timestep_ranges_take_adapters_and_branches(tmp_path: Path) -> None:
    model, twin = quantized("dit", "smoothquant-w8a8", "balance.timesteps=[[0, 499], [500, 999]]")
    add(model, size=0.1)
    add(twin, size=0.1)
    wanted = run(twin, "dit")
    assert relative(wanted, run(model, "dit")) < 0.05
    ditq.fuse_lora(twin)
    fused = run(twin, "dit")
    assert relative(fused, wanted) < 0.02
    twin.save_pretrained(tmp_path)
    assert torch.equal(run(type(twin).from_pretrained(tmp_path), "dit"), fused)


@pytest.mark.parametrize("recipe", ["quarot-w8a8", "rtn-w4a16"])
def test_dora_acts_as_on_the_dequantized_model(recipe: str) -> None:
    _, twin = quantized("pixart", recipe)
    plain = copy.deepcopy(twin)
    plain.dequantize()
    for one in (plain, twin):
        add(one, size=0.1, use_dora=True)
    assert relative(run(twin, "pixart"), run(plain, "pixart")) < 0.06


def test_a_model_with_a_branch_is_pickled_exported_and_not_quantized_from_its_plan() -> None:
    from ditq.openvino.convert import linear_spec

    model, twin = quantized("pixart", "rtn-w8a8")
    add(twin, targets=["to_q"])
    ditq.fuse_lora(twin)
    assert torch.equal(run(pickle.loads(pickle.dumps(twin)), "pixart"), run(twin, "pixart"))
    with pytest.raises(UsageError, match="has a branch"):
        ditq.quantize(model, twin.hf_quantizer.plan)
    name, layer = next((n, m) for n, m in twin.named_modules() if isinstance(m, QuantizedLinear) and m.plan.branch)
    spec = linear_spec(name, layer)
    assert spec.branch is not None
    assert torch.equal(spec.branch[0], layer.branch_down)
    assert torch.equal(spec.branch[1], layer.branch_up)


def lora_file(pipe: Any, family: str, folder: Path, seed: int) -> Path:
    """A LoRA file of random numbers for the pipeline, whose transformer is left without it."""
    model = pipe.transformer
    add(model, seed=seed, size=0.1)
    pipe.save_lora_weights(folder, transformer_lora_layers=peft.get_peft_model_state_dict(model))
    model.unload_lora()
    return folder


def test_adapters_are_swapped_weighted_disabled_and_deleted(tmp_path: Path) -> None:
    import videos

    pipe = videos.wan()
    model = pipe.transformer
    files = [lora_file(pipe, "wan", tmp_path / str(seed), seed) for seed in (0, 1)]
    attach(model, quantize_model(model, architectures.load("wan"), load_recipe("quarot-w8a8"), None))
    plain = run(model, "wan")
    pipe.load_lora_weights(files[0], adapter_name="one")
    first = run(model, "wan")
    pipe.load_lora_weights(files[1], adapter_name="one", hotswap=True)
    second = run(model, "wan")
    assert relative(second, first) > 0.01
    pipe.load_lora_weights(files[0], adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.0, 1.0])
    assert relative(run(model, "wan"), first) < 1e-4
    pipe.set_adapters(["one", "two"], [1.0, 0.0])
    assert relative(run(model, "wan"), second) < 1e-4
    pipe.disable_lora()
    assert torch.equal(run(model, "wan"), plain)
    pipe.enable_lora()
    assert relative(run(model, "wan"), second) < 1e-4
    pipe.delete_adapters("two")
    assert relative(run(model, "wan"), second) < 1e-4
    model.add_adapter(peft.LoraConfig(r=2, target_modules=TARGETS), "three")  # starts without effect
    assert torch.equal(run(model, "wan"), plain)
    pipe.set_adapters("one", 0.5)
    half = run(model, "wan")
    ditq.fuse_lora(pipe)  # with its present weight; "three" stays loaded
    assert pipe.get_list_adapters()["transformer"] == ["three"]
    assert relative(run(model, "wan"), half) < 0.02
    pipe.unload_lora_weights()
    assert relative(run(model, "wan"), half) < 0.02


def test_an_adapter_trained_on_the_quantized_model_acts_alike_on_the_float_one(tmp_path: Path) -> None:
    model, twin = quantized("wan", "viditq-w8a8")
    floats, own = run(model, "wan"), run(twin, "wan")
    twin.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS))
    trained = [p for name, p in twin.named_parameters() if "lora_" in name]
    optimizer = torch.optim.Adam(trained, lr=0.002)
    target = own + 0.2 * own.roll(1, -1)
    losses = []
    for _ in range(6):
        output = twin(**example_inputs("wan"), return_dict=False)[0]
        loss = (output - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    # Not save_lora_adapter(), which casts the model: diffusers refuses that of every quantized model.
    diffusers.WanPipeline.save_lora_weights(tmp_path, peft.get_peft_model_state_dict(twin))
    model.load_lora_adapter(tmp_path, use_safetensors=True)
    wanted, got = run(twin, "wan") - own, run(model, "wan") - floats
    assert wanted.norm() > 0.01 * own.norm()
    assert relative(got, wanted) < 0.2


def test_adapters_on_unquantized_linears_are_merged(tmp_path: Path) -> None:
    _, twin = quantized("pixart", "rtn-w8a8")
    kept = next(x.name for x in twin.hf_quantizer.plan.kept)
    add(twin, targets=[kept, "to_q"], size=0.1)
    wanted = run(twin, "pixart")
    ditq.fuse_lora(twin)
    assert type(twin.get_submodule(kept)) is nn.Linear
    fused = run(twin, "pixart")
    assert relative(fused, wanted) < 0.02
    twin.save_pretrained(tmp_path)  # in 16 bit
    assert relative(run(type(twin).from_pretrained(tmp_path), "pixart"), fused) < 0.02


def test_a_peft_model_is_fused(tmp_path: Path) -> None:
    _, twin = quantized("wan", "rtn-w8a8")
    wrapped = peft.get_peft_model(twin, peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    wanted = run(twin, "wan")
    ditq.fuse_lora(wrapped)
    assert relative(run(twin, "wan"), wanted) < 0.02
    twin.save_pretrained(tmp_path)


def test_both_experts_are_fused() -> None:
    import videos

    pipe = videos.wan_of_two_experts()
    file = {}
    for name in ("transformer", "transformer_2"):
        model = getattr(pipe, name)
        add(model, size=0.1, seed=len(file))
        file[name] = {f"transformer.{k}": t for k, t in peft.get_peft_model_state_dict(model).items()}
        model.unload_lora()
        attach(model, quantize_model(model, architectures.load("wan"), load_recipe("rtn-w8a8"), None))
    pipe.load_lora_weights(file["transformer"], adapter_name="style")
    pipe.load_lora_weights(file["transformer_2"], adapter_name="style", load_into_transformer_2=True)
    wanted = [run(model, "wan") for model in (pipe.transformer, pipe.transformer_2)]
    with pytest.raises(UsageError, match="ditq.fuse_lora"):
        pipe.fuse_lora(components=["transformer_2"])
    ditq.fuse_lora(pipe)
    for model, output in zip((pipe.transformer, pipe.transformer_2), wanted, strict=True):
        assert relative(run(model, "wan"), output) < 0.02
        assert any(layer.branch for layer in model.hf_quantizer.plan.quantized)


OTHERS = {
    "LoHa": lambda: peft.LoHaConfig(r=2, target_modules=["to_q"], init_weights=False),
    "LoKr": lambda: peft.LoKrConfig(r=2, target_modules=["to_q"], init_weights=False),
    "IA3": lambda: peft.IA3Config(target_modules=["to_q"], feedforward_modules=[], init_ia3_weights=False),
    "bias": lambda: peft.LoraConfig(r=2, target_modules=["to_q"], lora_bias=True, init_lora_weights=False),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_are_not_fused_and_nothing_changes(kind: str) -> None:
    _, twin = quantized("pixart", "rtn-w8a8")
    peft.inject_adapter_in_model(OTHERS[kind](), twin)
    before, plan = run(twin, "pixart"), twin.hf_quantizer.plan
    names = twin.state_dict().keys()
    with pytest.raises(UsageError, match="not a plain low-rank product"):
        ditq.fuse_lora(twin)
    assert twin.state_dict().keys() == names
    assert twin.hf_quantizer.plan == plan
    assert torch.equal(run(twin, "pixart"), before)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_with_adapters_is_not_saved(way: Any, tmp_path: Path) -> None:
    _, twin = quantized("pixart", "rtn-w8a8")
    add(twin)
    copied = way(twin)
    del twin
    with pytest.raises(UsageError, match="ditq.fuse_lora"):
        copied.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pipeline_with_adapters_leaves_no_folder_that_loads(tmp_path: Path) -> None:
    import videos

    pipe = videos.wan()
    attach(
        pipe.transformer, quantize_model(pipe.transformer, architectures.load("wan"), load_recipe("rtn-w8a8"), None)
    )
    add(pipe.transformer)
    with pytest.raises(UsageError, match="ditq.fuse_lora"):
        ditq.save(pipe, tmp_path / "ours")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="ditq.fuse_lora"):
        pipe.save_pretrained(tmp_path / "stock")
    # diffusers has written the components before the transformer, but not the index, which comes last.
    assert not (tmp_path / "stock" / "model_index.json").exists()
    assert not (tmp_path / "stock" / "transformer").exists()
