"""The transformers quantization backend for text encoders that ``ditq export --whole-pipeline`` has written.

It does not import diffusers, because diffusers imports transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ditq.checkpoint.engine import checked, compile_graphs
from ditq.errors import CheckpointError, UsageError


class DitqConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a floating-point component that an engine executes.

    Its arguments are those of ``ditq.DitqConfig``, because ``PipelineQuantizationConfig(quant_backend="ditq")`` passes
    the same ones to both. All but ``engine`` are refused when a model is loaded.
    """

    def __init__(
        self,
        plan: Any = None,
        recipe: Any = None,
        engine: dict[str, Any] | None = None,
        overrides: Any = (),
        modules_to_not_convert: Any = (),
        **fields: Any,
    ) -> None:
        self.quant_method = fields.pop("quant_method", "ditq")
        self.engine = None if engine is None else checked(engine)
        self.plan, self.recipe = plan, recipe
        if plan is None and recipe is None and engine is None:
            raise CheckpointError("A ditq quantization_config of a text encoder needs an engine.")

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, "engine": self.engine}


class DitqQuantizer(HfQuantizer):
    """Loads the weights, then replaces modules by graphs. With another engine the model stays plain."""

    requires_calibration = False

    def __init__(self, quantization_config: DitqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if quantization_config.plan is not None or quantization_config.recipe is not None:
            raise UsageError(
                "ditq quantizes the transformer of a pipeline, not a component of transformers such as a text "
                "encoder. Leave it out of the PipelineQuantizationConfig, which takes "
                "quant_mapping={'transformer': DitqConfig(...)} or components_to_quantize=['transformer'], or give it "
                "a config of another backend, e.g. transformers.QuantoConfig(weights='int8')."
            )
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
