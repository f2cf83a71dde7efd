"""The transformers quantization backend for text encoders that ``ditq export --whole-pipeline`` has written.

It does not import diffusers, because diffusers imports transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ditq.checkpoint.engine import checked, compile_graphs


class DitqConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a floating-point component that an engine executes."""

    def __init__(self, engine: dict[str, Any], quant_method: str = "ditq", **fields: Any) -> None:
        self.quant_method = quant_method
        self.engine = checked(engine)


class DitqQuantizer(HfQuantizer):
    """Loads the weights, then replaces modules by graphs. With another engine the model stays plain."""

    requires_calibration = False

    def __init__(self, quantization_config: DitqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._folder: Path | None = None
        self.compiled = False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._folder = Path(kwargs["checkpoint_files"][0]).parent
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        assert self._folder is not None
        self.compiled = compile_graphs(model, self.quantization_config.engine, self._folder)
        if not self.compiled:
            self.remove_quantization_config(model)
        return model

    def is_serializable(self) -> bool:
        return not self.compiled

    @property
    def is_trainable(self) -> bool:
        return False
