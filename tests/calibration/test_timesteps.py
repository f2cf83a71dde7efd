"""Normally distributed timesteps against the standard library; what they leave out of statistics."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch
from helpers import CLASSES, tiny_dit

from ditq import architectures
from ditq.calibration import GroupStatistics, Statistics
from ditq.calibration import run as calibration_run
from ditq.calibration.timesteps import normal_timesteps
from ditq.recipe import Calibration


@pytest.mark.parametrize("count", [1, 2, 3, 10, 20, 50, 250, 1000])
def test_steps_are_those_of_the_distribution(count: int) -> None:
    normal = NormalDist(0.4 * count, 0.4 * count)
    drawn = {min(max(int(normal.inv_cdf((i + 0.5) / count)), 0), count - 1) for i in range(count)}
    assert {count - 1 - i for i in normal_timesteps(count).nonzero().flatten().tolist()} == drawn


@pytest.mark.parametrize("count", [20, 50, 250])
def test_the_clean_end_is_seen_more(count: int) -> None:
    chosen = normal_timesteps(count)
    assert chosen[count // 2 :].sum() > 1.2 * chosen[: count // 2].sum()
    assert chosen[-1]
    assert not chosen.all()


def test_statistics_keep_the_chosen_timesteps_and_their_rows() -> None:
    times = torch.linspace(990, 0, 20)
    absmax = torch.rand(20, 2, 3)
    sample_time = times.repeat_interleave(2)
    sample = sample_time[:, None].repeat(1, 3)
    calls = [{"timestep": times[0]}]
    statistics = Statistics(times, {"g": GroupStatistics(absmax, sample, sample_time)}, calls)
    assert statistics.at("all") is statistics
    kept = statistics.at("normal")
    chosen = normal_timesteps(20)
    assert torch.equal(kept.timesteps, times[chosen])
    assert torch.equal(kept.groups["g"].absmax, absmax[chosen])
    assert kept.groups["g"].sample_time.tolist() == times[chosen].repeat_interleave(2).tolist()
    assert torch.equal(kept.groups["g"].sample[:, 0], kept.groups["g"].sample_time)
    assert kept.calls is calls


def test_one_cache_serves_whichever_timesteps_count() -> None:
    pipe, arch = tiny_dit(), architectures.load("dit")
    a, b, c = (
        calibration_run._key(pipe, "transformer", arch, CLASSES, settings, 0)
        for settings in (Calibration(), Calibration(timesteps="normal"), Calibration(steps=3))
    )
    assert a == b != c
