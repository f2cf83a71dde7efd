"""Timesteps of a sampling run, in the units that the transformer gets."""

from __future__ import annotations

from helpers import tiny_dit, tiny_pixart
from pytest import MonkeyPatch

from ditq import architectures
from ditq.sampling import Sampling, trajectory_timesteps


def test_timesteps_are_those_of_the_steps_and_the_transformer_runs_once() -> None:
    pipe = tiny_pixart()
    calls = []
    handle = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    times = trajectory_timesteps(pipe, architectures.match(pipe.transformer), "a cat", Sampling(steps=7))
    handle.remove()
    pipe.scheduler.set_timesteps(7)
    assert times == pipe.scheduler.timesteps.tolist()
    assert len(calls) == 1
    assert "forward" not in pipe.transformer.__dict__


def test_timesteps_of_a_class_conditional_pipeline() -> None:
    pipe = tiny_dit()
    times = trajectory_timesteps(pipe, architectures.match(pipe.transformer), "1", Sampling(steps=4))
    assert len(times) == 4 and times == sorted(times, reverse=True)


def test_forward_is_put_back_after_an_error(monkeypatch: MonkeyPatch) -> None:
    pipe = tiny_pixart()
    monkeypatch.setattr(pipe.scheduler, "set_timesteps", lambda *a, **k: 1 / 0)
    try:
        trajectory_timesteps(pipe, architectures.match(pipe.transformer), "a cat", Sampling(steps=4))
    except ZeroDivisionError:
        pass
    else:
        raise AssertionError("no error")
    assert "forward" not in pipe.transformer.__dict__
