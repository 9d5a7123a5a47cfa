"""Runs a graph from layer to layer, holding every image's tensors between the layers.

Layer-wise corrections look at a layer's input *as the corrected layers before it leave it*. Running the whole
graph once for every layer would cost as many passes as there are layers. Here each node runs once: what later
nodes read is kept for all images, and dropped when nobody needs it any more. Quantized tensors are kept as
the integers they are, a quarter of the size.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pipeline.contracts import RunnerFactory
from pipeline.onnx_files import save_for_runner

__all__ = ["LayerwiseRun", "bytes_per_image"]

_CHUNK = 4
"""Images a request, where the model's batch size is free: enough to fill the cores."""


class LayerwiseRun:
    """A pass over a graph that stops wherever it is told to.

    Constants may change between two steps: nodes that have not run yet see the new ones.
    """

    def __init__(
        self, model: ir.Model, images: NDArray[np.uint8], runner_factory: RunnerFactory, folder: Path
    ) -> None:
        """Start in front of the first node.

        Args:
            model: an ONNX model of one input, the shapes of its tensors known; may have Q/DQ.
            images: uint8 ``[N, H, W, 3]``, N a multiple of the model's batch size where that is fixed.
            runner_factory: makes the runners of the pieces.
            folder: for the pieces' files.
        """
        (image,) = model.graph.inputs
        batch = image.shape[0] if image.shape is not None else None
        self._model = model
        self._n_images = len(images)
        self._chunk = batch if isinstance(batch, int) else _CHUNK
        self._runner_factory = runner_factory
        self._path = folder / "piece.onnx"
        self._values = {v.name or "": v for v in (image, *(v for node in model.graph for v in node.outputs))}
        self._held: dict[str, NDArray[Any]] = {image.name or "": images}
        self._done: set[ir.Node] = set()

    def advance(self, name: str) -> NDArray[Any]:
        """Run what tensor `name` still lacks, and return it for all images, ``[N, ...]``.

        It stays held while a node that has not run reads it.
        """
        target = self._values[name]
        nodes = self._missing(target)
        self._done.update(node for node in nodes if not _is_free(node))
        wanted = [
            value
            for node in nodes
            if not _is_free(node)
            for value in node.outputs
            if value is target or self._is_needed(value)
        ]
        if wanted:
            self._run(nodes, wanted)
        found = self._held[name]
        for held in [held for held in self._held if not self._is_needed(self._values[held])]:
            del self._held[held]
        return found

    def is_done(self, value: ir.Value | None) -> bool:
        """Whether `value` has been computed, or is an input or a constant."""
        node = None if value is None else value.producer()
        return node is None or node in self._done

    def _missing(self, target: ir.Value) -> list[ir.Node]:
        """The nodes between what is held and `target`, in an order that runs."""
        nodes: dict[ir.Node, None] = {}

        def visit(value: ir.Value | None) -> None:
            node = None if value is None or value.name in self._held else value.producer()
            if node is None or node in nodes:
                return
            for source in node.inputs:
                visit(source)
            nodes[node] = None

        visit(target)
        return list(nodes)

    def _is_needed(self, value: ir.Value) -> bool:
        return any(
            self._is_needed(node.outputs[0]) if _is_free(node) else node not in self._done
            for node, _ in value.uses()
        )

    def _run(self, nodes: list[ir.Node], wanted: list[ir.Value]) -> None:
        sources = list(
            dict.fromkeys(
                value
                for node in nodes
                for value in node.inputs
                if value is not None and value.name in self._held
            )
        )
        piece = ir.convenience.extract(self._model.graph, sources, wanted)
        save_for_runner(ir.Model(piece, ir_version=self._model.ir_version), self._path)
        results: dict[str, NDArray[Any]] = {}
        with self._runner_factory(self._path, ()) as runner:
            for rows in self._chunks():
                outputs = runner.infer({v.name or "": self._held[v.name or ""][rows] for v in sources})
                for value in wanted:
                    part = outputs[value.name or ""]
                    whole = results.setdefault(
                        value.name or "", np.empty((self._n_images, *part.shape[1:]), part.dtype)
                    )
                    whole[rows] = part
        self._held.update(results)

    def _chunks(self) -> Iterator[slice]:
        for start in range(0, self._n_images, self._chunk):
            yield slice(start, min(start + self._chunk, self._n_images))


def bytes_per_image(model: ir.Model) -> int:
    """What one image takes at most while a `LayerwiseRun` holds its tensors, as float32.

    The sum of what is alive at a node, the largest over all nodes; tensors of unknown shape count as nothing.
    """
    last_use: dict[ir.Value, int] = {}
    for index, node in enumerate(model.graph):
        for value in node.inputs:
            if value is not None and value.const_value is None:
                last_use[value] = index
    alive: dict[ir.Value, int] = {}
    peak = 0
    for index, node in enumerate(model.graph):
        for value in node.outputs:
            sizes = [] if value.shape is None else [size for size in value.shape[1:] if isinstance(size, int)]
            alive[value] = 4 * int(np.prod(sizes, dtype=np.int64)) if sizes else 0
        peak = max(peak, sum(alive.values()))
        for value in [value for value in alive if last_use.get(value, index) <= index]:
            del alive[value]
    return peak


def _is_free(node: ir.Node) -> bool:
    """Dequantizing is done again for every reader: holding its result would take four times the room."""
    return node.op_type == "DequantizeLinear"
