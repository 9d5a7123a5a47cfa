"""ONNX Runtime on a CPU.

``latency``: one request at a time on every core. ``throughput``: one core a request and as many
requests as cores, since small convolutions do not fill several. Threads never spin between
operators: on a machine that also captures and draws, a spinning pool takes the cores it waits for
(measurements in ``docs/engines.md``). ``cache_dir`` is not used: a session takes well under a
second to make, and what ONNX Runtime can store is a graph, not kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from engines.base import (
    Arrays,
    CheckedRunner,
    available_cpus,
    check_options,
    fixed_batch_message,
    portable_artifact,
    reason,
)
from engines.fingerprint import make_fingerprint
from engines.model_file import read_model_bytes
from pipeline.artifacts import EngineArtifact, EngineOptions, Fingerprint, ModelArtifact, TensorSpec
from pipeline.contracts import EngineBackend, Runner
from pipeline.errors import EngineError

__all__ = ["BACKEND", "OnnxRuntimeBackend", "OnnxRuntimeRunner", "fp32_runner"]

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


class OnnxRuntimeBackend:
    """`pipeline.contracts.EngineBackend` for ONNX Runtime. The engine is the ONNX file: portable."""

    name = "onnxruntime"

    def build(self, model: ModelArtifact, out_dir: Path, options: EngineOptions) -> EngineArtifact:
        """Prove that ONNX Runtime takes the model; nothing is written.

        Raises:
            EngineError: ONNX Runtime refuses the model.
            IntegrityError: the model file is not the one described.
        """
        artifact = portable_artifact(model, self.name, self.fingerprint())
        self.load(artifact, options).close()
        return artifact

    def load(self, artifact: EngineArtifact, options: EngineOptions) -> Runner:
        """Make a session.

        Raises:
            EngineError: the artifact is another backend's, or ONNX Runtime refuses the model.
            IntegrityError: the file's SHA-256 is not the artifact's; nothing was parsed.
        """
        if artifact.backend != self.name:
            raise EngineError(f"this engine was built for {artifact.backend!r}, not for {self.name!r}")
        check_options(options)
        data = read_model_bytes(artifact.path, artifact.sha256)
        return _runner(data, artifact.path, options)

    def fingerprint(self) -> Fingerprint:
        """ONNX Runtime's version and this CPU."""
        return make_fingerprint(self.name, ort.__version__)


BACKEND: EngineBackend = OnnxRuntimeBackend()


def fp32_runner(path: Path, extra_outputs: Sequence[str] = ()) -> Runner:
    """A `pipeline.contracts.RunnerFactory`: the model in fp32, also returning intermediate tensors.

    Args:
        path: an fp32 ONNX file that the caller has just written, its weights perhaps in others beside it; a free
            batch dimension stays free.
        extra_outputs: names of ONNX tensors the graph computes; they follow the model's own outputs.

    Raises:
        EngineError: ONNX Runtime refuses the model, or it computes no tensor of such a name.
    """
    model = _load(path)
    n_own = len(model.graph.output)
    computed = {name for node in model.graph.node for name in node.output}
    unknown = [name for name in extra_outputs if name not in computed]
    if unknown:
        raise EngineError(f"model {path} has no tensor to expose: {', '.join(map(repr, unknown))}")
    declared = {output.name for output in model.graph.output}
    for name in dict.fromkeys(extra_outputs):
        if name not in declared:
            model.graph.output.add().name = name  # ONNX Runtime infers the rest
    return _runner(model.SerializeToString(), path, EngineOptions(), n_own_outputs=n_own)


def _load(path: Path) -> Any:
    """A model with the weights it keeps in other files."""
    import onnx

    try:
        return onnx.load_model(path)
    except Exception as error:
        raise EngineError(f"ONNX Runtime cannot read model {path}: {reason(error)}") from error


def _parse(data: bytes, path: Path) -> Any:
    import onnx

    try:
        return onnx.ModelProto.FromString(data)
    except Exception as error:
        raise EngineError(f"ONNX Runtime cannot read model {path}: {reason(error)}") from error


def _with_batch(data: bytes, path: Path, batch: int) -> bytes:
    """The model with the free first dimension of every input made `batch`."""
    model = _parse(data, path)
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in initializers]
    names = set()
    for value in inputs:
        dimensions = value.type.tensor_type.shape.dim
        if not dimensions:
            continue
        if dimensions[0].HasField("dim_value") and dimensions[0].dim_value != batch:
            raise EngineError(fixed_batch_message(path, dimensions[0].dim_value, batch))
        names.add(dimensions[0].dim_param)
        dimensions[0].dim_value = batch
    for value in model.graph.output:
        dimensions = value.type.tensor_type.shape.dim
        if dimensions and not dimensions[0].HasField("dim_value") and dimensions[0].dim_param in names:
            dimensions[0].dim_value = batch
    return bytes(model.SerializeToString())


def _runner(data: bytes, path: Path, options: EngineOptions, n_own_outputs: int | None = None) -> Runner:
    n_threads = options.threads or available_cpus()
    settings = ort.SessionOptions()
    settings.log_severity_level = 3  # errors; they are raised as well
    settings.inter_op_num_threads = 1
    n_streams = options.streams or (1 if options.mode == "latency" else n_threads)
    settings.intra_op_num_threads = max(1, n_threads // n_streams)
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if options.batch is not None:
        data = _with_batch(data, path, options.batch)
    try:
        session = ort.InferenceSession(data, settings, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise EngineError(f"ONNX Runtime cannot load model {path}: {reason(error)}") from error
    return OnnxRuntimeRunner(session, n_streams=n_streams, n_own_outputs=n_own_outputs)


class OnnxRuntimeRunner(CheckedRunner):
    """A session that may run several requests at once, each in a thread of its own."""

    def __init__(self, session: ort.InferenceSession, *, n_streams: int, n_own_outputs: int | None) -> None:
        """Use `session` from `n_streams` threads.

        Args:
            session: the session.
            n_streams: requests that run at the same time.
            n_own_outputs: how many of its outputs the model declares itself; ``None``: all.
        """
        outputs = session.get_outputs()
        super().__init__(
            "onnxruntime",
            [_spec(value) for value in session.get_inputs()],
            [_spec(value) for value in outputs],
            n_streams=n_streams,
            n_waiters=n_streams,
            n_checked_outputs=len(outputs) if n_own_outputs is None else n_own_outputs,
        )
        self._session: ort.InferenceSession | None = session

    def _infer(self, arrays: Arrays) -> Arrays:
        assert self._session is not None
        feeds = {spec.name: array for spec, array in zip(self._inputs, arrays, strict=True)}
        results: Arrays = self._session.run(None, feeds)
        return results

    def _start(self, arrays: Arrays) -> Callable[[], Arrays]:
        return lambda: self._infer(arrays)

    def _release(self) -> None:
        self._session = None


def _spec(value: Any) -> TensorSpec:
    if value.type not in _DTYPES:
        raise EngineError(f"tensor {value.name!r} is a {value.type}, which this engine does not exchange")
    shape = tuple(
        size if isinstance(size, int) else (size or ("batch" if index == 0 else f"dim{index}"))
        for index, size in enumerate(value.shape)
    )
    return TensorSpec(name=value.name, dtype=_DTYPES[value.type], shape=shape)
