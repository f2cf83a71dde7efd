"""The diffusers quantization backend ``ditq``, which loads and saves the quantized layers of a checkpoint."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from ditq.architectures import load as load_architecture
from ditq.architectures import match
from ditq.checkpoint.engine import checked, compile_graphs
from ditq.checkpoint.registration import register
from ditq.checkpoint.verify import DIGESTS, verify
from ditq.conversion import quantize_model, replace
from ditq.conversion.folding import BUFFER, prepare, unfold
from ditq.conversion.wiring import unwire, wire
from ditq.digests import of_tensor
from ditq.errors import CheckpointError, DitqError, UsageError
from ditq.layers import Clock, QuantizedLinear, TimestepLinear
from ditq.plan import Plan
from ditq.recipe import load as load_recipe


class Method(str, Enum):  # noqa: UP042 - diffusers reads `.value` of a str-valued enum member
    DITQ = "ditq"


class DitqConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a transformer: ``quant_method`` and the fields of a plan.

    ``DitqConfig(recipe="rtn-w8a8")`` quantizes while loading, for recipes without calibration. A config with neither
    plan nor recipe belongs to a floating-point component that an engine executes (a VAE, a text encoder).

    Args:
        plan: the plan of a quantized transformer.
        recipe: the name of a recipe to apply while loading.
        engine: a runtime and its options: ``{"name": "openvino", "shapes": "dynamic", "attention": "auto", "options":
            {"NUM_STREAMS": 1}}``. Its graphs (``ditq export``) are in a folder of that name beside the weights.
        fields: the fields of a plan, as read from ``config.json``.
    """

    def __init__(
        self,
        plan: Plan | None = None,
        recipe: str | None = None,
        engine: dict[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        self.quant_method = Method.DITQ
        self.engine = None if engine is None else checked(engine)
        fields.pop("quant_method", None)
        if plan is None and "layers" in fields:
            plan = Plan.from_dict({**fields, "recipe": recipe})
        if plan is None and recipe is None and engine is None:
            raise CheckpointError("A ditq quantization_config needs the fields of a plan, or the name of a recipe.")
        self.plan, self.recipe = plan, recipe

    def to_dict(self) -> dict[str, Any]:
        fields: dict[str, Any] = {} if self.recipe is None else {"recipe": self.recipe}
        if self.plan is not None:
            fields = self.plan.model_dump(mode="json", exclude_none=True)
        engine = {} if self.engine is None else {"engine": self.engine}
        return {"quant_method": self.quant_method.value, **engine, **fields}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def __repr__(self) -> str:
        return f"DitqConfig({self.plan.hash() if self.plan else self.recipe or self.engine})"

    @property
    def is_plain(self) -> bool:
        """Whether the component is not quantized by ditq."""
        return self.plan is None and self.recipe is None


class DitqQuantizer(DiffusersQuantizer):
    """The methods that diffusers calls to load and save a transformer quantized by ditq."""

    requires_calibration = False
    required_packages = ("ditq",)
    use_keep_in_fp32_modules = False

    def __init__(self, quantization_config: DitqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized: bool = kwargs.get("pre_quantized", True)
        self.dtype = torch.float32
        self._parameters: frozenset[str] = frozenset()
        self._stored: frozenset[str] = frozenset()
        self._folder: Path | None = None
        self.compiled = False
        self._model: weakref.ref[nn.Module] | None = None

    @property
    def plan(self) -> Plan:
        plan = self.quantization_config.plan
        if plan is None:
            raise DitqError("This transformer is not quantized yet: its config only names a recipe.")
        return plan

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        self.dtype = torch_dtype or torch.float32
        return torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self._folder = Path(checkpoint_files[0]).parent
        if self.pre_quantized and not self.quantization_config.is_plain:
            verify(checkpoint_files, self.plan)
            self._stored = frozenset(loaded_keys)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.pre_quantized and not self.quantization_config.is_plain:
            build(model, self.plan, self.dtype)
            # diffusers would ignore them, and a model without a fold generates other images.
            unexpected = sorted(self._stored - model.state_dict().keys())
            if unexpected:
                raise CheckpointError(
                    f"The checkpoint holds tensor {unexpected[0]!r}, which the plan does not account for."
                )

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if not self.pre_quantized:
            recipe = load_recipe(self.quantization_config.recipe)
            if recipe.needs_calibration:
                raise UsageError(
                    f"Recipe {recipe.name!r} needs calibration and cannot be applied while loading; "
                    "use ditq.quantize(pipe, recipe, prompts=...)."
                )
            self.quantization_config.plan = quantize_model(model, match(model), recipe, None)
            self.pre_quantized = True
        config = self.quantization_config
        self.remember(model)
        assert self._folder is not None
        self.compiled = compile_graphs(model, config.engine, self._folder)
        if not self.compiled:
            config.engine = None  # a copy saved from this model will not have graphs
            if not config.is_plain:
                self._wire(model)
        target = cast(Any, model)
        if config.is_plain and not self.compiled:
            other_fields = {key: value for key, value in target.config.items() if key != "quantization_config"}
            target._internal_dict = type(target.config)(other_fields)
        else:
            target.register_to_config(quantization_config=config)
        return model

    def _wire(self, model: nn.Module) -> None:
        try:
            architecture = load_architecture(self.plan.architecture)
        except UsageError:
            return  # a user's architecture file is not part of a checkpoint; the model runs without wiring
        wire(model, architecture)

    def remember(self, model: nn.Module) -> None:
        """Stores the names of the parameters: only they are saved in 16 bit, and a state dict does not mark them."""
        self._parameters = frozenset(name for name, _ in model.named_parameters())
        self._model = weakref.ref(model)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}  # a copy belongs to another model

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        if not self.pre_quantized:
            return False
        parent, _, name = param_name.rpartition(".")
        if name == BUFFER:
            return True
        return name != "bias" and isinstance(model.get_submodule(parent), QuantizedLinear)

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        # Not param_value: diffusers has already cast it to the model's dtype, scales included.
        parent, _, name = param_name.rpartition(".")
        model.get_submodule(parent)._buffers[name] = state_dict[param_name].to(target_device)

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        if self.pre_quantized and missing_keys:
            raise CheckpointError(f"The checkpoint lacks tensor {missing_keys[0]!r} of {type(model).__name__}.")
        return missing_keys

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = True
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Casts unquantized parameters to their 16-bit storage dtype, and adds a checksum of every tensor."""
        if self.compiled:
            raise UsageError(
                "Parts of this model are compiled graphs and cannot be saved again. Copy its folder, or load it "
                "inside ditq.use_engine('torch')."
            )
        if not safe_serialization:
            raise UsageError("ditq writes safetensors only; leave safe_serialization=True.")
        if self.quantization_config.is_plain:
            return state_dict, {}
        _refuse_adapters(state_dict)
        storage = getattr(torch, self.plan.storage_dtype)
        out = {}
        for name, tensor in state_dict.items():
            in_16_bit = name in self._parameters and tensor.dtype == torch.float32
            out[name] = tensor.detach().to(storage) if in_16_bit else tensor
        return out, {DIGESTS: json.dumps({name: of_tensor(tensor) for name, tensor in out.items()})}

    def _dequantize(self, model: nn.Module) -> nn.Module:
        if self.compiled:
            raise UsageError("Compiled graphs cannot be dequantized; load the folder inside ditq.use_engine('torch').")
        for name, module in list(model.named_modules()):
            if isinstance(module, TimestepLinear) or (
                isinstance(module, QuantizedLinear) and ".ranges." not in f".{name}"
            ):
                replace(model, name, module.dequantize())
        unwire(model)
        unfold(model, load_architecture(self.plan.architecture), self.plan.folds)
        # The key is removed, not set to None, because diffusers would write it.
        target = cast(Any, model)
        target._internal_dict = FrozenDict({k: v for k, v in target.config.items() if k != "quantization_config"})
        return model

    @property
    def is_serializable(self) -> bool:
        # diffusers asks before it writes anything.
        model = None if self._model is None else self._model()
        if model is not None and not self.quantization_config.is_plain:
            _refuse_adapters(name for name, _ in model.named_modules())
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top can be trained; integer weights cannot


def _refuse_adapters(names: Iterable[str]) -> None:
    """Raises if ``names``, of modules or tensors, are those of a model with adapters of PEFT."""
    if any("base_layer" in name.split(".") for name in names):
        raise UsageError(
            "Adapters are loaded, and a quantized checkpoint cannot hold them. Call ditq.fuse_lora(pipe) to save them "
            "with the model, or pipe.unload_lora_weights() (transformer.unload_lora()) to save it without."
        )


def build(model: nn.Module, plan: Plan, dtype: torch.dtype) -> None:
    """Replaces the layers of ``model`` (on the meta device) as its plan says. Tensors are loaded afterwards.

    Raises:
        CheckpointError: the plan names a layer that the model does not have, or that has another size.
    """
    for record in plan.folds:
        prepare(model, record)
    clock = Clock()
    for layer in plan.quantized:
        try:
            linear = model.get_submodule(layer.name)
        except AttributeError as error:
            raise CheckpointError(
                f"The plan names layer {layer.name!r}, which {type(model).__name__} does not have."
            ) from error
        sizes = (getattr(linear, "in_features", None), getattr(linear, "out_features", None))
        if sizes != (layer.in_features, layer.out_features):
            raise CheckpointError(
                f"Layer {layer.name!r} is {layer.in_features} -> {layer.out_features} in the plan, but "
                f"{sizes[0]} -> {sizes[1]} in {type(model).__name__}."
            )
        if layer.timesteps:
            inner = layer.model_copy(update={"timesteps": None})
            ranges = [QuantizedLinear(inner, dtype=dtype, device="meta") for _ in layer.timesteps]
            replace(model, layer.name, TimestepLinear(layer, ranges, clock))
        else:
            replace(model, layer.name, QuantizedLinear(layer, dtype=dtype, device="meta"))
    if any(layer.timesteps for layer in plan.quantized):
        if plan.time_argument is None:
            raise CheckpointError("The plan is timestep-aware but has no time_argument.")
        clock.attach(model, plan.time_argument)


def attach(model: nn.Module, plan: Plan) -> None:
    """Marks a model that was quantized in memory, so that ``save_pretrained`` writes a ditq checkpoint."""
    config = DitqConfig(plan=plan)
    quantizer = DitqQuantizer(config, pre_quantized=True)
    quantizer.dtype = next(model.parameters()).dtype
    quantizer.remember(model)
    target = cast(Any, model)
    target.is_quantized = True
    target.quantization_method = config.quant_method
    target.hf_quantizer = quantizer
    target.register_to_config(quantization_config=config)


# If importing this module imported diffusers, its registration was deferred until here.
register()
