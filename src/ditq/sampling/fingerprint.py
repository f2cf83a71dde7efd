"""A hash of a pipeline's tensors, configs and code: the key of everything that is cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from functools import cache
from importlib import resources
from typing import Any

import torch
from torch import nn

from ditq.components import plan_of
from ditq.digests import tensor_bytes
from ditq.environment import LIBRARIES, versions

# Config fields that say where a model came from, not what it computes. So do names that begin with an underscore.
_ORIGIN = {"transformers_version", "architectures", "dtype", "quantization_config"}
# Fields of a pipeline's config that do not affect an image: names of classes.
_LABELS = {"id2label"}
# Packages of ditq that every image depends on.
_CODE = ("architectures", "engines", "layers", "models", "numerics", "sampling")


def fingerprint(pipe: Any, *, code: tuple[str, ...] = (), unread: Collection[str] = ()) -> str:
    """SHA-256 (first 24 hex digits) over a pipeline: its class, config, and every component.

    A component enters with its class, config, tensors, dtype and device. A model in memory and the same model loaded
    from its folder have the same fingerprint. The versions of the libraries and the code of ditq are part of it,
    because another kernel computes other images. Hashing reads about 1 GB of weights a second.

    Args:
        pipe: a diffusers pipeline.
        code: packages of ditq that the cached values depend on, besides those used for sampling.
        unread: components whose tensors are skipped; their classes and configs still count.
    """
    digest = hashlib.sha256(code_version(code).encode())
    digest.update(f"{type(pipe).__qualname__} {_pipeline_config(pipe)}".encode())
    for name, component in sorted(pipe.components.items()):
        digest.update(f"{name} {type(component).__qualname__}".encode())
        digest.update(_config(component).encode())
        if isinstance(component, nn.Module) and name not in unread:
            plan = plan_of(component)
            digest.update((plan.hash() if plan else "").encode())
            for module in component.modules():  # exported graphs have digests instead of tensors
                digest.update(str(getattr(module, "digests", "")).encode())
            for key, tensor in sorted(component.state_dict().items()):
                digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype} {tensor.device.type}".encode())
                digest.update(tensor_bytes(tensor))
    return digest.hexdigest()[:24]


@cache
def code_version(more: tuple[str, ...] = ()) -> str:
    """Versions of the libraries, the GPU or the CPU's instruction set, and a digest of the code of ditq."""
    code = hashlib.sha256()
    root = resources.files("ditq")
    for folder in (*_CODE, *more):
        for path in sorted((root / folder).rglob("*.py")):  # type: ignore[attr-defined]
            code.update(path.read_bytes())
    libraries = [f"{name} {number}" for name, number in versions(*LIBRARIES).items()]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return " ".join([*libraries, device, code.hexdigest()])


def _pipeline_config(pipe: Any) -> str:
    """Settings of the pipeline itself, such as the timestep at which Wan 2.2 switches to its second expert."""
    values = dict(getattr(pipe, "config", {}))
    return _json({k: v for k, v in values.items() if k not in pipe.components and k not in _LABELS})


def _config(component: Any) -> str:
    if hasattr(component, "get_vocab"):  # a tokenizer
        limits = [component.model_max_length, component.padding_side]
        return json.dumps([sorted(component.get_vocab().items()), repr(component.special_tokens_map), limits])
    config = getattr(component, "config", None)
    if config is None:
        return ""
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return _json({k: v for k, v in values.items() if k not in _ORIGIN})


def _json(values: dict[str, Any]) -> str:
    return json.dumps({k: v for k, v in sorted(values.items()) if k[0] != "_"}, default=repr, sort_keys=True)
