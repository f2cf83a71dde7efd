"""A name for what a pipeline computes, made from its tensors and configs: the key of everything that is cached."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib import resources
from typing import Any

import torch
from torch import nn

from ditq.digests import tensor_bytes
from ditq.environment import LIBRARIES, versions

# What a config says about where a model came from, not about what it computes; and so do names with an underscore.
_ORIGIN = {"transformers_version", "architectures", "dtype", "quantization_config"}


def fingerprint(pipe: Any) -> str:
    """SHA-256 (first 24 hex digits) over every component's class, config, tensors, dtype and device.

    A model in memory and the same model loaded from its folder have one fingerprint. The versions of the
    libraries and ditq's own code belong to it: another kernel draws other pictures.
    """
    digest = hashlib.sha256(code_version().encode())
    for name, component in sorted(pipe.components.items()):
        digest.update(f"{name} {type(component).__qualname__}".encode())
        digest.update(_config(component).encode())
        if isinstance(component, nn.Module):
            plan = getattr(getattr(component, "config", None), "quantization_config", None)
            digest.update(f"{getattr(getattr(plan, 'plan', None), 'hash', str)()}".encode())
            for module in component.modules():  # graphs of another runtime have no tensors, but digests
                digest.update(str(getattr(module, "digests", "")).encode())
            for key, tensor in sorted(component.state_dict().items()):
                digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype} {tensor.device.type}".encode())
                digest.update(tensor_bytes(tensor))
    return digest.hexdigest()[:24]


@cache
def code_version() -> str:
    """Versions of the libraries that compute, this machine's instruction set, and a digest of ditq's own code."""
    own = hashlib.sha256()
    root = resources.files("ditq")
    for folder in ("architectures", "engines", "layers", "numerics", "sampling"):
        for path in sorted((root / folder).rglob("*.py")):  # type: ignore[attr-defined]
            own.update(path.read_bytes())
    libraries = [f"{name} {number}" for name, number in versions(*LIBRARIES).items()]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return " ".join([*libraries, device, own.hexdigest()])


def _config(component: Any) -> str:
    if hasattr(component, "get_vocab"):  # a tokenizer
        return json.dumps([sorted(component.get_vocab().items()), repr(component.special_tokens_map)])
    config = getattr(component, "config", None)
    if config is None:
        return ""
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return json.dumps(
        {k: v for k, v in sorted(values.items()) if k not in _ORIGIN and k[0] != "_"}, default=repr, sort_keys=True
    )
