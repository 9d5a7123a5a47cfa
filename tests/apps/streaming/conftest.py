"""A tiny real bundle, an engine that does what a test tells it, and sources made of lists."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest
from numpy.typing import NDArray

from apps.streaming.sources import Delivered
from pipeline.artifacts import Fingerprint, PreprocessSpec, TensorSpec
from pipeline.bundle import BundleWriter
from pipeline.contracts import Outputs
from pipeline.manifest import EngineRecord, Manifest, ModelSource

LABELS = ("blue", "green", "red")

# The mean of each channel of a BGR picture, as logits: what is shown is what is predicted.
MEAN_COLOR = """
<ir_version: 10, opset_import: ["" : 18]>
mean_color (uint8[batch, 16, 16, 3] input) => (float[batch, 3] logits) {
    pixels = Cast <to = 1> (input)
    axes = Constant <value = int64[2] {1, 2}> ()
    means = ReduceMean <keepdims = 0> (pixels, axes)
    scale = Constant <value = float {0.05}> ()
    logits = Mul (means, scale)
}
"""


class FakeRunner:
    """A `Runner` whose one stream calls `work` on its input; `submit` is bounded as engines' is."""

    def __init__(
        self, work: Callable[[NDArray[Any]], NDArray[Any]], n_streams: int = 1, size: int = 16
    ) -> None:
        self.inputs = (TensorSpec("input", "uint8", ("batch", size, size, 3)),)
        self.outputs = (TensorSpec("logits", "float32", ("batch", 3)),)
        self.reuses_outputs = False
        self.n_streams = n_streams
        self.n_done = 0
        self._work = work
        self._pool = ThreadPoolExecutor(n_streams)
        self._slots = threading.BoundedSemaphore(2 * n_streams)

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> Outputs:
        return self.submit(inputs).result()

    def submit(self, inputs: Mapping[str, NDArray[Any]]) -> Future[Outputs]:
        self._slots.acquire()

        def run() -> Outputs:
            try:
                return {"logits": self._work(inputs["input"])}
            finally:
                self.n_done += 1
                self._slots.release()

        return self._pool.submit(run)

    def close(self) -> None:
        self._pool.shutdown()

    def __enter__(self) -> FakeRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ListSource:
    """Delivers what it is given, then ends; `before_read` may block or fail."""

    source_id = "list"
    color = "BGR"
    self_paced = False

    def __init__(
        self,
        items: Sequence[Any],
        *,
        live: bool = False,
        labels: Sequence[int] | None = None,
        before_read: Callable[[int], None] = lambda index: None,
    ) -> None:
        self.live = live
        self.fps = 30.0
        self.labels = LABELS
        self.notes: list[str] = []
        self.n_read = 0
        self._items = items
        self._labels = labels
        self._before_read = before_read

    def read(self) -> Delivered | None:
        self._before_read(self.n_read)
        if self.n_read == len(self._items):
            return None
        self.n_read += 1
        label = None if self._labels is None else self._labels[self.n_read - 1]
        return Delivered(self._items[self.n_read - 1], label)

    def close(self) -> None:
        pass


def solid(bgr: tuple[int, int, int], hw: tuple[int, int] = (24, 32)) -> NDArray[np.uint8]:
    """A picture of one colour, uint8 BGR."""
    return np.full((*hw, 3), bgr, np.uint8)


def write_bundle(
    path: Path, graph: str = MEAN_COLOR, labels: tuple[str, ...] = LABELS, num_classes: int | None = None
) -> Path:
    """A real bundle around a graph in ONNX text."""
    model = onnx.parser.parse_model(graph)
    with BundleWriter(path) as writer:
        writer.add_file("model.onnx", model.SerializeToString())
        writer.add_file("model.int8.onnx", model.SerializeToString())
        manifest = Manifest(
            name="mean_color",
            created_utc="2026-11-23T00:00:00Z",
            edgefold_version="0",
            tools={},
            target="cpu",
            precision="int8",
            model=ModelSource("mean_color", "none", None, num_classes or len(labels)),
            inputs=(TensorSpec("input", "uint8", ("batch", 16, 16, 3)),),
            outputs=(TensorSpec("logits", "float32", ("batch", 3)),),
            preprocess=PreprocessSpec(input_hw=(16, 16)),
            preprocess_folded=True,
            input_color="BGR",
            labels=labels,
            calibration=None,
            accuracy=None,
            stages=(),
            engine=EngineRecord("openvino", "model.int8.onnx", Fingerprint("openvino", "0", "cpu")),
            files={},
        )
        writer.commit(manifest)
    return path


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "mean-color")


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., Path]:
    return write_bundle


@pytest.fixture(scope="session")
def fake_runner() -> type[FakeRunner]:
    return FakeRunner


@pytest.fixture(scope="session")
def list_source() -> type[ListSource]:
    return ListSource
