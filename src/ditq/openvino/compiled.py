"""A stack of transformer blocks that OpenVINO executes; it is called like one block."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ditq.errors import CheckpointError, UsageError
from ditq.openvino.manifest import Input, Segment
from ditq.openvino.program import Program
from ditq.reading import cut
from ditq.trace.arguments import leaves

_TORCH = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool}


class _NotExportedError(CheckpointError, AttributeError):
    """A module of a block that the graph replaced; an AttributeError, because ``hasattr`` must stay false."""


class CompiledStack(nn.Module):
    """Replaces a list of blocks, or one block, in a model.

    Tensors of any float dtype are computed in float32. Outputs have the dtype of the argument that they replace
    (float32 if that argument holds token ids). A sample with NaN in any argument is NaN in every output, as in torch:
    the integer kernels of OpenVINO would turn it into plausible numbers.

    Copies of a model share the program and its immutable weights.
    """

    def __init__(self, segment: Segment, program: Program, kept: dict[str, nn.Module]) -> None:
        super().__init__()
        self.segment = segment
        self.program = program
        self._inputs = {spec.name: spec for spec in segment.inputs}
        for name, module in kept.items():
            _place(self, name, module)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise _NotExportedError(
                f"{type(self).__name__} has no attribute {name!r}: the blocks are one graph. If the model itself uses "
                f"{name!r}, its export is damaged: run ditq export again."
            ) from error

    @property
    def digests(self) -> dict[str, str]:
        """Digests of the files that it was read from; they identify its computation, for caches."""
        return self.segment.digests

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self._bind(args, kwargs)
        first = arguments[self.segment.inputs[0].name]
        feed = {name: self._feed(arguments[name], spec) for name, spec in self._inputs.items()}
        results = self.program(feed)
        with_nan = _samples_with_nan(feed.values())
        outputs = []
        for i in range(self.segment.outputs):
            output = results[i]
            if with_nan is not None and len(with_nan) == len(output):
                output[with_nan] = torch.nan
            outputs.append(output.to(first.dtype) if first.is_floating_point() else output)
        return self._returned(outputs)

    def _returned(self, outputs: list[Tensor]) -> Any:
        if self.segment.returns == "BaseModelOutput":
            from transformers.modeling_outputs import BaseModelOutput

            return BaseModelOutput(last_hidden_state=outputs[0])
        return outputs[0] if self.segment.returns == "tensor" else tuple(outputs)

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """Tensor arguments by leaf name. All other arguments must have the values of the exported call."""
        named = {**dict(zip(self.segment.parameters, args, strict=False)), **kwargs}
        tensors: dict[str, Tensor] = {}
        for name, value in leaves(named).items():
            if name in self._inputs and isinstance(value, Tensor):
                tensors[name] = value
            elif name in self._inputs or value != self.segment.constants.get(name):
                expected = "a tensor" if name in self._inputs else repr(self.segment.constants.get(name))
                got = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise UsageError(
                    f"{self.segment.place} was exported with {name}={expected} and cannot be called with {got}; "
                    "export it again with such a call as the example."
                )
        missing = [name for name in self._inputs if name not in tensors]
        if missing:
            raise UsageError(
                f"{self.segment.place} was exported with the tensor {missing[0]!r}, which is missing in this call."
            )
        return tensors

    def _feed(self, value: Tensor, spec: Input) -> Tensor:
        if value.device.type != "cpu":
            raise UsageError(f"OpenVINO runs on the CPU; {spec.name!r} is on {value.device}: pipe.to('cpu').")
        if torch.is_grad_enabled() and value.requires_grad:
            raise UsageError(
                "A model exported to OpenVINO has no gradients; train the checkpoint that it was exported from."
            )
        fits = len(value.shape) == len(spec.shape) and all(
            expected in (None, size) for expected, size in zip(spec.shape, value.shape, strict=True)
        )
        if not fits or (value.is_floating_point() and spec.dtype != "float32"):
            shape = ", ".join("any" if size is None else str(size) for size in spec.shape)
            raise UsageError(
                f"{self.segment.place} was exported for {spec.name} of shape [{cut(shape)}] and dtype {spec.dtype}, "
                f"got {list(value.shape)} and {str(value.dtype).removeprefix('torch.')}."
            )
        return _contiguous(value.detach()).to(_TORCH[spec.dtype])

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledStack:
        kept = {name: copy.deepcopy(self.get_submodule(name), memo) for name in self.segment.kept}
        return CompiledStack(self.segment, self.program, kept)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UsageError(
            f"{self.segment.place} is a compiled graph of this process and cannot be pickled. In a spawned worker, "
            "load the exported folder again; to pickle the model, load it inside ditq.use_engine('torch')."
        )

    def extra_repr(self) -> str:
        return f"{self.segment.place}, {len(self.segment.layers)} linears on OpenVINO"


def _samples_with_nan(tensors: Any) -> Tensor | None:
    """Which samples have NaN, bool [B]; None if none has (the usual case, detected by sums, which propagate NaN)."""
    floats = [x for x in tensors if x.is_floating_point() and x.ndim]
    if not any(bool(torch.isnan(x.sum())) for x in floats):
        return None
    with_nan = torch.zeros(len(floats[0]), dtype=torch.bool)
    for x in floats:
        rows = torch.isnan(x.reshape(len(x), -1)).any(1)
        with_nan |= rows if len(rows) == len(with_nan) else rows.any()  # shared by all samples
    return with_nan


def _contiguous(x: Tensor) -> Tensor:
    """A contiguous ``x``, copied sample by sample: torch transposes one matrix several times as fast as a batch."""
    if x.is_contiguous() or x.ndim < 3:
        return x.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for target, source in zip(out, x, strict=True):
        target.copy_(source)
    return out


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    """Sets ``root.a.b.c`` to the module, with empty modules between, so that parameter names are unchanged."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    root.add_module(last, module)
