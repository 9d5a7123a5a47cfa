"""Reading and writing ONNX files: contained, atomic, digested. Imports no torch.

A model file is untrusted input. Its tensors may name other files ("external data"), and a loader that
follows such a name blindly reads whatever the file's author wanted: every location is therefore
checked before any of them is opened.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]

from pipeline.artifacts import TensorSpec
from pipeline.digest import file_sha256
from pipeline.errors import ExportError, IntegrityError, ModelSpecError
from pipeline.whole_files import whole_file

__all__ = [
    "file_sha256",
    "interface",
    "load_model",
    "load_proto",
    "opset_of",
    "save_for_runner",
    "save_model",
    "unload_tensors",
    "unload_weights",
]

_PROTOBUF_LIMIT_BYTES = 2**31 - 1
_LARGE_BYTES = 4096
"""Tensors from here on are copied from where they are straight into a file, not into a message first."""
_GRAPH, _INITIALIZER, _RAW_DATA = (number << 3 | 2 for number in (7, 5, 9))
"""Keys of ``ModelProto.graph``, ``GraphProto.initializer`` and ``TensorProto.raw_data``: field number, and 2 for
what has a length (protobuf.dev/programming-guides/encoding)."""


def load_proto(path: Path) -> onnx.ModelProto:
    """Parse an ONNX file together with its external data.

    Raises:
        ModelSpecError: no such file, or it is not an ONNX model.
        IntegrityError: external data lies outside the model's folder or behind a link.
    """
    try:
        proto = onnx.load_model(path, load_external_data=False)
    except OSError as error:
        raise ModelSpecError(f"cannot read {path}: {error.strerror or error}") from error
    except DecodeError as error:
        raise ModelSpecError(f"{path} is not an ONNX model: {error}") from error
    if not proto.HasField("graph") or not proto.graph.node:
        raise ModelSpecError(f"{path} is not an ONNX model: it holds no graph")
    external = list(_external_tensors(proto))
    for tensor in external:
        _check_location(tensor, path.parent)
    if external:
        try:
            onnx.load_external_data_for_model(proto, str(path.parent))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise IntegrityError(f"external data of {path} cannot be read: {error}") from error
    for tensor in _external_tensors(proto):
        raise IntegrityError(
            f"tensor {tensor.name!r} of {path} keeps its data in another file where the ONNX loader does not "
            "look for it; save the model as one file"
        )
    return proto


def load_model(path: Path) -> ir.Model:
    """As `load_proto`, as an IR model."""
    return ir.serde.deserialize_model(load_proto(path))


def save_model(model: ir.Model, path: Path) -> str:
    """Write `model` as one self-contained file, all or nothing; its weights are not copied in memory on the way.

    Returns:
        The file's SHA-256 (hex).

    Raises:
        ExportError: the model is over protobuf's limit of 2 GiB, or the folder cannot be written.
    """
    _check_size(value.const_value for value in model.graph.initializers.values())
    digest = hashlib.sha256()
    try:
        with whole_file(path) as file:
            for piece in _serialized(model):
                digest.update(piece)
                file.write(piece)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from error
    return digest.hexdigest()


def unload_tensors(tensors: Sequence[ir.TensorProtocol], path: Path) -> list[ir.ExternalTensor]:
    """Write tensors to a file of their own, from which they are mapped; one after the other where they are lazy.

    However many graphs of the file's folder `save_for_runner` writes then share them.
    """
    path.unlink(missing_ok=True)  # what is still mapped of a file before it stays as it was
    return ir.external_data.convert_tensors_to_external(tensors, path.parent, path.name)


def unload_weights(model: ir.Model, path: Path) -> None:
    """As `unload_tensors`, for those large constants of `model` that are not unloaded yet, in place."""
    large = [
        value
        for value in model.graph.initializers.values()
        if _is_large(value.const_value) and not isinstance(value.const_value, ir.ExternalTensor)
    ]
    tensors = [value.const_value for value in large if value.const_value is not None]
    for value, tensor in zip(large, unload_tensors(tensors, path), strict=True):
        value.const_value = tensor


def save_for_runner(model: ir.Model, path: Path) -> None:
    """Write a graph for a `pipeline.contracts.RunnerFactory`: unloaded tensors stay where they are.

    Args:
        model: one whose unloaded tensors lie in the folder of `path`.
        path: replaced; no runner may still have it open.

    Raises:
        ExportError: what is not unloaded is over protobuf's limit of 2 GiB, or the folder cannot be written.
    """
    constants = [value.const_value for value in model.graph.initializers.values()]
    _check_size(tensor for tensor in constants if not isinstance(tensor, ir.ExternalTensor))
    try:
        path.write_bytes(ir.serde.serialize_model(model).SerializeToString())
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from error


def interface(model: ir.Model) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and the outputs of `model`."""
    return tuple(map(_spec, model.graph.inputs)), tuple(map(_spec, model.graph.outputs))


def opset_of(model: ir.Model) -> int:
    """The version of the standard operator set that `model` uses."""
    return int(model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx", 0)))


def _check_size(tensors: Iterable[ir.TensorProtocol | None]) -> None:
    # Of strings, which have no size in bytes before they are encoded, a model has a few names.
    n_bytes = sum(
        tensor.nbytes for tensor in tensors if tensor is not None and tensor.dtype != ir.DataType.STRING
    )
    if n_bytes >= _PROTOBUF_LIMIT_BYTES:
        raise ExportError(
            f"the weights take {n_bytes} bytes; one ONNX file holds at most {_PROTOBUF_LIMIT_BYTES}: "
            "use a smaller model"
        )


def _is_large(tensor: ir.TensorProtocol | None) -> bool:
    return tensor is not None and tensor.dtype != ir.DataType.STRING and tensor.nbytes >= _LARGE_BYTES


def _serialized(model: ir.Model) -> Iterator[bytes]:
    """The bytes of a ``ModelProto``, the graph at its end and the initializers at the graph's.

    Protobuf would hold every weight twice more, in the message and in its serialized form, and copy it each time.
    """
    light = model.clone()
    data: dict[str, ir.TensorProtocol] = {}
    for name, value in light.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and _is_large(tensor):
            data[name] = tensor
            value.const_value = ir.ExternalTensor(
                "",
                None,
                None,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=name,
                doc_string=tensor.doc_string,
                metadata_props=dict(tensor.metadata_props),
            )
    proto = ir.serde.serialize_model(light)
    initializers = list(proto.graph.initializer)
    del proto.graph.initializer[:]
    heads: list[bytes] = []
    for tensor in initializers:
        n_bytes = data[tensor.name].nbytes if tensor.name in data else None
        if n_bytes is not None:
            tensor.ClearField("data_location")
            tensor.ClearField("external_data")
        fields = tensor.SerializeToString()
        if n_bytes is not None:
            fields += _key(_RAW_DATA, n_bytes)
        heads.append(_key(_INITIALIZER, len(fields) + (n_bytes or 0)) + fields)
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    n_graph = len(graph) + sum(map(len, heads)) + sum(tensor.nbytes for tensor in data.values())
    yield proto.SerializeToString() + _key(_GRAPH, n_graph) + graph
    for tensor, head in zip(initializers, heads, strict=True):
        yield head
        if tensor.name in data:
            yield data[tensor.name].tobytes()


def _key(key: int, length: int) -> bytes:
    """A field's key and the length of what follows, a base-128 varint."""
    encoded = bytearray([key])
    while length > 0x7F:
        encoded.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*encoded, length])


def _spec(value: ir.Value) -> TensorSpec:
    if value.name is None or value.dtype is None or value.shape is None:
        raise ExportError(
            f"{value.name!r} has no declared type or shape; the model must declare its interface"
        )
    shape: list[int | str] = []
    for axis, dim in enumerate(value.shape):
        if isinstance(dim, int):
            shape.append(dim)
        else:
            shape.append(dim.value or f"{value.name}_{axis}")
    return TensorSpec(value.name, value.dtype.numpy().name, tuple(shape))


def _external_tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """Every tensor anywhere in `message` (subgraphs, attributes, functions) that names a file."""
    if isinstance(message, onnx.TensorProto):
        if message.data_location == onnx.TensorProto.EXTERNAL or message.external_data:
            yield message
        return
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for child in [value] if isinstance(value, Message) else value:
            yield from _external_tensors(child)


def _check_location(tensor: onnx.TensorProto, folder: Path) -> None:
    """Refuse a location that leaves `folder` or that is not a plain file of its own.

    A hard link is refused as well: nothing tells it from the file, perhaps a secret one, it was made of.
    """
    location = {entry.key: entry.value for entry in tensor.external_data}.get("location", "")
    parts = PurePosixPath(location).parts
    what = f"external data {location!r} of tensor {tensor.name!r}"
    if not location or PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor:
        raise IntegrityError(f"{what} is not a relative path; nothing was opened")
    if ".." in parts or "\\" in location or "\0" in location:
        raise IntegrityError(f"{what} leaves the model's folder; nothing was opened")
    place = folder
    for part in parts:
        place = place / part
        try:
            status = os.lstat(place)
        except OSError as error:
            raise IntegrityError(f"{what} is missing: {error.strerror}") from error
        if stat.S_ISLNK(status.st_mode):
            raise IntegrityError(f"{what} is a symbolic link; nothing was opened; copy the file instead")
    if not stat.S_ISREG(status.st_mode):
        raise IntegrityError(f"{what} is not a regular file; nothing was opened")
    if status.st_nlink != 1:
        raise IntegrityError(
            f"{what} has {status.st_nlink} hard links; nothing was opened; copy the file, so that it is the "
            "model's own"
        )
