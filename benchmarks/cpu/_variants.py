"""A transformer as each library executes it: every builder takes one fp32 model and returns a function to call it.

``REGISTRY`` lists the builders. Each imports its library when it is called, so a missing library costs only one row.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from _measure import has_bf16, openvino_bytes, torch_bytes, trim
from torch import Tensor, nn

import ditq
from ditq.architectures import Architecture

Call = Mapping[str, Any]
Run = Callable[[Call], Tensor]


class NotRun(Exception):  # noqa: N818 - a reason, not a failure
    """Why a variant has no times here."""


@dataclass
class Case:
    """What is measured: an fp32 model in evaluation mode, the call that is timed, and others like it.

    Attributes:
        architecture: None for a bare layer.
        calls: for those that calibrate; of the same shapes, other values.
    """

    model: nn.Module
    architecture: Architecture | None
    call: Call
    calls: Sequence[Call]

    @cached_property
    def half(self) -> nn.Module:
        """The model in bf16."""
        return copy.deepcopy(self.model).to(torch.bfloat16)

    def of(self, dtype: torch.dtype) -> nn.Module:
        return self.model if dtype == torch.float32 else self.half

    @cached_property
    def openvino_file(self) -> Path:
        """The fp32 model as OpenVINO converts it, with the shapes of the call: what OpenVINO and NNCF start from."""
        import openvino as ov

        self._folder = tempfile.TemporaryDirectory(prefix="ditq-bench-")
        wrapper = _Positional(self.model, self.call).eval()
        tensors = tuple(wrapper.tensors(self.call))
        with torch.no_grad(), _silence():
            traced = torch.jit.trace(wrapper, tensors, check_trace=False, strict=False)
            converted = ov.convert_model(traced, example_input=tensors)
        for port, tensor in zip(converted.inputs, tensors, strict=True):
            converted.reshape({port: ov.PartialShape(list(tensor.shape))})
        path = Path(self._folder.name) / "model.xml"
        ov.save_model(converted, path, compress_to_fp16=False)
        return path


@dataclass
class Variant:
    """A model ready to be called, and how many bytes its weights take."""

    run: Run
    weights_bytes: int


class _Positional(nn.Module):
    """The tensors of a call, in order, as the only arguments."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model, self.rest = model, {k: v for k, v in call.items() if not isinstance(v, Tensor)}
        self.names = [k for k, v in call.items() if isinstance(v, Tensor)]

    def tensors(self, call: Call) -> Iterator[Tensor]:
        yield from (call[name] for name in self.names)

    def forward(self, *tensors: Tensor) -> Tensor:
        named = dict(zip(self.names, tensors, strict=True))
        return self.model(**named, **self.rest, return_dict=False)[0]


@contextmanager
def _silence() -> Iterator[None]:
    """Without warnings about deprecations inside of other libraries."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _blocks(case: Case, model: nn.Module) -> Iterator[nn.Module]:
    if case.architecture is None:
        yield model
        return
    for stack in case.architecture.stacks:
        yield from model.get_submodule(stack)  # type: ignore[misc]


def torch_variant(model: nn.Module, dtype: torch.dtype = torch.float32) -> Variant:
    def run(call: Call) -> Tensor:
        with torch.no_grad():
            return model(**_cast(call, dtype), return_dict=False)[0].float()

    return Variant(run, torch_bytes(model))


def _cast(call: Call, dtype: torch.dtype) -> Call:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in call.items()}


def _compiled(case: Case, model: nn.Module) -> nn.Module:
    """Compiles block by block, as diffusers recommends: the time to compile does not grow with depth."""
    torch._dynamo.config.recompile_limit = 64  # blocks of several kinds and variants share code; eager beyond it
    for block in _blocks(case, model):
        block.compile(dynamic=False)
    return model


def eager(case: Case, dtype: torch.dtype) -> Variant:
    return torch_variant(case.of(dtype), dtype)


def compiled(case: Case, dtype: torch.dtype) -> Variant:
    model = case.of(dtype)
    shared = {id(p): p for p in model.parameters()}
    return torch_variant(_compiled(case, copy.deepcopy(model, shared)), dtype)


def torchao(case: Case) -> Variant:
    with _silence():
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        model = _copy(case)
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return torch_variant(_compiled(case, model))


def quanto(case: Case) -> Variant:
    with _silence():
        from optimum.quanto import Calibration, freeze, qint8, quantize

        model = _copy(case)
        quantize(model, weights=qint8, activations=qint8)
        with torch.no_grad(), Calibration():
            for call in case.calls:
                model(**call, return_dict=False)
        freeze(model)
    return torch_variant(model)


def openvino(case: Case, hint: str) -> Variant:
    import openvino as ov

    if hint == "bf16" and not has_bf16():
        raise NotRun("this CPU has no bf16 instructions, and OpenVINO emulates them 60 times slower than f32")
    return openvino_variant(ov.Core().read_model(case.openvino_file), INFERENCE_PRECISION_HINT=hint)


def nncf_static(case: Case) -> Variant:
    """Post-training quantization, weights and activations static, with the preset for transformers."""
    import openvino as ov

    with _silence():
        import nncf

        inputs = [_numpy(call) for call in case.calls]
        quantized = nncf.quantize(
            ov.Core().read_model(case.openvino_file), nncf.Dataset(inputs), model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(inputs),
        )  # fmt: skip
    return openvino_variant(quantized)


def nncf_weights(case: Case, mode: str, **options: Any) -> Variant:
    """Weight compression with NNCF's defaults; OpenVINO quantizes activations at run time, by its defaults."""
    import openvino as ov

    with _silence():
        import nncf

        compressed = nncf.compress_weights(
            ov.Core().read_model(case.openvino_file), mode=nncf.CompressWeightsMode(mode), **options
        )  # fmt: skip
    return openvino_variant(compressed)


def openvino_variant(model: Any, **properties: str) -> Variant:
    import openvino as ov

    config = {"INFERENCE_NUM_THREADS": str(torch.get_num_threads()), "PERFORMANCE_HINT": "LATENCY"}
    compiled_model = ov.Core().compile_model(model, "CPU", {**config, **properties})
    request = compiled_model.create_infer_request()

    def run(call: Call) -> Tensor:
        results = request.infer(_numpy(call), share_inputs=True, share_outputs=False)
        return torch.from_numpy(results[0]).float()

    return Variant(run, openvino_bytes(compiled_model))


def _numpy(call: Call) -> list[Any]:
    return [v.numpy() for v in call.values() if isinstance(v, Tensor)]


# The recipes keep modulation and embedders in 16 bit by the paper's rule: more than a third of a DiT's parameters,
# which a CPU reads as float32 at every call. NNCF quantizes them; so do the rows "and modulation", to 8 bits per
# channel and token.
_EIGHT = "{weights: {bits: 8, granularity: channel}, activations: {bits: 8, granularity: token, dynamic: true}}"
# With static scales, and no zero points, OpenVINO writes codes straight out of the product of the layer before.
SYMMETRIC = "weights={bits: 8, symmetric: true, granularity: channel}"
MODULATION = (f"roles.modulation={_EIGHT}", f"roles.embedder={_EIGHT}", "keep=[final]")


def ours(
    case: Case,
    recipe: str,
    engine: str,
    hint: Literal["f32", "bf16", "best"] = "f32",
    overrides: Sequence[str] = (),
    shapes: Literal["dynamic", "static"] = "static",
    attention: Literal["auto", "f32", "int8"] = "auto",
) -> Variant:
    """A recipe of ditq; recipes that calibrate do so on ``case.calls``.

    Args:
        hint: of OpenVINO's precision between the layers; with bf16 the model around them is in bf16 too, as it is in
            most pipelines. "best" is bf16 on CPUs that have the instructions.
    """
    if hint == "best":
        hint = "bf16" if has_bf16() else "f32"
    if hint == "bf16" and not has_bf16():
        raise NotRun("this CPU has no bf16 instructions")
    dtype = torch.bfloat16 if hint == "bf16" else torch.float32
    model = copy.deepcopy(case.of(dtype))

    def calibrate(model: nn.Module) -> None:
        with torch.no_grad():
            for call in case.calls:
                model(**_cast(call, dtype))

    ditq.quantize(model, recipe, calibrate_with=calibrate, overrides=overrides)
    if engine == "torch":
        return torch_variant(model)
    from ditq.openvino import attention_ranges as scores
    from ditq.openvino.export import compile_in_place

    largest = None
    if attention == "int8":
        with scores.observed(model, case.architecture) as largest:
            calibrate(model)
    properties = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": hint}
    compile_in_place(
        model, case.architecture, _cast(case.call, dtype), properties=properties, shapes=shapes, attention=attention,
        largest=largest,
    )  # fmt: skip
    variant = torch_variant(model, dtype)
    variant.run(case.call)  # compiles for its sizes
    stacks = (module for module in model.modules() if type(module).__name__ == "CompiledStack")
    variant.weights_bytes += sum(openvino_bytes(stack.program.compiled) for stack in stacks)
    return variant


def _copy(case: Case) -> nn.Module:
    return copy.deepcopy(case.model)


REGISTRY: dict[str, Callable[[Case], Variant]] = {
    "torch fp32": partial(eager, dtype=torch.float32),
    "torch bf16": partial(eager, dtype=torch.bfloat16),
    "torch fp32 compiled": partial(compiled, dtype=torch.float32),
    "torch bf16 compiled": partial(compiled, dtype=torch.bfloat16),
    "torchao int8 dynamic, compiled": torchao,
    "optimum-quanto int8 weights and activations": quanto,
    "OpenVINO f32": partial(openvino, hint="f32"),
    "OpenVINO bf16": partial(openvino, hint="bf16"),
    "NNCF static int8": nncf_static,
    "NNCF weight compression int8": partial(nncf_weights, mode="int8_asym"),
    "NNCF weight compression int4": partial(nncf_weights, mode="int4_sym"),
    "ditq W8A8, torch engine": partial(ours, recipe="rtn-w8a8", engine="torch"),
    "ditq W8A8, OpenVINO": partial(ours, recipe="rtn-w8a8", engine="openvino"),
    "ditq W4A8, OpenVINO": partial(ours, recipe="rtn-w4a8", engine="openvino"),
    "ditq W8A8 and modulation, OpenVINO": partial(ours, recipe="rtn-w8a8", engine="openvino", overrides=MODULATION),
    "ditq W4A8 and modulation, OpenVINO": partial(ours, recipe="rtn-w4a8", engine="openvino", overrides=MODULATION),
    "ditq W8A8 and modulation, OpenVINO, any size": partial(
        ours, recipe="rtn-w8a8", engine="openvino", overrides=MODULATION, shapes="dynamic"
    ),
    "ditq W8A8 and modulation, OpenVINO bf16": partial(
        ours, recipe="rtn-w8a8", engine="openvino", overrides=MODULATION, hint="bf16"
    ),
    "ditq W4A8 and modulation, OpenVINO bf16": partial(
        ours, recipe="rtn-w4a8", engine="openvino", overrides=MODULATION, hint="bf16"
    ),
    "ditq W8A8 static and modulation, OpenVINO": partial(
        ours, recipe="smoothquant-static-w8a8", engine="openvino", overrides=(*MODULATION, SYMMETRIC)
    ),
    "ditq W8A8 static and modulation, int8 attention, OpenVINO": partial(
        ours,
        recipe="smoothquant-static-w8a8",
        engine="openvino",
        overrides=(*MODULATION, SYMMETRIC),
        hint="best",
        attention="int8",
    ),  # fmt: skip
    "ditq smoothed W8A8, torch engine": partial(ours, recipe="smoothquant-w8a8", engine="torch"),
    "ditq smoothed W8A8 and modulation, OpenVINO": partial(
        ours, recipe="smoothquant-w8a8", engine="openvino", overrides=MODULATION
    ),
    "ditq ViDiT-Q W8A8, OpenVINO": partial(ours, recipe="viditq-w8a8", engine="openvino"),
}


def build(
    name: str, case: Case, builder: Callable[[Case], Variant] | None = None, announce: bool = True
) -> tuple[Variant | None, str, float]:
    """The variant, or None and the reason; and the seconds that it took."""
    begin = time.perf_counter()
    variant, status = None, "ok"
    try:
        variant = (builder or REGISTRY[name])(case)
        variant.run(case.call)  # compiles what is compiled at the first call
    except NotRun as reason:
        status = f"not run: {reason}"
    except Exception as error:  # noqa: BLE001 - a peer that fails costs its row, not the table
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        status = f"not run: {text[:160]}"
    trim()
    seconds = time.perf_counter() - begin
    if announce:
        print(f"  built {name}: {status}, {seconds:.0f} s", flush=True)
    return variant, status, seconds
