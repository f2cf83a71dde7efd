"""The engine as the registry sees it: it runs whole transformers, so no single linear is ever given to it."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import NoReturn

import torch
from torch import Tensor

from ditq.engines.base import Engine, QuantizedWeight
from ditq.errors import DitqError
from ditq.numerics import Quantized
from ditq.plan import TensorFormat

_WHOLE = "it runs whole transformers, not single linears: export the model (ditq export DIR --engine openvino)"


class OpenVINOEngine(Engine):
    """Compiles the blocks of a transformer for the CPU, see ``ditq.deploy``."""

    name = "openvino"
    priority = -10  # nobody asks this engine before one that runs single linears

    def why_unavailable(self) -> str | None:
        if importlib.util.find_spec("openvino") is None:
            return "OpenVINO is not installed: pip install 'ditq[openvino]'"
        return _why_no_integers()

    def why_unsupported(self, weight: TensorFormat, activation: TensorFormat | None, device: torch.device) -> str:
        return _WHOLE

    def quantize_activations(self, x: Tensor, format: TensorFormat, scale: Tensor | None) -> Quantized:
        self._refuse()

    def linear(
        self, x: Quantized, x_format: TensorFormat, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        self._refuse()

    def dequantize_weight(self, weight: QuantizedWeight) -> Tensor:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise DitqError(f"Engine {self.name!r} cannot do this: {_WHOLE}.")


@cache
def _why_no_integers() -> str | None:
    """Tries a small layer: whether a CPU has integer kernels is for OpenVINO to know."""
    import openvino as ov

    from ditq.engines.openvino.linear import Kernel
    from ditq.engines.openvino.probe import execution

    try:
        found = execution(Kernel(64, 32, "i8"), 64)
    except RuntimeError as error:  # no CPU plugin for this machine, or one that cannot compile a product
        return f"OpenVINO {ov.__version__} cannot run here: {str(error).strip().splitlines()[0]}"
    if found == "float":
        return f"OpenVINO {ov.__version__} has no 8-bit products for this CPU (it needs AVX2-VNNI or AVX512-VNNI)"
    return None
