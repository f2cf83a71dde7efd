"""Sensitivity of a tiny pipeline: measured again by hand, resumed, shared, and without traces in the model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import videos
from helpers import CLASSES, draw, tiny_dit, tiny_pixart, token_format, weight_format
from helpers import PROMPTS as TEXTS
from probing import PROMPTS, SAMPLING, TRIALS, logged, measured

from ditq import architectures
from ditq.allocation import ImageMetrics, Scores, sensitivity
from ditq.allocation.scores import PREDICTION, MetricKind
from ditq.allocation.sensitivity import NOISE_OFFSET
from ditq.conversion.storage import round_to_storage
from ditq.errors import DitqError, UsageError
from ditq.numerics import fake_quantize
from ditq.sampling import Sampling, sample

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sensitivity")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Scores:
    """The scores of all layers, of one process that nothing interrupted."""
    return measured(folder / "whole")


def values(scores: Scores) -> Any:
    """All but what belongs to one run."""
    return scores.model_dump(exclude={"info"})


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def start(storage: Path, log: Path, seconds: float = 0.0, last: int = 0) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    arguments = [str(HERE / "probing.py"), str(storage), str(log), str(seconds), str(last)]
    # The same number of threads: sums are in the same order then.
    command = [sys.executable, *arguments, str(torch.get_num_threads())]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})


def wait_for(log: Path, count: int) -> None:
    for _ in range(6000):
        if len(lines(log)) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"{len(lines(log))} of {count} evaluations after 300 s")


# ------------------------------------------------------------------------------------- what is measured


def test_every_layer_is_measured_at_every_width(whole: Scores) -> None:
    assert (whole.part, whole.unit, whole.choices) == ("weights", "layer", ("w8", "w4"))
    parts = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"]
    assert whole.genes == tuple(f"transformer_blocks.{i}.{part}" for i in range(2) for part in parts)
    assert whole.roles[:2] == (("self_attn.q",), ("self_attn.k",))
    assert whole.parameters == (128 * 128,) * 4 + (128 * 512,) * 2 + (128 * 128,) * 4 + (128 * 512,) * 2
    # Up to 4 moments of each prompt: both steps.
    assert len(whole.steps) == 2
    assert whole.steps[0] > whole.steps[1]
    assert whole.prompts == (0, 0, 1, 1)
    assert whole.timesteps == (*sorted(whole.steps), *sorted(whole.steps))
    assert set(whole.rows.values()) == {16.0 * 2 * 2}  # tokens, halves of the guidance, steps; of one image
    assert (whole.info["measured"], whole.info["prompts"], whole.info["steps"]) == (TRIALS, 2, 2)
    harms = whole.harms()
    assert harms.shape == (12, 2, 2)
    assert (harms > 0).all()
    assert (harms[:, 1] > 10 * harms[:, 0]).all()  # 4 bits have 16 times larger steps than 8 bits


@pytest.mark.parametrize("part", ["weights", "activations"])
def test_values_are_those_of_a_model_changed_by_hand(part: str) -> None:
    scores = measured(None, part=part, bits=(4,), unit="role")
    pipe, arch = tiny_dit(), architectures.load("dit")
    model = pipe.transformer
    calls: list[Any] = []
    handle = model.register_forward_pre_hook(lambda m, a, k: calls.append((a, k)), with_kwargs=True)
    sample(pipe, arch, PROMPTS, Sampling(**{**SAMPLING, "seed": NOISE_OFFSET}))
    handle.remove()

    @torch.no_grad()
    def outputs() -> list[torch.Tensor]:
        return [model(*args, **kwargs)[0].double() for args, kwargs in calls]

    with torch.no_grad():
        round_to_storage(model)
    reference = outputs()
    for linear in arch.linears(model):
        if linear.role != "ffn.down":
            continue
        if part == "weights":
            linear.module.weight.data = fake_quantize(linear.module.weight.detach(), weight_format(4))
        else:
            linear.module.register_forward_pre_hook(
                lambda _, args: fake_quantize(args[0].flatten(0, -2), token_format(4)).reshape(args[0].shape)
            )
    errors = [
        (b - a).square().sum((1, 2, 3)) / a.square().sum((1, 2, 3)) for a, b in zip(reference, outputs(), strict=True)
    ]
    # By hand [steps, halves of the guidance, prompts]; stored by prompt, the last timestep first.
    by_prompt = torch.stack(errors).reshape(2, 2, 2).mean(1).flip(0).T.flatten()
    gene = scores.genes.index("ffn.down")
    assert scores.values[PREDICTION][gene][0] == pytest.approx(by_prompt.tolist(), rel=1e-3)
    assert scores.parameters[gene] == 2 * 128 * 512


def test_rows_belong_to_their_prompts_whatever_the_batches() -> None:
    prompts = CLASSES[:3]
    together, apart, odd = (
        measured(None, prompts=prompts, unit="block", bits=(3,), moments=2, sampling={"batch_size": size})
        for size in (3, 1, 2)
    )
    assert together.prompts == (0, 0, 1, 1, 2, 2)
    harms = together.harms()
    assert np.ptp(harms, axis=-1).min() > 1e-3 * harms.mean()  # prompts differ
    assert apart.harms() == pytest.approx(harms, rel=1e-3)
    assert odd.harms() == pytest.approx(harms, rel=1e-3)


def test_fewer_moments_are_some_of_the_timesteps() -> None:
    scores = measured(None, unit="block", bits=(4,), moments=1, sampling={"steps": 3})
    assert scores.prompts == (0, 1)
    assert len(scores.steps) == 3
    assert set(scores.timesteps) <= set(scores.steps)


def test_a_text_model_with_a_recipe_that_needs_calibration() -> None:
    options: dict[str, Any] = {"recipe": "smoothquant-w4a8", "unit": "block", "bits": (4,), "prompts": TEXTS[:2]}
    with pytest.raises(UsageError, match="'smoothquant-w4a8' needs calibration: pass calibration="):
        measured(None, tiny_pixart(), **options)
    scores = measured(None, tiny_pixart(), calibration=TEXTS[2:], part="activations", **options)
    assert scores.choices == ("a4",)
    assert scores.harms().shape == (2, 1, 2)
    assert (scores.harms() > 0).all()


def test_metrics_of_images_are_measured_on_paired_noise() -> None:
    seen: list[tuple[Any, Any]] = []

    def measure(reference: Any, other: Any) -> dict[str, list[float]]:
        seen.append((reference, other))
        norm = other.latents.flatten(1).norm(dim=1).tolist()
        distance = (other.latents - reference.latents).flatten(1).norm(dim=1).tolist()
        return {"norm": norm, "distance": distance, "extra": [0.0, 0.0]}

    kinds = {
        "norm": MetricKind(kind="own", higher_is_better=True, title="norm"),
        "distance": MetricKind(kind="paired", higher_is_better=False, title="distance"),
    }
    scores = measured(None, unit="block", bits=(8, 2), images=ImageMetrics(kinds, measure))
    assert set(scores.metrics) == {PREDICTION, "norm", "distance"}
    assert {tuple(samples.seeds) for pair in seen for samples in pair} == {(NOISE_OFFSET, NOISE_OFFSET + 1)}
    own = sample(tiny_dit(), architectures.load("dit"), PROMPTS, Sampling(**{**SAMPLING, "seed": NOISE_OFFSET}))
    norms = own.latents.flatten(1).norm(dim=1).tolist()
    assert scores.reference == {"norm": pytest.approx(norms, rel=0.01)}  # of the model rounded to 16 bit
    distance = scores.harms("distance")
    assert distance.shape == (2, 2, 2)
    assert (distance[:, 1] > distance[:, 0]).all()
    assert (distance > 0).all()


# ------------------------------------------------------------------------------------- the study


def test_the_same_run_again_evaluates_nothing(whole: Scores, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the laboratory is set up again")

    monkeypatch.setattr(sensitivity, "_Laboratory", fail)
    again = measured(folder / "whole")
    assert again.info["measured"] == 0
    assert values(again) == values(whole)


def test_results_are_in_the_cache_by_what_they_depend_on() -> None:
    options: dict[str, Any] = {"storage": None, "unit": "block", "bits": (5,)}
    first = measured(**options)
    assert first.info["measured"] == 3
    assert values(measured(**options)) == values(first)
    assert measured(**options).info["measured"] == 0
    for change in (
        {"part": "activations"}, {"bits": (6,)}, {"unit": "role"}, {"recipe": "rtn-w8a8"}, {"moments": 1},
        {"prompts": CLASSES[1:3]}, {"sampling": {"seed": 1}}, {"sampling": {"steps": 3}}, {"pipe": tiny_dit(1)},
    ):  # fmt: skip
        assert measured(**{**options, **change}).info["measured"] > 0, change


def test_a_killed_run_goes_on_without_repeating_a_trial(
    whole: Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, log = tmp_path / "study", tmp_path / "log"
    worker = start(storage, log, last=11)
    try:
        wait_for(log, 11)
    finally:
        worker.send_signal(signal.SIGKILL)
    assert worker.wait(10) == -signal.SIGKILL
    finished, interrupted = lines(log)[:10], lines(log)[10:]
    assert len(interrupted) == 1
    monkeypatch.setattr(sensitivity._Laboratory, "measured", logged(log))
    resumed = measured(storage, patience=1e9)  # a process of this machine is known to have ended
    assert resumed.info["measured"] == TRIALS - 10
    later = lines(log)[11:]
    assert interrupted[0] in later
    assert len(set(finished + later)) == len(finished + later) == TRIALS
    assert values(resumed) == values(whole)


def test_two_processes_share_the_work(whole: Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, log, own = tmp_path / "study", tmp_path / "log", tmp_path / "own"
    worker = start(storage, log, 0.05)
    try:
        wait_for(log, 1)
        monkeypatch.setattr(sensitivity._Laboratory, "measured", logged(own, 0.05))
        shared = measured(storage)
        assert worker.wait(60) == 0
    finally:
        worker.kill()
    assert shared.info["measured"] == len(lines(own)) > 0
    assert len(lines(log)) > 1
    assert len({*lines(log), *lines(own)}) == len(lines(log)) + len(lines(own)) == TRIALS
    assert values(shared) == values(whole)


def test_a_storage_of_another_run_is_refused(whole: Scores, folder: Path) -> None:
    with pytest.raises(UsageError, match="belongs to another study: .*moments is 4 there, 1 here"):
        measured(folder / "whole", moments=1)


def test_progress_counts_measurements() -> None:
    seen: list[tuple[str, int, int]] = []
    measured(None, unit="block", bits=(7,), progress=lambda *state: seen.append(state))
    assert [state for state in seen if state[0] == "sensitivity"] == [("sensitivity", i, 3) for i in (1, 2, 3)]


# ------------------------------------------------------------------------------------- the model


def assert_untouched(pipe: Any, state: dict[str, torch.Tensor], modules: dict[str, Any], image: torch.Tensor) -> None:
    after = pipe.transformer.state_dict()
    assert list(after) == list(state)
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in state.items()
    )
    assert {name: (module, type(module)) for name, module in pipe.transformer.named_modules()} == modules
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in pipe.transformer.modules())
    assert torch.equal(draw(pipe), image)


def traced(pipe: Any) -> tuple[Any, Any, Any]:
    modules = {name: (module, type(module)) for name, module in pipe.transformer.named_modules()}
    return {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}, modules, draw(pipe)


@pytest.mark.parametrize("part", ["weights", "activations"])
def test_the_model_is_left_bit_for_bit_as_it_was(part: str, tmp_path: Path) -> None:
    pipe = tiny_dit()
    before = traced(pipe)
    assert measured(tmp_path / "s", pipe, part=part, unit="block", bits=(4,)).info["measured"] == 3
    assert_untouched(pipe, *before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_model_is_left_as_it_was_after_an_error(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, original, count = tiny_dit(), sensitivity.outputs_of, 0

    def fail(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:  # the reference, a block, and another block
            raise error
        return original(*args)

    monkeypatch.setattr(sensitivity, "outputs_of", fail)
    before = traced(pipe)
    with pytest.raises(error):
        measured(tmp_path / "s", pipe, unit="block", bits=(4,))
    assert count == 3
    assert_untouched(pipe, *before)
    monkeypatch.undo()
    assert measured(tmp_path / "s", pipe, unit="block", bits=(4,), patience=1e9).info["measured"] == 1


# ------------------------------------------------------------------------------------- errors


def test_usage_errors() -> None:
    with pytest.raises(UsageError, match=r"Sensitivity of weights needs widths below 16 bit.*got \[16\]"):
        measured(None, bits=(16,))
    with pytest.raises(UsageError, match=r"Sensitivity of activations needs widths below 16 bit.*got \[\]"):
        measured(None, part="activations", bits=())
    with pytest.raises(UsageError, match="at least 1 timestep of each prompt, got moments=0"):
        measured(None, moments=0)
    with pytest.raises(UsageError, match="prompt"):
        measured(None, prompts=[])
    with pytest.raises(UsageError, match="has activations in 16 bit"):
        measured(None, recipe="rtn-w4a16", part="activations")


def test_a_transformer_that_is_not_called_is_an_error() -> None:
    with pytest.raises(DitqError, match="transformer_2 is not called in these sampling steps"):
        measured(
            None, videos.wan_of_two_experts(), component="transformer_2", prompts=TEXTS[:1], unit="block", bits=(4,),
            sampling={"steps": 1, "arguments": videos.PIPELINES["wan"][1]},
        )  # fmt: skip


def test_nan_names_the_metric_and_the_layer(tmp_path: Path) -> None:
    kinds = {"norm": MetricKind(kind="paired", higher_is_better=True, title="norm")}
    images = ImageMetrics(kinds, lambda reference, other: {"norm": [1.0, float("nan")]})
    with pytest.raises(DitqError, match=r"norm is NaN or Inf with transformer_blocks\.0 at w4"):
        measured(tmp_path / "s", unit="block", bits=(4,), images=images)
