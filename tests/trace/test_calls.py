"""Whole calls that are kept: how many of which samples, unchanged, and saved to files."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CLASSES, CONDITIONS, PIPELINES, QUICK, example_inputs, tiny_dit, tiny_model
from torch import Tensor

import ditq
from ditq import api, architectures
from ditq.calibration import Statistics, calibrate
from ditq.calibration import capture as capture_module
from ditq.errors import DitqError
from ditq.recipe import Calibration
from ditq.trace.arguments import leaves
from ditq.trace.calls import Recorder, attended, merged


@pytest.fixture(params=PIPELINES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def recorder(keep: int = 1, seed: int = 0, architecture: str = "dit") -> Recorder:
    return Recorder(architectures.load(architecture), keep, seed)


def call(time: float, samples: int = 2, **more: Any) -> dict[str, Any]:
    """Under guidance: conditional rows first. Row i of the sample holds the numbers 100 i + time."""
    rows = torch.arange(2 * samples)[:, None] * 100 + torch.full((2 * samples, 3), time)
    return {"hidden_states": rows, "timestep": torch.full((2 * samples,), time), **more}


def equal(a: Any, b: Any) -> bool:
    x, y = leaves(a), leaves(b)
    return x.keys() == y.keys() and all(
        torch.equal(x[key], y[key]) and x[key].dtype == y[key].dtype
        if isinstance(x[key], Tensor)
        else x[key] == y[key]
        for key in x
    )


def test_both_conditions_of_a_sample_are_kept_and_nothing_of_others() -> None:
    kept = recorder(keep=5)
    shared = torch.randn(7)
    for time in (900.0, 500.0, 10.0):
        kept.record(call(time, table=shared, flag=True, return_dict=False), time)
    calls = kept.calls()
    assert len(calls) == 6  # all three timesteps of both samples
    for i, (slot, time) in enumerate((s, t) for s in (0, 1) for t in (900.0, 500.0, 10.0)):
        expected = torch.tensor([[100.0 * slot], [100.0 * (slot + 2)]]) + time
        assert torch.equal(calls[i]["hidden_states"], expected.expand(2, 3))
        assert calls[i]["timestep"].tolist() == [time, time]
        assert torch.equal(calls[i]["table"], shared)
        assert calls[i]["flag"] is True
        assert "return_dict" not in calls[i]


def test_every_timestep_is_as_likely() -> None:
    times = [float(t) for t in range(8)]
    counts: Counter[float] = Counter()
    for seed in range(200):
        kept = recorder(keep=2, seed=seed)
        for time in times:
            kept.record(call(time), time)
        for slot in (0, 1):
            chosen = [float(c["timestep"][0]) for c in kept.calls()[2 * slot : 2 * slot + 2]]
            assert len(set(chosen)) == 2
            counts.update(chosen)
    assert all(60 < counts[time] < 140 for time in times)  # 100 each, six standard deviations are 50


def test_two_calls_of_one_moment_stay_together() -> None:
    calls_apart = architectures.load("dit").model_copy(
        update={"guidance": architectures.load("dit").guidance.model_copy(update={"style": "calls"})}
    )
    kept = Recorder(calls_apart, 1, seed=0)
    for time in (9.0, 8.0, 7.0):
        for condition in (0.0, 0.5):
            kept.record(call(time + condition, samples=1), time)
    calls = kept.calls()
    assert len(calls) == 4  # two samples (rows), each with both calls of one moment
    for first, second in (calls[:2], calls[2:]):
        assert torch.equal(first["hidden_states"] + 0.5, second["hidden_states"])


def test_the_model_accepts_calls_recorded_from_a_pipeline(name: str, tmp_path: Path) -> None:
    pipe, arch = PIPELINES[name](), architectures.load(name)
    settings = Calibration(prompts=3, batch_size=2, steps=4, guidance_scale=3.0, rows=96, calls=2)
    seen: list[Tensor] = []
    handle = pipe.transformer.register_forward_hook(lambda _, args, output: seen.append(output[0]))
    statistics = calibrate(pipe, arch, CONDITIONS[name], settings, cache=tmp_path)
    handle.remove()
    assert len(statistics.calls) == 3 * 4  # all four timesteps, since a call has few tokens
    with torch.no_grad():
        for kept in statistics.calls:
            output = pipe.transformer(**kept, return_dict=False)[0]
            rows = [row for batch in seen for row in batch]
            assert all(min(float((row - mine).abs().max()) for row in rows) < 1e-4 for mine in output)
    again = calibrate(pipe, arch, CONDITIONS[name], settings, cache=tmp_path, resume=True)
    assert all(equal(a, b) for a, b in zip(statistics.calls, again.calls, strict=True))
    other = calibrate(pipe, arch, CONDITIONS[name], settings, seed=1, cache=tmp_path)
    assert not all(equal(a, b) for a, b in zip(statistics.calls, other.calls, strict=True))


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_more_calls_are_kept_where_rows_are_few(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough calls per prompt for the rows of the widest layer, for any batches; or the setting, if it is larger."""
    monkeypatch.setattr(capture_module, "ROWS_PER_INPUT", 1)
    pipe, arch = tiny_dit(), architectures.load("dit")
    widest, tokens = 4 * pipe.transformer.inner_dim, (8 // 2) ** 2

    def kept(prompts: int, **changes: Any) -> int:
        settings = {"prompts": prompts, "batch_size": batch_size, "steps": 8, "guidance_scale": 3.0, **changes}
        statistics = calibrate(pipe, arch, CLASSES, Calibration.model_validate(settings), seed=1)
        assert len(statistics.calls) % prompts == 0
        return len(statistics.calls) // prompts

    needed = math.ceil(widest / (4 * 2 * tokens))
    assert 1 < needed < 7  # otherwise this tests nothing
    assert kept(4) == needed
    assert kept(4, calls=needed + 1) == needed + 1
    assert kept(4, calls=0) == 0


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_calls_are_kept_for_gptq_only(rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(api, "calibrate", lambda *args, **_: asked.append(args[3]) or calibrate(*args))
    ditq.quantize(tiny_dit(), "smoothquant-w8a8", prompts=CLASSES, overrides=[*QUICK, f"rounding={rounding}"])
    assert [bool(settings.calls) for settings in asked] == [rounding == "gptq"]


def test_calls_survive_a_file(tmp_path: Path) -> None:
    arch = architectures.load("dit")
    nested = {"rotary": (torch.randn(3), torch.arange(4)), "options": {"a": None, "b": [1, 2.5, "c", False]}}
    statistics = Statistics(torch.tensor([1.0]), {}, [{**call(1.0), **nested}, {**call(2.0), **nested}])
    statistics.save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors")
    assert arch.forward.sample in loaded.calls[0]
    assert all(equal(a, b) for a, b in zip(statistics.calls, loaded.calls, strict=True))
    assert isinstance(loaded.calls[0]["rotary"], tuple)
    assert loaded.groups == {}


def test_merged_calls_hold_every_sample_once_and_mix_no_timesteps() -> None:
    arch, table = architectures.load("dit"), torch.randn(5)
    times = [9.0, 9.0, 3.0, 9.0, 3.0, 9.0]
    calls = [
        {**call(t, samples=1, table=table), "hidden_states": torch.full((2, 3), 10.0 * i)} for i, t in enumerate(times)
    ]
    large = merged(calls, arch, elements=18)
    assert [(len(c["hidden_states"]), set(c["timestep"].tolist())) for c in large] == [
        (6, {9.0}),
        (4, {3.0}),
        (2, {9.0}),
    ]
    assert sorted(x for c in large for x in c["hidden_states"][:, 0].tolist()) == sorted([0.0, 10, 20, 30, 40, 50] * 2)
    assert all(torch.equal(c["table"], table) for c in large)
    assert len(merged(calls, arch, elements=1)) == 6
    for changes in ({"table": table + 1}, {"flag": True}, {"hidden_states": torch.ones(2, 4)}):
        odd = {**calls[0], **changes}
        assert len(merged([calls[0], odd], arch)) == 2


@pytest.mark.parametrize("any_time", [False, True])
def test_model_returns_the_same_for_merged_calls(name: str, any_time: bool) -> None:
    model, arch = tiny_model(name), architectures.load(name)
    times = (900, 400, 10) if any_time else (400, 400, 400)
    calls = [{**example_inputs(name, seed=i), "timestep": torch.tensor([t, t])} for i, t in enumerate(times)]
    (batch,) = merged(calls, arch, any_time=any_time)
    with torch.no_grad():
        apart = torch.cat([model(**c, return_dict=False)[0] for c in calls])
        torch.testing.assert_close(model(**batch, return_dict=False)[0], apart, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_kept_is_named(tmp_path: Path) -> None:
    statistics = Statistics(torch.tensor([1.0]), {}, [call(1.0, processor=object())])
    with pytest.raises(DitqError, match=r"'processor' of the transformer cannot be saved"):
        statistics.save(tmp_path / "s.safetensors")
    with pytest.raises(DitqError, match="without its argument 'hidden_states'"):
        recorder().record({"timestep": 3}, 3.0)


def test_padded_text_is_left_out() -> None:
    x = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    text = torch.stack([x[0, 0], x[0, 1], x[1, 0]])
    assert torch.equal(attended(x, mask, "all"), text)
    assert torch.equal(attended(x, None, "all"), x.reshape(6, 4))
    assert torch.equal(attended(x, mask, None), x.reshape(6, 4))
    latents = torch.randn(2, 5, 4)
    both = attended(torch.cat([latents, x], 1), mask, "last")
    assert torch.equal(both, torch.cat([latents[0], text[:2], latents[1], text[2:]]))
    folded = torch.randn(6, 3, 4)  # rows that the mask does not fit: nothing is left out
    assert torch.equal(attended(folded, mask, "all"), folded.reshape(18, 4))


def test_positional_arguments_get_their_names() -> None:
    from ditq.calibration.capture import Capture

    model, arch = tiny_model("dit"), architectures.load("dit")
    inputs = example_inputs("dit")
    capture = Capture(arch, arch.groups(model), rows=8, seed=0)
    with capture.watching(model), torch.no_grad():
        model(inputs["hidden_states"], **{k: v for k, v in inputs.items() if k != "hidden_states"})
    (kept,) = capture.statistics().calls
    assert torch.equal(kept["hidden_states"], inputs["hidden_states"])
