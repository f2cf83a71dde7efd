"""The diffusers quantization backend ``ditq``, which loads and saves the quantized layers of a checkpoint."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from ditq.architectures import Architecture, match
from ditq.architectures import load as load_architecture
from ditq.checkpoint.config import DitqConfig as DitqConfig
from ditq.checkpoint.config import Method as Method
from ditq.checkpoint.counting import count_as_float
from ditq.checkpoint.engine import compile_graphs
from ditq.checkpoint.registration import register
from ditq.checkpoint.verify import metadata, refuse_unplanned, verify
from ditq.conversion import quantize_model, replace
from ditq.conversion.folding import BUFFER, prepare, unfold
from ditq.conversion.storage import dtype_of, stays_float32
from ditq.conversion.wiring import unwire, wire
from ditq.errors import CheckpointError, DitqError, UsageError, warn
from ditq.layers import Clock, QuantizedLinear, TimestepLinear, with_steps
from ditq.plan import Plan

_ALIGNMENT = 64
"""Bytes; torch allocates memory of a CPU at multiples of this."""

FOREIGN_SCALES = ("scale_weight", "weight_scale", "weight_scale_inv", "scale_input", "input_scale", "scaled_fp8")
"""Names of tensors that belong to 8-bit weights in checkpoints of other tools."""


class DitqQuantizer(DiffusersQuantizer):
    """The methods that diffusers calls to load and save a transformer quantized by ditq."""

    requires_calibration = False
    required_packages = ("ditq",)
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: DitqConfig, **kwargs: Any) -> None:
        # A copy, which gets the plan of this model: the caller may load other models with the same config.
        config = copy.copy(quantization_config)
        super().__init__(config, **kwargs)
        # `from_single_file` does not say: its config is the caller's, so that a recipe is one to apply.
        self.pre_quantized: bool = kwargs.get("pre_quantized", config.plan is not None or config.is_plain)
        self.dtype = torch.float32
        self._parameters: frozenset[str] = frozenset()
        self._stored: frozenset[str] = frozenset()
        self._folder: Path | None = None
        self._model: Callable[[], Any] = _weak(None)
        self.compiled = False
        count_as_float()

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle of the model holds its quantizer, which belongs to the new model then.
        return {**self.__dict__, "_model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._model = _weak(state["_model"])
        count_as_float()  # in another process nothing else has called it

    @property
    def plan(self) -> Plan:
        plan = self.quantization_config.plan
        if plan is None:
            raise DitqError("This transformer is not quantized yet: its config only names a recipe.")
        return plan

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        self.dtype = torch_dtype or torch.float32
        if self.dtype.itemsize < 2:
            raise UsageError(f"torch_dtype={torch_dtype} is for storage only; pass torch_dtype=torch.bfloat16.")
        return torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self._folder = Path(checkpoint_files[0]).parent
        self._stored = frozenset(loaded_keys)
        if self.quantization_config.is_plain:
            refuse_unplanned(checkpoint_files)
        elif self.pre_quantized:
            self._stored = verify(checkpoint_files, self.plan)
            unstored = sorted(set(loaded_keys) - self._stored)  # the index of the files names them
            if unstored:
                raise CheckpointError(
                    f"No file of the checkpoint holds tensor {unstored[0]!r}, which its index names."
                )
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config
        if not self.pre_quantized:
            _architecture_of(model)
            config.check_names(model)
        elif not config.is_plain:
            if self._folder is None:
                raise UsageError(
                    "A single file has no plan that it could be checked against. Load the folder of a model quantized "
                    "by ditq with from_pretrained, or pass DitqConfig(recipe=...) to quantize a 16-bit file."
                )
            build(model, self.plan, self.dtype)
            # diffusers would ignore them, and a model without a fold generates other images.
            unexpected = sorted(self._stored - model.state_dict().keys())
            if unexpected:
                raise CheckpointError(
                    f"The checkpoint holds tensor {unexpected[0]!r}, which the plan does not account for."
                )

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config = self.quantization_config
        if not self.pre_quantized:
            recipe = config.job()
            if recipe.needs_calibration:
                raise UsageError(
                    f"Recipe {recipe.name!r} needs calibration and cannot be applied while loading; "
                    "use ditq.quantize(pipe, recipe, prompts=...)."
                )
            config.plan = quantize_model(model, _architecture_of(model), recipe, None)
            self.pre_quantized = True
        _align(model)
        self.remember(model)
        self.compiled = self._folder is not None and compile_graphs(model, config.engine, self._folder, config.plan)
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

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Upcasts 8-bit floats that are to be quantized; refuses those with scales, which diffusers would ignore."""
        if self.pre_quantized:
            return state_dict
        for name in state_dict:
            if name.rpartition(".")[2] in FOREIGN_SCALES:
                raise UsageError(
                    f"The checkpoint holds {name!r}: its weights are quantized already, by another tool. Quantize the "
                    "16-bit (bfloat16 or float16) weights of this model."
                )
        small = {k: x for k, x in state_dict.items() if x.is_floating_point() and x.dtype.itemsize < 2}
        if small:
            name, tensor = next(iter(small.items()))
            warn(
                f"{len(small)} tensors of the checkpoint are 8-bit floats ({name!r} is "
                f"{str(tensor.dtype).removeprefix('torch.')}). Quantizing rounds them a second time, and both errors "
                "add up: prefer a 16-bit checkpoint."
            )
        return {k: x.to(self.dtype) if k in small else x for k, x in state_dict.items()}

    def _wire(self, model: nn.Module) -> None:
        try:
            architecture = load_architecture(self.plan.architecture)
        except UsageError:
            return  # a user's architecture file is not part of a checkpoint; the model runs without wiring
        wire(model, architecture)

    def remember(self, model: nn.Module) -> None:
        """Stores the model, whose config is saved, and the names of its parameters: only they are saved in 16 bit."""
        self._model = _weak(model)
        self._parameters = frozenset(name for name, _ in model.named_parameters() if not stays_float32(model, name))

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
        module = model.get_submodule(parent)
        module._buffers[name] = state_dict[param_name].to(target_device)
        if name == "qweight":
            cast(QuantizedLinear, module).warm()

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
        return out, metadata(out, self.plan, json.loads(self._model().to_json_string()))

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
        model = self._model()
        if model is not None and not self.quantization_config.is_plain:
            _refuse_adapters(name for name, _ in model.named_modules())
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top can be trained; integer weights cannot


def _architecture_of(model: nn.Module) -> Architecture:
    """The architecture of a model that is to be quantized while loading."""
    try:
        return match(model)
    except UsageError as error:
        raise UsageError(
            f"A DitqConfig quantizes diffusion transformers, not {type(model).__name__}. {error} In a "
            "PipelineQuantizationConfig, give it to transformers only: quant_mapping={'transformer': config}, or "
            "components_to_quantize=['transformer'] with quant_backend='ditq'."
        ) from error


def _align(model: nn.Module) -> None:
    """Copies parameters that lie in the mapped file at an address of few trailing zero bits.

    The order of a product's sums depends on it, and a loaded model computes the very numbers of the saved one.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()


def _weak(model: nn.Module | None) -> Callable[[], Any]:
    """A weak reference, so that a model is freed as soon as its owner drops it."""
    return _nothing if model is None else weakref.ref(model)


def _nothing() -> None:
    return None


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
        kind = torch.float32 if stays_float32(model, layer.name) else dtype
        if layer.timesteps:
            plans = [layer.in_range(i) for i in range(len(layer.timesteps))]
            ranges = [QuantizedLinear(inner, dtype=kind, device="meta") for inner in plans]
            replace(model, layer.name, TimestepLinear(layer, ranges, clock))
        else:
            quantized = QuantizedLinear(layer, dtype=kind, device="meta")
            replace(model, layer.name, with_steps(quantized, layer, clock))
    if plan.follows_timesteps:
        if plan.time_argument is None:
            raise CheckpointError("Layers of the plan change with the timestep, but it has no time_argument.")
        clock.attach(model, plan.time_argument)


def attach(model: nn.Module, plan: Plan) -> None:
    """Marks a model that was quantized in memory, so that ``save_pretrained`` writes a ditq checkpoint."""
    config = DitqConfig(plan=plan)
    quantizer = DitqQuantizer(config, pre_quantized=True)
    quantizer.dtype = dtype_of(model)
    quantizer.remember(model)
    target = cast(Any, model)
    target.is_quantized = True
    target.quantization_method = config.quant_method
    target.hf_quantizer = quantizer
    target.register_to_config(quantization_config=config)


# If importing this module imported diffusers, its registration was deferred until here.
register()
