"""How a kernel becomes an operation of torch: one node for ``torch.compile``, with shapes known before it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def operation(
    name: str, schema: str, launch: Callable[..., Any], reference: Callable[..., Any], empty: Callable[..., Any]
) -> Callable[..., Any]:
    """Registers ``ditq::name``, which mutates nothing.

    Args:
        schema: arguments and results in the language of ``torch.library``.
        launch: what runs on CUDA.
        reference: what runs on a CPU, in plain torch.
        empty: results of the right shapes and dtypes; sizes by ``x.shape``, for ``len(x)`` would fix them.
    """
    found = torch.library.custom_op(f"ditq::{name}", launch, mutates_args=(), device_types="cuda", schema=schema)
    found.register_kernel("cpu")(reference)
    found.register_fake(empty)
    return found
