"""The map of errors: right numbers, right layers, no trace left in the models."""

import math

import pytest
import torch
from helpers import CLASSES, PROMPTS, QUICK, tiny_dit, tiny_pixart

import ditq
from ditq import architectures
from ditq.metrics.layer_errors import TimedCall, layer_errors, step_times
from ditq.sampling import Sampling

PIXART = architectures.load("pixart")
OPTIONS = {"steps": 3, "guidance_scale": 3.0, "seed": 1}


def test_errors_are_those_of_the_first_layer_by_hand() -> None:
    """Nothing comes before the first layer of the first block but 16-bit modules: its error is its own."""
    reference, quantized = tiny_dit(), tiny_dit()
    plan = ditq.quantize(quantized, "rtn-w4a8").plan
    # What stays unquantized is rounded to its storage format; the reference here is that 16-bit model.
    reference.transformer.to(getattr(torch, plan.storage_dtype)).float()
    inputs: list[torch.Tensor] = []
    name = plan.quantized[0].name
    reference.transformer.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    errors, _, _ = layer_errors(
        reference, quantized, architectures.load("dit"), CLASSES[:2], Sampling(**OPTIONS), runs=1
    )
    assert errors.layers == [layer.name for layer in plan.quantized]
    assert (len(errors.timesteps), errors.prompts) == (3, 2)
    for column in range(3):
        with torch.no_grad():
            y = reference.transformer.get_submodule(name)(inputs[column])
            yq = quantized.transformer.get_submodule(name)(inputs[column])
        by_hand = 10 * math.log10(y.square().sum() / (y - yq).square().sum())
        assert errors.sqnr_db[0][column] == pytest.approx(by_hand, abs=0.01)


def test_more_bits_err_less_in_every_role() -> None:
    means = {}
    for recipe in ("rtn-w4a4", "rtn-w8a8"):
        quantized = tiny_pixart()
        ditq.quantize(quantized, recipe)
        errors, _, _ = layer_errors(tiny_pixart(), quantized, PIXART, PROMPTS[:2], Sampling(**OPTIONS), runs=1)
        means[recipe] = [sum(row) / len(row) for row in errors.sqnr_db]
    assert all(b > a + 10 for a, b in zip(means["rtn-w4a4"], means["rtn-w8a8"], strict=True))


def test_smoothed_value_projection_shows_its_own_error() -> None:
    quantized = tiny_pixart()
    plan = ditq.quantize(quantized, "smoothquant-w8a8", prompts=PROMPTS, overrides=[*QUICK, "balance.alpha=0.5"]).plan
    assert any(x.smooth for x in plan.quantized)
    errors, _, _ = layer_errors(tiny_pixart(), quantized, PIXART, PROMPTS[:2], Sampling(**OPTIONS), runs=1)
    worst = {name: min(row) for name, row in zip(errors.layers, errors.sqnr_db, strict=True)}
    assert min(worst.values()) > 25, worst


def test_models_are_left_without_hooks_and_times_are_of_both() -> None:
    reference, quantized = tiny_pixart(), tiny_pixart()
    ditq.quantize(quantized, "rtn-w8a8")
    _, first, second = layer_errors(reference, quantized, PIXART, PROMPTS[:2], Sampling(**OPTIONS), runs=2)
    for model in (reference.transformer, quantized.transformer):
        assert not any(m._forward_hooks for m in model.modules())
    assert first.ratio_to_reference == 1.0
    assert second.ratio_to_reference == pytest.approx(first.ms_median / second.ms_median)
    assert (first.runs, first.batch) == (2, 4)  # two prompts, guided


def test_step_times_call_both_models_equally_often() -> None:
    class Counter(torch.nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x

    a, b = Counter(), Counter()
    step_times([TimedCall(a, b, (torch.zeros(3, 2),))], runs=4)
    assert a.calls == b.calls == 5
