"""OpenVINO on a CPU: the default engine.

Properties, and why (measurements in ``docs/engines.md``):

``INFERENCE_PRECISION_HINT = f32``
    On CPUs with bf16 arithmetic OpenVINO runs *fp32 graphs in bf16* unless told otherwise. An
    fp32 reference must be fp32, and the float remainder of an int8 graph is too small to gain.
``PERFORMANCE_HINT`` and ``NUM_STREAMS``
    ``latency``: one stream that has every core. ``throughput``: as many streams as OpenVINO
    thinks fit the threads.
    ``EngineOptions.streams`` sets their number in either mode; they share the threads.
``INFERENCE_NUM_THREADS``
    Only where the caller set it.
``LP_TRANSFORMS_MODE = NO``
    In `EMULATOR` only: Q/DQ is computed as written, rounding and then float32, instead of being turned into
    integer kernels. OpenVINO's kernels are made for Q/DQ on both inputs of an addition; a graph placed for
    TensorRT has one, and through them `inception_resnet_lite` comes out at 6 dB where ONNX Runtime and the
    emulation agree at 20 dB from fp32. `fp32_runner` says it of graphs whose weights are all in float, which have no
    integer kernels: looking for them is half the time of compiling.
"""

from __future__ import annotations

import functools
import io
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from engines.base import Arrays, CheckedRunner, check_options, fixed_batch_message, portable_artifact, reason
from engines.blob_cache import BlobCache, blob_key
from engines.fingerprint import make_fingerprint
from engines.model_file import read_model_bytes
from pipeline.artifacts import EngineArtifact, EngineOptions, Fingerprint, ModelArtifact, TensorSpec
from pipeline.contracts import EngineBackend, Runner
from pipeline.errors import EngineError

__all__ = ["BACKEND", "EMULATOR", "OpenVinoBackend", "OpenVinoRunner", "fp32_runner"]

_DEVICE = "CPU"


class OpenVinoBackend:
    """`pipeline.contracts.EngineBackend` for OpenVINO. The engine is the ONNX file: portable."""

    name = "openvino"

    def __init__(self, *, integer_kernels: bool = True) -> None:
        """Choose how Q/DQ is computed.

        Args:
            integer_kernels: by OpenVINO's int8 kernels; else as it is written, for the accuracy that the graph
                has on the engine it was made for.
        """
        self._integer_kernels = integer_kernels

    def build(self, model: ModelArtifact, out_dir: Path, options: EngineOptions) -> EngineArtifact:
        """Prove that OpenVINO compiles the model here; nothing is written but the cache.

        Raises:
            EngineError: OpenVINO refuses the model.
            IntegrityError: the model file is not the one described.
        """
        artifact = portable_artifact(model, self.name, self.fingerprint())
        self.load(artifact, options).close()
        return artifact

    def load(self, artifact: EngineArtifact, options: EngineOptions) -> Runner:
        """Compile the model, or import it from ``options.cache_dir``.

        Raises:
            EngineError: the artifact is another backend's, or OpenVINO refuses the model.
            IntegrityError: the file's SHA-256 is not the artifact's; nothing was parsed.
        """
        if artifact.backend != self.name:
            raise EngineError(f"this engine was built for {artifact.backend!r}, not for {self.name!r}")
        check_options(options)
        data = read_model_bytes(artifact.path, artifact.sha256)
        properties = compile_properties(options, integer_kernels=self._integer_kernels)
        if options.cache_dir is None:
            return OpenVinoRunner(_compile_bytes(data, artifact.path, options.batch, properties))
        cache = BlobCache(options.cache_dir)
        key = blob_key(artifact.sha256, self.fingerprint(), {"batch": options.batch, **properties})
        compiled = _import(cache, key, properties)
        if compiled is None:
            compiled = _compile_bytes(data, artifact.path, options.batch, properties)
            cache.put(key, compiled.export_model().getvalue())
        return OpenVinoRunner(compiled)

    def fingerprint(self) -> Fingerprint:
        """OpenVINO's full version and this CPU."""
        return make_fingerprint(self.name, ov.get_version())


BACKEND: EngineBackend = OpenVinoBackend()
EMULATOR: EngineBackend = OpenVinoBackend(integer_kernels=False)
"""Judges graphs with Q/DQ that were placed for another engine. Half precision is computed in float32."""


def fp32_runner(path: Path, extra_outputs: Sequence[str] = ()) -> Runner:
    """A `pipeline.contracts.RunnerFactory`: the model in fp32, also returning intermediate tensors.

    The outputs are views of OpenVINO's own buffers, valid until the next `infer`: the activations
    of a batch may be hundreds of megabytes, and calibration reads each once.

    Args:
        path: an fp32 ONNX file that the caller has just written, its weights perhaps in others beside it; a free
            batch dimension stays free.
        extra_outputs: names of ONNX tensors the graph computes; they follow the model's own outputs.

    Raises:
        EngineError: OpenVINO refuses the model, or it computes no tensor of such a name.
    """
    # By its path: OpenVINO maps the weights that lie in other files, and holds a second copy of bytes it is given.
    model = _read(path, path)
    properties = compile_properties(EngineOptions(), integer_kernels=_has_integer_weights(model))
    declared = {_output_name(port) for port in model.outputs}
    exposed = [name for name in dict.fromkeys(extra_outputs) if name not in declared]
    try:
        model.add_outputs(exposed)
    except Exception as error:
        raise EngineError(f"model {path} has no tensor to expose: {reason(error)}") from error
    return OpenVinoRunner(_compile(model, path, properties), exposed=exposed, reuse_outputs=True)


def compile_properties(options: EngineOptions, *, integer_kernels: bool = True) -> dict[str, str]:
    """What OpenVINO is told for `options`; the reasons are in the module's docstring."""
    properties = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": options.mode.upper()}
    if options.mode == "latency":
        properties["NUM_STREAMS"] = "1"
    if options.streams is not None:
        properties["NUM_STREAMS"] = str(options.streams)
    if options.threads is not None:
        properties["INFERENCE_NUM_THREADS"] = str(options.threads)
    if not integer_kernels:
        properties["LP_TRANSFORMS_MODE"] = "NO"
    return properties


@functools.cache
def _core() -> ov.Core:
    return ov.Core()


def _read(source: bytes | Path, path: Path) -> ov.Model:
    try:
        return _core().read_model(io.BytesIO(source) if isinstance(source, bytes) else source)
    except Exception as error:
        raise EngineError(f"OpenVINO cannot read model {path}: {reason(error)}") from error


def _compile(model: ov.Model, path: Path, properties: dict[str, str]) -> ov.CompiledModel:
    try:
        return _core().compile_model(model, _DEVICE, properties)
    except Exception as error:
        raise EngineError(f"OpenVINO cannot compile model {path}: {reason(error)}") from error


def _compile_bytes(
    data: bytes, path: Path, batch: int | None, properties: dict[str, str]
) -> ov.CompiledModel:
    model = _read(data, path)
    if batch is not None:
        _fix_batch(model, batch, path)
    return _compile(model, path, properties)


def _fix_batch(model: ov.Model, batch: int, path: Path) -> None:
    """Make the free first dimension of every input `batch`."""
    shapes = {}
    for port in model.inputs:
        shape = port.partial_shape
        if shape.rank.is_static and len(shape) and shape[0].is_dynamic:
            shape[0] = batch
        elif len(shape) and shape[0].get_length() != batch:
            raise EngineError(fixed_batch_message(path, shape[0].get_length(), batch))
        shapes[port] = shape
    try:
        model.reshape(shapes)
    except Exception as error:
        raise EngineError(f"model {path} cannot take batch {batch}: {reason(error)}") from error


def _has_integer_weights(model: ov.Model) -> bool:
    return any(
        node.get_type_name() == "Constant"
        and node.get_element_type() in (ov.Type.i8, ov.Type.u8)
        and len(node.get_output_shape(0)) > 1
        for node in model.get_ops()
    )


def _import(cache: BlobCache, key: str, properties: dict[str, str]) -> ov.CompiledModel | None:
    blob = cache.get(key)
    if blob is None:
        return None
    try:
        return _core().import_model(blob, _DEVICE, properties)
    except Exception:  # whole, yet not to this build's liking: as good as absent
        cache.discard(key)
        return None


class OpenVinoRunner(CheckedRunner):
    """A compiled model with a pool of infer requests.

    `infer` has a request of its own; `submit` starts a free one of the pool at once, and one thread
    waits for them in the order of submission.
    """

    def __init__(
        self, compiled: ov.CompiledModel, *, exposed: Sequence[str] = (), reuse_outputs: bool = False
    ) -> None:
        """Create the requests.

        Args:
            compiled: the compiled model; its last outputs are `exposed`.
            exposed: names of the tensors exposed besides the model's own outputs.
            reuse_outputs: let `infer` return views of OpenVINO's buffers.
        """
        n_own = len(compiled.outputs) - len(exposed)
        names = [*(_output_name(port) for port in compiled.outputs[:n_own]), *exposed]
        n_streams = int(compiled.get_property("NUM_STREAMS"))
        super().__init__(
            "openvino",
            [_spec(port, port.get_node().get_friendly_name()) for port in compiled.inputs],
            [_spec(port, name) for port, name in zip(compiled.outputs, names, strict=True)],
            n_streams=n_streams,
            n_waiters=1,
            n_checked_outputs=n_own,
        )
        self._reuse_outputs = reuse_outputs
        self._compiled: ov.CompiledModel | None = compiled
        self._request: ov.InferRequest | None = compiled.create_infer_request()
        # Made at the first `submit`: whoever only infers does not pay for their buffers.
        self._idle: deque[ov.InferRequest] = deque()
        self._n_requests_left = 2 * n_streams

    @property
    def reuses_outputs(self) -> bool:
        """Whether the next `infer` overwrites what the last one returned."""
        return self._reuse_outputs

    def _infer(self, arrays: Arrays) -> Arrays:
        assert self._request is not None
        results = self._request.infer(
            dict(enumerate(arrays)), share_inputs=True, share_outputs=self._reuse_outputs
        )
        return [results[index] for index in range(len(self._outputs))]

    def _start(self, arrays: Arrays) -> Callable[[], Arrays]:
        assert self._compiled is not None
        if self._n_requests_left and not self._idle:
            self._n_requests_left -= 1
            self._idle.append(self._compiled.create_infer_request())
        request = self._idle.popleft()
        try:
            request.start_async(dict(enumerate(arrays)), share_inputs=True)
        except BaseException:
            self._idle.append(request)
            raise

        def wait() -> Arrays:
            try:
                request.wait()
                return [_copy(request, index) for index in range(len(self._outputs))]
            finally:
                self._idle.append(request)

        return wait

    def _release(self) -> None:
        self._idle.clear()
        self._request = None
        self._compiled = None


def _copy(request: ov.InferRequest, index: int) -> NDArray[Any]:
    array: NDArray[Any] = np.array(request.get_output_tensor(index).data)
    return array


def _output_name(port: Any) -> str:
    """The ONNX name of an output: a port also lists the names of tensors that were folded into it."""
    name, _, _ = port.get_node().get_friendly_name().partition("/sink_port_")
    return name if name in port.get_names() else str(port.get_any_name())


def _spec(port: Any, name: str) -> TensorSpec:
    shape = tuple(
        dimension.get_length() if dimension.is_static else ("batch" if index == 0 else f"dim{index}")
        for index, dimension in enumerate(port.partial_shape)
    )
    return TensorSpec(name=name, dtype=np.dtype(port.element_type.to_dtype()).name, shape=shape)
