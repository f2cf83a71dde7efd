"""Calibration on tiny pipelines: recorded inputs, their order, how much is kept, and resuming."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import videos
from helpers import CLASSES, CONDITIONS, PIPELINES, PROMPTS, tiny_dit, tiny_model, tiny_pixart, tiny_statistics
from torch import Tensor

import ditq
from ditq import architectures
from ditq.calibration import GroupStatistics, Statistics, calibrate
from ditq.calibration import run as calibration_run
from ditq.calibration.statistics import merge
from ditq.errors import CheckpointError, DitqError, UsageError
from ditq.recipe import Calibration
from ditq.sampling import Sampling, sample
from ditq.sampling.fingerprint import code_version
from ditq.sampling.sample import resolve_conditions

SETTINGS = Calibration(prompts=4, batch_size=2, steps=3, guidance_scale=3.0, rows=96)


@pytest.fixture(params=PIPELINES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def recorded(pipe: Any, modules: list[str]) -> tuple[list[float], dict[str, list[Tensor]]]:
    """The timestep of every transformer call and the input of some modules, from now on."""
    times: list[float] = []
    inputs: dict[str, list[Tensor]] = {module: [] for module in modules}

    def call(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        times.append(float(kwargs["timestep"].flatten()[0]))

    pipe.transformer.register_forward_pre_hook(call, with_kwargs=True)
    for module in modules:
        pipe.transformer.get_submodule(module).register_forward_pre_hook(
            lambda _, args, into=inputs[module]: into.append(args[0].detach().clone())
        )
    return times, inputs


def same(a: Statistics, b: Statistics) -> bool:
    return (
        torch.equal(a.timesteps, b.timesteps)
        and set(a.groups) == set(b.groups)
        and all(
            torch.equal(getattr(a.groups[n], part), getattr(b.groups[n], part))
            for n in a.groups
            for part in ("absmax", "sample", "sample_time")
        )
    )


class Calls:
    """Counts the calls of a pipeline's transformer."""

    def __init__(self, pipe: Any) -> None:
        self.count = 0
        pipe.transformer.register_forward_pre_hook(self.call)

    def call(self, *_: Any) -> None:
        self.count += 1

    def since(self) -> int:
        count, self.count = self.count, 0
        return count


# --------------------------------------------------------------------------------- recorded inputs


def test_maxima_are_those_of_the_inputs_per_timestep_and_condition(name: str) -> None:
    pipe, arch = PIPELINES[name](), architectures.load(name)
    groups = [g for g in arch.groups(pipe.transformer) if g.input.online != "text"]
    times, inputs = recorded(pipe, [g.name for g in groups])
    statistics = calibrate(pipe, arch, CONDITIONS[name], SETTINGS)
    assert statistics.timesteps.tolist() == times[:3]
    assert times == times[:3] * 2  # two batches of two prompts
    # Stock pipelines: PixArt puts the unconditional half first, DiT the conditional one.
    conditional = slice(2, 4) if name == "pixart" else slice(0, 2)
    unconditional = slice(0, 2) if name == "pixart" else slice(2, 4)
    for group in groups:
        stored = statistics.groups[group.name].absmax
        assert stored.shape == (3, 2, group.linears[0].module.in_features)
        for t in range(3):
            for c, half in enumerate((conditional, unconditional)):
                seen = torch.stack([inputs[group.name][i][half].abs().amax((0, 1)) for i in (t, t + 3)]).amax(0)
                assert torch.equal(stored[t, c], seen), (group.name, t, c)


def test_conditions_are_not_swapped() -> None:
    """The unconditional half of DiT is class 1000, so its statistics do not depend on the classes."""
    pipe, arch = tiny_dit(), architectures.load("dit")
    one_step = SETTINGS.model_copy(update={"steps": 1, "prompts": 1})
    a, b = (calibrate(pipe, arch, [c], one_step) for c in CLASSES[:2])
    name = next(iter(a.groups))
    (conditional, unconditional), (other, same_again) = a.groups[name].absmax[0], b.groups[name].absmax[0]
    assert torch.equal(unconditional, same_again)
    assert not torch.equal(conditional, other)


def test_without_guidance_a_batch_of_odd_size_is_one_condition() -> None:
    pipe, arch = tiny_dit(), architectures.load("dit")
    settings = SETTINGS.model_copy(update={"guidance_scale": 1.0, "prompts": 1, "batch_size": 1})
    statistics = calibrate(pipe, arch, CLASSES, settings)
    assert {g.absmax.shape[1] for g in statistics.groups.values()} == {1}


def test_padded_text_is_excluded() -> None:
    pipe, arch = tiny_pixart(), architectures.load("pixart")
    group = next(g for g in arch.groups(pipe.transformer) if g.input.online == "text")
    seen: list[Tensor] = []
    masks: list[Tensor] = []
    pipe.transformer.get_submodule(group.name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["encoder_attention_mask"]), with_kwargs=True
    )
    statistics = calibrate(pipe, arch, PROMPTS[:2], SETTINGS.model_copy(update={"prompts": 2, "steps": 2}))
    text, mask = seen[0], masks[0]
    assert 0 < mask.sum() < mask.numel()
    expected = text[2:][mask[2:] > 0].abs().amax(0)
    assert torch.equal(statistics.groups[group.name].absmax[0, 0], expected)
    padding = {tuple(row.tolist()) for row in text[mask == 0]}
    words = {tuple(row.tolist()) for row in text[mask > 0]}
    rows = [tuple(row.tolist()) for row in statistics.groups[group.name].sample]
    assert rows
    assert all(row in words for row in rows)
    assert not any(row in padding - words for row in rows)


# ------------------------------------------------------------------------------------ how much is kept


@pytest.mark.parametrize("rows", [16, 48, 400])
def test_sample_is_bounded(rows: int, name: str) -> None:
    pipe, arch = PIPELINES[name](), architectures.load(name)
    statistics = calibrate(pipe, arch, CONDITIONS[name], SETTINGS.model_copy(update={"rows": rows}))
    for group in statistics.groups.values():
        assert 0 < len(group.sample) <= rows
        assert group.sample.shape[1] == group.absmax.shape[2]
        assert set(group.sample_time.tolist()) == set(statistics.timesteps.tolist())
        largest = group.channel_absmax(statistics.timesteps)
        assert bool((group.sample.abs().amax(0) <= largest).all())


def test_same_seed_same_statistics_another_seed_others(name: str) -> None:
    pipe, arch = PIPELINES[name](), architectures.load(name)
    a, b, c = (calibrate(pipe, arch, CONDITIONS[name], SETTINGS, seed=seed) for seed in (0, 0, 1))
    assert same(a, b)
    assert not same(a, c)


def test_calibration_leaves_the_pipeline_as_it_was(name: str) -> None:
    pipe, arch = PIPELINES[name](), architectures.load(name)
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    calibrate(pipe, arch, CONDITIONS[name], SETTINGS)
    assert not any(m._forward_pre_hooks for m in pipe.transformer.modules())
    assert "decode" not in vars(pipe.vae)
    assert all(torch.equal(v, before[k]) for k, v in pipe.transformer.state_dict().items())


@pytest.mark.parametrize(
    ("config", "asked", "expected"),
    [({}, 3, 3), ({"sample_size": 8}, "auto", 32), ({"sample_size": 32}, "auto", 16),
     ({"sample_size": 128}, "auto", 8), ({"sample_size": None}, "auto", 8), ({"sample_size": 8}, None, 8)],
    ids=["as-asked", "small", "DiT-256", "large", "unknown", "default"],
)  # fmt: skip
def test_small_images_are_sampled_in_larger_batches(config: dict[str, Any], asked: Any, expected: int) -> None:
    assert batch_size(lambda prompt: None, config, asked) == expected


@pytest.mark.parametrize("asked", [None, "auto"])
@pytest.mark.parametrize(
    ("config", "expected"),
    [({"sample_size": 16, "video_length": 8}, 8), ({"sample_size": 32, "video_length": 16}, 2),
     ({"sample_size": 64, "video_length": 16}, 1), ({}, 1)],
    ids=["emoji-video", "Latte-256", "Latte-512", "unknown"],
)  # fmt: skip
def test_a_video_counts_as_its_frames(config: dict[str, Any], asked: Any, expected: int) -> None:
    assert batch_size(lambda prompt, video_length: None, config, asked) == expected


def batch_size(call: Any, config: dict[str, Any], asked: Any) -> int:
    """The batch size of calibration for a pipeline with this call and this transformer config."""
    transformer = SimpleNamespace(config=SimpleNamespace(in_channels=4, **config))
    pipe = SimpleNamespace(transformer=transformer, __call__=call)
    return calibration_run._batch_size(pipe, SETTINGS.model_copy(update={"batch_size": asked}))


def test_samples_of_all_layers_together_stay_below_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SETTINGS.model_copy(update={"rows": 960, "prompts": 2})

    def taken() -> int:
        found = calibrate(tiny_dit(), architectures.load("dit"), CLASSES, settings, cache=tmp_path)
        return sum(group.sample.numel() * group.sample.element_size() for group in found.groups.values())

    everything = taken()
    monkeypatch.setattr(calibration_run, "SAMPLE_BYTES", everything // 4)
    assert everything // 8 < taken() <= everything // 4


def test_nan_activation_names_the_layer_and_the_timestep() -> None:
    pipe, arch = tiny_dit(), architectures.load("dit")
    with torch.no_grad():
        pipe.transformer.transformer_blocks[1].attn1.to_v.bias[3] = float("nan")
    with pytest.raises(DitqError, match=r"transformer_blocks\.1\.attn1\.to_out\.0.*NaN.*timestep \d+"):
        calibrate(pipe, arch, CLASSES, SETTINGS)


# --------------------------------------------------------------------------------------------- resume


def test_resume_after_an_interrupt_is_identical_and_samples_no_batch_twice(name: str, tmp_path: Path) -> None:
    pipe, arch = PIPELINES[name](), architectures.load(name)
    calls = Calls(pipe)

    def interrupt(done: int, total: int) -> None:
        assert total == 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, arch, CONDITIONS[name], SETTINGS, cache=tmp_path, progress=interrupt)
    first = calls.since()
    resumed = calibrate(pipe, arch, CONDITIONS[name], SETTINGS, cache=tmp_path, resume=True)
    second = calls.since()
    again = calibrate(pipe, arch, CONDITIONS[name], SETTINGS, cache=tmp_path, resume=True)
    assert (first, second, calls.since()) == (3, 3, 0)
    straight = calibrate(pipe, arch, CONDITIONS[name], SETTINGS)
    assert same(resumed, straight)
    assert same(again, straight)


def test_interrupt_within_a_batch_leaves_no_half_of_it(tmp_path: Path) -> None:
    pipe, arch = tiny_dit(), architectures.load("dit")
    seen = []

    def stop(*_: Any) -> None:
        seen.append(1)
        if len(seen) == 5:  # the second step of the second batch
            raise KeyboardInterrupt

    handle = pipe.transformer.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, arch, CLASSES, SETTINGS, cache=tmp_path)
    handle.remove()
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["batch-00000.safetensors"]
    assert not any(m._forward_pre_hooks for m in pipe.transformer.modules())
    resumed = calibrate(pipe, arch, CLASSES, SETTINGS, cache=tmp_path, resume=True)
    assert same(resumed, calibrate(tiny_dit(), arch, CLASSES, SETTINGS))


def test_without_resume_everything_is_sampled_again(tmp_path: Path) -> None:
    pipe, arch = tiny_dit(), architectures.load("dit")
    calls = Calls(pipe)
    for _ in range(2):
        calibrate(pipe, arch, CLASSES, SETTINGS, cache=tmp_path)
        assert calls.since() == 6


def test_cache_is_named_by_everything_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(seed: int = 0, model: int = 0, prompts: list[str] = CLASSES, name: str = "dit", **changes: Any) -> str:
        arch = architectures.load("dit").model_copy(update={"name": name})
        return calibration_run._key(
            tiny_dit(seed=model), "transformer", arch, prompts, SETTINGS.model_copy(update=changes), seed
        )

    keys = [key(), key(seed=1), key(model=1), key(prompts=CLASSES[:2]), key(steps=4), key(guidance_scale=2.0)]
    keys += [key(name="another")]
    assert key() == keys[0]
    for library in ("diffusers", "transformers", "torch"):
        code_version.cache_clear()
        with monkeypatch.context() as changed:
            changed.setattr(metadata, "version", lambda name, newer=library: "99" if name == newer else "1")
            keys.append(key())
    code_version.cache_clear()
    assert len(set(keys)) == len(keys)
    assert key(timesteps="normal") == keys[0]  # all timesteps are recorded in any case


def other_vae(pipe: Any) -> None:
    with torch.no_grad():
        next(pipe.vae.parameters()).add_(1.0)


def other_scheduler_class(pipe: Any) -> None:
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)


def other_scheduler_config(pipe: Any) -> None:
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, beta_end=0.03)


def other_text_encoder(pipe: Any) -> None:
    with torch.no_grad():
        list(pipe.text_encoder.parameters())[-1].mul_(1.5)


def swapped_rows_of_the_text_encoder(pipe: Any) -> None:
    """A sum over the weights is the same."""
    with torch.no_grad():
        weight = next(p for p in pipe.text_encoder.parameters() if p.ndim == 2)
        weight.copy_(weight.flip(0))


def other_tokenizer(pipe: Any) -> None:
    pipe.tokenizer.add_tokens(["unheard-of"])


def other_dtype(pipe: Any) -> None:
    pipe.text_encoder.to(torch.float64)


@pytest.mark.parametrize(
    ("change", "new"),
    [(lambda pipe: None, False), (other_vae, False), (other_scheduler_class, True), (other_scheduler_config, True),
     (other_text_encoder, True), (swapped_rows_of_the_text_encoder, True), (other_tokenizer, True),
     (other_dtype, True)],
)  # fmt: skip
def test_resume_depends_on_all_that_feeds_the_transformer(change: Any, new: bool) -> None:
    arch, pipe = architectures.load("pixart"), tiny_pixart()
    change(pipe)
    a, b = (calibration_run._key(p, "transformer", arch, PROMPTS, SETTINGS, 0) for p in (tiny_pixart(), pipe))
    assert (a != b) is new


def test_resume_depends_on_where_the_second_expert_takes_over_and_on_what_it_is() -> None:
    arch, pipe = architectures.load("wan"), videos.wan_of_two_experts()

    def key(component: str = "transformer") -> str:
        return calibration_run._key(pipe, component, arch, PROMPTS, SETTINGS, 0)

    keys = [key(), key("transformer_2")]
    pipe.register_to_config(boundary_ratio=0.5)
    keys.append(key())
    ditq.quantize(pipe, "rtn-w8a8", component="transformer_2")
    keys.append(key())
    assert len(set(keys)) == 4


@pytest.mark.parametrize("change", [other_scheduler_config, other_text_encoder])
def test_resume_with_another_component_calibrates_again(change: Any, tmp_path: Path) -> None:
    arch, pipe = architectures.load("pixart"), tiny_pixart()
    before = calibrate(tiny_pixart(), arch, PROMPTS, SETTINGS, cache=tmp_path)
    calls = Calls(pipe)
    assert same(calibrate(pipe, arch, PROMPTS, SETTINGS, cache=tmp_path, resume=True), before)
    assert calls.since() == 0
    change(pipe)
    after = calibrate(pipe, arch, PROMPTS, SETTINGS, cache=tmp_path, resume=True)
    assert calls.since() == 6
    assert not same(after, before)


def test_a_run_without_resume_deletes_no_file_of_another(tmp_path: Path) -> None:
    arch = architectures.load("dit")
    calibrate(tiny_dit(), arch, CLASSES, SETTINGS, cache=tmp_path)
    (first, second) = sorted(tmp_path.rglob("*.safetensors"))
    present: list[bool] = []
    pipe = tiny_dit()
    pipe.transformer.register_forward_pre_hook(lambda *_: present.append(first.exists() and second.exists()))
    calibrate(pipe, arch, CLASSES, SETTINGS, cache=tmp_path)
    assert present == [True] * 6
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == [first, second]


def test_two_writers_of_one_file_leave_a_whole_one(tmp_path: Path) -> None:
    statistics = tiny_statistics(tiny_model("pixart"), "pixart")
    path = tmp_path / "s.safetensors"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: statistics.save(path), range(64)))
    assert same(Statistics.load(path), statistics)
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    times = torch.tensor([900.0, 100.0])
    group = GroupStatistics(torch.rand(2, 1, 3), torch.rand(4, 3), times.repeat(2))
    calls = [{"hidden_states": torch.rand(1, 2), "timestep": torch.tensor([9]), "flag": True, "scale": 0.5}]
    path = tmp_path / "s.safetensors"
    Statistics(times, {"g": group}, calls).save(path)
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ (1 << i % 8)]) + data[i + 1 :])
        try:
            loaded = Statistics.load(path)
        except CheckpointError as error:
            assert str(path) in str(error)
        else:  # padding and order of the header hold nothing
            pytest.fail(f"byte {i} of {len(data)}: {loaded}")


def test_cache_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DitqError, match=r"Cannot create.*--cache"):
        calibrate(tiny_dit(), architectures.load("dit"), CLASSES, SETTINGS, cache=tmp_path / "file")
    statistics = tiny_statistics(tiny_model("dit"), "dit")
    with pytest.raises(DitqError, match="Cannot write"):
        statistics.save(tmp_path / "missing" / "s.safetensors")


@pytest.mark.parametrize(
    "damage", ["truncated", "empty", "garbage", "exponent-bit", "tensor-missing", "wrong-shape", "no-timesteps"]
)
def test_damaged_cache_file_is_named(damage: str, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    pipe, arch = tiny_dit(), architectures.load("dit")
    calibrate(pipe, arch, CLASSES, SETTINGS, cache=tmp_path)
    path = next(tmp_path.rglob("batch-00001.safetensors"))
    data = path.read_bytes()
    if damage in ("truncated", "empty", "garbage"):
        path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "garbage": b"\x00" * 100}[damage])
    elif damage == "exponent-bit":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 0x40]))  # of the last float32
    else:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as stored:
            info = stored.metadata()
        name = next(key for key in tensors if key.endswith("absmax"))
        if damage == "tensor-missing":
            del tensors[name]
        elif damage == "no-timesteps":
            del tensors["timesteps"]
        else:
            tensors[name] = tensors[name][:, :, :-1].contiguous()
        save_file(tensors, path, info)
    with pytest.raises(CheckpointError, match=r"batch-00001\.safetensors.*Delete it"):
        calibrate(pipe, arch, CLASSES, SETTINGS, cache=tmp_path, resume=True)


@pytest.mark.parametrize("change", ["model", "steps", "prompts", "seed"])
def test_resume_takes_no_batch_of_another_run(change: str, tmp_path: Path) -> None:
    arch = architectures.load("dit")
    calibrate(tiny_dit(), arch, CLASSES, SETTINGS, cache=tmp_path)
    pipe = tiny_dit(seed=1 if change == "model" else 0)
    calls = Calls(pipe)
    steps = 2 if change == "steps" else 3
    calibrate(
        pipe,
        arch,
        CLASSES[::-1] if change == "prompts" else CLASSES,
        SETTINGS.model_copy(update={"steps": steps}),
        seed=1 if change == "seed" else 0,
        cache=tmp_path,
        resume=True,
    )
    assert calls.since() == 2 * steps


# ---------------------------------------------------------------------------------------- statistics


def test_statistics_survive_their_file(tmp_path: Path) -> None:
    statistics = tiny_statistics(tiny_model("pixart"), "pixart")
    statistics.save(tmp_path / "s.safetensors")
    assert same(Statistics.load(tmp_path / "s.safetensors"), statistics)
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_ranges_of_timesteps_select_maxima_and_rows() -> None:
    times = torch.tensor([900.0, 500.0, 100.0])
    group = GroupStatistics(
        torch.tensor([[[3.0]], [[1.0]], [[2.0]]]), torch.tensor([[3.0], [1.0], [2.0]]), times.clone()
    )
    assert group.channel_absmax(times).item() == 3.0
    assert group.channel_absmax(times, (0, 500)).item() == 2.0
    assert group.rows((0, 500)).flatten().tolist() == [1.0, 2.0]
    assert group.channel_absmax(times, (600, 700)).item() == 3.0  # no timestep in that range: all of them
    assert len(group.rows((600, 700))) == 3


def test_merge_takes_maxima_of_maxima_and_all_rows() -> None:
    times = torch.full((2,), 5.0)
    a, b = (
        Statistics(times[:1], {"g": GroupStatistics(torch.tensor([[[x, 4 - x]]]), torch.full((2, 2), x), times)})
        for x in (1.0, 3.0)
    )
    merged = merge([a, b]).groups["g"]
    assert merged.absmax.tolist() == [[[3.0, 3.0]]]
    assert merged.sample[:, 0].tolist() == [1.0, 1.0, 3.0, 3.0]


# ----------------------------------------------------------------------------------------- sampling


def test_noise_of_an_image_does_not_depend_on_the_batch_size(name: str) -> None:
    pipe, arch = PIPELINES[name](), architectures.load(name)
    starts: list[Tensor] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: starts.append((args[0] if args else kwargs["hidden_states"]).chunk(2)[0].clone()),
        with_kwargs=True,
    )
    for batch_size in (1, 2, 4):
        sample(pipe, arch, CONDITIONS[name], Sampling(steps=2, guidance_scale=3.0, batch_size=batch_size))
    first = starts[::2]  # of the two steps of a call
    alone, twos, all_four = torch.cat(first[:4]), torch.cat(first[4:6]), first[6]
    assert torch.equal(alone, twos)
    assert torch.equal(alone, all_four)


def test_latents_are_those_of_the_images(name: str) -> None:
    pipe, arch = PIPELINES[name](), architectures.load(name)
    samples = sample(pipe, arch, CONDITIONS[name], Sampling(steps=2, guidance_scale=3.0, batch_size=3, seed=4))
    assert samples.latents.shape == (4, 4, 8, 8)
    assert samples.seeds == [4, 5, 6, 7]
    assert samples.conditions == CONDITIONS[name]
    with torch.no_grad():
        # The batch it was decoded in: float sums may differ in the last bit between batch sizes.
        decoded = pipe.vae.decode(samples.latents[:3] / pipe.vae.config.scaling_factor).sample
    image = pipe.image_processor.postprocess(decoded)[0] if name == "pixart" else None
    assert len(samples.images) == 4
    assert image is None or image.tobytes() == samples.images[0].tobytes()


def test_class_names_and_numbers() -> None:
    pipe, arch = tiny_dit(), architectures.load("dit")
    assert resolve_conditions(pipe, arch, ["thing7", "12"]) == [7, 12]
    with pytest.raises(UsageError, match="a class 'thing7x'. Close: thing7.*1000 class names"):
        resolve_conditions(pipe, arch, ["thing7x"])


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], "no prompts"),
        ([""], "Prompt 1 of 1 is empty"),
        (["a cat", " \n"], "Prompt 2 of 2"),
        ("7", "got the string '7'"),
    ],
)
def test_empty_prompts_and_single_strings_are_refused(prompts: Any, words: str, name: str) -> None:
    with pytest.raises(UsageError, match=words):
        resolve_conditions(None, architectures.load(name), prompts)
    with pytest.raises(UsageError, match=words):
        calibrate(PIPELINES[name](), architectures.load(name), prompts, SETTINGS)
    with pytest.raises(UsageError, match=words):
        sample(PIPELINES[name](), architectures.load(name), prompts, Sampling(steps=2))


def test_statistics_that_cannot_be_written_say_how_to_choose_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "/somewhere")

    monkeypatch.setattr("ditq.calibration.statistics.save_file", full)
    statistics = tiny_statistics(tiny_model("pixart"), "pixart")
    with pytest.raises(DitqError, match=r"Cannot write .*: No space left on device\. .*--cache PATH"):
        statistics.save(tmp_path / "s.safetensors")
    assert list(tmp_path.iterdir()) == []
