"""A compiled graph: compiled once for calls of any size, or for the sizes of the calls."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditq.openvino.options import Shapes
from ditq.openvino.passes.attention import as_products
from ditq.openvino.probe import core
from ditq.openvino.settings import PRECISION

logger = logging.getLogger(__name__)

# The largest number of sizes that a static program compiles for: compiling takes seconds.
MOST_SIZES = 4

# Graphs with at most this many bytes of constants are kept for every size.
SMALL = 2**27


class Program:
    """One ``openvino.Model`` and its compiled graph.

    With ``shapes="static"`` the graph is compiled for the sizes of a call, unless the last call had the same sizes.
    It then runs faster (small images by a third), and the first call of a size takes seconds. Of a large graph only
    the last compilation is kept, so that its weights are in memory once. A model that is called in many sizes falls
    back to one graph for all of them. With ``half``, graphs compiled for a size compute attention over many keys in
    bf16.

    With the bf16 hint outputs are in bf16 too. Otherwise OpenVINO keeps all terms of an output in the output's type,
    which for a stack of blocks is the whole residual stream, and converts them back and forth around every layer.

    Outputs are copies. A lock serializes calls from several threads, since an OpenVINO request serves one.
    """

    def __init__(self, graph: Any, config: Mapping[str, str], shapes: Shapes = "dynamic", half: bool = False) -> None:
        self.config, self.shapes, self._half = dict(config), shapes, half
        self._graph = graph if shapes == "static" else None
        self._compilations = 0
        self._kept: dict[tuple[tuple[int, ...], ...], Any] = {}  # by sizes
        constants = (node for node in graph.get_ops() if node.get_type_name() == "Constant")
        self.small = sum(node.get_byte_size() for node in constants) <= SMALL
        self._lock = threading.Lock()
        if self.config.get(PRECISION) == "bf16":
            _convert_outputs(graph)
        self._use(core().compile_model(graph, "CPU", self.config))

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Runs the graph once."""
        with self._lock:
            if self._graph is not None:
                self._fit({name: tuple(x.shape) for name, x in inputs.items()})
            # Inputs are not copied; outputs are, because the next call overwrites them.
            feed = {name: x.numpy() for name, x in inputs.items()}
            self._request.infer(feed, share_inputs=True, share_outputs=True)
            return [_copied(self._request.get_output_tensor(i)) for i in range(len(self.compiled.outputs))]

    def _use(self, compiled: Any) -> None:
        self.compiled = compiled
        self._request = compiled.create_infer_request()

    def _fit(self, sizes: Mapping[str, tuple[int, ...]]) -> None:
        """Compiles for these sizes, or for all sizes if they change too often."""
        import openvino as ov

        if (key := tuple(sizes[name] for name in sorted(sizes))) in self._kept:
            if self._kept[key] is not self.compiled:
                self._use(self._kept[key])
            return
        graph: Any = self._graph
        if self._compilations == MOST_SIZES:
            logger.warning(
                "The transformer was called in more than %d sizes, and compiled for each; from now on one graph "
                "serves all sizes. Export with shapes='dynamic' to avoid the compilations.",
                MOST_SIZES,
            )
            self._graph, self.shapes = None, "dynamic"
            self._kept.clear()
        else:
            graph = graph.clone()
            graph.reshape({name: ov.PartialShape(list(shape)) for name, shape in sizes.items()})
            as_products(graph, self._half)
            self._compilations += 1
        if not self.small:
            self._kept.clear()
        del self._request, self.compiled  # frees old weights before the new ones are allocated
        self._use(core().compile_model(graph, "CPU", self.config))
        if self._graph is not None:
            self._kept[key] = self.compiled


def _convert_outputs(graph: Any) -> None:
    """Converts the float outputs of an ``openvino.Model`` to bf16, in place."""
    import openvino.opset13 as op

    for result in graph.get_results():
        if result.get_element_type().get_type_name() == "f32":
            result.input(0).replace_source_output(op.convert(result.input_value(0), "bf16").output(0))
    graph.validate_nodes_and_infer_types()


def _copied(tensor: Any) -> Tensor:
    """A copy of an ``openvino.Tensor`` as a torch tensor; numpy does not have bf16."""
    if tensor.element_type.get_type_name() == "bf16":
        return torch.from_numpy(tensor.data.view(np.int16)).view(torch.bfloat16).clone()
    return torch.from_numpy(tensor.data).clone()
