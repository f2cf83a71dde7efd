"""Choosing an engine: by priority, with reasons, never in silence."""

from __future__ import annotations

import pytest
import torch
from helpers import layer_plan, token_format, weight_format
from torch import nn

from ditq import engines
from ditq.engines import registry
from ditq.engines.torch.engine import TorchEngine
from ditq.errors import DitqError, UsageError
from ditq.layers import QuantizedLinear
from ditq.numerics import Grid

CPU = torch.device("cpu")


class Picky(TorchEngine):
    """Pretends to be fast, and runs 8-bit weights only."""

    name = "picky"
    priority = 5

    def why_unsupported(self, weight: Grid, activation: Grid | None, device: torch.device) -> str | None:
        return None if weight.bits == 8 else f"it runs 8-bit weights only, not {weight.bits}"


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> Picky:
    engine = Picky()
    known = {"picky": engine, **registry.engines()}
    monkeypatch.setattr(registry, "engines", lambda: known)
    registry.forget()
    yield engine  # type: ignore[misc]
    registry.forget()


def test_torch_is_known_and_runs_everything_on_cpu() -> None:
    assert engines.engines()["torch"].why_unavailable() is None
    for bits in range(2, 9):
        assert engines.choose(weight_format(bits), token_format(), CPU).name == "torch"


def test_higher_priority_wins_where_it_can(picky: Picky) -> None:
    assert engines.choose(weight_format(8), token_format(), CPU) is picky
    assert engines.choose(weight_format(4), token_format(), CPU).name == "torch"


def test_forced_engine_wins_over_priority(picky: Picky) -> None:
    with engines.use_engine("torch"):
        assert engines.choose(weight_format(8), token_format(), CPU).name == "torch"
    assert engines.choose(weight_format(8), token_format(), CPU) is picky


def test_forced_engine_that_cannot_do_the_job_says_why(picky: Picky) -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(32, 24), layer_plan())
    with engines.use_engine("picky"), pytest.raises(DitqError, match="picky: it runs 8-bit weights only, not 4"):
        layer(torch.randn(2, 32))


def test_forced_engine_that_is_not_available_says_why(picky: Picky, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picky, "why_unavailable", lambda: "needs a driver; install one")
    with engines.use_engine("picky"), pytest.raises(DitqError, match="picky: needs a driver; install one"):
        engines.choose(weight_format(8), token_format(), CPU)


def test_no_engine_for_a_device_gives_the_reason_of_each(picky: Picky) -> None:
    with pytest.raises(DitqError, match=r"int4.*on mps.*picky: .*torch: .*not on mps"):
        engines.choose(weight_format(4), token_format(), torch.device("mps"))


def test_unknown_engine_names_the_known() -> None:
    with pytest.raises(UsageError, match="Unknown engine 'tensorrt'.*torch"), engines.use_engine("tensorrt"):
        pass


def test_use_engine_ends_with_its_block_even_after_an_error(picky: Picky) -> None:
    with pytest.raises(KeyError), engines.use_engine("torch"):
        raise KeyError
    assert engines.choose(weight_format(8), token_format(), CPU) is picky
