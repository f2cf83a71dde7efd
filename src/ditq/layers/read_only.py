"""The dequantized weight of a quantized layer: a tensor to read, whose changes would be lost and therefore raise."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ditq.errors import UsageError

_IN_PLACE = {"__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__idiv__", "__itruediv__"}
_NO_CHANGE = {"requires_grad_"}

FUSE_LORA = (
    "A quantized layer has integers and no weight that could be changed in place, so PEFT and diffusers cannot merge "
    "an adapter into it. Call ditq.fuse_lora(pipe), which keeps LoRA adapters exactly, as a 16-bit low-rank branch "
    "beside the integers."
)
FUSE_PROJECTIONS = (
    "Projections of quantized layers cannot be fused: to_q, to_k and to_v already share the integers of their input. "
    "Leave fuse_qkv_projections() out."
)


class ReadOnly(Tensor):
    """Operations give plain tensors, those in place raise; ``data`` is the same tensor."""

    @classmethod
    def of(cls, tensor: Tensor) -> Tensor:
        # A compiler does not trace the subclass, and nothing merges an adapter inside a compiled forward.
        return tensor if torch.compiler.is_compiling() else tensor.as_subclass(cls)

    @property
    def data(self) -> Tensor:
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        raise UsageError(FUSE_LORA)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = cast(str, getattr(func, "__name__", ""))
        in_place = name in _IN_PLACE or (name.endswith("_") and not name.startswith("_") and name not in _NO_CHANGE)
        if (in_place and args and isinstance(args[0], cls)) or isinstance((kwargs or {}).get("out"), cls):
            raise UsageError(FUSE_LORA)
        if func in (torch.cat, torch.concat, torch.concatenate) and all(isinstance(t, cls) for t in args[0]):
            raise UsageError(FUSE_PROJECTIONS)  # how diffusers fuses projections
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
