"""A tiny real bundle, an engine that does what a test tells it, and sources made of lists."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest
from numpy.typing import NDArray

from apps.streaming.config import CaptureLimits, SourceConfig
from apps.streaming.contracts import CapturedFrame, SourceState, SourceStatus
from apps.streaming.engine_slot import EngineSlot
from apps.streaming.frames import as_image, defect
from apps.streaming.loading import LoadedEngine
from apps.streaming.metrics import StreamMetrics
from apps.streaming.scheduling import RuntimeFeed
from apps.streaming.sources import Delivered, ModelClasses, SourceUri, open_source
from pipeline.artifacts import Fingerprint, Frame, PreprocessSpec, TensorSpec
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


class ThreadFeed:
    """A `Feed` over a source that is read in a thread, as simple as can be: bounded, paced, never restarted.

    `n_out` are the frames that were taken and not released.
    """

    def __init__(
        self,
        source: Any,
        policy: str,
        metrics: StreamMetrics,
        *,
        pace_fps: float | None = None,
        name: str = "",
    ) -> None:
        self.source_id = name or source.source_id
        self.live, self.policy, self.labels, self.notes = source.live, policy, source.labels, source.notes
        self.n_out = 0
        self.max_out = 0
        self._source = source
        self._metrics = metrics
        self._pace_s = 0.0 if pace_fps is None else 1.0 / pace_fps
        self._waiting: deque[CapturedFrame] = deque()
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"test-feed-{self.source_id}", daemon=True)

    def start(self, on_ready: Callable[[], None]) -> None:
        self._on_ready = on_ready
        self._thread.start()

    def take(self) -> CapturedFrame | None:
        with self._changed:
            if not self._waiting:
                return None
            self._changed.notify_all()
            self.n_out += 1
            self.max_out = max(self.max_out, self.n_out)
            return self._waiting.popleft()

    @property
    def exhausted(self) -> bool:
        with self._changed:
            return self._ended and not self._waiting

    def status(self) -> SourceStatus:
        state = SourceState.ENDED if self._ended else SourceState.LIVE
        return SourceStatus(
            self.source_id, state, 0, None, self._source.fps, None, None, restarts=0, stalls=0, frozen=False
        )

    def failure(self) -> Exception | None:
        return self._failure

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            for _ in self._waiting:
                self._metrics.frame_dropped("stopped")
            self._waiting.clear()
        if self._thread.ident is not None:
            self._thread.join(2)
            if not self._thread.is_alive():
                self._source.close()

    def _release(self) -> None:
        with self._changed:
            self.n_out -= 1

    def _run(self) -> None:
        try:
            self._read_all()
        except Exception as error:
            self._failure = error
        with self._changed:
            self._ended = True
        self._on_ready()

    def _read_all(self) -> None:
        index, due_s = 0, time.monotonic()
        while not self._closed:
            started_s = time.monotonic()
            delivered = self._source.read()
            if delivered is None:
                return
            self._metrics.frame_read()
            index += 1
            reason = defect(delivered.pixels)
            if reason is not None:
                self._metrics.frame_dropped(reason)
                continue
            capture_s = time.monotonic() - started_s
            due_s = max(due_s + self._pace_s, time.monotonic() - self._pace_s)
            time.sleep(max(0.0, due_s - time.monotonic()) if self._pace_s else 0.0)
            image, pixel_format = as_image(delivered.pixels, self._source.color, delivered.yuv)
            now_ns = time.monotonic_ns()
            frame = Frame(
                image, pixel_format, self.source_id, index - 1, now_ns, delivered.label, delivered.yuv
            )
            self._put(CapturedFrame(frame, self._release, capture_s))

    def _put(self, captured: CapturedFrame) -> None:
        with self._changed:
            if self.policy == "every":
                self._changed.wait_for(lambda: self._closed or len(self._waiting) < 4)
            elif self._waiting:
                self._waiting.clear()
                self._metrics.frame_dropped("newer frame")
            if self._closed:
                self._metrics.frame_dropped("stopped")
                return
            self._waiting.append(captured)
        self._on_ready()


def open_thread_feed(
    source: SourceConfig, uri: SourceUri, classes: ModelClasses, limits: CaptureLimits, metrics: StreamMetrics
) -> ThreadFeed:
    """What the capture package does, without its processes."""
    opened = open_source(uri, classes, source.fps)
    policy = source.policy or ("newest" if opened.live else "every")
    paced = not opened.self_paced and (opened.live or policy == "newest" or source.fps is not None)
    return ThreadFeed(opened, policy, metrics, pace_fps=opened.fps if paced else None, name=source.name or "")


def copy_pixels(frame: Frame, row: NDArray[Any]) -> None:
    row[...] = frame.image


class ArrayFeeder:
    """A `Feeder` whose frames are written by `prepare`, and its batch."""

    def __init__(
        self, runner: Any, prepare: Callable[[Frame, NDArray[Any]], None], shape: tuple[int, ...]
    ) -> None:
        self._runner, self._prepare, self._array = runner, prepare, np.empty(shape, runner.inputs[0].dtype)

    def new_batch(self) -> ArrayFeeder:
        return ArrayFeeder(self._runner, self._prepare, self._array.shape)

    def engine_input(self, frame: Frame) -> NDArray[Any]:
        self.put(0, frame)
        return self._array[:1].copy()

    def put(self, index: int, frame: Frame) -> None:
        self._prepare(frame, self._array[index])

    def submit(self, n_images: int) -> Future[Outputs]:
        return self._runner.submit({self._runner.inputs[0].name: self._array[:n_images]})


def fake_engine(
    runner: Any,
    *,
    labels: tuple[str, ...] = LABELS,
    prepare: Callable[[Frame, NDArray[Any]], None] | None = None,
    max_batch: int = 1,
) -> LoadedEngine:
    """A loaded engine around a fake runner; its bundle is only a name."""

    size = runner.inputs[0].shape[1]
    bundle: Any = type("NamedBundle", (), {"path": Path("fake")})()
    return LoadedEngine(
        bundle=bundle,
        digest="0" * 12,
        runner=runner,
        engine="fake",
        precision="int8",
        file="model.onnx",
        classes=ModelClasses(labels, len(labels)),
        feeder=ArrayFeeder(runner, prepare or copy_pixels, (max_batch, size, size, 3)),
        row_shape=(size, size, 3),
        max_batch=max_batch,
    )


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


@pytest.fixture(scope="session")
def thread_feed() -> type[ThreadFeed]:
    return ThreadFeed


@pytest.fixture(scope="session")
def open_feed() -> Callable[..., ThreadFeed]:
    return open_thread_feed


@pytest.fixture(scope="session")
def engine_around() -> Callable[..., LoadedEngine]:
    return fake_engine


@pytest.fixture(scope="session")
def feeds_of() -> Callable[..., list[RuntimeFeed]]:
    """Feeds over sources, each with its metrics."""

    def make(sources: Sequence[Any], policy: str = "every", **options: Any) -> list[RuntimeFeed]:
        made = []
        for index, source in enumerate(sources):
            metrics = StreamMetrics()
            name = source.source_id if len(sources) == 1 else f"camera-{index}"
            made.append(RuntimeFeed(ThreadFeed(source, policy, metrics, name=name, **options), metrics))
        return made

    return make


@pytest.fixture(scope="session")
def slot_around() -> Callable[..., EngineSlot]:
    return lambda *arguments, **options: EngineSlot(fake_engine(*arguments, **options))
