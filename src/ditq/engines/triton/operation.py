"""Registers a kernel as an operation of torch: one node for ``torch.compile``, with shapes known before it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Operation:
    """The operation ``ditq::name``, which mutates nothing.

    Args:
        schema: arguments and results in the syntax of ``torch.library``.
        launch: the implementation on CUDA.
        reference: the implementation on a CPU, in plain torch.
        empty: empty results of the right shapes and dtypes. It must read sizes from ``x.shape``: ``len(x)`` would make
            them constants.

    Attributes:
        overload: the operation as torch registers it.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        launch: Callable[..., Any],
        reference: Callable[..., Any],
        empty: Callable[..., Any],
    ) -> None:
        torch.library.define(f"ditq::{name}", schema)
        torch.library.impl(f"ditq::{name}", "cuda", launch)
        torch.library.impl(f"ditq::{name}", "cpu", reference)
        torch.library.register_fake(f"ditq::{name}", empty)
        self.overload = getattr(torch.ops.ditq, name).default
        self._launch = launch

    def __call__(self, *arguments: Any) -> Any:
        # The dispatcher takes as long as a small kernel. Compilers and fake tensors need it; eager code does not.
        if not torch.compiler.is_compiling() and type(arguments[0]) is Tensor and arguments[0].is_cuda:
            return self._launch(*arguments)
        return self.overload(*arguments)
