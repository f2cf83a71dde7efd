"""Queries and keys in 8 bits: their ranges, recorded during calls of a model, and their rounding in a graph.

The queries of an attention share one static scale, and its keys another, like the inputs of a linear layer with static
activations. Softmax and its product with the values stay in floating point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from ditq.architectures import Architecture
from ditq.calibration.run import NOISE_OFFSET
from ditq.errors import UsageError
from ditq.numerics import Grid, fake_quantize
from ditq.openvino.passes.attention import MOVES
from ditq.recipe import Calibration
from ditq.sampling import Sampling, draws_videos, sample
from ditq.trace.hooks import all_hooked, hooked

GRID = Grid(bits=8, granularity="tensor")
BOTTOM, TOP = GRID.code_range

# The largest magnitudes of queries and of keys, for each attention in the order of execution.
Largest = Sequence[tuple[float, float]]


class EveryAttention(TorchFunctionMode):
    """Inside, every attention computes with the queries and keys that ``change(query, key)`` returns."""

    def __init__(self, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._change = change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
        query, key = self._change(named.pop("query"), named.pop("key"))
        return func(query, key, named.pop("value"), *args[3:], **named)


@contextmanager
def observed(model: nn.Module, architecture: Architecture) -> Iterator[dict[str, list[tuple[float, float]]]]:
    """Inside, records the ranges of calls of a model in the yielded dictionary, ``{full name of a block: Largest}``.

    It does not contain blocks whose attention is not torch's ``scaled_dot_product_attention``.
    """
    ranges: dict[str, list[tuple[float, float]]] = {}
    block_name, index = [""], [0]

    def record(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        if block_name[0]:
            largest, i = ranges.setdefault(block_name[0], []), index[0]
            previous = largest[i] if i < len(largest) else (0.0, 0.0)
            largest[i : i + 1] = [(max(previous[0], _largest(query)), max(previous[1], _largest(key)))]
            index[0] += 1
        return query, key

    def inside(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            block_name[0], index[0] = name, 0

        return hook

    def blocks() -> Iterator[AbstractContextManager[None]]:
        for stack in architecture.stacks:
            for i, block in enumerate(cast(nn.ModuleList, model.get_submodule(stack))):
                yield hooked(block, inside(f"{stack}.{i}"), inside(""), always=True)

    with all_hooked(blocks()), EveryAttention(record):
        yield ranges


def sampled_ranges(
    pipe: Any,
    architecture: Architecture,
    conditions: Sequence[str],
    *,
    component: str = "transformer",
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, list[tuple[float, float]]]:
    """The ranges that :func:`observed` records while a pipeline samples, with noise that no comparison uses.

    Raises:
        UsageError: none of the model's blocks uses torch's attention.
    """
    model = getattr(pipe, component)
    sampling = Sampling(seed + NOISE_OFFSET, Calibration().steps, batch_size=1 if draws_videos(pipe) else 8)
    with observed(model, architecture) as ranges:
        sample(
            pipe, architecture, conditions, sampling, decode=False,
            on_batch=None if progress is None else lambda done: progress("calibrate attention", done, len(conditions)),
        )  # fmt: skip
    if not ranges:
        raise UsageError(
            f"{type(model).__name__} does not use torch's scaled_dot_product_attention; export it with "
            "attention='auto'."
        )
    return ranges


@contextmanager
def rounding(largest: Largest) -> Iterator[None]:
    """Inside, rounds the queries and keys of each attention in turn, as the graph does."""
    if not largest:
        yield
        return
    scales = iter([(q / TOP, k / TOP) for q, k in largest])

    def change(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        q, k = next(scales, (0.0, 0.0))
        if not q * k:  # not recorded, or all zeros
            return query, key
        return torch.ops.ditq.openvino_codes(query, q), torch.ops.ditq.openvino_codes(key, k)

    with EveryAttention(change):
        yield


def emulate(x: Tensor, scale: float) -> Tensor:
    """``x`` [..., channels] rounded to 8-bit codes with one scale, as floats."""
    static = torch.tensor([[scale]], device=x.device)
    rows = x.reshape(-1, x.shape[-1])
    return fake_quantize(rows, GRID, scale=static).reshape(x.shape)


def convert(context: Any) -> Any:
    """The nodes of ``ditq::openvino_codes``, for OpenVINO's frontend.

    It rounds before the transposition of the heads, which then moves a quarter of the bytes; the linear layer before
    it then writes the codes.
    """
    return _rounded(context.get_input(0), float(context.get_values_from_const_input(1))).outputs()


def _rounded(x: Any, scale: float) -> Any:
    import openvino.opset13 as op

    node = x.get_node()
    kind = node.get_type_name()
    if kind in MOVES:
        inner, order = _rounded(node.input_value(0), scale), node.input_value(1)
        zero_keeps_size = node.get_attributes().get("special_zero")
        return op.transpose(inner, order) if kind == "Transpose" else op.reshape(inner, order, zero_keeps_size)
    ends = [op.constant(np.float32(end * scale)) for end in (BOTTOM, TOP, BOTTOM, TOP)]
    return op.fake_quantize(x, *ends, TOP - BOTTOM + 1)


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().amax())
