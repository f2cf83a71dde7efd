"""Determines how every linear layer of an exported model is executed on this machine, by proofs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ditq.errors import DitqError
from ditq.openvino.manifest import Layer, Manifest
from ditq.openvino.passes.attention import multiplying
from ditq.openvino.probe import Execution, execution, multiplies
from ditq.openvino.program import Program


@dataclass(frozen=True)
class Report:
    """All linear layers of the exported blocks.

    Attributes:
        executions: "int8" or "float" for each layer of ``layers``, by name.
        group_size: channels of a token that share an activation scale where OpenVINO rounds the input.
        attentions: number of attentions that multiply 8-bit queries and keys.
    """

    layers: tuple[Layer, ...]
    executions: dict[str, Execution]
    group_size: int
    attentions: int = 0

    def summary(self) -> str:
        """A few lines of text: counts, then the layers that multiply floats, and why."""
        integer = [layer for layer in self.layers if self.executions[layer.name] == "int8"]
        line = f"OpenVINO: {len(integer)} of {len(self.layers)} linear layers of the blocks multiply 8-bit integers"
        if integer:
            kinds = Counter(str(layer.storage) for layer in integer)
            line += f" ({', '.join(f'{count} with {kind} weights' for kind, count in sorted(kinds.items()))})"
            finer = [layer for layer in integer if layer.activations == "plugin"]
            if finer:
                line += f"; {len(finer)} have an activation scale for each token and {self.group_size} channels"
        if self.attentions:
            line += f"; {self.attentions} attentions multiply 8-bit queries and keys"
        reasons: dict[str, list[str]] = {}
        for layer in self.layers:
            if self.executions[layer.name] == "float":
                reasons.setdefault(layer.reason or "this CPU", []).append(layer.name)
        return "\n".join([line + ".", *(f"In floats ({reason}): {some(names)}." for reason, names in reasons.items())])


def some(names: Sequence[str]) -> str:
    """The first two names of a list, and the number of further ones."""
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def examine(manifest: Manifest, programs: Iterable[Program], precision: str, allow_float: bool) -> Report:
    """Probes every kernel of the model, and looks up every layer in the compiled graphs.

    A probe proves that a kernel multiplies integers. The graph shows that a layer still has the operands of that
    kernel (it would show a pass that expands them to floats).

    Raises:
        DitqError: a layer with 8-bit activations, or an attention with 8-bit queries and keys, would be executed in
            floats, without ``allow_float``.
    """
    executions: dict[str, Execution] = {}
    failed: dict[str, list[str]] = {}
    attentions = 0
    for segment, program in zip(manifest.segments, programs, strict=True):
        attentions += (multiplied := min(multiplying(program.compiled), segment.attentions))
        if multiplied < segment.attentions and not allow_float:
            raise DitqError(
                f"On this CPU OpenVINO multiplies queries and keys as floats in {segment.attentions - multiplied} of "
                f"{segment.attentions} attentions of {segment.place}. Export with an attention other than int8."
            )
        intact = multiplies(
            program.compiled, {layer.name: layer.kernel for layer in segment.layers if layer.kernel is not None}
        )
        # The compiled graph has one of several equal layers, under the name of any of them.
        executed = {layer.twin or layer.name for layer in segment.layers if intact.get(layer.name)}
        for layer in segment.layers:
            kernel = layer.kernel
            executions[layer.name] = "float"
            if kernel is None:
                continue
            probed = execution(kernel, manifest.group_size, precision)
            if not kernel.integer and probed == "int8":
                raise DitqError(f"OpenVINO quantizes the input of {layer.name!r}, whose plan has 16-bit activations.")
            if (layer.twin or layer.name) in executed:
                executions[layer.name] = probed
            if kernel.integer and executions[layer.name] == "float":
                failed.setdefault(str(kernel), []).append(layer.name)
    if failed and not allow_float:
        kernel_name, names = next(iter(failed.items()))
        raise DitqError(
            f"On this CPU OpenVINO executes {sum(map(len, failed.values()))} layers in floats that should multiply "
            f"integers: {some(names)} ({kernel_name}). Keep them in 16 bit, or allow floats (allow_float=True)."
        )
    layers = tuple(layer for segment in manifest.segments for layer in segment.layers)
    return Report(layers, executions, manifest.group_size, attentions)
