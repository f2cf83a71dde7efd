"""Fuses loaded LoRA adapters into a quantized model: a 16-bit low-rank branch beside the integers of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ditq.checkpoint.backend import DitqQuantizer, attach
from ditq.components import transformers
from ditq.errors import UsageError
from ditq.layers import QuantizedLinear, TimestepLinear
from ditq.plan import LayerPlan


@torch.no_grad()
def fuse_lora(target: Any, adapter_names: str | Sequence[str] | None = None, scale: float = 1.0) -> None:
    """Fuses LoRA adapters into the quantized transformers of a pipeline, and unloads them.

    A quantized layer gets a branch, which is saved and loaded with the model; fusing again makes it larger. In layers
    that are not quantized, PEFT merges the adapter into the weight.

    Args:
        target: a pipeline, or a transformer quantized by ditq, with adapters loaded.
        adapter_names: those to fuse, with their present weights; by default the active ones. Others stay loaded.
        scale: multiplies the effect of all of them.

    Raises:
        UsageError: nothing is quantized, no adapter of these names is loaded, one is merged already, or one is not a
            plain LoRA on a quantized layer (DoRA, for example). Nothing is changed then.

    Example:
        >>> import ditq
        >>> from peft import LoraConfig, inject_adapter_in_model
        >>> pipe = ditq.load("bundled:emoji-t2i")
        >>> result = ditq.quantize(pipe, "rtn-w8a8")
        >>> adapter = LoraConfig(r=4, target_modules=["to_q"])  # or pipe.load_lora_weights(file)
        >>> _ = inject_adapter_in_model(adapter, pipe.transformer)
        >>> ditq.fuse_lora(pipe, scale=0.8)
        >>> pipe.transformer.hf_quantizer.plan["transformer_blocks.0.attn1.to_q"].branch.rank
        4
    """
    if hasattr(target, "get_base_model"):  # a PeftModel
        target = target.get_base_model()
    models = {"transformer": target} if isinstance(target, nn.Module) else transformers(target)
    models = {
        name: model
        for name, model in models.items()
        if isinstance(getattr(model, "hf_quantizer", None), DitqQuantizer)
    }
    if not models:
        raise UsageError(
            f"{type(target).__name__} is not quantized by ditq. Use its own fuse_lora(), and quantize afterwards."
        )
    wanted = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    found = {name: _chosen(model, wanted) for name, model in models.items()}
    loaded = sorted({adapter for model in models.values() for _, layer in _tuned(model) for adapter in _all(layer)})
    unknown = sorted(set(wanted or ()) - set(loaded))
    if unknown:
        raise UsageError(f"No adapter {unknown[0]!r} is loaded; loaded are: {', '.join(loaded) or 'none'}.")
    if not any(found.values()):
        raise UsageError("No adapter is active. Load one first, e.g. pipe.load_lora_weights(file).")
    for layers in found.values():
        for name, layer, adapters in layers:
            for adapter in adapters:
                _check(name, layer, adapter)
    for name, model in models.items():
        if found[name]:
            _fuse(model, found[name], scale)


def _tuned(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers of ``model`` with adapters, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def _all(layer: Any) -> set[str]:
    return {name for kind in layer.adapter_layer_names for name in getattr(layer, kind, ())}


def _chosen(model: nn.Module, wanted: Sequence[str] | None) -> list[tuple[str, Any, list[str]]]:
    """Each layer with the adapters to fuse that it has."""
    chosen = []
    for name, layer in _tuned(model):
        adapters = [a for a in (layer.active_adapters if wanted is None else wanted) if a in _all(layer)]
        if adapters:
            chosen.append((name, layer, adapters))
    return chosen


def _check(name: str, layer: Any, adapter: str) -> None:
    from peft.tuners.lora import Linear

    if layer.merged:
        raise UsageError(f"An adapter is merged into layer {name!r} already. Call pipe.unfuse_lora() first.")
    if not isinstance(layer.get_base_layer(), QuantizedLinear | TimestepLinear):
        return
    if not isinstance(layer, Linear) or adapter not in layer.lora_A:
        what = type(layer).__name__
    elif adapter in layer.lora_variant:
        what = type(layer.lora_variant[adapter]).__name__
    elif layer.lora_bias.get(adapter):
        what = "LoRA with a bias"
    else:
        return
    raise UsageError(
        f"Adapter {adapter!r} on the quantized layer {name!r} is not a plain low-rank product but {what}: it cannot "
        "be fused. Keep it loaded, or fuse it into the 16-bit model and quantize that."
    )


def _fuse(model: Any, layers: list[tuple[str, Any, list[str]]], scale: float) -> None:
    plan = model.hf_quantizer.plan
    changed: dict[str, LayerPlan] = {}
    for name, layer, adapters in layers:
        base = layer.get_base_layer()
        if isinstance(base, QuantizedLinear | TimestepLinear):
            for adapter in adapters:
                down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                base.add_branch(down, up.float() * (layer.scaling[adapter] * scale), plan.storage_dtype)
            changed[name] = base.plan
        else:
            if scale != 1.0:
                for adapter in adapters:
                    layer.scaling[adapter] *= scale
            layer.merge(adapter_names=adapters)
            layer.merged_adapters.clear()  # for good: deleting the adapter leaves its effect
    _unload(model, {adapter for _, _, adapters in layers for adapter in adapters})
    attach(model, plan.model_copy(update={"layers": tuple(changed.get(x.name, x) for x in plan.layers)}))


def _unload(model: Any, adapters: set[str]) -> None:
    """Deletes the adapters; if no other is left, the layers of PEFT too."""
    for _, layer in _tuned(model):
        for adapter in adapters & _all(layer):
            layer.delete_adapter(adapter)
    for adapter in adapters:
        getattr(model, "peft_config", {}).pop(adapter, None)
    if any(_all(layer) for _, layer in _tuned(model)):
        return
    for name, layer in _tuned(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = False
