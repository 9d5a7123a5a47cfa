"""A ``tensorrt`` module whose plans are ONNX files and whose device is a `FakeDevice`.

`execute_async_v3` enqueues work that, when the stream runs it, reads the inputs at the addresses set, computes the graph
with ONNX's reference evaluator and writes the outputs. It refuses what TensorRT refuses: an address or a
shape not set, a shape outside of the profile, a capture before a plain run of the same shapes, a context used on two
streams, no CUDA context in the thread. ``events`` records the deaths of its objects and whether the CUDA context was
current then.
"""

from __future__ import annotations

import enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from fake_device import FakeDevice
from onnx.reference import ReferenceEvaluator

from engines.base import check_options, portable_artifact
from engines.model_file import read_model_bytes
from engines.tensorrt.api import TensorRtApi
from engines.tensorrt.runner import TensorRtRunner
from pipeline.artifacts import EngineArtifact, EngineOptions, Fingerprint, ModelArtifact
from pipeline.errors import EngineError

Enum = enum.Enum
DataType = Enum("DataType", "FLOAT HALF BF16 INT8 INT32 INT64 BOOL UINT8")
TensorFormat = Enum("TensorFormat", "LINEAR CHW32")
TensorLocation = Enum("TensorLocation", "DEVICE HOST")
TensorIOMode = Enum("TensorIOMode", "NONE INPUT OUTPUT")
CudaGraphStrategy = Enum("CudaGraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE")
_DTYPES = {
    onnx.TensorProto.FLOAT: (DataType.FLOAT, np.float32),
    onnx.TensorProto.UINT8: (DataType.UINT8, np.uint8),
    onnx.TensorProto.BFLOAT16: (DataType.BF16, np.uint16),
}


class FakeLogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None:
        self.ready = True  # a subclass that forgets to call this is refused by the real one

    def log(self, severity: int, message: str) -> None:
        raise NotImplementedError


class FakeLibrary:
    """One library on one device; `module` is what ``import tensorrt`` gives."""

    def __init__(
        self,
        device: FakeDevice,
        *,
        rtx: bool = False,
        profiles: tuple[tuple[int, int, int], ...] = ((1, 4, 8),),
        refuses_capture: bool = False,
        n_contexts: int = 99,
    ) -> None:
        self.device, self.profiles, self.refuses_capture = device, profiles, refuses_capture
        self.contexts_left = n_contexts
        self.events: list[str] = []
        self.contexts: list[FakeContext] = []
        self.formats: dict[str, Any] = {}
        self.locations: dict[str, Any] = {}
        self.fail_next = ""
        self.fault_next = 0
        self.caches: list[FakeRuntimeCache] = []
        engine = type(
            "ICudaEngine", (FakeEngine,), {"create_runtime_config": FakeEngine.runtime_config} if rtx else {}
        )
        self.engine_class = engine
        self.module = SimpleNamespace(
            ILogger=FakeLogger,
            Runtime=lambda logger: FakeRuntime(self, logger),
            ICudaEngine=engine,
            IRuntimeConfig=FakeRuntimeConfig if rtx else type("IRuntimeConfig", (), {}),
            DataType=DataType,
            TensorFormat=TensorFormat,
            TensorLocation=TensorLocation,
            TensorIOMode=TensorIOMode,
            CudaGraphStrategy=CudaGraphStrategy,
        )

    @property
    def api(self) -> TensorRtApi:
        if hasattr(self.module.IRuntimeConfig, "create_runtime_cache"):
            return TensorRtApi("tensorrt_rtx", self.module, (1, 7, 1), "1.7.1")
        return TensorRtApi("tensorrt", self.module, (10, 16, 2), "10.16.2")

    def in_context(self) -> bool:
        """Whether the calling thread has a CUDA context."""
        return self.device.depth() > 0

    def has_stream(self, handle: int) -> bool:
        return handle in self.device.streams

    def is_capturing(self, handle: int) -> bool:
        return self.device.streams[handle].tape is not None

    def fault(self) -> int:
        """The sticky code that the device has failed with, or 0."""
        if self.fault_next:
            self.device.sticky, self.fault_next = self.fault_next, 0
        return self.device.sticky

    def make_context(self, engine: FakeEngine, config: Any) -> FakeContext:
        return FakeContext(engine, config)

    def died(self, what: str) -> None:
        self.events.append(f"{what}{'' if self.in_context() else ' outside of the context'}")
        self.device.log.append(f"{what} destroyed")


class FakeRuntime:
    def __init__(self, library: FakeLibrary, logger: FakeLogger) -> None:
        assert logger.ready
        self.library, self.logger = library, logger

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        if not self.library.in_context():
            self.logger.log(FakeLogger.ERROR, "no CUDA context")
            return None
        try:
            model = onnx.load_from_string(plan)
            onnx.checker.check_model(model)
        except Exception:
            self.logger.log(FakeLogger.WARNING, "a warning")
            self.logger.log(FakeLogger.ERROR, "Serialization (Serialization assertion magicTagRead failed.)")
            return None
        return self.library.engine_class(self.library, model, self.logger)

    def __setattr__(self, name: str, value: Any) -> None:
        assert name != "engine_host_code_allowed", "a switch for code execution"
        super().__setattr__(name, value)

    def __del__(self) -> None:
        self.library.died("runtime")


class FakeEngine:
    """An ``ICudaEngine`` of an ONNX model."""

    def __init__(self, library: FakeLibrary, model: onnx.ModelProto, logger: FakeLogger) -> None:
        self.library, self.model, self.logger = library, model, logger
        newer = onnx.ModelProto()
        newer.CopyFrom(model)
        newer.opset_import[
            0
        ].version = 21  # the evaluator's oldest DequantizeLinear; the same for these graphs
        self.evaluator = ReferenceEvaluator(newer)
        self.values = {value.name: value for value in (*model.graph.input, *model.graph.output)}
        self.names = list(self.values)
        self.num_io_tensors = len(self.names)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.library.profiles)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> Any:
        is_input = any(value.name == name for value in self.model.graph.input)
        return TensorIOMode.INPUT if is_input else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return _DTYPES[self.values[name].type.tensor_type.elem_type][0]

    def get_tensor_format(self, name: str) -> Any:
        return self.library.formats.get(name, TensorFormat.LINEAR)

    def get_tensor_location(self, name: str) -> Any:
        return self.library.locations.get(name, TensorLocation.DEVICE)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        dims = self.values[name].type.tensor_type.shape.dim
        return tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        rest = self.get_tensor_shape(name)[1:]
        return [(batch, *rest) for batch in self.library.profiles[profile]]

    def runtime_config(self) -> FakeRuntimeConfig:
        return FakeRuntimeConfig(self.library)

    def create_execution_context(self, config: Any = None) -> FakeContext | None:
        if self.library.contexts_left == 0:
            self.logger.log(FakeLogger.ERROR, "Error Code 2: OutOfMemory (Requested size was 123 bytes.)")
            return None
        self.library.contexts_left -= 1
        context = self.library.make_context(self, config)
        self.library.contexts.append(context)
        return context

    def __del__(self) -> None:
        self.library.died("engine")


class FakeContext:
    """An ``IExecutionContext``."""

    def __init__(self, engine: FakeEngine, config: Any) -> None:
        self.engine, self.library, self.config = engine, engine.library, config
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.profile = 0
        self.warm = False
        self.calls: list[str] = []
        self.stream = 0

    def _error(self, message: str) -> bool:
        self.engine.logger.log(FakeLogger.ERROR, f"IExecutionContext: {message}")
        return False

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self.engine.values or not isinstance(address, int) or address % 256:
            return self._error(f"invalid address of {name}")
        self.addresses[name] = address
        return True

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile, self.warm = profile, False
        self.shapes.clear()
        return self.library.has_stream(stream) and profile < len(self.library.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.library.profiles[self.profile]
        if not low <= shape[0] <= high or shape[1:] != self.engine.get_tensor_shape(name)[1:]:
            return self._error(f"dimensions {shape} of {name} are outside of the profile")
        self.calls.append(f"shape {shape[0]}")
        self.warm = self.warm and self.shapes.get(name) == shape
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shape = self.engine.get_tensor_shape(name)
        batch = next((one[0] for one in self.shapes.values()), -1)
        return (batch if shape[0] < 0 else shape[0], *shape[1:])

    def execute_async_v3(self, handle: int) -> bool:
        fault = self.library.fault()
        if fault:
            return self._error(f"Cuda Runtime (an illegal memory access was encountered, {fault})")
        if not self.library.has_stream(handle) or not self.library.in_context():
            return self._error("invalid stream")
        if self.stream not in (0, handle):
            return self._error("in use on another stream")
        self.stream = handle
        if self.library.fail_next:
            message, self.library.fail_next = self.library.fail_next, ""
            return self._error(message)
        shapes = {name: self.get_tensor_shape(name) for name in self.engine.names}
        if any(name not in self.addresses for name in self.engine.names):
            return self._error("an address is not set")
        if any(size < 0 for shape in shapes.values() for size in shape):
            return self._error("an input shape is not set")
        if self.library.is_capturing(handle):
            self.calls.append("captured")
            if self.library.refuses_capture or not self.warm:
                return self._error("operation not permitted when stream is capturing")
        else:
            self.calls.append("executed")
        self.warm = True
        return self.enqueue(handle, shapes)

    def enqueue(self, handle: int, shapes: dict[str, tuple[int, ...]]) -> bool:
        """Put the engine's work on the stream; everything has been checked."""
        device, addresses = self.library.device, dict(self.addresses)
        names = [value.name for value in self.engine.model.graph.input]

        def at(name: str) -> np.ndarray:
            dtype = np.dtype(_DTYPES[self.engine.values[name].type.tensor_type.elem_type][1])
            n_bytes = int(np.prod(shapes[name])) * dtype.itemsize
            return device.view(addresses[name], n_bytes).view(dtype).reshape(shapes[name])

        def work() -> None:
            with np.errstate(all="ignore"):
                results = self.engine.evaluator.run(None, {name: at(name).copy() for name in names})
            for value, result in zip(self.engine.model.graph.output, results, strict=True):
                at(value.name)[...] = result

        device.streams[handle].enqueue(work)
        return True

    def __del__(self) -> None:
        self.library.died("context")


class FakeRuntimeConfig:
    cuda_graph_strategy = CudaGraphStrategy.DISABLED

    def __init__(self, library: FakeLibrary) -> None:
        self.library = library
        self.cache: FakeRuntimeCache | None = None

    def create_runtime_cache(self) -> FakeRuntimeCache:
        self.library.caches.append(FakeRuntimeCache())
        return self.library.caches[-1]

    def set_runtime_cache(self, cache: FakeRuntimeCache) -> bool:
        self.cache = cache
        return True


class FakeRuntimeCache:
    def __init__(self) -> None:
        self.content = b"compiled now"
        self.accepts = b"compiled"

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(self.accepts):
            return False
        self.content = blob
        return True

    def serialize(self) -> memoryview:
        return memoryview(self.content)


class FakeTensorRtBackend:
    """An `EngineBackend` over the fake library, for the contract tests: its plan is the ONNX file itself."""

    name = "tensorrt"

    def build(self, model: ModelArtifact, out_dir: Path, options: EngineOptions) -> EngineArtifact:
        artifact = portable_artifact(model, self.name, self.fingerprint())
        self.load(artifact, options).close()
        return artifact

    def load(self, artifact: EngineArtifact, options: EngineOptions) -> TensorRtRunner:
        if artifact.backend != self.name:
            raise EngineError(f"this engine was built for {artifact.backend!r}, not for {self.name!r}")
        check_options(options)
        plan = read_model_bytes(artifact.path, artifact.sha256)
        device = FakeDevice()
        return TensorRtRunner(plan, FakeLibrary(device).api, options, path=artifact.path, device=device)

    def fingerprint(self) -> Fingerprint:
        return Fingerprint(self.name, "10.16.2", "Fake GPU")
