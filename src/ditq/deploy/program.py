"""A graph that runs: compiled once for calls of any size, or for the size of the calls that come."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from ditq.deploy.attention import in_bf16
from ditq.engines.openvino.probe import core

logger = logging.getLogger(__name__)

Shapes = Literal["dynamic", "static"]

# Sizes that a static program compiles for before it gives up: compiling takes seconds.
MOST_SIZES = 4

# Bytes of constants of which a copy for every size is no matter.
SMALL = 2**27


class Program:
    """One ``openvino.Model`` and what it is compiled to.

    With ``shapes="static"`` the graph is compiled anew for the sizes of a call, unless those of the last call were
    the same: it then runs faster (small pictures by a third), and the first call of a size takes seconds. Of a large
    graph only the last compilation is kept, so that its weights are in memory once. A model that is called in many
    sizes goes back to one graph for all of them. ``half`` has attention over many keys computed in bf16, in graphs
    that are compiled for a size.

    Outputs are copies. A lock serializes calls from several threads, since a request of OpenVINO serves one.
    """

    def __init__(self, graph: Any, config: Mapping[str, str], shapes: Shapes = "dynamic", half: bool = False) -> None:
        self.config, self.shapes, self._half = dict(config), shapes, half
        self._graph = graph if shapes == "static" else None
        self._compilations = 0
        self._kept: dict[tuple[tuple[int, ...], ...], Any] = {}  # by sizes
        constants = (node for node in graph.get_ops() if node.get_type_name() == "Constant")
        self.small = sum(node.get_byte_size() for node in constants) <= SMALL
        self._lock = threading.Lock()
        self._use(core().compile_model(graph, "CPU", self.config))

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Any]:
        """Runs once; the outputs as arrays."""
        with self._lock:
            if self._graph is not None:
                self._fit({name: tuple(x.shape) for name, x in inputs.items()})
            # Inputs are read where they are; outputs are copied, the next call overwrites them.
            feed = {name: x.numpy() for name, x in inputs.items()}
            results = self._request.infer(feed, share_inputs=True, share_outputs=False)
        return [results[i] for i in range(len(results))]

    def _use(self, compiled: Any) -> None:
        self.compiled = compiled
        self._request = compiled.create_infer_request()

    def _fit(self, sizes: Mapping[str, tuple[int, ...]]) -> None:
        """Compiles for these sizes, or for all where they change too often."""
        import openvino as ov

        if (key := tuple(sizes[name] for name in sorted(sizes))) in self._kept:
            if self._kept[key] is not self.compiled:
                self._use(self._kept[key])
            return
        graph: Any = self._graph
        if self._compilations == MOST_SIZES:
            logger.warning(
                "The transformer was called in more than %d sizes, and compiled for each; from now on one graph "
                "serves all sizes. Export with shapes='dynamic' to have that from the start.",
                MOST_SIZES,
            )
            self._graph, self.shapes = None, "dynamic"
            self._kept.clear()
        else:
            graph = graph.clone()
            graph.reshape({name: ov.PartialShape(list(shape)) for name, shape in sizes.items()})
            if self._half:
                in_bf16(graph)
            self._compilations += 1
        if not self.small:
            self._kept.clear()
        del self._request, self.compiled  # old weights that are not kept go before the new ones come
        self._use(core().compile_model(graph, "CPU", self.config))
        if self._graph is not None:
            self._kept[key] = self.compiled
