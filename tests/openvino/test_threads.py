"""Torch's threads around a small graph."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ditq.openvino.threads import one_thread


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Counting(nn.Module):
    """Notes in how many threads it runs."""

    def forward(self, x: Tensor) -> Tensor:
        self.threads = torch.get_num_threads()
        if x.numel() == 0:
            raise ValueError("nothing")
        return x


def test_one_thread_inside_and_as_before_outside() -> None:
    model = Counting()
    model(torch.ones(1))
    assert model.threads == 2
    one_thread(model)
    model(torch.ones(1))
    assert model.threads == 1
    assert torch.get_num_threads() == 2


def test_threads_come_back_after_an_error() -> None:
    model = Counting()
    one_thread(model)
    with pytest.raises(ValueError, match="nothing"):
        model(torch.ones(0))
    assert torch.get_num_threads() == 2


def test_models_inside_of_models() -> None:
    inner = Counting()
    outer = nn.Sequential(inner, Counting())
    one_thread(inner)
    one_thread(outer)
    outer(torch.ones(1))
    assert inner.threads == outer[1].threads == 1
    assert torch.get_num_threads() == 2


def test_copies_restore_the_threads_too() -> None:
    model = Counting()
    one_thread(model)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        other(torch.ones(1))
        assert other.threads == 1
        assert torch.get_num_threads() == 2
